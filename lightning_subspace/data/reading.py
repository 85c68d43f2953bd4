"""Reading of a dataset: told, limited in time, and without a trace.

It is done only where a user has asked for it. Iterating the trainer's loader would change what training sees next, so
a loader of our own reads. It has the workers of the user's; where there are none, it reads in this process, which puts
back random numbers, the attributes of the dataset and the positions of its files.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_subspace._lightning import rank_zero_info
from lightning_subspace.data.training_set import is_in_memory
from lightning_subspace.state.object_graph import restore, walk
from lightning_subspace.state.packages import packages_of
from lightning_subspace.state.rng import preserved_random_state, seed_generators

TELL_EVERY = 10.0  # seconds
READ_TIMEOUT = 600.0  # seconds that a training may wait for its sample


class ReadProgress:
    """Progress of a reading, and its limit.

    Args:
        limit: seconds; infinite for none.
        clock: seconds, monotonic.

    Attributes:
        count: number of examples to be read; None where it is not known.

    Example:
        >>> now = [0.0]
        >>> progress = ReadProgress(60.0, clock=lambda: now[0])
        >>> progress.count = 8
        >>> progress.check()
        >>> now[0] = 61.0
        >>> progress.check()
        Traceback (most recent call last):
        TimeoutError: read_timeout: expected the sample to be read within 60 s, got 0 of 8 examples by then; ...
    """

    def __init__(self, limit: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.count: int | None = None
        self._limit = limit
        self._clock = clock
        self._began = self._told = clock()
        self._seen = 0
        self._has_begun = False

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self._began + self._limit - self._clock()

    def begin(self, num_workers: int) -> None:
        """Say once what is read, and where."""
        if self._has_begun:
            return
        self._has_begun = True
        where = f"in {num_workers} workers" if num_workers else "in this process, as the loader has no workers"
        limit = "" if math.isinf(self._limit) else f", for at most {self._limit:g} s"
        self._tell(f"reading {self._of()} for the sample, {where}{limit}")

    def add(self, count: int) -> None:
        """So many more examples are read."""
        self._seen += count
        self.check()

    def check(self) -> None:
        """Say now and then how far it is, and end in time.

        Raises:
            TimeoutError: behind the limit.
        """
        now = self._clock()
        if now - self._began > self._limit:
            raise TimeoutError(self.refusal)
        if now - self._told >= TELL_EVERY:
            self._told = now
            self._tell(f"{self._seen:,} of {self._of()} read for the sample after {now - self._began:.0f} s")

    @property
    def refusal(self) -> str:
        """What a reading that takes too long ends with."""
        return (
            f"read_timeout: expected the sample to be read within {self._limit:g} s, got {self._seen:,} of "
            f"{self._of()} by then; pass a larger one, or a number as sample=, whose examples come from training."
        )

    def _of(self) -> str:
        return "the examples" if self.count is None else f"{self.count:,} examples"

    @staticmethod
    def _tell(text: str) -> None:
        rank_zero_info(f"lightning_subspace: {text}.")


def read(
    loader: DataLoader[Any],
    units: Sequence[Any] | None,
    generator: torch.Generator,
    progress: ReadProgress,
) -> Iterator[Any]:
    """Load and collate as a loader does.

    Nothing is said of tensors in memory.

    Args:
        loader: gives dataset, collate function and workers; it is not iterated.
        units: for each batch its indices, or one index if items are batches; None reads an iterable dataset to its end.
        generator: draws the seeds of the workers, and of what is random in this process.
        progress: of the reading.

    Yields:
        One batch for each unit.

    Raises:
        TimeoutError: behind the limit.
    """  # noqa: DOC501  # the RuntimeError is a dataset's own
    batching: dict[str, Any] = {"batch_size": None, "sampler": units}
    if units is None:
        batching = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        batching = {"batch_sampler": units}
    is_quick = is_in_memory(loader)
    num_workers = 0 if is_quick else loader.num_workers
    options: dict[str, Any] = {}
    if num_workers:
        options = {
            "num_workers": num_workers,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": 0.0 if math.isinf(progress.left) else max(progress.left, 1.0),
        }
    if not is_quick:
        progress.begin(num_workers)
    dataset = loader.dataset if num_workers or units is None else _Watched(loader.dataset, progress)
    own: DataLoader[Any] = DataLoader(dataset, collate_fn=loader.collate_fn, generator=generator, **options, **batching)
    if not num_workers:
        yield from _in_this_process(own, loader, generator)
        return
    try:
        yield from own
    except RuntimeError as error:
        if "timed out" in str(error):  # torch's own words: a worker hangs
            raise TimeoutError(progress.refusal) from error
        raise


class _Watched(Dataset[Any]):
    """A dataset whose reading ends in time."""

    def __init__(self, dataset: Any, progress: ReadProgress) -> None:
        self._dataset = dataset
        self._progress = progress
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._items

    def __getitem__(self, index: Any) -> Any:
        self._progress.check()
        return self._dataset[index]

    def _items(self, indices: list[Any]) -> Any:
        self._progress.check()
        return self._dataset.__getitems__(indices)


def _in_this_process(own: DataLoader[Any], loader: DataLoader[Any], generator: torch.Generator) -> Iterator[Any]:
    """Load here, as if nothing had been read.

    Between two batches random numbers are put back as well: whoever takes the batches may draw some.

    Yields:
        The batches.
    """
    seed = int(torch.randint(1 << 31, (), generator=generator))
    with unmoved([loader.dataset, loader.collate_fn]):
        batches = iter(own)
        for number in range(1 << 62):
            with preserved_random_state():
                seed_generators(seed + number)
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch


@contextmanager
def unmoved(readers: Sequence[Any], seen: Sequence[Any] = ()) -> Iterator[None]:
    """Put back attributes, generators and file positions behind a block.

    Args:
        readers: a dataset, a collate function, a sampler. What a dataset holds by index is not looked at.
        seen: what they hold and is left alone.
    """
    attributes = [vars(reader) for reader in readers if hasattr(reader, "__dict__")]
    found = walk(attributes, packages_of(readers), map(id, seen))
    with ExitStack() as stack:
        stack.callback(restore, found.containers, found.generators)
        for file in found.iterators:
            if isinstance(file, io.IOBase) and not file.closed and file.seekable():
                stack.callback(file.seek, file.tell())
        yield
