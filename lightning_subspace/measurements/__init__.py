"""What is computed at a probe and logged. Each is a small class; a user's own goes beside them."""

from lightning_subspace.measurements.base import Measurement, Probe
from lightning_subspace.measurements.control import Control
from lightning_subspace.measurements.critical_sharpness import CriticalSharpness
from lightning_subspace.measurements.density import Density, Trace
from lightning_subspace.measurements.gradient import GapIndex, GradientCurvature, GradientFraction
from lightning_subspace.measurements.loss_change import Chi, LossChange
from lightning_subspace.measurements.noise import BatchSharpness, GradientNoise
from lightning_subspace.measurements.overlap import SubspaceOverlap
from lightning_subspace.measurements.reliability import Reliability
from lightning_subspace.measurements.stability import SharpnessOverThreshold, Stability
from lightning_subspace.measurements.update import UpdateFraction
from lightning_subspace.subspace.spectral_density import SpectralDensity


def default_measurements(k: int) -> list[Measurement]:
    """The measurements every monitor takes; the cheap tier k = 0 has only what needs no eigenvectors."""
    if k == 0:
        return [GradientCurvature()]
    return [
        GradientFraction(),
        GradientCurvature(),
        GapIndex(),
        SubspaceOverlap(),
        UpdateFraction(),
        SharpnessOverThreshold(),
        Reliability(),
    ]


__all__ = [
    "BatchSharpness",
    "Chi",
    "Control",
    "CriticalSharpness",
    "Density",
    "GapIndex",
    "GradientCurvature",
    "GradientFraction",
    "GradientNoise",
    "LossChange",
    "Measurement",
    "Probe",
    "Reliability",
    "SharpnessOverThreshold",
    "SpectralDensity",
    "Stability",
    "SubspaceOverlap",
    "Trace",
    "UpdateFraction",
    "default_measurements",
]
