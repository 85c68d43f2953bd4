"""Gradient of one micro-batch, by `backward()` or by `autograd.grad`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss


def backward_gradient(loss: TrainingLoss, batch: MicroBatch) -> Tensor:  # (n,)
    """The gradient by `backward()`, as training takes it.

    `torch.autograd.grad` prunes the nodes that lead to no parameter of the space, also those that would refuse a
    derivative, and reentrant checkpoints refuse it altogether; `backward()` takes all as they are.

    Raises:
        LossError: when the loss cannot be evaluated (see `TrainingLoss`).
    """
    evaluation = loss(batch)
    for leaf in evaluation.leaves:
        leaf.grad = None
    with loss.dependence.preserved_gradients(), loss.default_type():
        evaluation.value.backward()
    return _flat(loss, [leaf.grad for leaf in evaluation.leaves])


def pruned_gradient(loss: TrainingLoss, batch: MicroBatch) -> Tensor:  # (n,)
    """The gradient by `torch.autograd.grad`; arguments and errors as `backward_gradient`.

    It goes back no further than the parameters of the space, so it is the cheaper one where these are few.
    """
    evaluation = loss(batch)
    with loss.default_type():
        gradients = torch.autograd.grad(evaluation.value, evaluation.leaves, allow_unused=True)
    return _flat(loss, gradients)


def _flat(loss: TrainingLoss, gradients: Sequence[Tensor | None]) -> Tensor:
    return loss.space.flatten(gradients, like=torch.empty(0, dtype=loss.dtype, device=loss.device))
