"""The gradient of the mean loss over a list of micro-batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_subspace.collectives import Ranks
from lightning_subspace.micro_batch import MicroBatch
from lightning_subspace.rounds import Turn, rounds
from lightning_subspace.training_loss import TrainingLoss


def mean_gradient(loss: TrainingLoss, batches: Iterable[MicroBatch]) -> Tensor:  # (n,)
    """sum_b w_b grad L_b / sum_b w_b, in this process alone.

    Args:
        loss: an open `TrainingLoss`.
        batches: at least one; their weights need not be normalised.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
    """
    return weighted_gradient(loss, rounds(list(batches), Ranks()))


def weighted_gradient(loss: TrainingLoss, turns: Iterable[Turn]) -> Tensor:  # (n,)
    """sum_b share_b grad L_b, one forward and one backward pass a turn.

    Args:
        loss: an open `TrainingLoss`.
        turns: micro-batches and their shares in the mean, see `rounds`.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
    """
    mean = torch.zeros(loss.space.n, dtype=loss.dtype, device=loss.device)
    for batch, share in turns:
        evaluation = loss(batch)
        gradients = torch.autograd.grad(evaluation.value, evaluation.leaves, allow_unused=True)
        values = loss.space.flatten(gradients, like=mean)
        if share:
            mean.add_(values, alpha=share)
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
