"""Another loss of the same module, inside of an open context.

A validation loss at theta_t needs the copies that the training loss runs on, and all that is off and put back around
them. So it is the same context with another function in it: nothing is copied or walked a second time. Micro-batches
have the random seeds of their places, so that the same loss on the same batches gives the same bits.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lightning_subspace.loss.findings import findings_of
from lightning_subspace.loss.loss_function import LossError, LossFunction, key_of, resolve_loss
from lightning_subspace.loss.training_loss import TrainingLoss


def another_loss(loss: TrainingLoss, loss_fn: LossFunction | None = None) -> TrainingLoss:
    """A loss within the context of an open one.

    Args:
        loss: an open context.
        loss_fn: `loss_fn(module, batch, batch_idx) -> scalar`; by default that of `loss`.

    Raises:
        LossError: for a loss that could not be undone before.
        RuntimeError: when the context is not open.

    Example:
        >>> import torch
        >>> from lightning_subspace.data.micro_batch import MicroBatch
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net, data = nn.Linear(2, 1), MicroBatch(torch.ones(4, 2), weight=4.0, index=0)
        >>> with TrainingLoss(net, ParameterSpace.of(net), lambda m, x, i: m(x).square().mean()) as loss:
        ...     other = another_loss(loss, lambda m, x, i: 2.0 * m(x).square().mean())
        ...     print(bool(other(data).value == 2.0 * loss(data).value))
        True
    """
    if loss._shadow is None:
        raise RuntimeError("another_loss: expected a loss inside of its `with`, got one that is not open.")
    other = copy.copy(loss)
    own = loss._step
    if loss_fn is not None:
        own, other._loss_key = resolve_loss(loss.module, loss_fn), key_of(loss_fn)
        if (refusal := findings_of(loss.module).refusals.get(other._loss_key)) is not None:
            raise LossError(refusal)

    def step(module: nn.Module, batch: Any, batch_idx: int) -> Any:
        output = own(module, batch, batch_idx)
        if output is None:  # not a `NoLossError`, which would have batches of the training loss left out
            raise LossError(
                f"the second loss of {type(module).__name__}: expected a tensor or {{'loss': ...}} for every batch, "
                "got none for one; leave such batches out of those that are given."
            )
        return output

    other._step, other.is_another = step, True
    other.values, other._followed, other.tally = {}, set(), None
    loss.served.add(other)
    return other
