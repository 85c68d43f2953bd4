"""Methods of a user on the way of a batch to `training_step`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lightning_subspace._lightning import Trainer, undeclared, undistributed
from lightning_subspace._torch import unwrap_fsdp_method
from lightning_subspace.data.training_set import SAMPLERS

TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
START = "on_train_batch_start"
PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_subspace", "torch")


def changes_batches(trainer: Trainer) -> bool:
    """Whether a hook of the user's may change a batch.

    Hooks are those of the module, the data module and the callbacks.
    """
    module, data = trainer.lightning_module, undeclared(trainer, "datamodule")
    places = [(module, (*TRANSFER, START)), (data, TRANSFER)]
    places += [(callback, (START,)) for callback in undeclared(trainer, "callbacks")]
    return any(_is_own(place, name) for place, names in places for name in names)


def may_write(trainer: Trainer) -> bool:
    """Whether a hook may write to batches that no other one changes."""
    module, data = trainer.lightning_module, undeclared(trainer, "datamodule")
    is_moved_alone = not any(_is_own(place, name) for place in (module, data) for name in TRANSFER)
    return is_moved_alone and any(_is_own(place, START) for place in (module, *undeclared(trainer, "callbacks")))


def other_reading(loaders: Sequence[Any]) -> str | None:
    """Why training may be given other examples than its datasets hold."""
    for loader in loaders:
        if type(loader).__iter__ is not DataLoader.__iter__:
            return f"{type(loader).__name__} has an __iter__ of its own"
        for sampler in (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", loader.sampler)):
            inner, _ = undistributed(sampler)
            if type(inner) not in (BatchSampler, type(None), *SAMPLERS) and not hasattr(inner, "indices"):
                return f"a {type(inner).__name__} may leave out examples, or draw some more often"
    return None


def takes_iterator(module: Any) -> bool:
    """Whether `training_step` takes a `dataloader_iter`, and fetches its batches."""
    step = module.training_step
    return "dataloader_iter" in inspect.signature(unwrap_fsdp_method(step) or step).parameters  # FSDP's lacks one


def _is_own(place: object, name: str) -> bool:
    """Whether a method is defined outside of Lightning."""
    if name in getattr(place, "__dict__", {}):
        return True
    owner = next((cls for cls in type(place).__mro__ if name in vars(cls)), None)
    return owner is not None and owner.__module__.split(".")[0] not in PACKAGES
