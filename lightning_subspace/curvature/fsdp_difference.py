"""Hessian on the shards of FSDP2, by central differences of float32 gradients.

    H v = |v| (g(theta + eps u) - g(theta - eps u)) / (2 eps),    u = v / |v|,  eps = 1e-3

Two gradients a product, with the memory of a training step; FSDP does the communication (`loss/fsdp_loss.py`). For a
loss with kinks (ReLU, max-pooling) no eps is right: single examples cross a kink, and their jump is divided by eps.
`check_differences` finds such losses. Errors: README.md, "What is exact".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.differences import DisplacedGradients
from lightning_subspace.curvature.kinks import KinkObserver
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck
from lightning_subspace.data.assignment import Assignment
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.loss_function import LossError

STEP = 1e-3  # rounding leaves about 1e-7 / STEP of the gradients of single examples, truncation STEP^2
# What the check compares along a random direction: large enough for many examples to cross kinks, if there are any.
CHECKED_STEPS = (3e-2, 1e-2)
# The largest relative difference that passes. For smooth nets the two steps differ by 3e-5 to 1.3e-2, for those with
# kinks by .22 to 1.1 (MLPs and convolutions of ReLU, 16 to 512 examples).
LARGEST_DIFFERENCE = 0.05
DIRECTIONS = 4  # random ones that are tried where the loss has kinks
# Along the gradient, for the loss itself: its differences have the rounding of a float32 loss.
LOSS_STEP = 1e-2
LOSS_ROUNDING = 1e-5


class ShardedDifferenceHessian(DisplacedGradients):
    """The Hessian, on this rank's shards of vectors.

    Every method is a collective: FSDP gathers parameters and scatters gradients in it, and sums over ranks. Where one
    micro-batch is evaluated alone, all ranks but its owner do so at weight zero.

    Args:
        loss: an open `ShardedLoss`; otherwise as for `BatchMean`.
        batches: the sample, of all ranks.
        partition: the shards of the module, and the ranks that it is sharded over.

    Raises:
        LossError: when a loss cannot be evaluated (see `ShardedLoss`).
        ValueError: for an empty sample.
    """

    max_asymmetry = 1e-3  # 1e-4 at most was measured for smooth networks

    _loss: ShardedLoss

    def matvec(self, v: Tensor, step: float = STEP) -> Tensor:  # (n,) -> (n,)
        """H v, from two gradients of every micro-batch at distance `step`."""
        length = self.norm(v)
        if not 0.0 < length < float("inf"):
            return torch.zeros_like(v, dtype=self.dtype) * length  # nan stays nan
        offset = v.to(self.dtype) * (step / length)
        plus, minus = (self._evaluated(sign * offset, self._assignments)[0] for sign in (1.0, -1.0))
        return plus.sub_(minus).mul_(length / (2.0 * step))

    def other_gradients(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each of other micro-batches of all ranks, with its gradient, (n,)."""
        return ((batch, self.mean_gradient([batch])) for batch in batches)

    def part(self, positions: Iterable[int]) -> BatchMean:
        """The Hessian over some micro-batches, dealt anew, as nothing is retained."""
        part = super().part(positions)
        part._assignments = part._rounds(part.batches)
        return part

    def value(self, offset: Tensor | None) -> float:
        """The mean loss at theta + offset."""
        _, own = self._evaluated(offset, self._assignments)
        return float(self.partition.ranks.all_reduce(torch.tensor([own], dtype=torch.float64, device=self.device)))

    def dot(self, u: Tensor, v: Tensor) -> float:
        """The inner product over all ranks."""
        return float(self.partition.ranks.all_reduce((u.to(torch.float64) @ v.to(torch.float64)).reshape(1)))

    def norm(self, v: Tensor) -> float:
        """The Euclidean norm over all ranks."""
        return math.sqrt(self.dot(v, v))

    def norms(self, v: Tensor) -> Tensor:
        """The norm of each parameter's part over all ranks."""
        pieces = torch.split(v.to(torch.float64), list(self._loss.local_numels))
        return self.partition.ranks.all_reduce(torch.stack([piece.square().sum() for piece in pieces])).sqrt()

    def _gradient_over(self, assignments: Sequence[Assignment]) -> Tensor:
        return self._evaluated(None, assignments)[0]

    def _evaluated(self, offset: Tensor | None, assignments: Sequence[Assignment]) -> tuple[Tensor, float]:
        """Gradient and this rank's share of the loss at theta + offset."""
        self._loss.displace(offset)
        try:
            return self._loss.gradient(assignments)
        finally:
            self._loss.displace(None)


