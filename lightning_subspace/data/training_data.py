"""Data of training: how they give a sample, and when they change."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning_subspace._lightning import CombinedLoader, Trainer
from lightning_subspace._torch import version_of
from lightning_subspace.data.micro_batch import SampleError
from lightning_subspace.data.sample import SampleSpec
from lightning_subspace.data.training_hooks import takes_iterator
from lightning_subspace.data.training_set import batch_size_of, is_in_memory, tensors_in


def is_to_be_gathered(spec: SampleSpec, loaders: CombinedLoader) -> bool:
    """Whether the sample comes from the batches of training."""
    return spec.is_number and not all(map(is_in_memory, loaders.flattened))


def first_step(spec: SampleSpec, trainer: Trainer, loaders: CombinedLoader) -> int:
    """The first step with a sample, as far as the loaders tell.

    It is there when its examples are, or else when the first epoch is over.
    """
    if not is_to_be_gathered(spec, loaders) or not isinstance(spec.sample, int):
        return 0
    sizes = [batch_size_of(loader) for loader in loaders.flattened]
    if not sizes or None in sizes:
        return 0
    examples = trainer.world_size * sum(size for size in sizes if size is not None)
    num_batches = -(-spec.sample // examples)
    filled = (num_batches - 1) // trainer.accumulate_grad_batches
    lengths = [length for loader in loaders.flattened if (length := _num_batches(loader, trainer)) is not None]
    return int(min([filled, *(-(-length // trainer.accumulate_grad_batches) for length in lengths)]))


def _num_batches(loader: Any, trainer: Trainer) -> int | None:
    """Batches of an epoch on a process, at least; None: unknown."""
    try:
        length = len(loader) // trainer.world_size  # what deals the examples to processes may not be there yet
    except (TypeError, NotImplementedError):
        return None
    limit = trainer.limit_train_batches
    return int(length * limit) if isinstance(limit, float) else min(length, limit)


def require_batches(trainer: Trainer) -> None:
    """Refuse a sample of batches where training hands out none.

    Raises:
        SampleError: naming what to pass.
    """
    if takes_iterator(trainer.lightning_module):
        raise SampleError(
            "sample: expected 'all', a loader or a list of batches where training_step takes a dataloader_iter, got "
            "one that comes from the batches of training, which are not seen there."
        )


def contents(loaders: CombinedLoader) -> list[tuple[Any, int]]:
    """What training draws from, and its length; -1 if it has none.

    Of tensors in memory also each of them, with the number of writes to it.
    """
    found: list[tuple[Any, int]] = []
    for loader in loaders.flattened:
        data, length = getattr(loader, "dataset", loader), -1
        with suppress(TypeError, NotImplementedError):  # it has no length, or says so
            length = len(data)
        found.append((data, length))
        found.extend((tensor, version_of(tensor)) for tensor in tensors_in(data))
    return found
