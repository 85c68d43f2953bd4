"""What is needed of Lightning beyond its documented callback interface, each with its reason.

Seen working with lightning 2.6.6. Nothing else in the package touches a private attribute of Lightning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

__all__ = [
    "Callback",
    "EarlyStopping",
    "MisconfigurationException",
    "ModelCheckpoint",
    "attached_trainer",
    "muted",
    "rank_zero_info",
    "rank_zero_warn",
    "transfer",
]


def attached_trainer(module: nn.Module) -> Any:
    """The trainer of a LightningModule, or None. `module.trainer` raises when there is none, `_trainer` does not."""
    return getattr(module, "_trainer", None)


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Swallow what training_step logs: `self.log`, `self.log_dict`, `self.print` and `self.logger.experiment`.

    The methods are covered on the instances of every LightningModule in the tree, found by their attribute
    `_current_fx_name` since classes of both namespaces may meet; the trainer's loggers make way for dummies that
    accept anything. `self.log` must not reach the result collection: it would enter the epoch's averages.
    """
    trainer = attached_trainer(module)
    with ExitStack() as stack:
        for m in module.modules():
            if hasattr(m, "_current_fx_name"):
                for name in ("log", "log_dict", "print"):
                    _cover(stack, m, name)
        if trainer is not None:
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        yield


def transfer(batch: Any, module: nn.Module, device: torch.device) -> Any:
    """Move a batch to the device as the trainer does, through the transfer hooks of the module or the data module."""
    trainer = attached_trainer(module)
    if trainer is not None and trainer.lightning_module is module:
        return trainer.strategy.batch_to_device(batch, device=device, dataloader_idx=0)
    if hasattr(module, "transfer_batch_to_device"):
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)
    return move_data_to_device(batch, device)


def _cover(stack: ExitStack, module: nn.Module, name: str) -> None:
    own = vars(module)
    if name in own:
        stack.callback(own.__setitem__, name, own[name])
    else:
        stack.callback(own.pop, name, None)
    own[name] = _ignore


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Accept a log call and do nothing."""
