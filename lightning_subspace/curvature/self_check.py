"""Self-check of the Hessian product, by differences of gradients.

Double backward is silently wrong for custom autograd functions that keep tensors on `ctx`, for `once_differentiable`
and for reentrant checkpoints: the product is then often even symmetric, so only an independent derivative notices. The
check compares H v for one random v with central differences of first-order gradients, in float64,

    (g(theta + eps v) - g(theta - eps v)) / (2 eps),

one parameter tensor at a time. A loss that cannot be evaluated in float64 is compared in float32, where a difference of
a few percent is all that can be told from rounding: that proves a fault, or nothing.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.curvature.hessian import Hessian
from lightning_subspace.curvature.kinks import KinkObserver
from lightning_subspace.curvature.widening import Widening
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import ElsewhereError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.state.quiet import quiet
from lightning_subspace.state.signals import SignalError

LARGEST_ERROR = 1e-4  # relative; less is rounding
LARGEST_ASYMMETRY = 1e-4  # what an operator may have at most, see `BatchMean.max_asymmetry`
JITTER = 1e-3  # of theta: networks with zero biases start on the kinks of their ReLUs, where no derivative exists
CHECKED_STEPS = (1e-5, 1e-6, 1e-7)  # the best of these counts
SMALLEST_PART = 1e-3  # of |H v|: smaller parts, of single parameter tensors, are compared on this scale
# In float32 rounding leaves 1e-7 |g| / eps, which is up to 1 % of |H v| (measured for MLPs and a transformer), and no
# step is small enough for kinks.
NARROW_ERROR = 0.05
NARROW_SPREAD = 0.01
NARROW_STEPS = (1e-1, 3e-2, 1e-2, 3e-3)
# What torch says where it has no second derivative: at an operation without one (EmbeddingBag, CTC loss), at
# `once_differentiable`, at compiled code and cuDNN's recurrent kernels, and at a reentrant checkpoint.
REFUSALS = re.compile(r"derivative for .* is not implemented|once_differentiable|double.?backward|use_reentrant", re.I)


class CheckOutcome(enum.Enum):
    """Outcome of a self-check, in one sentence for the user."""

    PASSED = "What was compared agrees."
    FAILED = "The second derivatives of this model are not those of its gradient."
    UNAVAILABLE = "An operation of this model has no second derivative in torch."
    SKIPPED = "There was nothing to compare, or it need not agree; the reason says so."
    INCONCLUSIVE = "The second derivatives of this model could not be checked; nothing is known."


@dataclass(frozen=True)
class SelfCheck:
    """Result of a self-check."""

    outcome: CheckOutcome
    error: float = float("nan")  # largest relative difference over parameter tensors; inf: no product, nan: not known
    parameter: str = ""  # the name of the tensor where it is largest
    reason: str = ""  # one sentence with the numbers, or why there are none
    diagnosis: Diagnosis | None = None  # of a failure
    is_plain: bool = False  # whether it has passed without fused kernels, and not with them

    @property
    def text(self) -> str:
        """What it says to the user, with its numbers."""
        what = self.outcome.value if self.diagnosis is None else self.diagnosis.text
        return f"{what} Measured: {self.reason.rstrip('.')}."

    @property
    def is_gradient(self) -> bool:
        """Whether differences show that a gradient trains the model."""
        return self.diagnosis is not None and self.diagnosis.asymmetry <= LARGEST_ASYMMETRY

    @property
    def is_no_gradient(self) -> bool:
        """Whether differences show that no gradient trains the model."""
        return self.diagnosis is not None and self.diagnosis.asymmetry > LARGEST_ASYMMETRY


@dataclass(frozen=True)
class Diagnosis:
    """What a failed check tells of the derivative J of the gradient.

    Attributes:
        asymmetry: |J - J'| / (2 |J|) in Frobenius norms, in [0, 1]: 0 for the gradient of a function; nan: not known.
        text: what it is, and what can be measured, in sentences.
    """

    asymmetry: float
    text: str


def self_check(loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> SelfCheck:
    """Compare a Hessian product with differences of gradients.

    Costs about eight gradients of a batch; eight examples are enough.

    Args:
        loss: a `TrainingLoss`, not open yet, best with dtype float64. With a narrower one the result is FAILED or
            INCONCLUSIVE.
        batch: a few examples.
        seed: of the direction v and of the jitter.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1)
        >>> fn = lambda m, x, i: m(x).square().mean()
        >>> loss = TrainingLoss(net, ParameterSpace.of(net), fn, dtype=torch.float64)
        >>> self_check(loss, MicroBatch(torch.ones(4, 2), 4.0, 0)).outcome.name
        'PASSED'
    """  # noqa: DOC501  # the RuntimeError is caught below
    is_wide = loss.dtype == torch.float64
    jitter, directions = drawn(loss, 1, seed)
    direction = directions[0] / directions[0].norm()
    observer = KinkObserver()
    refusal = ""
    try:
        with checking(loss):
            loss.displace(jitter)
            try:
                product = Hessian(loss, [batch]).matvec(direction)
            except RuntimeError as raised:
                if not REFUSALS.search(str(raised)):
                    raise
                refusal = f"{type(raised).__name__}: {raised}"  # not itself, whose frames hold the graph
            steps = CHECKED_STEPS if is_wide else NARROW_STEPS
            with nullcontext() if is_wide else observer:  # in float64 differences tell kinks by themselves
                differences = [difference(loss, batch, jitter, direction, eps) for eps in steps]
    except (ElsewhereError, SignalError):
        raise
    except Exception as failure:  # float64 can fail in any way inside the user's code; that decides nothing
        reason = f"{type(failure).__name__} in {str(loss.dtype).removeprefix('torch.')}: {failure}"
        return SelfCheck(CheckOutcome.INCONCLUSIVE, reason=reason)
    if refusal:
        reentrant = "use_reentrant" in refusal  # a choice that the user can undo
        outcome = CheckOutcome.FAILED if reentrant else CheckOutcome.UNAVAILABLE
        return SelfCheck(outcome, float("inf"), reason=refusal)
    error, name = min(worst_part(loss, product, difference) for difference in differences)
    # Differences can accuse the product only where they agree with each other, for two eps at least. An operation in
    # float32 makes them noise; one that the loss does not depend on, in a metric or a label, leaves them as they are.
    spread, _ = min(worst_part(loss, *pair) for pair in itertools.pairwise(differences))
    return _judged(error, name, spread) if is_wide else _judged_narrow(error, name, spread, observer.kinks)


def _judged(error: float, name: str, spread: float) -> SelfCheck:
    if error <= LARGEST_ERROR:
        return SelfCheck(CheckOutcome.PASSED, error, name, f"relative difference {error:.1e} (largest in {name})")
    if spread > LARGEST_ERROR:
        reason = f"differences of gradients for two eps differ by {spread:.1%}: noise or kinks in the loss"
        return SelfCheck(CheckOutcome.INCONCLUSIVE, reason=reason)
    reason = (
        f"H v differs from differences of gradients by {error:.1%} in {name} (at most {LARGEST_ERROR:.0e} is rounding)"
    )
    return SelfCheck(CheckOutcome.FAILED, error, name, reason)


def _judged_narrow(error: float, name: str, spread: float, kinks: set[str]) -> SelfCheck:
    if error <= NARROW_ERROR:
        reason = f"in float32 H v agrees with differences of gradients within {error:.1%}, which tells no smaller fault"
    elif kinks:  # many of them leave differences that agree with each other, and are not H v
        reason = f"float32 cannot tell a fault from the kinks of this loss ({', '.join(sorted(kinks))})"
    elif spread > NARROW_SPREAD:
        reason = f"differences of float32 gradients for two eps differ by {spread:.1%}: noise or rounding"
    else:
        reason = f"H v differs from differences of float32 gradients by {error:.1%} in {name} (at most "
        reason += f"{NARROW_ERROR:.0%} is rounding)"
        return SelfCheck(CheckOutcome.FAILED, error, name, reason)
    return SelfCheck(CheckOutcome.INCONCLUSIVE, reason=reason)


@contextmanager
def checking(loss: TrainingLoss) -> Iterator[None]:
    """The loss, open, without warnings; a float64 one in float64 throughout."""
    with quiet(), loss:  # what the model has to say, it says in training
        if loss.dtype != torch.float64:
            yield
            return
        with Widening():  # type: ignore[no-untyped-call]  # torch's own __init__ is untyped
            yield


def drawn(loss: TrainingLoss, count: int, seed: int) -> tuple[Tensor, Tensor]:  # (n,), (count, n)
    """The jitter, and random directions of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(1 + count, loss.space.n, generator=generator, dtype=torch.float64)
    draw = draw.to(loss.device, loss.dtype)
    return JITTER * draw[0], draw[1:]


def difference(loss: TrainingLoss, batch: MicroBatch, jitter: Tensor, direction: Tensor, eps: float) -> Tensor:
    """J v along `direction`, at theta + jitter, by differences."""
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
