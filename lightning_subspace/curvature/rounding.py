"""Rounding of forward differences in float32, by the kernels at hand.

A difference of gradients divides their rounding by its step. In IEEE float32 that leaves less than 1e-3 of the largest
|H u|. Fused attention may round its backward pass more coarsely (on a GPU by TF32 inside, or by sums in any order), and
then the solver meets no symmetric matrix. Three steps tell it, without another number format, whose random numbers
would be others: with d(eps) = (g(theta + eps u) - g(theta)) / eps,

    d(eps) - 2 d(2 eps) + d(3 eps) = O(eps^2) + 1.5 times the rounding of d(eps)

An error that is smooth in theta cancels there, but leaves differences asymmetric.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_subspace.curvature.forward_difference import STEP, ForwardDifferenceHessian
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck, checking
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import ElsewhereError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.state.signals import SignalError

# In units of the largest |H u|. On 64 examples networks of GELU, SiLU, tanh and softmax had 1e-4 to 1.5e-3
# up to n = 114,122, with which the solver converges, and 7e-2 to 9e-2 for some that had learnt their examples by heart,
# which it finds asymmetric.
LARGEST_ROUNDING = 5e-3


def kernels_check(
    loss_of: Callable[[Literal[1, 2]], TrainingLoss],
    batch: MicroBatch,
    *,
    seed: int = 0,
    first: Callable[[Any], Any] = lambda value: value,
) -> SelfCheck:
    """Rounding check by the kernels of training, else without fused ones.

    Args:
        loss_of: makes a loss for `rounding_check`, of an order.
        batch: as for that check, like `seed`.
        seed: of the random direction.
        first: gives all ranks the first one's value, so that all evaluate the loss equally often.
    """
    fused: SelfCheck = first(rounding_check(loss_of(1), batch, seed=seed))
    if fused.outcome is CheckOutcome.PASSED:
        return fused
    plain: SelfCheck = first(rounding_check(loss_of(2), batch, seed=seed))
    reason = f"{plain.reason}; by the kernels of training, {fused.reason}"
    return replace(plain, reason=reason, is_plain=plain.outcome is CheckOutcome.PASSED)


def chosen(check: SelfCheck) -> str:
    """What is used after such a check, and why."""
    if check.outcome is not CheckOutcome.PASSED:
        what = "central ones of float64 gradients"
    elif check.is_plain:
        what = "forward ones of float32 gradients, with math attention in place of fused one"
    else:
        what = "forward ones of float32 gradients, by the kernels of training"
    return f"finite differences are {what}: {check.reason}."


def rounding_check(loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> SelfCheck:
    """Whether forward differences of this loss are a matrix for the solver.

    PASSED, or SKIPPED with the reason why not. Costs ten gradients of the batch, along a random direction, the gradient
    and its image.

    Args:
        loss: a `TrainingLoss` in float32, not open, of smooth networks (see `smoothness_check`). Its order says which
            kernels it uses: 1 those of training, 2 none that are fused.
        batch: of as many examples as that check had.
        seed: of the random direction.

    Raises:
        ElsewhereError: when the loss takes parameters from elsewhere than the module.
        SignalError: when a signal has come meanwhile.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(loss.space.n, generator=generator, dtype=torch.float64).to(loss.device, loss.dtype)
    try:
        with checking(loss):
            operator = ForwardDifferenceHessian(loss, [batch])
            units: list[Tensor] = []
            images: list[Tensor] = []
            remainders: list[Tensor] = []
            for given in (direction, operator.gradient(), None):
                vector = images[-1] if given is None else given
                unit = vector / vector.norm()
                near, middle, far = (operator.matvec(unit, number * STEP) for number in (1, 2, 3))
                units.append(unit)
                images.append(near)
                remainders.append((near - 2.0 * middle + far).norm())
    except (ElsewhereError, SignalError):
        raise
    except Exception as failure:  # the probe will meet it, or need not
        return SelfCheck(CheckOutcome.SKIPPED, reason=f"{type(failure).__name__} in differences: {failure}")
    largest = torch.stack(images).norm(dim=1).max()
    rounding = float(torch.stack(remainders).max() / largest)
    pairs = itertools.combinations(range(len(units)), 2)
    asymmetry = max(float((units[i] @ images[j] - units[j] @ images[i]).abs() / largest) for i, j in pairs)
    reason = f"rounding leaves {rounding:.1e} of the largest |Hv| in them, and an asymmetry of {asymmetry:.1e}"
    passes = rounding <= LARGEST_ROUNDING and asymmetry <= operator.max_asymmetry  # not where one is nan
    return SelfCheck(CheckOutcome.PASSED if passes else CheckOutcome.SKIPPED, rounding, reason=reason)
