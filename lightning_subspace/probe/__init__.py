"""One measurement, and the measurements along a run."""

from lightning_subspace.probe.measure import measure_subspace as measure_subspace
from lightning_subspace.probe.measure import take_probe as take_probe
