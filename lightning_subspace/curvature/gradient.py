"""The gradient of the mean loss over a list of micro-batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_subspace.training_loss import MicroBatch, TrainingLoss


def mean_gradient(loss: TrainingLoss, batches: Iterable[MicroBatch]) -> Tensor:  # (n,)
    """sum_b w_b grad L_b / sum_b w_b, one forward and one backward pass a micro-batch.

    Args:
        loss: an open `TrainingLoss`.
        batches: at least one; their weights need not be normalised.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
    """
    batches = list(batches)
    total = sum(batch.weight for batch in batches)
    mean = torch.zeros(loss.space.n, dtype=loss.dtype, device=loss.device)
    for batch in batches:
        evaluation = loss(batch)
        gradients = torch.autograd.grad(evaluation.value, evaluation.leaves, allow_unused=True)
        mean.add_(loss.space.flatten(gradients, like=mean), alpha=batch.weight / total)
    return mean


def backward_gradient(loss: TrainingLoss, batch: MicroBatch) -> Tensor:  # (n,)
    """The gradient of one micro-batch by `backward()`, as training takes it.

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
    like = torch.empty(0, dtype=loss.dtype, device=loss.device)
    return loss.space.flatten([leaf.grad for leaf in evaluation.leaves], like=like)
