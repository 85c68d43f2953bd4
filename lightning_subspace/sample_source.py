"""Where the sample of a run comes from: drawn at the start, given, gathered on the way, or each batch anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning_subspace._lightning import training_loaders
from lightning_subspace.combined import sample_of_loaders
from lightning_subspace.first_seen import FirstSeen
from lightning_subspace.pool import is_drawable
from lightning_subspace.sample import Sample, Weight, sample_of_batches, sample_of_current


@dataclass(frozen=True)
class SampleRequest:
    """What a user asks for; see the arguments of `SubspaceMonitor`."""

    sample: int | str | Iterable[Any]
    gradient_sample: int | str
    batch_size: int | None
    weight: Weight | None
    seed: int


class SampleSource:
    """Gives the sample at each point of a run.

    Attributes:
        sample: the present one; None as long as there is none.
    """

    def __init__(self, request: SampleRequest) -> None:
        self.sample: Sample | None = None
        self._request = request
        self._first_seen: FirstSeen | None = None

    def begin(self, trainer: Any, *, continues: bool) -> None:
        """Training starts: draw the sample, or prepare to gather it; one that was gathered is kept if a run goes on.

        Raises:
            SampleError: when the training data cannot give what is asked for.
        """
        asked, first_seen = self._request, self._first_seen
        self.sample = self._first_seen = None
        if not isinstance(asked.sample, int | str):
            self.sample = sample_of_batches(asked.sample, asked.weight)
        elif asked.sample != "current":
            loaders = training_loaders(trainer)
            if all(is_drawable(loader) for loader in loaders.flattened):
                self.sample = sample_of_loaders(
                    loaders,
                    *(None if isinstance(size, str) else size for size in (asked.sample, asked.gradient_sample)),
                    batch_size=asked.batch_size,
                    weight=asked.weight,
                    seed=asked.seed,
                )
            else:
                anew = FirstSeen(asked.sample, asked.gradient_sample, asked.weight)
                self._first_seen = first_seen if continues and first_seen is not None else anew
                self.sample = self._first_seen.sample

    def see(self, batch: Any, epoch: int) -> None:
        """Training is about to use a batch, into which its training step may write."""
        if self._request.sample == "current":
            self.sample = None
            self.sample = sample_of_current(batch, lambda _: 1.0)  # one batch: any weight is the same mean
        elif self._first_seen is not None:
            self._first_seen.see(batch, epoch)
            self.sample = self._first_seen.sample

    def end(self) -> None:
        """Training has ended: what has been gathered has to do."""
        if self._first_seen is not None:
            self._first_seen.close()
            self.sample = self._first_seen.sample

    def release(self) -> None:
        """Let go of the examples; what was gathered stays for a run that goes on."""
        self.sample = None

    def __getstate__(self) -> dict[str, Any]:
        """The request alone: the examples can be drawn again."""
        return {**vars(self), "sample": None, "_first_seen": None}