def check_differences(operator: ShardedDifferenceHessian, seed: int = 0) -> SelfCheck:
    """Whether differences of float32 gradients are the Hessian of this loss.

    Costs nine gradients of the sample, for three comparisons, and four more a direction where the loss has kinks.

    Args:
        operator: over the sample to be checked with.
        seed: of random directions, those after the first for kinks, which few examples may not cross along one.

    Raises:
        LossError: where FSDP2's gradients are not those of the mean loss.
    """
    observer = KinkObserver()
    with observer:
        gradient = operator.gradient()
    seen = f"; the loss has kinks ({', '.join(sorted(observer.kinks))})" if observer.kinks else ""
    has_kinks = any(operator.partition.ranks.all_gather_object(bool(observer.kinks)))
    check_gradient(operator, gradient)  # first: where it is wrong, nothing can be measured
    # 1. Two steps along a random direction: the differences disagree where the loss has kinks.
    names = operator._loss.space.names
    random = [operator.partition.random(seed, number, device=operator.device) for number in range(DIRECTIONS)]
    found = [_disagreement(operator, direction) for direction in (random if has_kinks else random[:1])]
    v, near, disagreement, place = max(found, key=lambda one: math.inf if math.isnan(one[2]) else one[2])
    name = names[place]
    if not disagreement <= LARGEST_DIFFERENCE:
        reason = (
            f"differences of float32 gradients along one direction, for steps of {CHECKED_STEPS[0]:.0e} and "
            f"{CHECKED_STEPS[1]:.0e}, disagree by {disagreement:.1%} (largest in {name}; at most "
            f"{LARGEST_DIFFERENCE:.0%} is rounding){seen or ': rounding, or kinks in the loss'}. On the shards of "
            "FSDP2 finite differences are right for smooth networks only; use curvature='hessian'."
        )
        return SelfCheck(CheckOutcome.FAILED, disagreement, name, reason)
    # 2. The symmetry of the operator: u.Hv = v.Hu with u along Hv.
    length = operator.norm(near)
    if length > 0.0:
        u = near / length
        asymmetry = _ratio(abs(operator.dot(v, operator.matvec(u)) - length), length)
        if not asymmetry <= LARGEST_DIFFERENCE:
            reason = f"u.Hv and v.Hu differ by {asymmetry:.1%} (at most {LARGEST_DIFFERENCE:.0%} is rounding){seen}"
            return SelfCheck(CheckOutcome.FAILED, asymmetry, name, reason)
        disagreement = max(disagreement, asymmetry)
    reason = f"relative difference {disagreement:.1e} (largest in {name})"
    return SelfCheck(CheckOutcome.PASSED, disagreement, name, reason)


def check_gradient(operator: ShardedDifferenceHessian, gradient: Tensor | None = None) -> SelfCheck:
    """Whether FSDP2's gradients are those of the mean loss.

    Costs two gradients of the sample.

    Args:
        operator: over the sample to be checked with.
        gradient: what it gives, (n,), if it is known.

    Raises:
        LossError: where the loss has another slope.
    """
    gradient = operator.gradient() if gradient is None else gradient
    skipped = SelfCheck(CheckOutcome.SKIPPED, reason="there are no second derivatives")
    if (slope := operator.norm(gradient)) == 0.0:
        return skipped
    offset = gradient * (LOSS_STEP / slope)
    plus, minus = operator.value(offset), operator.value(-offset)
    error = abs((plus - minus) / (2.0 * LOSS_STEP) - slope)
    if not error <= LARGEST_DIFFERENCE * slope + LOSS_ROUNDING * max(abs(plus), abs(minus)) / LOSS_STEP:
        raise LossError(
            f"along its gradient of length {slope:.3g} the mean loss has a slope of "
            f"{(plus - minus) / (2.0 * LOSS_STEP):.3g}: FSDP2's gradients are not those of the mean over ranks (is "
            "a set_gradient_divide_factor, or a set_requires_all_reduce(False), in effect?)"
        )
    return skipped


def _disagreement(operator: ShardedDifferenceHessian, direction: Tensor) -> tuple[Tensor, Tensor, float, int]:
    """Disagreement of two steps along a direction.

    Returns:
        The unit vector, its image, the relative disagreement, and the place of the parameter with most of it.
    """
    v = direction.to(operator.dtype) / operator.norm(direction)
    wide, near = (operator.matvec(v, step) for step in CHECKED_STEPS)
    parts = operator.norms(wide - near)
    scale = max(operator.norm(wide), operator.norm(near))
    return v, near, _ratio(float(parts.square().sum().sqrt()), scale), int(parts.argmax())


def _ratio(error: float, scale: float) -> float:
    if scale > 0.0:
        return error / scale
    return 0.0 if error == 0.0 else float("inf")
