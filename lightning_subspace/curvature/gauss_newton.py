"""Generalised Gauss-Newton matrix of the training loss.

With the loss of a micro-batch L(z(theta)), z the output of the network, and J = dz/dtheta,

    G v = J^T H_L J v,    H_L = d^2 L / dz^2:

the Hessian without the curvature of the network (Schraudolph 2002); positive semidefinite where L is convex. J v is
taken by backward passes alone: J^T w is linear in w, and its derivative along v is J v. The graphs of z, of J^T w and
of dL/dz do not depend on v and are kept for a whole probe.

A training step gives a scalar and no z. So the call of a loss function (`LOSSES`) is caught while the step runs, and
its first argument is replaced by a copy that is a leaf. H_L is then that of all that the step makes of its output:
weights, masks and means. Steps without a single output are refused; README.md says which. The derivatives of a
cross-entropy are taken in closed form (`loss/cross_entropy.py`), so that of its logits one copy is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_subspace._torch import version_of
from lightning_subspace.curvature.hessian import GradientGraph, RetainedGraphs
from lightning_subspace.curvature.self_check import (
    LARGEST_ERROR,
    REFUSALS,
    CheckOutcome,
    SelfCheck,
    checking,
    drawn,
    worst_part,
)
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.convolution import regular_convolutions
from lightning_subspace.loss.cross_entropy import closed_cross_entropy
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.state.signals import SignalError

LOSSES = (
    F.cross_entropy,
    F.nll_loss,
    F.mse_loss,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.huber_loss,
    F.smooth_l1_loss,
    F.poisson_nll_loss,
)
LOG_SOFTMAX = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)
CHECKED_STEPS = (1e-5, 1e-6)  # in float64


@dataclass(frozen=True)
class OutputGraph(GradientGraph):
    """Graphs of one micro-batch: leaves to output, and output to loss."""

    output: Tensor  # z, with the graph that ends in the leaves
    place: Tensor  # a copy of z, the leaf that the loss was computed from
    slope: GradientEdge  # the graph of dL/dz, which ends in `place`; its values are not needed
    cotangent: Tensor  # w, a leaf of the shape of z
    pullback: list[Tensor | None]  # J^T w by leaf, with the graph that ends in w; None where z does not depend on it

    @classmethod
    def build(cls, loss: TrainingLoss, batch: MicroBatch) -> OutputGraph:
        """Evaluate the loss, and find its output.

        Raises:
            LossError: where there is no single output that the loss depends on.
        """
        with regular_convolutions(loss.device), loss.default_type():
            leaves, output, place, slope = _evaluated(loss, batch, create_graph=True)
            # One zero in memory: all that is asked of J^T w is its derivative.
            cotangent = output.new_zeros(()).expand_as(output).detach().requires_grad_()
            pullback = torch.autograd.grad(output, leaves, cotangent, create_graph=True, allow_unused=True)
            gradients = torch.autograd.grad(output, leaves, slope.detach(), retain_graph=True, allow_unused=True)
        return cls(leaves, list(gradients), output, place, get_gradient_edge(slope), cotangent, list(pullback))

    @property
    def held(self) -> list[Tensor]:
        """Tensors kept beside the leaves and what autograd saves for backward."""
        images = [image for image in self.pullback if image is not None]
        return [*super().held, *images, self.output, self.place, self.cotangent]

    def product(self, direction: list[Tensor]) -> list[Tensor | None]:
        """J^T H_L J v by leaf; None for a leaf without influence."""
        pairs = [(p, v) for p, v in zip(self.pullback, direction, strict=True) if p is not None]
        images = [p.to_dense() if p.is_sparse else p for p, _ in pairs]
        weights = [v.reshape(p.shape).to(p.dtype) for p, v in pairs]
        with regular_convolutions(self.place.device):
            (forward,) = torch.autograd.grad(images, self.cotangent, weights, retain_graph=True)
            (curved,) = torch.autograd.grad([self.slope], self.place, forward, retain_graph=True)
        del forward  # as large as all logits
        return self.pulled_back(curved)

    def pulled_back(self, cotangent: Tensor) -> list[Tensor | None]:
        """J^T w by leaf."""
        with regular_convolutions(self.place.device):
            return list(torch.autograd.grad(self.output, self.leaves, cotangent, retain_graph=True, allow_unused=True))


class GaussNewton(RetainedGraphs):
    """The Gauss-Newton matrix; arguments as `RetainedGraphs`.

    Raises:
        LossError: also where the training step has no single output (see above).

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), weight=2.0, index=0)
        >>> fn = lambda m, x, i: F.mse_loss(m(x), torch.zeros(2, 1))
        >>> with TrainingLoss(net, ParameterSpace.of(net), fn) as loss:
        ...     print(GaussNewton(loss, [data]).matvec(torch.ones(2)))
        tensor([1., 4.])
    """

    def _build(self, batch: MicroBatch) -> OutputGraph:
        return OutputGraph.build(self._loss, batch)


def gauss_newton_check(loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> SelfCheck:
    """Compare G v with J^T times differences of dL/dz; arguments as `self_check`.

    Raises:
        LossError: where the training step has no single output.
        SignalError: when a signal has come meanwhile.
    """
    jitter, directions = drawn(loss, 1, seed)
    direction = directions[0] / directions[0].norm()
    try:
        with checking(loss), loss.default_type():
            loss.displace(jitter)
            graph = OutputGraph.build(loss, batch)
            product = loss.space.flatten(graph.product(loss.space.unflatten(direction)), like=direction)
            coarse, fine = (_difference(loss, batch, graph, jitter, step * direction) / step for step in CHECKED_STEPS)
            error, name = worst_part(loss, product, fine)
            spread, _ = worst_part(loss, coarse, fine)
    except (LossError, SignalError):
        raise
    except Exception as failure:  # float64 can fail in any way inside the user's code
        refused = isinstance(failure, RuntimeError) and REFUSALS.search(str(failure))
        outcome = CheckOutcome.UNAVAILABLE if refused else CheckOutcome.INCONCLUSIVE
        error = float("inf" if refused else "nan")
        return SelfCheck(outcome, error, reason=f"{type(failure).__name__}: {failure}")
    reason = f"G v and differences are apart by {error:.1e} in {name}, differences for two steps by {spread:.1e}"
    if error <= LARGEST_ERROR:
        return SelfCheck(CheckOutcome.PASSED, error, name, reason)
    if spread > LARGEST_ERROR:  # noise or kinks: nothing that could accuse the product
        return SelfCheck(CheckOutcome.INCONCLUSIVE, reason=reason)
    return SelfCheck(CheckOutcome.FAILED, error, name, reason)


def _difference(loss: TrainingLoss, batch: MicroBatch, graph: OutputGraph, centre: Tensor, offset: Tensor) -> Tensor:
    """J^T (dL/dz(centre + offset) - dL/dz(centre - offset)) / 2."""
    slopes = []
    for sign in (1.0, -1.0):
        loss.displace(centre + sign * offset)
        slopes.append(_evaluated(loss, batch, create_graph=False)[-1])
    return loss.space.flatten(graph.pulled_back(0.5 * (slopes[0] - slopes[1])), like=offset)


def _evaluated(
    loss: TrainingLoss, batch: MicroBatch, *, create_graph: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Leaves, z, z as a leaf, and dL/dz."""
    cut = _Cut(closed=True)
    with cut:
        evaluation = loss(batch)
    if cut.has_written:
        cut = _Cut(closed=False)
        with cut:
            evaluation = loss(batch)
    if len(cut.found) != 1:
        calls = ", ".join(name for name, _, _ in cut.found) or "none"
        raise LossError(
            "curvature: expected, for 'ggn', a training step that calls one of torch.nn.functional."
            f"{', '.join(f.__name__ for f in LOSSES)} (or the module of it) exactly once on what depends on the "
            f"parameters, got these calls: {calls}; its first argument is taken for the output of the network. Pass "
            "curvature='hessian' or loss_fn=."
        )
    name, output, place = cut.found[0]
    others = torch.autograd.grad(evaluation.value, evaluation.leaves, retain_graph=True, allow_unused=True)
    if any(other is not None for other in others):
        raise LossError(
            "curvature: expected, for 'ggn', a loss that depends on the parameters through the first argument of "
            f"{name} alone, got one that does so also in another way, such as a penalty or a second use of the output; "
            "pass curvature='hessian', or loss_fn= without it."
        )
    (slope,) = torch.autograd.grad(evaluation.value, place, create_graph=create_graph, allow_unused=True)
    if cut.is_linear or slope is None or (create_graph and not slope.requires_grad):
        raise LossError(
            f"curvature: expected, for 'ggn', a curved loss, got one that is linear in the first argument of {name}, "
            "so that its matrix is zero; give nll_loss what log_softmax returns, without a reshape in between."
        )
    return evaluation.leaves, output, place, slope


