"""Curvature along the gradients of single mini-batches, for SGD at the edge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from lightning_subspace.curvature import Operator
from lightning_subspace.measurements.base import Measurement, Needs, Probe, positive
from lightning_subspace.measurements.prospect import Prospect


class BatchSharpness(Measurement):
    """`batch_sharpness`, `batch_sharpness_pooled`: curvature of a mini-batch along its own gradient.

    E_B[g_B.H_B g_B / g_B.g_B] (Andreyev and Beneventano, arXiv 2412.20553, definition 3), and the ratio of the two
    means, E_B[g_B.H_B g_B] / E_B[g_B.g_B], for g_B and H_B of the loss of micro-batch B alone. In units of an
    eigenvalue. Plain SGD is said to keep the first near 2/lr (late in training with cross-entropy it stays below).

    B are weighted micro-batches of the Hessian's sample, of the batch size of training by default; one with g_B = 0 is
    left out. Costs one pass of gradient and product over them, W passes on W ranks.

    Args:
        batches: number of micro-batches used; all where there are fewer.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for `batches` or `every` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[BatchSharpness(batches=8)])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, batches: int = 16, every: int = 1) -> None:
        self.batches = positive("batches", batches)
        self.every = positive("every", every)

    def expected_products(self, prospect: Prospect) -> float:
        """A gradient and a product over some of the micro-batches."""
        return 2.0 * min(1.0, self.batches / len(prospect.sample.hessian))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A gradient and a product a micro-batch."""
        weights = ratios = curvature = square = 0.0
        for weight, gradient, batch in _micro_batches(probe, self.batches):
            own = probe.dot(gradient, gradient)
            if own == 0.0:
                continue
            bend = probe.dot(gradient, batch.matvec(gradient))
            weights += weight
            ratios += weight * bend / own
            curvature += weight * bend
            square += weight * own
        if weights == 0.0:
            return {}
        return {"batch_sharpness": ratios / weights, "batch_sharpness_pooled": curvature / square}


class GradientNoise(Measurement):
    """`gradient_noise_interaction`, `interaction_sharpness`: curvature of the whole loss along noisy gradients.

    E_B[g_B.H g_B] / g.g, and E_B[g_B.H g_B] / E_B[g_B.g_B], the interaction-aware sharpness of Lee and Jang (ICLR
    2023), for g_B of a micro-batch, and g and H of the samples. In units of an eigenvalue. One step of SGD lowers the
    loss on average while the first is below 2/lr, so training with noise hovers there: the loss oscillates, but descent
    need not be at an edge of stability. The second is at most lambda_1; it is tr(HS)/tr(S) for the second moment S of
    the g_B.

    The micro-batches are as for `BatchSharpness`. Costs a gradient over one and a product over the sample for each.

    Args:
        batches: number of micro-batches used; all where there are fewer.
        every: taken at each probe whose number is a multiple of this.

    Raises:
        ValueError: for `batches` or `every` that is not a positive integer.

    Example:
        >>> from lightning_subspace import SubspaceMonitor
        >>> monitor = SubspaceMonitor(k=0, measurements=[GradientNoise(batches=8, every=5)])
    """

    needs: ClassVar[Needs] = Needs.NOTHING

    def __init__(self, batches: int = 8, every: int = 1) -> None:
        self.batches = positive("batches", batches)
        self.every = positive("every", every)

    def expected_products(self, prospect: Prospect) -> float:
        """One a micro-batch."""
        return float(min(self.batches, len(prospect.sample.hessian)))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A product over the sample for each micro-batch."""
        weights = curvature = square = 0.0
        for weight, gradient, _ in _micro_batches(probe, self.batches):
            weights += weight
            curvature += weight * probe.dot(gradient, probe.operator.matvec(gradient))
            square += weight * probe.dot(gradient, gradient)
        whole = probe.dot(probe.gradient, probe.gradient)
        found = {}
        if whole > 0.0:
            found["gradient_noise_interaction"] = curvature / weights / whole
        if square > 0.0:
            found["interaction_sharpness"] = curvature / square
        return found


def _micro_batches(probe: Probe, count: int) -> Iterator[tuple[float, Tensor, Operator]]:
    """Weights, gradients and Hessians of micro-batches, evenly spread over the sample."""
    batches = probe.operator.batches
    for number in range(min(count, len(batches))):
        position = number * len(batches) // min(count, len(batches))
        part = probe.operator.part([position])
        yield batches[position].weight, part.gradient(), part
