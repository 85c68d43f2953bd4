"""The gradient's share in the sharpest directions of the loss, live.

A Lightning callback, `SubspaceMonitor`, logs it during training; `measure_subspace` measures it once.

Public names are loaded when they are first used (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_subspace.callbacks.monitor import SubspaceMonitor as SubspaceMonitor
    from lightning_subspace.callbacks.projection import SubspaceProjection as SubspaceProjection
    from lightning_subspace.callbacks.start import StartWhenAligned as StartWhenAligned
    from lightning_subspace.curvature.selection import CheckError as CheckError
    from lightning_subspace.data.micro_batch import SampleError as SampleError
    from lightning_subspace.linalg import EigshResult as EigshResult
    from lightning_subspace.linalg import Outcome as Outcome
    from lightning_subspace.linalg import eigsh as eigsh
    from lightning_subspace.loss.loss_function import LossError as LossError
    from lightning_subspace.measurements.activation_spectrum import ActivationSpectrum as ActivationSpectrum
    from lightning_subspace.measurements.base import Measurement as Measurement
    from lightning_subspace.measurements.base import Needs as Needs
    from lightning_subspace.measurements.base import Probe as Probe
    from lightning_subspace.measurements.critical_sharpness import CriticalSharpness as CriticalSharpness
    from lightning_subspace.measurements.density import Density as Density
    from lightning_subspace.measurements.density import Trace as Trace
    from lightning_subspace.measurements.gradient import Chi as Chi
    from lightning_subspace.measurements.layers import Layers as Layers
    from lightning_subspace.measurements.loss_change import LossChange as LossChange
    from lightning_subspace.measurements.matrices import Matrices as Matrices
    from lightning_subspace.measurements.noise import BatchSharpness as BatchSharpness
    from lightning_subspace.measurements.noise import GradientNoise as GradientNoise
    from lightning_subspace.measurements.noise_scale import NoiseScale as NoiseScale
    from lightning_subspace.measurements.overlap import Control as Control
    from lightning_subspace.measurements.prospect import Prospect as Prospect
    from lightning_subspace.measurements.second_loss import SecondLoss as SecondLoss
    from lightning_subspace.measurements.slices import Slices as Slices
    from lightning_subspace.measurements.spectral_sharpness import SpectralSharpness as SpectralSharpness
    from lightning_subspace.measurements.stability import Stability as Stability
    from lightning_subspace.measurements.step import Step as Step
    from lightning_subspace.measurements.step import StepCurvature as StepCurvature
    from lightning_subspace.measurements.update_spectrum import UpdateSpectrum as UpdateSpectrum
    from lightning_subspace.parallel.ranks import PeerError as PeerError
    from lightning_subspace.probe.entries import CheckpointError as CheckpointError
    from lightning_subspace.probe.history import read_history as read_history
    from lightning_subspace.probe.measure import measure_subspace as measure_subspace
    from lightning_subspace.state.signals import SignalError as SignalError
    from lightning_subspace.subspace.loss_slices import LossSlices as LossSlices
    from lightning_subspace.subspace.record import Record as Record
    from lightning_subspace.subspace.record import to_rows as to_rows
    from lightning_subspace.subspace.room import NoRoomError as NoRoomError
    from lightning_subspace.subspace.spectral_density import SpectralDensity as SpectralDensity
    from lightning_subspace.subspace.subspace import Subspace as Subspace
    from lightning_subspace.subspace.subspace import SubspaceIntegrityError as SubspaceIntegrityError

__version__ = "0.1.0"

_HOMES = {
    "ActivationSpectrum": "measurements.activation_spectrum",
    "BatchSharpness": "measurements.noise",
    "CheckError": "curvature.selection",
    "CheckpointError": "probe.entries",
    "Chi": "measurements.gradient",
    "Control": "measurements.overlap",
    "CriticalSharpness": "measurements.critical_sharpness",
    "Density": "measurements.density",
    "EigshResult": "linalg",
    "GradientNoise": "measurements.noise",
    "Layers": "measurements.layers",
    "LossChange": "measurements.loss_change",
    "LossError": "loss.loss_function",
    "LossSlices": "subspace.loss_slices",
    "Matrices": "measurements.matrices",
    "Measurement": "measurements.base",
    "Needs": "measurements.base",
    "NoRoomError": "subspace.room",
    "NoiseScale": "measurements.noise_scale",
    "Outcome": "linalg",
    "PeerError": "parallel.ranks",
    "Probe": "measurements.base",
    "Prospect": "measurements.prospect",
    "Record": "subspace.record",
    "SampleError": "data.micro_batch",
    "SecondLoss": "measurements.second_loss",
    "SignalError": "state.signals",
    "Slices": "measurements.slices",
    "SpectralDensity": "subspace.spectral_density",
    "SpectralSharpness": "measurements.spectral_sharpness",
    "Stability": "measurements.stability",
    "StartWhenAligned": "callbacks.start",
    "Step": "measurements.step",
    "StepCurvature": "measurements.step",
    "Subspace": "subspace.subspace",
    "SubspaceIntegrityError": "subspace.subspace",
    "SubspaceMonitor": "callbacks.monitor",
    "SubspaceProjection": "callbacks.projection",
    "Trace": "measurements.density",
    "UpdateSpectrum": "measurements.update_spectrum",
    "eigsh": "linalg",
    "measure_subspace": "probe.measure",
    "read_history": "probe.history",
    "to_rows": "subspace.record",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