class _Cut(TorchFunctionMode):
    """Context in which a loss gets a leaf for its input.

    Args:
        closed: whether a cross-entropy is differentiated in closed form.
    """

    def __init__(self, *, closed: bool) -> None:
        super().__init__()
        self._is_closed = closed
        self._versions: list[tuple[Tensor, int]] = []  # of the logits that closed forms have kept
        self.found: list[tuple[str, Tensor, Tensor]] = []  # one a call: its name, the output with its graph, the leaf
        self.is_linear = False  # whether one was `nll_loss` of anything but a `log_softmax`
        self._normalised: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = []  # log-probabilities and logits

    @property
    def has_written(self) -> bool:
        """Whether the step has overwritten logits that a closed form has kept.

        Torch's graph keeps others, so that training allows it.
        """
        return any(version_of(logits) != version for logits, version in self._versions)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function; a loss gets a leaf for its input."""
        kwargs = dict(kwargs or {})
        if func not in LOSSES and func not in LOG_SOFTMAX:
            return func(*args, **kwargs)
        given, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        if func in LOSSES:
            if not given.requires_grad:
                return func(given, *rest, **kwargs)
            place = self._cut(func.__name__, given)
            is_closed = self._is_closed and func is F.cross_entropy
            closed = closed_cross_entropy((place, *rest), kwargs) if is_closed else None
            if closed is None:
                return func(place, *rest, **kwargs)
            self._versions.append((place, version_of(place)))
            return closed(place)
        result = func(given, *rest, **kwargs)
        self._normalised.append((result, given, lambda logits: func(logits, *rest, **kwargs)))
        return result

    def _cut(self, name: str, given: Tensor) -> Tensor:
        """The replacement for the first argument of a loss."""
        for result, logits, normalise in self._normalised:  # for nll_loss of log_softmax z is the logits
            if result is given and logits.requires_grad and name == F.nll_loss.__name__:
                return normalise(self._leaf(name, logits))
        self.is_linear = self.is_linear or name == F.nll_loss.__name__
        return self._leaf(name, given)

    def _leaf(self, name: str, output: Tensor) -> Tensor:
        place = output.detach().requires_grad_()
        self.found.append((name, output, place))
        return place
