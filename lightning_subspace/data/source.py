"""Source of a run's sample: drawn, given, gathered, or the current batch."""

from __future__ import annotations

from typing import Any

from lightning_subspace._lightning import Trainer, training_loaders
from lightning_subspace.data.sample import Sample, SampleSpec, sample_of_batches, sample_of_current
from lightning_subspace.data.several_loaders import sample_of_loaders
from lightning_subspace.data.stream import StreamSample
from lightning_subspace.data.training_set import is_drawable
from lightning_subspace.parallel.ranks import Ranks


class SampleSource:
    """The sample at each point of a run.

    Attributes:
        spec: the user's choice.
        sample: the present sample; None if there is none yet.
        failure: the exception for which this rank, perhaps alone, could not copy the current batch.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.sample: Sample | None = None
        self.failure: Exception | None = None
        self.spec = spec
        self._stream: StreamSample | None = None
        self._ranks = Ranks()
        self._has_seen = False  # whether there has been a current batch, copied or not

    @property
    def is_gathered(self) -> bool:
        """Whether the sample comes from batches given to `observe`."""
        return self.spec.sample == "current" or self._stream is not None

    @property
    def has_begun(self) -> bool:
        """Whether a sample is due by now; the same on all ranks."""
        if self.spec.sample == "current":
            return self._has_seen
        return self.sample is not None or self._stream is None

    def begin(self, trainer: Trainer, ranks: Ranks, *, continues: bool) -> None:
        """Draw the sample, or start gathering it.

        A run that `continues` keeps what it has gathered.

        Raises:
            SampleError: when the training data cannot give this sample.
        """
        spec, before = self.spec, self._stream
        self.sample = self.failure = self._stream = None
        self._has_seen, self._ranks = False, ranks
        if spec.sample == "current":
            return
        if not isinstance(spec.sample, int | str):
            self.sample = sample_of_batches(spec.sample, spec.weight, ranks)
            return
        loaders = training_loaders(trainer)
        if all(is_drawable(loader) for loader in loaders.flattened):
            self.sample = sample_of_loaders(loaders, spec, ranks)
            return
        if not (continues and before is not None and before.rebind(ranks)):
            before = StreamSample(spec.sample, spec.gradient_sample, spec.weight, ranks)
        self._stream, self.sample = before, before.sample

    def observe(self, batch: Any, epoch: int) -> None:
        """Copy a batch that training is about to use."""
        if self.spec.sample == "current":
            self.sample, self.failure, self._has_seen = None, None, True
            try:
                self.sample = sample_of_current(batch, self._ranks)  # a copy: the training step may write into it
            except Exception as error:  # kept, since the ranks do not communicate here: there is one batch a step
                self.failure = error
        elif self._stream is not None:
            self._stream.add(batch, epoch)
            self.sample = self._stream.sample

    def end(self) -> None:
        """End training: a smaller sample than asked for has to do."""
        if self._stream is not None:
            self._stream.close()
            self.sample = self._stream.sample

    def forget(self) -> None:
        """Drop the sample and gather none: another rank has failed."""
        self.sample = self.failure = self._stream = None

    def release(self) -> None:
        """Free the examples, but for a stream's."""
        self.sample = self.failure = None

    def __getstate__(self) -> dict[str, Any]:
        """The choice alone, since the examples can be drawn again."""
        return {**vars(self), "sample": None, "failure": None, "_stream": None, "_ranks": Ranks()}
