"""Self-check of the Hessian product, by differences of gradients.

Double backward is silently wrong for custom autograd functions that keep tensors on `ctx`, for `once_differentiable`
and for reentrant checkpoints: the product is then often even symmetric, so only an independent derivative notices. The
check compares H v for one random v with central differences of first-order gradients, in float64,

    (g(theta + eps v) - g(theta - eps v)) / (2 eps),

one parameter tensor at a time.
"""

from __future__ import annotations

import enum
import itertools
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_subspace._torch import DispatchMode
from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss

LARGEST_ERROR = 1e-4  # relative; less is rounding
JITTER = 1e-3  # of theta: networks with zero biases start on the kinks of their ReLUs, where no derivative exists
CHECKED_STEPS = (1e-5, 1e-6, 1e-7)  # the best of these counts
SMALLEST_PART = 1e-3  # of |H v|: smaller parts, of single parameter tensors, are compared on this scale
# What torch says where it has no second derivative: at an operation without one (EmbeddingBag, CTC loss), at
# `once_differentiable`, at compiled code and cuDNN's recurrent kernels, and at a reentrant checkpoint.
REFUSALS = re.compile(r"derivative for .* is not implemented|once_differentiable|double.?backward|use_reentrant", re.I)


class CheckOutcome(enum.Enum):
    """Outcome of a self-check, in one sentence for the user."""

    PASSED = "What was compared agrees."
    FAILED = (
        "The second derivatives of this model are not those of its gradient. Either the backward pass is wrong about "
        "its own derivative (a custom autograd.Function that is differentiable once, or a reentrant activation "
        "checkpoint: use_reentrant=False is right), or the gradient is not the derivative of the loss to begin with (a "
        "straight-through estimator, spectral norm in train mode, weights that the training step itself changes; or a "
        "`.detach()` on the way to some of the parameters, as in a GAN: name those that this loss trains with params=)."
    )
    UNAVAILABLE = "An operation of this model has no second derivative in torch."
    SKIPPED = "There was nothing to compare, or it need not agree; the reason says so."
    INCONCLUSIVE = "The check needs float64 throughout and could not have it here; nothing is known."


@dataclass(frozen=True)
class SelfCheck:
    """Result of a self-check."""

    outcome: CheckOutcome
    error: float = float("nan")  # largest relative difference over parameter tensors; inf: no product, nan: not known
    parameter: str = ""  # the name of the tensor where it is largest
    reason: str = ""  # one sentence with the numbers, or why there are none


def self_check(loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> SelfCheck:
    """Compare a Hessian product with float64 differences of gradients.

    Costs about eight gradients of a batch in float64; eight examples are enough.

    Args:
        loss: a `TrainingLoss` with dtype float64, not open yet.
        batch: a few examples.
        seed: of the direction v and of the jitter.

    Raises:
        ValueError: when `loss` is not a float64 one.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1)
        >>> fn = lambda m, x, i: m(x).square().mean()
        >>> loss = TrainingLoss(net, ParameterSpace.of(net), fn, dtype=torch.float64)
        >>> self_check(loss, MicroBatch(torch.ones(4, 2), 4.0, 0)).outcome.name
        'PASSED'
    """  # noqa: DOC501  # the RuntimeError is caught below
    if loss.dtype != torch.float64:
        raise ValueError(f"loss: expected a TrainingLoss with dtype=torch.float64, got {loss.dtype}.")
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, loss.space.n, generator=generator, dtype=torch.float64).to(loss.device)
    jitter, direction = JITTER * draw[0], draw[1] / draw[1].norm()
    narrowing = _NarrowingObserver()  # type: ignore[no-untyped-call]  # torch's own __init__ is untyped
    refusal: RuntimeError | None = None
    try:
        with warnings.catch_warnings(), loss:
            warnings.simplefilter("ignore")  # what the model has to say, it says in training
            loss.displace(jitter)
            try:
                product = Hessian(loss, [batch]).matvec(direction)
            except RuntimeError as raised:
                if not REFUSALS.search(str(raised)):
                    raise
                refusal = raised
            with narrowing:
                differences = [_difference(loss, batch, jitter, direction, eps) for eps in CHECKED_STEPS]
    except Exception as failure:  # float64 can fail in any way inside the user's code; that decides nothing
        return SelfCheck(CheckOutcome.INCONCLUSIVE, reason=f"{type(failure).__name__} in float64: {failure}")
    if refusal is not None:
        reentrant = "use_reentrant" in str(refusal)  # a choice that the user can undo
        outcome = CheckOutcome.FAILED if reentrant else CheckOutcome.UNAVAILABLE
        return SelfCheck(outcome, float("inf"), reason=f"{type(refusal).__name__}: {refusal}")
    error, name = min(worst_part(loss, product, difference) for difference in differences)
    if error <= LARGEST_ERROR:
        return SelfCheck(CheckOutcome.PASSED, error, name, f"relative difference {error:.1e} (largest in {name})")
    # Differences can accuse the product only where they agree with each other, for two eps at least. An operation in
    # float32 makes them noise; one that the loss does not depend on, in a metric or a label, leaves them as they are.
    spread, _ = min(worst_part(loss, *pair) for pair in itertools.pairwise(differences))
    if spread > LARGEST_ERROR:
        reason = f"differences of gradients for two eps differ by {spread:.1%}: noise or kinks in the loss"
        if narrowing.operation is not None:
            reason = f"{narrowing.operation} returns a type narrower than float64, and {reason}"
        return SelfCheck(CheckOutcome.INCONCLUSIVE, reason=reason)
    reason = (
        f"H v differs from differences of gradients by {error:.1%} in {name} (at most {LARGEST_ERROR:.0e} is rounding)"
    )
    return SelfCheck(CheckOutcome.FAILED, error, name, reason)


def _difference(loss: TrainingLoss, batch: MicroBatch, jitter: Tensor, direction: Tensor, eps: float) -> Tensor:
    gradients = []
    for sign in (1, -1):
        loss.displace(jitter + sign * eps * direction)
        gradients.append(backward_gradient(loss, batch))
    return (gradients[0] - gradients[1]) / (2 * eps)


def worst_part(loss: TrainingLoss, product: Tensor, difference: Tensor) -> tuple[float, str]:
    """Largest relative error over parameter tensors, and where; nan is infinite."""
    floor = SMALLEST_PART * max(float(product.norm()), float(difference.norm()))
    worst = (0.0, loss.space.names[0])
    for name, hv, fd in zip(
        loss.space.names, loss.space.unflatten(product), loss.space.unflatten(difference), strict=True
    ):
        scale = max(float(hv.norm()), float(fd.norm()), floor)
        error = float((hv - fd).norm()) / scale if scale > 0.0 else 0.0
        worst = max(worst, (error if error == error else float("inf"), name))
    return worst


class _NarrowingObserver(DispatchMode):
    """Remember the first operation that turned float64 into a narrower floating-point type."""

    operation: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.operation is None and isinstance(result, Tensor) and result.is_floating_point():
            was_wide = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
            if was_wide and result.dtype != torch.float64:
                self.operation = str(func)
        return result
