"""Quantities that a probe computes and logs, each a small class."""

from lightning_subspace._arguments import require_integer
from lightning_subspace.measurements.activation_spectrum import ActivationSpectrum as ActivationSpectrum
from lightning_subspace.measurements.base import Measurement as Measurement
from lightning_subspace.measurements.base import Probe as Probe
from lightning_subspace.measurements.critical_sharpness import CriticalSharpness as CriticalSharpness
from lightning_subspace.measurements.density import Density as Density
from lightning_subspace.measurements.density import Trace as Trace
from lightning_subspace.measurements.gradient import Chi as Chi
from lightning_subspace.measurements.gradient import GradientCurvature as GradientCurvature
from lightning_subspace.measurements.gradient import GradientFraction as GradientFraction
from lightning_subspace.measurements.gradient import UpdateFraction as UpdateFraction
from lightning_subspace.measurements.layers import LayerMap as LayerMap
from lightning_subspace.measurements.layers import Layers as Layers
from lightning_subspace.measurements.loss_change import LossChange as LossChange
from lightning_subspace.measurements.matrices import Matrices as Matrices
from lightning_subspace.measurements.noise import BatchSharpness as BatchSharpness
from lightning_subspace.measurements.noise import GradientNoise as GradientNoise
from lightning_subspace.measurements.noise_scale import NoiseScale as NoiseScale
from lightning_subspace.measurements.overlap import Control as Control
from lightning_subspace.measurements.overlap import SubspaceOverlap as SubspaceOverlap
from lightning_subspace.measurements.reliability import Reliability as Reliability
from lightning_subspace.measurements.sample_loss import SampleLoss as SampleLoss
from lightning_subspace.measurements.second_loss import SecondLoss as SecondLoss
from lightning_subspace.measurements.slices import Slices as Slices
from lightning_subspace.measurements.spectral_sharpness import SpectralSharpness as SpectralSharpness
from lightning_subspace.measurements.spectrum import GapIndex as GapIndex
from lightning_subspace.measurements.stability import SharpnessOverThreshold as SharpnessOverThreshold
from lightning_subspace.measurements.stability import Stability as Stability
from lightning_subspace.measurements.step import Step as Step
from lightning_subspace.measurements.step import StepCurvature as StepCurvature
from lightning_subspace.measurements.update_spectrum import UpdateSpectrum as UpdateSpectrum
from lightning_subspace.subspace.loss_slices import LossSlices as LossSlices
from lightning_subspace.subspace.spectral_density import SpectralDensity as SpectralDensity


def default_measurements(k: int) -> list[Measurement]:
    """Measurements of every monitor; for k = 0 those without eigenvectors."""
    require_integer("k", k, 0)
    if k == 0:
        return [GradientCurvature(), SampleLoss(), Step(), NoiseScale()]
    return [
        GradientFraction(),
        GradientCurvature(),
        GapIndex(),
        SubspaceOverlap(),
        UpdateFraction(),
        SharpnessOverThreshold(),
        Reliability(),
        SampleLoss(),
        Step(),
        NoiseScale(),
        LayerMap(),
    ]
