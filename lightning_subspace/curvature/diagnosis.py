"""Self-check in stages, and what a failed one says.

A check that is INCONCLUSIVE is made again in other directions (kinks), then in float32. One that FAILED is explained:
by the symmetry of what trains (`GradientField`), and by what can be measured in its place, which is tried first.

The first rank's result counts at every stage. So all ranks evaluate the loss, which may have collectives of its own,
equally often.
"""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from lightning_subspace.curvature.gradient_field import GradientField, Part
from lightning_subspace.curvature.self_check import LARGEST_ASYMMETRY, CheckOutcome, Diagnosis, SelfCheck, self_check
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace

First: TypeAlias = Callable[[Any], Any]  # gives all ranks the first one's value
ATTEMPTS = 3  # none of 700 networks with ReLU, max-pooling or batch-norm needed a second one

NO_GRADIENT = (
    "What trains this model is not the gradient of a function of its parameters, so it has no second derivatives: its "
    "derivative J is not symmetric (|J - J'| / 2|J| is about {:.1%}; 0 for a gradient). This comes of a `.detach()` or "
    "no_grad() on the way to some of the parameters (as in a GAN, in self-distillation, with an actor and a critic, "
    "with detached proposals), of a reversed gradient, of a straight-through estimator or fake quantisation, of "
    "spectral norm in train mode, or of weights that the training step itself changes."
)
WRONG_BACKWARD = (
    "The second derivatives of this model are wrong. What trains it is the gradient of a function (by differences its "
    "derivative is symmetric to {:.0e}), but a backward pass is wrong about its own derivative: a custom "
    "autograd.Function that is differentiable once, a reentrant activation checkpoint (use_reentrant=False is right), "
    "or weights that the training step itself changes."
)
UNKNOWN = (
    "The second derivatives of this model are not those of its gradient. Either a backward pass is wrong about its own "
    "derivative (a custom autograd.Function that is differentiable once, or a reentrant activation checkpoint: "
    "use_reentrant=False is right), or what trains it is not the gradient of a function (a `.detach()` on the way to "
    "some of the parameters, a straight-through estimator)."
)


def check_in_stages(
    check: Callable[..., SelfCheck],
    loss_of: Callable[[torch.dtype], TrainingLoss],
    batch: MicroBatch,
    *,
    seed: int = 0,
    first: First = lambda value: value,
) -> SelfCheck:
    """Make a check, and explain its failure. A collective if `first` is.

    Args:
        check: called with (loss, batch, seed=).
        loss_of: makes a loss, not open, that is at least so wide.
        batch: a few examples.
        seed: of the directions.
        first: gives all ranks the first one's value.
    """
    wide = loss_of(torch.float64)
    for attempt in range(ATTEMPTS):
        result: SelfCheck = first(check(wide, batch, seed=seed + attempt))
        if result.outcome is not CheckOutcome.INCONCLUSIVE:
            break
    if result.outcome is CheckOutcome.INCONCLUSIVE and check is self_check:
        narrow = loss_of(torch.float32)
        if narrow.dtype != torch.float64:  # that of parameters in float64
            second: SelfCheck = first(self_check(narrow, batch, seed=seed))
            is_proof = second.outcome is CheckOutcome.FAILED
            result = second if is_proof else replace(result, reason=f"{result.reason.rstrip('.')}; {second.reason}")
    if result.outcome is not CheckOutcome.FAILED:
        return result
    return replace(result, diagnosis=diagnose(wide, batch, seed=seed, first=first))


def diagnose(
    loss: TrainingLoss,
    batch: MicroBatch,
    *,
    seed: int = 0,
    first: First = lambda value: value,
) -> Diagnosis:
    """What is wrong, and what can be measured; arguments as `check_in_stages`.

    Costs at most 64 gradients of the batch, and as many again for parts that are tried.
    """
    field: GradientField = first(GradientField.of(loss, batch, seed=seed))
    if math.isnan(field.asymmetry):
        return Diagnosis(field.asymmetry, UNKNOWN)
    if field.asymmetry <= LARGEST_ASYMMETRY:
        return Diagnosis(field.asymmetry, WRONG_BACKWARD.format(field.asymmetry))
    tried = []
    if (part := field.by_hessian) is not None:
        inside, patterns = _within(loss, part)
        outcome = first(self_check(inside, batch, seed=seed).outcome)
        if outcome is CheckOutcome.PASSED:
            tried.append(f"params={patterns}")
    part = field.by_differences
    if part is not None and (not tried or field.by_hessian is None or part.size > field.by_hessian.size):
        inside, patterns = _within(loss, part)
        found: GradientField = first(GradientField.of(inside, batch, seed=seed))
        if found.asymmetry <= LARGEST_ASYMMETRY:
            tried.append(f"params={patterns} with curvature='finite-difference'")
    way_out = "No part of the model was found where it is one; pass loss_fn=, a loss without that."
    if tried:
        way_out = f"It is one of some of them, the others held fixed: {', or '.join(tried)} (tried)."
    return Diagnosis(field.asymmetry, f"{NO_GRADIENT.format(field.asymmetry)} {way_out}")


def _within(loss: TrainingLoss, part: Part) -> tuple[TrainingLoss, list[str]]:
    """The loss over a part of the parameters, and its patterns."""
    inside, patterns = copy.copy(loss), list(part.patterns)
    inside.space = ParameterSpace.of(loss.module, patterns)
    if not set(inside.space.names) <= set(loss.space.names):  # `params=` has left some of these out already
        own = set(inside.space.names) & set(loss.space.names)
        patterns = [glob.escape(name) for name in loss.space.names if name in own]
        inside.space = ParameterSpace.of(loss.module, patterns)
    return inside, patterns
