"""Hessian by forward differences: one gradient a product.

    H v = |v| (g(theta + eps u) - g(theta)) / eps,    u = v / |v|,

in the precision of training, with g(theta) taken once. A product needs no second derivative and the memory of a
training step, and leaves fused attention in place where its rounding is small (`rounding.py`). For float32 it is the
cheapest product there is, and the least exact. With kinks its error is of the size of H v, whatever eps is. So it is
used only where `smoothness_check` finds none, by an extrapolation in float64 that is exact to second order for smooth
losses:

    (3 d(eps) - d(3 eps)) / 2 = H u + O(eps^2),    d(eps) = (g(theta + eps u) - g(theta)) / eps
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_subspace.curvature.central_difference import FiniteDifferenceHessian
from lightning_subspace.curvature.differences import DisplacedGradients
from lightning_subspace.curvature.self_check import LARGEST_ASYMMETRY, CheckOutcome, SelfCheck, checking
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.state.signals import SignalError

# Truncation is STEP / 2 times the third derivative along u, rounding about 1e-6 |g| / STEP. Along top eigenvectors of
# smooth networks both are about 1e-3 lambda_1; what was measured: README.md, "What is exact".
STEP = 3e-4
CHECKED_STEP = 1e-3
# The largest error of the extrapolation that counts as smooth, in units of the largest |H u|. On 64 examples 2e-7 to
# 3e-4 were measured for networks of GELU, SiLU, tanh and softmax, .08 to 19 for those of ReLU. Few kinks, as those of
# one max-pooling behind a smooth layer, may hide from it; the solver then finds the operator asymmetric.
SMOOTH_ERROR = 2e-3


class ForwardDifferenceHessian(DisplacedGradients):
    """The Hessian at one gradient a product, for smooth networks.

    Arguments as `BatchMean`; the loss is best of order 1.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
        ValueError: for an empty sample.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), weight=2.0, index=0)
        >>> fn = lambda m, x, i: m(x).square().mean()
        >>> with TrainingLoss(net, ParameterSpace.of(net), fn, order=1) as loss:
        ...     print(ForwardDifferenceHessian(loss, [data]).matvec(torch.ones(2)).round(decimals=2))
        tensor([1., 4.])
    """

    # Truncation is not symmetric: 1e-4 was measured. What depends on chance, such as batches drawn anew, exceeds 5e-3.
    max_asymmetry = 1e-3

    def matvec(self, v: Tensor, step: float = STEP) -> Tensor:  # (n,) -> (n,)
        """H v, from one gradient of every micro-batch at distance `step`."""
        (length,) = self._norms(v)
        if not 0.0 < length < float("inf"):
            return torch.zeros_like(v) * length  # nan stays nan
        scale = step / length
        centre = self._centre()
        return self._gradient_at(self._buffers.gather(v), scale).sub_(centre).div_(scale)


def smoothness_check(loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> SelfCheck:
    """Whether forward differences may be used; arguments as `self_check`.

    PASSED, SKIPPED with the reason why not, or FAILED where differences are not symmetric: they are no Hessian then.
    Costs about 17 gradients of the batch in float64; it should have 64 examples, since fewer may meet no kink.

    Raises:
        ValueError: when `loss` is not a float64 one.
        SignalError: when a signal has come meanwhile.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(loss.space.n, generator=generator, dtype=torch.float64).to(loss.device)
    try:
        with checking(loss):
            exact = FiniteDifferenceHessian(loss, [batch], dtype=torch.float64)
            near, far = ForwardDifferenceHessian(loss, [batch]), ForwardDifferenceHessian(loss, [batch])
            errors, units, images, product = [], [], [], draw
            for given in (draw, exact.gradient(), None):
                direction = product if given is None else given
                unit = direction / direction.norm()
                product = exact.matvec(unit)
                extrapolated = 1.5 * near.matvec(unit, CHECKED_STEP) - 0.5 * far.matvec(unit, 3 * CHECKED_STEP)
                errors.append(float((extrapolated - product).norm()))
                units.append(unit)
                images.append(product)
    except (ValueError, SignalError):
        raise
    except Exception as failure:  # float64 can fail in any way inside the user's code; that decides nothing
        return SelfCheck(CheckOutcome.SKIPPED, reason=f"{type(failure).__name__} in float64: {failure}")
    largest = torch.stack(images).norm(dim=1).max()
    pairs = itertools.combinations(range(len(units)), 2)
    asymmetry = max(float((units[i] @ images[j] - units[j] @ images[i]).abs() / largest) for i, j in pairs)
    if asymmetry > LARGEST_ASYMMETRY:
        reason = f"u.Hv and v.Hu, both by differences of gradients, differ by {asymmetry:.1e} of the largest |Hv|"
        return SelfCheck(CheckOutcome.FAILED, asymmetry, reason=reason)
    error = float(torch.tensor(errors, dtype=torch.float64).max() / largest)  # nan where one of them is
    if error <= SMOOTH_ERROR:
        reason = f"forward differences extrapolate to H v within {error:.1e}"
        return SelfCheck(CheckOutcome.PASSED, error, reason=reason)
    reason = f"the loss has kinks, or bends too much: forward differences miss H v by {error:.1e}"
    return SelfCheck(CheckOutcome.SKIPPED, error, reason=reason)
