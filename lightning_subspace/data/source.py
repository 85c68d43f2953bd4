"""Where the sample of a run comes from: drawn at the start, given, gathered on the way, or each batch anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from lightning_subspace._lightning import Trainer, training_loaders
from lightning_subspace.data.micro_batch import Weight
from lightning_subspace.data.sample import Sample, sample_of_batches, sample_of_current
from lightning_subspace.data.several_loaders import sample_of_loaders
from lightning_subspace.data.stream import StreamSample
from lightning_subspace.data.training_set import is_drawable
from lightning_subspace.parallel.ranks import Ranks


@dataclass(frozen=True)
class SampleSpec:
    """What a user asks for; see the arguments of `SubspaceMonitor`."""

    sample: int | str | Iterable[Any]
    gradient_sample: int | str
    batch_size: int | None
    weight: Weight | None
    seed: int

    def is_of_the_examples_of(self, other: SampleSpec) -> bool:
        """Whether both give the same examples; given batches are the same if they are the same object."""
        is_named = isinstance(self.sample, int | str) and isinstance(other.sample, int | str)
        same = self.sample == other.sample if is_named else self.sample is other.sample
        return same and replace(self, sample=0) == replace(other, sample=0)


class SampleSource:
    """Gives the sample at each point of a run.

    Attributes:
        request: what was asked for.
        sample: the present one; None as long as there is none.
        failure: why this rank, perhaps alone, has none of the current batch.
    """

    def __init__(self, request: SampleSpec) -> None:
        self.sample: Sample | None = None
        self.failure: Exception | None = None
        self.request = request
        self._first_seen: StreamSample | None = None
        self._ranks = Ranks()
        self._has_seen = False

    @property
    def is_gathered(self) -> bool:
        """Whether the sample comes from the batches of training, so that it has to `see` them."""
        return self.request.sample == "current" or self._first_seen is not None

    @property
    def has_begun(self) -> bool:
        """Whether it has come to the point where there is a sample, if nothing went wrong. The same on all ranks."""
        if self.request.sample == "current":
            return self._has_seen
        return self.sample is not None or self._first_seen is None

    def begin(self, trainer: Trainer, ranks: Ranks, *, continues: bool) -> None:
        """Training starts: draw the sample, or prepare to gather it; one that was gathered is kept if a run goes on.

        Raises:
            SampleError: when the training data cannot give what is asked for.
        """
        asked, first_seen = self.request, self._first_seen
        self.sample = self.failure = self._first_seen = None
        self._has_seen, self._ranks = False, ranks
        if not isinstance(asked.sample, int | str):
            self.sample = sample_of_batches(asked.sample, asked.weight, ranks)
        elif asked.sample != "current":
            loaders = training_loaders(trainer)
            if all(is_drawable(loader) for loader in loaders.flattened):
                self.sample = sample_of_loaders(
                    loaders,
                    *(None if isinstance(size, str) else size for size in (asked.sample, asked.gradient_sample)),
                    batch_size=asked.batch_size,
                    weight=asked.weight,
                    seed=asked.seed,
                    ranks=ranks,
                )
            else:
                anew = StreamSample(asked.sample, asked.gradient_sample, asked.weight, ranks)
                goes_on = continues and first_seen is not None and first_seen.num_ranks == ranks.count
                self._first_seen = first_seen if goes_on and first_seen is not None else anew
                self._first_seen.rebind(ranks)
                self.sample = self._first_seen.sample

    def observe(self, batch: Any, epoch: int) -> None:
        """Training is about to use a batch, into which its training step may write.

        Ranks do not meet for the current batch, of which there is one a step: what goes wrong is kept as `failure`.
        """
        if self.request.sample == "current":
            self.sample, self.failure, self._has_seen = None, None, True
            try:
                self.sample = sample_of_current(batch, self._ranks)
            except Exception as error:
                self.failure = error
        elif self._first_seen is not None:
            self._first_seen.add(batch, epoch)
            self.sample = self._first_seen.sample

    def end(self) -> None:
        """Training has ended: what has been gathered has to do."""
        if self._first_seen is not None:
            self._first_seen.close()
            self.sample = self._first_seen.sample

    def forget(self) -> None:
        """There is no sample, nor will be one from the batches to come: it went wrong on another rank."""
        self.sample = self.failure = self._first_seen = None

    def release(self) -> None:
        """Let go of the examples; what was gathered stays for a run that goes on."""
        self.sample = self.failure = None

    def __getstate__(self) -> dict[str, Any]:
        """The request alone: the examples can be drawn again."""
        return {**vars(self), "sample": None, "failure": None, "_first_seen": None, "_ranks": Ranks()}
