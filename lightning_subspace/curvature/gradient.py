"""Gradient of one micro-batch, in both ways that torch has for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss


def backward_gradient(loss: TrainingLoss, batch: MicroBatch) -> Tensor:  # (n,)
    """The gradient by `backward()`, as training takes it.

    `torch.autograd.grad`, which is told the inputs, prunes the nodes that refuse to be derived, and reentrant
    checkpoints refuse it altogether; `backward()` takes them as they are.

    Args:
        loss: an open `TrainingLoss`.
        batch: the micro-batch.

    Raises:
        LossError: when the loss cannot be evaluated (see `TrainingLoss`).
    """
    evaluation = loss(batch)
    for leaf in evaluation.leaves:
        leaf.grad = None
    evaluation.value.backward()
    return loss.space.flatten([leaf.grad for leaf in evaluation.leaves], like=_like(loss))


def pruned_gradient(loss: TrainingLoss, batch: MicroBatch) -> Tensor:  # (n,)
    """The gradient by `torch.autograd.grad`.

    It goes back no further than the parameters of the space, so it is the cheaper one where these are few. Arguments
    and errors are those of `backward_gradient`.
    """
    evaluation = loss(batch)
    gradients = torch.autograd.grad(evaluation.value, evaluation.leaves, allow_unused=True)
    return loss.space.flatten(gradients, like=_like(loss))


def _like(loss: TrainingLoss) -> Tensor:
    return torch.empty(0, dtype=loss.dtype, device=loss.device)
