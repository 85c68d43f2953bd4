"""Objects that a training step can reach by the trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_subspace._lightning import Trainer, attached_trainer, combined_loader, is_a, undeclared
from lightning_subspace.state.packages import is_ours


def extra_roots(module: nn.Module) -> list[Any]:
    """Objects that a training step can write to by its trainer.

    Trainer, strategy, loops and their counts, data module, loaders with samplers and data sets, optimizers, schedulers,
    and the callbacks but for this package's own and progress bars, which other threads draw.
    """
    trainer = attached_trainer(module)
    if trainer is None:
        return []
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    callbacks = [c for c in undeclared(trainer, "callbacks") if not is_a(c, "ProgressBar") and not is_ours(c)]
    datamodule = undeclared(trainer, "datamodule")
    others = [trainer.strategy, *_loops(trainer), *callbacks, *_parts_of_loaders(trainer)]
    found = [trainer, *trainer.optimizers, *schedulers, *([] if datamodule is None else [datamodule]), *others]
    return [value for value in found if hasattr(value, "__dict__")]


def _loops(trainer: Trainer) -> list[Any]:
    """The loops of `fit`, and the objects that count their progress."""
    found: list[Any] = [trainer.fit_loop]
    for value in found:  # it grows
        found += [inside for inside in vars(value).values() if is_a(inside, "_Loop") or is_a(inside, "_BaseProgress")]
    return found


def _parts_of_loaders(trainer: Trainer) -> list[Any]:
    """Samplers and data sets of the loaders of training."""
    combined = combined_loader(trainer)
    names = ("sampler", "batch_sampler", "dataset")
    loaders = () if combined is None else combined.flattened
    return [getattr(loader, name, None) for loader in loaders for name in names]
