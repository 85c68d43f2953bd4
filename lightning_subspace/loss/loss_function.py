"""Loss functions: (module, batch, batch_idx) -> scalar, by default `training_step`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace._torch import unwrap_fsdp_method
from lightning_subspace.data.training_hooks import takes_iterator

LossFunction = Callable[[nn.Module, Any, int], Tensor]
WAY_OUT = "pass loss_fn=, a function (module, batch, batch_idx) -> scalar tensor."


class LossError(RuntimeError):
    """The training loss is no finite scalar that depends on the parameters."""


class NoLossError(LossError):
    """The training step has returned None: Lightning skips such a batch."""


class ElsewhereError(LossError):
    """A loss depends on an original parameter, beside its copies."""


class WrittenError(LossError):
    """An evaluation has written to what is copied from now on.

    It is to be taken again, on all ranks: a training step may have collectives of its own.
    """


def resolve_loss(module: nn.Module, loss_fn: LossFunction | None) -> LossFunction:
    """`loss_fn`, or `module.training_step` with the arguments that it declares.

    Raises:
        TypeError: without `loss_fn`, when the module has no `training_step` that takes a batch.
    """
    if loss_fn is not None:
        return loss_fn
    name, step = type(module).__name__, getattr(module, "training_step", None)
    if step is None:
        raise TypeError(f"{name} has no training_step; {WAY_OUT}")
    declared = inspect.signature(unwrap_fsdp_method(step) or step).parameters  # the one of FSDP lacks an argument
    if takes_iterator(module):
        raise TypeError(
            f"{name}.training_step takes a dataloader_iter, so no fixed batch can be given to it; {WAY_OUT}"
        )
    positional = [p for p in declared.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_index = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in declared.values())

    def evaluate(module: Any, batch: Any, batch_idx: int) -> Any:
        # Looked up at each call: in a probe, FSDP's method is unwrapped.
        return module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)

    return evaluate


def key_of(loss_fn: LossFunction | None) -> Any:
    """Key of a loss that refers to no module."""
    return getattr(loss_fn, "__code__", loss_fn and type(loss_fn))


def as_scalar(output: Any, name: str, *, finite: bool = True) -> Tensor:
    """The loss, 0-dimensional, in what a training step has returned.

    Raises:
        NoLossError: for None, which Lightning allows; a mapping without a loss it does not.
        LossError: without a scalar loss that depends on the parameters, and is finite if `finite`.
    """
    skipped = output is None
    if isinstance(output, Mapping):
        output = output.get("loss")
    if output is None:
        text = f"the loss of {name}: expected a tensor or {{'loss': ...}}, got none for this batch."
        raise NoLossError(text) if skipped else LossError(text)
    if not isinstance(output, Tensor) or output.numel() != 1:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise LossError(f"the loss of {name}: expected a scalar tensor, got {shape}; average it over the batch.")
    value = output.reshape(())
    if not value.requires_grad:
        raise LossError(f"the loss of {name} does not depend on the parameters (it has no graph); was it detached?")
    if finite and not bool(torch.isfinite(value)):
        raise LossError(f"the loss of {name} is {value.item()} on the fixed sample; nothing can be measured here.")
    return value
