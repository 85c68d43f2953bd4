"""Source of a run's sample: gathered, drawn, given, or the current batch.

| `sample` | where it comes from | anew |
| --- | --- | --- |
| a number, tensors in memory that no hook changes | drawn before the first step | where the data are others |
| a number, anything else | gathered from the batches that training uses | the same, at most once an epoch |
| "all" | the dataset is read | where the data of training are others |
| a loader, a list | read as it is | never |
| "current" | the batch that training is about to use | at every batch |
"""

from __future__ import annotations

from typing import Any

from lightning_subspace._lightning import CombinedLoader, Trainer, training_loaders
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.gathered import Gathered, GatheredSample
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.reading import ReadProgress
from lightning_subspace.data.sample import Sample, SampleSpec, sample_of_current
from lightning_subspace.data.several_loaders import CombinedCounter, sample_of_loaders
from lightning_subspace.data.training_data import contents, is_to_be_gathered, require_batches
from lightning_subspace.data.training_hooks import changes_batches, may_write, other_reading, takes_iterator
from lightning_subspace.data.training_set import batch_size_of, has_epochs
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.failure import Waiting


class SampleSource:
    """The sample at each point of a run.

    Attributes:
        spec: the user's choice.
        epoch: the one that is known to have begun.
        sample: the present sample; None if there is none yet.
        failure: the exception for which this rank, perhaps alone, could not copy the current batch.
        remark: what a user should know about a dataset that was read; None where training reads it alike.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self.sample: Sample | None = None
        self.failure = Waiting()
        self.remark: str | None = None
        self.spec = spec
        self._gathered: GatheredSample | None = None  # what the present sample comes from
        self._trial: GatheredSample | None = None  # of this epoch, to find out whether the data have changed
        self._next: GatheredSample | None = None  # what takes its place once it is full enough
        self._ranks = Ranks()
        self._has_seen = False  # whether there has been a current batch, copied or not
        self.epoch: int | None = None
        self._data: list[tuple[Any, int]] = []  # what the sample is of, see `contents`
        self._is_stale = False
        self._has_hooks = False  # that may change what training gets
        self._doubtful: Sample | None = None  # drawn, but perhaps not what training is given
        self._taken_in: int | None = None  # the epoch in which the sample was taken

    @property
    def is_gathered(self) -> bool:
        """Whether the sample comes from batches given to `observe`."""
        return self.spec.sample == "current" or self._gathered is not None

    @property
    def has_begun(self) -> bool:
        """Whether a sample is due by now; the same on all ranks."""
        if self.spec.sample == "current":
            return self._has_seen
        return self.sample is not None or (self._gathered is None and not self.is_doubtful)

    @property
    def is_doubtful(self) -> bool:
        """Whether the first batch has to show it; see `settle`."""
        return self._doubtful is not None

    @property
    def may_differ(self) -> bool:
        """Whether the sample is drawn, and hooks may change what training gets."""
        return self._has_hooks and self._gathered is None and self._next is None

    @property
    def is_outdated(self) -> bool:
        """Whether `refresh` has something to do; the same on all ranks."""
        return self._is_stale and self._gathered is None

    @property
    def is_renewing(self) -> bool:
        """Whether another sample is on its way; the same on all ranks."""
        return self._is_stale or self._next is not None

    @property
    def fresh(self) -> Sample | None:
        """A sample of the present epoch beside an older one; see `choose`."""
        return None if self._trial is None else self._trial.sample

    @property
    def bound(self) -> str | None:
        """Why the sample is smaller than asked for, in words."""
        return None if self._gathered is None else self._gathered.bound

    @property
    def state(self) -> Gathered | None:
        """What has been gathered, if it is whole on one process."""
        return self._gathered.state if self._gathered is not None and self._ranks.count == 1 else None

    def begin(self, trainer: Trainer, ranks: Ranks, *, continues: bool) -> None:
        """Draw the sample, or start gathering it.

        A run that `continues` keeps what it has gathered.

        Raises:
            SampleError: when the training data cannot give this sample.
            TimeoutError: when reading them takes too long.
        """
        spec, before = self.spec, self._gathered
        self.forget()
        self._has_seen, self._is_stale, self._ranks, self.epoch = False, False, ranks, trainer.current_epoch
        self._has_hooks, self.remark = False, None
        if spec.sample == "current":
            require_batches(trainer)
            return
        if not isinstance(spec.sample, int | str):
            self.sample = sample_of_batches(spec.sample, spec.weight, ranks, ReadProgress(spec.read_timeout), "sample")
            return
        loaders = training_loaders(trainer)
        self._data = contents(loaders)
        self._taken_in = self.epoch
        if continues and before is not None and before.rebind(ranks):
            self._gathered, self.sample = before, before.sample
            return
        if not is_to_be_gathered(spec, loaders):
            self.sample = sample_of_loaders(loaders, spec, ranks)
            if not spec.is_number and (reason := other_reading(loaders.flattened)) is not None:
                self.remark = (
                    f"the dataset was read for sample='all', but {reason}: training may be given other examples or "
                    "batches. A number, such as sample=1024, is gathered from what it is given."
                )
            self._has_hooks = not spec.is_number and may_write(trainer)
            if spec.is_number and changes_batches(trainer) and not takes_iterator(trainer.lightning_module):
                self.sample, self._doubtful, self._has_hooks = None, self.sample, True
            return
        require_batches(trainer)
        self._gathered = self._gathering(loaders)

    def settle(self, trainer: Trainer, *, has_changed: bool) -> None:
        """End the doubt: hooks have changed the first batch, or not."""
        if has_changed and not self.spec.is_number:
            self._has_hooks = False  # told, and there is nothing more to find
        elif has_changed:
            self.sample, self._gathered = None, self._gathering(training_loaders(trainer))
        elif self._doubtful is not None:
            self.sample = self._doubtful
        self._doubtful = None

    def resume(self, trainer: Trainer, state: Gathered | None) -> bool:
        """Go on with a checkpoint's gathered sample; whether there is one."""
        if state is None or self._ranks.count > 1 or not (self._gathered or self.is_doubtful):
            return False
        if self._gathered is None:
            self.settle(trainer, has_changed=True)
        assert self._gathered is not None, "made before"
        self._gathered.resume(state)
        self.sample = self._gathered.sample
        return True

    def begin_epoch(self, trainer: Trainer) -> None:
        """Notice a new epoch, and a sample stale in it. A collective."""
        self.epoch = trainer.current_epoch
        self.end()
        if not self.spec.resample or self.spec.is_given or self.spec.sample == "current":
            return
        if self.sample is None and self._gathered is None:  # reading has failed, and may take as long again
            return
        loaders = training_loaders(trainer)
        data = contents(loaders)
        is_other = len(data) != len(self._data) or any(
            a is not b or m != n for (a, m), (b, n) in zip(data, self._data, strict=True)
        )
        self._data = data
        if self._ranks.broadcast_object(is_other or (self.spec.is_number and any(map(has_epochs, loaders.flattened)))):
            self._is_stale = self._gathered is None and not is_to_be_gathered(self.spec, loaders)
            self.renew(trainer)
        elif self._gathered is not None and self.sample is not None:
            self._trial = self._gathering(loaders, is_small=True)

    def renew(self, trainer: Trainer) -> bool:
        """Take another sample, as this one seems stale; whether there will be.

        Once an epoch at most, and never one that the user has given, or of a whole dataset that is not in memory.
        """
        if not self.spec.resample or not self.spec.is_number or self._taken_in == self.epoch:
            return False
        loaders = training_loaders(trainer)
        if self._gathered is None and not is_to_be_gathered(self.spec, loaders):
            self._is_stale = True
        elif self._next is None:
            self._next = self._gathering(loaders)
        return True

    def choose(self, sample: Sample) -> Sample:
        """Go on with this sample, the present one or the fresh one."""
        trial, self._trial = self._trial, None
        if trial is not None and sample is not self.sample:
            self._gathered, self._taken_in = trial, trial.epoch
            trial.fill_up(self._gradient_sample)
            self.sample = trial.sample
        return sample

    def refresh(self, trainer: Trainer) -> None:
        """Draw a stale sample anew, before a probe. A collective.

        Raises:
            SampleError: when the training data cannot give this sample.
            TimeoutError: when reading them takes too long.
        """
        if self.is_outdated:
            self._is_stale, self._taken_in = False, self.epoch
            self.sample = sample_of_loaders(training_loaders(trainer), self.spec, self._ranks)

    def wants_batches(self) -> bool:
        """Whether the next batch is to be observed."""
        if self.spec.sample == "current":
            return True
        is_filling = self._gathered is not None and not self._gathered.is_complete
        is_trying = self._trial is not None and not self._trial.is_complete
        return self.is_doubtful or self._next is not None or is_filling or is_trying

    def observe(self, batch: Any, epoch: int, batch_idx: int | None = None) -> None:
        """Copy a batch that training is about to use."""
        if self.spec.sample == "current":
            self.sample, self._has_seen = None, True
            self.failure.drop()
            try:
                self.sample = sample_of_current(
                    batch, self._ranks, batch_idx
                )  # a copy: the training step may write into it
            except Exception as error:  # kept, since the ranks do not communicate here: there is one batch a step
                self.failure.keep(error)
            return
        if self._trial is not None:
            self._trial.add(batch, epoch, batch_idx)
        if (gathering := self._next or self._gathered) is not None:
            gathering.add(batch, epoch, batch_idx)
            if gathering.sample is not None:
                self._gathered, self._next, self.sample = gathering, None, gathering.sample
                self._taken_in = gathering.epoch

    def end(self) -> None:
        """End an epoch or training: a smaller sample has to do."""
        if self._gathered is not None:
            self._gathered.close()
            self.sample = self._gathered.sample

    def forget(self) -> None:
        """Drop the sample and gather none: another rank has failed."""
        self.failure.drop()
        self.sample = self._gathered = self._next = self._trial = self._doubtful = None
        self._data = []

    def release(self) -> None:
        """Free the examples, but for those that were gathered."""
        gathered = self._gathered
        self.forget()
        self._gathered = gathered

    @property
    def _gradient_sample(self) -> int:
        assert isinstance(self.spec.gradient_sample, int), "asked for of what is gathered"
        return self.spec.gradient_sample

    def _gathering(self, loaders: CombinedLoader, *, is_small: bool = False) -> GatheredSample:
        spec = self.spec
        assert isinstance(spec.sample, int), "asked for of what is gathered"
        sizes = [batch_size_of(loader) for loader in loaders.flattened]
        is_one = len(sizes) == 1 and loaders.iterables is loaders.flattened[0]
        counter = ExampleCounter(sizes[0]) if is_one else CombinedCounter(sizes)
        size = spec.sample if is_small else self._gradient_sample
        return GatheredSample(spec.sample, size, spec.weight, counter, self._ranks)

    def __getstate__(self) -> dict[str, Any]:
        """The choice alone, since the examples can be drawn again."""
        left: dict[str, Any] = {
            "sample": None,
            "failure": Waiting(),
            "_gathered": None,
            "_next": None,
            "_trial": None,
            "_doubtful": None,
            "_data": [],
            "epoch": None,
        }
        return {**vars(self), **left, "_ranks": Ranks()}
