"""Samples gathered in training: training is unchanged, and what is measured is what `training_step` was given."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset, TensorDataset

from lightning_subspace import SubspaceMonitor, SubspaceProjection
from lightning_subspace.data.training_set import TrainingSet, is_in_memory
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.modules import BATCH, EXAMPLES, examples
from tests.thorough import covering, usual
from tests.works_with.numbered import Numbered, by_index, everything, indices, loader
from tests.works_with.same_run import Classifier, KeepSample, compare

pytestmark = pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step")  # two eigenvalues may lie close together


@pytest.fixture(autouse=True)
def _probes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither changes a sample; test_fidelity.py has runs with a self-check."""
    leave_self_check_out(monkeypatch)
    leave_error_bar_out(monkeypatch)


class Recording(Classifier):
    """Keeps what `training_step` was given, outside of probes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.given: list[list[torch.Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.strategy.__dict__.get("training_step") is None and not _in_probe(self):
            self.given.append([part.clone() for part in self.read(batch)])
        return super().training_step(batch, batch_idx)


def _in_probe(module: Classifier) -> bool:
    return "log" in vars(module)  # a probe covers the methods that log


def equal(sample: Any, given: list[list[torch.Tensor]]) -> bool:
    """Whether the micro-batches are the first batches that training was given."""
    batches = everything(sample)
    return len(batches) <= len(given) and all(
        torch.equal(a, b)
        for batch, seen in zip(batches, given, strict=False)
        for a, b in zip(batch.data, seen, strict=True)
    )


def run(tmp_path: Any, data: Any, module: Any = Recording, monitor: Any = None, **options: Any) -> Any:
    """A compared run, and the module that was watched. A sample is the same for every k, so that none is the usual."""
    made, options = [], {**options, "monitor": {"k": 0, **(monitor or {})}}

    def make() -> Any:
        made.append(module())
        return made[-1]

    return compare(tmp_path, make, data, **options), made[-1]


# -- what training really draws ---------------------------------------------------------------------------------------


class Identities(Sampler):
    """P x K batches: every batch has four examples of each of two classes, drawn anew."""

    def __iter__(self):
        labels = examples().tensors[1]
        for _ in range(5):
            classes = torch.randperm(3)[:2].tolist()
            own = [(labels == one).nonzero().flatten() for one in classes]
            yield [int(i) for found in own for i in found[torch.randint(len(found), (4,))]]

    def __len__(self):
        return 5


class OwnLoader(DataLoader):
    """A loader whose batches are scaled on the way out."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield 3.0 * x, y


LOADERS = {
    "a batch sampler of the user's own": lambda: by_index(batch_sampler=Identities()),
    "a list as sampler": lambda: by_index(sampler=[3, 1, 2, 0] * 8),
    "a loader with an __iter__ of its own": lambda: OwnLoader(Numbered(), batch_size=BATCH, shuffle=True),
    "examples by index": lambda: by_index(shuffle=True),
    "tensors with a collate function": lambda: loader(examples(), collate_fn=lambda items: _doubled(items)),
    "a short last batch": lambda: loader(Numbered(0, 28), batch_size=10),
    "no last batch": lambda: loader(Numbered(0, 28), batch_size=10, drop_last=True),
}


def _doubled(items: Any) -> Any:
    x, y = zip(*items, strict=True)
    return 2.0 * torch.stack(x), torch.stack(y)


# Those that are the loaders of other tests here and in test_data.py.
ELSEWHERE = ("examples by index", "tensors with a collate function")


@pytest.mark.parametrize("case", usual([case for case in LOADERS if case not in ELSEWHERE], thorough=ELSEWHERE))
def test_the_sample_is_what_training_draws(case, tmp_path):
    watched, module = run(tmp_path, LOADERS[case])
    assert watched.differing == []
    assert equal(watched.sample, module.given)
    assert sum(batch.size for batch in watched.sample.hessian) >= 16
    first = -(-16 // LOADERS[case]().batch_size if LOADERS[case]().batch_size else 8) - 1
    assert watched.steps[0] == max(first, 1)


class OneSize(Recording):
    """Refuses every batch of another size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def training_step(self, batch, batch_idx):
        if len(batch[0]) != self.size:
            raise ValueError(f"this model has batches of {self.size}")
        return super().training_step(batch, batch_idx)


def test_a_model_of_one_batch_size_is_measured(tmp_path):
    for data in (
        lambda: loader(Numbered(0, 28), batch_size=10, drop_last=True, shuffle=True),
        lambda: loader(TensorDataset(*(c[:28] for c in examples().tensors)), batch_size=10, drop_last=True),
    ):
        watched, _ = run(tmp_path, data, lambda: OneSize(10), monitor={"sample": 5, "gradient_sample": 20})
        assert watched.differing == []
        assert [batch.size for batch in everything(watched.sample)] == [10, 10]


# -- hooks that change the batch --------------------------------------------------------------------------------------


class ByStart(Recording):
    def on_train_batch_start(self, batch, batch_idx):
        batch[0].mul_(2.0)


class ByTransfer(Recording):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + torch.rand(1), batch[1]]  # augmented "on the device"


class Mixing(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].copy_(batch[0].flip(0))


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(examples())

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [-batch[0], batch[1]]


HOOKS = {
    "the module's on_train_batch_start": (ByStart, lambda: loader(examples()), list),
    "the module's on_after_batch_transfer": (ByTransfer, lambda: loader(examples()), list),
    "a callback behind the monitor": (Recording, lambda: loader(examples()), lambda: [Mixing()]),
    "the data module's hook": (Recording, Data, list),
}


@pytest.mark.parametrize("case", HOOKS)
def test_the_sample_is_taken_behind_all_hooks(case, tmp_path):
    module, data, callbacks = HOOKS[case]
    watched, seen = run(tmp_path, data, module, callbacks=callbacks, max_epochs=1)
    assert watched.differing == []
    assert watched.steps[0] == 1  # tensors in memory, but not those that training sees
    assert equal(watched.sample, seen.given)


class Later(Callback):
    """Changes batches from one on."""

    def __init__(self, first: int) -> None:
        self.first, self.seen = first, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen += 1
        if self.seen >= self.first:
            batch[0].mul_(3.0)


@pytest.mark.parametrize(("first", "epochs"), usual([(2, 4), (14, 5)], thorough=[(3, 4), (30, 9)]))
def test_a_hook_that_sets_in_later_is_noticed(first, epochs, tmp_path):
    with pytest.warns(UserWarning, match=r"a hook .* has changed a batch at step .* gathered behind the hooks"):
        watched, module = run(
            tmp_path,
            lambda: loader(shuffle=True),
            callbacks=lambda: [Later(first)],
            max_epochs=epochs,
            monitor={"seed": 1, "every_n_steps": epochs},
        )
    assert watched.differing == []
    assert watched.steps[0] == 0
    found = watched.sample.hessian[0]
    assert any(torch.equal(found.data[0], seen[0]) for seen in module.given[first - 1 :])
    assert not any(torch.equal(found.data[0], seen[0]) for seen in module.given[: first - 1])


def test_a_hook_that_all_of_a_dataset_does_not_have_is_told_once(tmp_path):
    with pytest.warns(UserWarning, match=r"a hook .* at step 2; the sample has none of that.*sample=1024") as told:
        watched, _ = run(tmp_path, by_index, callbacks=lambda: [Later(3)], monitor={"sample": "all"})
    assert watched.differing == []
    assert len([one for one in told if "a hook" in str(one.message)]) == 1


@pytest.mark.parametrize("case", ["a batch sampler of the user's own", "a loader with an __iter__ of its own"])
def test_all_of_a_dataset_is_not_what_such_a_loader_gives(case, tmp_path):
    with pytest.warns(UserWarning, match="the dataset was read for sample='all', but .* sample=1024, is gathered"):
        watched, _ = run(tmp_path, LOADERS[case], monitor={"sample": "all", "batch_size": BATCH}, max_epochs=1)
    assert watched.differing == []


@pytest.mark.parametrize("sample", [16, "current"])
def test_a_step_is_evaluated_with_the_index_that_it_had(sample, tmp_path):
    class Alternating(Recording):
        def training_step(self, batch, batch_idx):
            return (1 + batch_idx % 2) * super().training_step(batch, batch_idx)

    watched, _ = run(
        tmp_path, by_index, Alternating, monitor={"sample": sample, "gradient_sample": 16, "every_n_steps": 3}
    )
    assert watched.differing == []
    for step, found in watched.samples.items():
        expected = [0, 1] if sample == 16 else [max(step - 1, 0) % 4]
        assert [batch.batch_idx for batch in found.hessian] == expected


def test_a_batch_that_is_skipped_is_not_in_the_sample(tmp_path):
    class Skipping(Recording):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    watched, module = run(tmp_path, by_index, Skipping, max_epochs=4)
    assert watched.differing == []
    assert equal(watched.sample, module.given)
    assert len(everything(watched.sample)) == 1  # an epoch has one


# -- nothing is read beside training ----------------------------------------------------------------------------------


class Pooled(Numbered):
    """Its examples come from a thread, which a forked process does not have."""

    def __init__(self):
        super().__init__()
        self.pool, self.lock, self.served = ThreadPoolExecutor(1), threading.Lock(), 0

    def __getitem__(self, index):
        with self.lock:
            self.served += 1
            return self.pool.submit(super().__getitem__, index).result(timeout=20)


class Unpicklable:
    """A batch with a function, which no other process can send."""

    def __init__(self, x, y):
        self.x, self.y, self.scale = x, y, lambda value: value


def _unpicklable(items: Any) -> Any:
    x, y = zip(*items, strict=True)
    return Unpicklable(torch.stack(x), torch.stack(y))


@pytest.mark.parametrize("sample", usual(["all"], thorough=[16]))
def test_a_dataset_with_a_thread_is_read_in_no_other_process(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    datasets = []

    def data():
        datasets.append(Pooled())
        return loader(datasets[-1])

    watched, _ = run(tmp_path, data, monitor={"sample": sample})
    assert watched.differing == []
    assert len(watched.steps) >= 4
    assert not multiprocessing.active_children()
    assert datasets[1].served == datasets[0].served == 2 * EXAMPLES  # what was read beside is put back


@pytest.mark.parametrize("sample", usual([16], thorough=["all"]))
def test_a_batch_that_cannot_be_pickled_is_measured(sample, tmp_path):
    def read(batch):
        return batch.scale(batch.x), batch.y

    watched = compare(
        tmp_path, lambda: Classifier(read), lambda: by_index(collate_fn=_unpicklable), monitor={"sample": sample}
    )
    assert watched.differing == []
    assert len(watched.steps) >= 4


class Listing(Sampler):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))

    def __len__(self):
        return self.count


class Endless(Dataset):
    def __len__(self):
        return 30_000_000

    def __getitem__(self, index):
        return Numbered()[index % EXAMPLES]


@pytest.mark.parametrize("shuffle", [False, True])
def test_indices_of_a_huge_dataset_are_not_listed(shuffle):
    import tracemalloc

    wide = TensorDataset(torch.zeros(1, 1).expand(30_000_000, 1))
    assert is_in_memory(DataLoader(wide, batch_size=8, shuffle=shuffle))
    tracemalloc.start()
    found = TrainingSet.of(DataLoader(wide, batch_size=8, shuffle=shuffle))
    order = found.order(torch.Generator().manual_seed(0), 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(order)) == 64
    assert max(order) > 1_000_000
    assert found.population == 30_000_000
    assert peak < 1_000_000


IN_MEMORY = {
    "tensors": (lambda: examples(), True),
    "a subset": (lambda: Subset(examples(), range(20)), True),
    "several": (lambda: ConcatDataset([examples(), Subset(examples(1), [1, 2])]), True),
    "a tensor": (lambda: torch.zeros(8, 2), True),
    "a subset of something else": (lambda: Subset(Numbered(), range(20)), False),
    "a class derived from TensorDataset": (lambda: type("Own", (TensorDataset,), {})(torch.zeros(8, 2)), False),
}


@pytest.mark.parametrize("case", IN_MEMORY)
def test_only_tensors_in_memory_are_drawn(case):
    make, expected = IN_MEMORY[case]
    assert is_in_memory(loader(make(), shuffle=True)) is expected
    assert not is_in_memory(loader(make(), batch_size=None))


# -- stale samples ----------------------------------------------------------------------------------------------------


class Reloaded(Recording):
    """Data that are others in every epoch."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data_of = data

    def train_dataloader(self):
        return loader(self.data_of(self.trainer.current_epoch))


def _of_epoch(kind: Any) -> Any:
    return lambda epoch: kind(8 * epoch, 8)


@pytest.mark.parametrize(
    ("kind", "resample"), covering([Numbered, lambda first, count: Numbered(first, count).tensors], [True, False])
)
def test_data_that_are_reloaded(kind, resample, tmp_path):
    watched, _ = run(
        tmp_path,
        lambda: None,
        lambda: Reloaded(_of_epoch(kind)),
        monitor={"k": 2, "sample": 8, "gradient_sample": 8, "every_n_steps": 1, "resample": resample},
        max_epochs=4,
        reload_dataloaders_every_n_epochs=1,
    )
    assert watched.differing == []
    # Drawn ones are drawn anew before the probe; gathered ones from the batch on, whose step is the next one.
    of_step = {step: min(indices(sample.hessian)) for step, sample in watched.samples.items()}
    expected = {0: 0, 1: 0, 2: 8, 3: 16, 4: 24}
    assert of_step == (expected if resample else dict.fromkeys(expected, 0))
    overlaps = [row["overlap_previous"] for row in watched.monitor.to_rows()[1:]]
    assert len(overlaps) == 4  # they go on over the change


def test_tensors_that_are_reloaded_as_something_else_are_gathered(tmp_path):
    def of_epoch(epoch):
        return Numbered(8 * epoch, 8) if epoch else Numbered(0, 8).tensors

    watched, _ = run(
        tmp_path,
        lambda: None,
        lambda: Reloaded(of_epoch),
        monitor={"sample": 8, "gradient_sample": 8, "every_n_steps": 1},
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
    )
    assert watched.differing == []
    assert {step: min(indices(sample.hessian)) for step, sample in watched.samples.items()} == {0: 0, 1: 0, 2: 8, 3: 16}


class Harder(Sampler):
    """A curriculum: in epoch e the examples from 8 e on."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(8 * self.epoch, 8 * self.epoch + 8))

    def __len__(self):
        return 8


def test_a_sampler_with_an_epoch(tmp_path):
    watched, _ = run(
        tmp_path,
        lambda: by_index(sampler=Harder()),
        monitor={"sample": 8, "gradient_sample": 8, "every_n_steps": 1},
        max_epochs=4,
    )
    assert watched.differing == []
    assert [min(indices(sample.hessian)) for sample in watched.samples.values()] == [0, 0, 8, 16, 24]


class InPlace(Recording):
    """A curriculum by hand: the examples grow in the same dataset."""

    def __init__(self, tensors: bool) -> None:
        super().__init__()
        self.dataset = Numbered()
        self.tensors = self.dataset.tensors if tensors else None

    def train_dataloader(self):
        return loader(self.dataset if self.tensors is None else self.tensors, shuffle=True)

    def on_train_epoch_start(self):
        if self.current_epoch == 3:
            (self.dataset.x if self.tensors is None else self.tensors.tensors[0]).mul_(30.0)


@pytest.mark.parametrize("sample", usual([16], thorough=["all"]))
def test_tensors_that_are_written_to_are_read_anew(sample, tmp_path):
    own = {"k": 2, "sample": sample, "every_n_steps": 4}
    watched, _ = run(tmp_path, lambda: None, lambda: InPlace(True), monitor=own, max_epochs=6)
    assert watched.differing == []
    largest = {step: float(found.hessian[0].data[0].abs().max()) for step, found in watched.samples.items()}
    assert largest[24] == pytest.approx(30.0 * largest[12])
    trusted = [record for record in watched.monitor.history if record.subspace.trusted]
    assert trusted[0].step < 12 < trusted[-1].step
    assert all("overlap_previous" in record.metrics for record in trusted[1:])  # over the change


def test_a_dataset_that_is_written_to_is_gathered_anew(tmp_path):
    watched, module = run(tmp_path, lambda: None, lambda: InPlace(False), max_epochs=6, monitor={"every_n_steps": 4})
    assert watched.differing == []
    first, last = (watched.samples[step].hessian[0].data[0] for step in (12, 24))
    assert torch.equal(first, module.given[0][0])
    assert any(torch.equal(last, seen[0]) for seen in module.given[12:])


def test_data_that_stay_keep_their_sample(tmp_path):
    own = {"every_n_steps": 4}
    watched, _ = run(tmp_path, lambda: by_index(shuffle=True), Classifier, max_epochs=12, monitor=own)
    assert watched.differing == []
    first, *others = (sample.hessian for step, sample in watched.samples.items() if step > 1)
    assert len(others) == 11
    assert all(torch.equal(a.data[0], b.data[0]) for other in others for a, b in zip(first, other, strict=True))


class Renamed(Classifier):
    """Classes that get other names in mid-run: nothing of the loader tells."""

    def __init__(self):
        super().__init__()
        self.dataset = Numbered()

    def train_dataloader(self):
        return loader(self.dataset)

    def on_train_epoch_start(self):
        if self.current_epoch == 10:
            self.dataset.y = (self.dataset.y + 1) % 3


def test_data_that_change_unseen_are_found_by_their_loss(tmp_path):
    watched, _ = run(
        tmp_path,
        lambda: None,
        Renamed,
        monitor={"sample": 16, "gradient_sample": 16, "every_n_steps": 20},
        max_epochs=40,
    )
    assert watched.differing == []
    labels = {step: sample.hessian[0].data[1] for step, sample in watched.samples.items()}
    assert torch.equal(labels[20], Numbered().y[:BATCH])
    assert torch.equal(labels[160], (Numbered().y[:BATCH] + 1) % 3)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_the_gradient_sample_goes_on_filling(tmp_path):
    watched, _ = run(tmp_path, by_index, monitor={"sample": 8, "gradient_sample": 64, "every_n_steps": 1}, max_epochs=1)
    filled = [record.metrics["solver/sample_filled"] for record in watched.monitor.history]
    assert filled == [0.125, 0.125, 0.25, 0.375, 0.5]  # at steps 0 and 1 there is the first batch
    assert [len(sample.hessian) for sample in watched.samples.values()] == [1] * 5


def test_a_sample_is_bounded_by_memory(tmp_path, monkeypatch):
    own = BATCH * 5 * 4 + BATCH * 8  # bytes of a batch
    monkeypatch.setattr("lightning_subspace.data.gathered.free_memory", lambda device: 4.0 * 2.5 * own)
    with pytest.warns(UserWarning, match="bounded by the memory, to 16 of 24 examples; pass a smaller sample"):
        watched, _ = run(tmp_path, by_index, monitor={"sample": 24, "gradient_sample": 24})
    assert watched.differing == []
    assert len(watched.sample.hessian) == 2
    assert len(watched.steps) >= 3


def test_a_batch_larger_than_the_sample_is_cut(tmp_path):
    watched, module = run(tmp_path, lambda: by_index(batch_size=16), monitor={"sample": 6, "gradient_sample": 16})
    assert watched.differing == []
    assert watched.steps[0] == 0  # the first batch has enough
    assert [[batch.size for batch in part] for part in (watched.sample.hessian, watched.sample.extra)] == [[6], [10]]
    assert torch.equal(torch.cat([batch.data[0] for batch in everything(watched.sample)]), module.given[0][0])
    whole, _ = run(
        tmp_path, lambda: by_index(batch_size=16), lambda: OneSize(16), monitor={"sample": 6, "gradient_sample": 16}
    )
    assert whole.differing == []
    assert [[batch.size for batch in part] for part in (whole.sample.hessian, whole.sample.extra)] == [[16], []]


def test_a_batch_size_cuts_batches(tmp_path):
    watched, _ = run(
        tmp_path, lambda: by_index(batch_size=16), monitor={"sample": 16, "gradient_sample": 32, "batch_size": 6}
    )
    assert watched.differing == []
    assert [batch.size for batch in everything(watched.sample)] == [5, 5, 6, 5, 5, 6]
    assert len({batch.index for batch in everything(watched.sample)}) == 6


# -- steps before there is a sample -----------------------------------------------------------------------------------


def fit(monitor: Any, data: Any, module: Any = None, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = monitor if isinstance(monitor, list) else [monitor]
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=callbacks, **{"max_epochs": 1, **quiet, **options})
    trainer.fit(Classifier() if module is None else module, data)
    return trainer


def listed(steps: list[int], **options: Any) -> SubspaceMonitor:
    arguments = {"k": 0, "max_overhead": None, "sample": 20, "gradient_sample": 20, **options}
    return SubspaceMonitor(every_n_steps=steps, **arguments)


def test_listed_steps_before_the_sample_are_refused_in_setup():
    class NotReached(Classifier):
        def on_fit_start(self):
            raise AssertionError("refused before")

    with pytest.raises(
        MisconfigurationException, match=r"every_n_steps: expected steps from 2 on, got 0; .*sample='all'"
    ):
        fit(listed([0, 3]), by_index(), NotReached())


def test_listed_steps_before_the_sample_of_a_modules_own_loader_are_refused():
    class Own(Classifier):
        def train_dataloader(self):
            return by_index()

    with pytest.raises(MisconfigurationException, match="every_n_steps: expected steps from 2 on, got 1"):
        fit(listed([1, 3]), None, Own())


@pytest.mark.parametrize(
    ("steps", "options", "data", "expected"),
    [
        ([2, 3], {}, by_index, [2, 3]),
        ([0, 3], {"sample": 8}, by_index, [0, 3]),
        ([0, 3], {"sample": "all"}, by_index, [0, 3]),
        ([0, 3], {}, lambda: loader(examples()), [0, 3]),
        ([4, 6], {"sample": 1024, "gradient_sample": 1024, "epochs": 2}, by_index, [4, 6]),  # an epoch has no more
        ([2], {"sample": 1024, "gradient_sample": 1024, "epochs": 2, "limit_train_batches": 2}, by_index, [2]),
        ([2], {"sample": 1024, "gradient_sample": 1024, "epochs": 2, "accumulate_grad_batches": 2}, by_index, [2]),
        ([1], {}, lambda: by_index(batch_size=4), None),
    ],
)
def test_listed_steps_at_which_there_is_a_sample(steps, options, data, expected):
    training = {key: options.pop(key) for key in ("limit_train_batches", "accumulate_grad_batches") if key in options}
    training["max_epochs"] = options.pop("epochs", 1)
    monitor = listed(steps, on_failure="raise", **options)
    if expected is None:
        with pytest.raises(MisconfigurationException, match="expected steps from 4 on"):
            fit(monitor, data())
        fit(listed(steps, on_failure="raise"), data(), accumulate_grad_batches=4)  # the fifth batch is of step 1
        return
    fit(monitor, data(), **training)
    assert [record.step for record in monitor.history] == expected


def test_a_listed_step_within_the_epoch_that_the_sample_needs_is_refused():
    with pytest.raises(
        MisconfigurationException, match="expected steps from 4 on, got 3; the 1024 examples of sample="
    ):
        fit(listed([3, 4], sample=1024, gradient_sample=1024), by_index(), max_epochs=2)


# -- the way to the batch ---------------------------------------------------------------------------------------------


def test_several_callbacks_see_the_batch_and_leave_the_strategy_alone():
    keeps = [KeepSample(), KeepSample()]
    monitors = [
        SubspaceMonitor(
            k=1,
            every_n_steps=1,
            max_overhead=None,
            sample=size,
            gradient_sample=size,
            name=f"m{size}",
            on_failure="raise",
            measurements=[keep],
        )
        for size, keep in zip((8, 16), keeps, strict=True)
    ]
    projection = SubspaceProjection("bulk", k=2, sample=8, gradient_sample=8, on_failure="raise")
    module = Recording()
    trainer = fit([*monitors, projection], by_index(), module)
    assert "training_step" not in vars(trainer.strategy)
    assert [[record.step for record in monitor.history] for monitor in monitors] == [[0, 1, 2, 3, 4], [1, 2, 3, 4]]
    assert all(equal(sample, module.given) for keep in keeps for sample in keep.samples.values())
    assert projection.is_active


def test_the_step_from_the_batch_that_fills_the_sample_is_projected():
    torch.manual_seed(0)
    module = Classifier()
    before = [parameter.clone() for parameter in module.parameters()]
    projection = SubspaceProjection("top", k=1, sample=8, gradient_sample=8, on_failure="raise")
    fit(projection, by_index(), module, max_steps=1)
    moved = torch.cat([(a - b).flatten() for a, b in zip(module.parameters(), before, strict=True)]).detach()
    basis = projection._projector._basis[0].float()
    assert float(moved.norm()) > 0.0
    assert abs(float(moved @ basis) / float(moved.norm())) == pytest.approx(1.0, abs=1e-5)


def test_a_step_that_fails_leaves_the_strategy_alone():
    class Failing(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            raise RuntimeError("on purpose")

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[SubspaceMonitor(k=2)], max_epochs=1, **quiet)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Failing(), by_index())
    assert "training_step" not in vars(trainer.strategy)


# -- resuming ---------------------------------------------------------------------------------------------------------


def stopped_and_resumed(tmp_path, data):
    """The samples of a run that is stopped in its second epoch, and those of the run that resumes it."""
    found = []
    for options in ({"max_steps": 6}, {"max_epochs": 4}):
        keep = KeepSample()
        monitor = SubspaceMonitor(
            k=0,
            every_n_steps=1,
            max_overhead=None,
            sample=16,
            gradient_sample=24,
            on_failure="raise",
            measurements=[keep],
        )
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=[monitor], **quiet, **options)
        path = tmp_path / "stopped.ckpt"
        trainer.fit(Classifier(lambda batch: (batch["x"], batch["y"])), data(), ckpt_path=path if found else None)
        trainer.save_checkpoint(path)
        found.append((keep.samples, monitor))
    return found


def _of_dict(items: Any) -> Any:
    x, y = zip(*items, strict=True)
    return {"x": torch.stack(x), "y": torch.stack(y)}


def test_a_resumed_run_goes_on_with_its_gathered_sample(tmp_path):
    (before, _), (after, monitor) = stopped_and_resumed(tmp_path, lambda: by_index(shuffle=True, collate_fn=_of_dict))
    last = everything(list(before.values())[-1])
    assert min(after) == 7  # at once: step 6 was probed before the stop
    for sample in after.values():
        for ours, theirs in zip(everything(sample), last, strict=True):
            assert (ours.index, ours.weight) == (theirs.index, theirs.weight)
            assert torch.equal(ours.data["x"], theirs.data["x"])
    assert [record.step for record in monitor.history] == list(range(1, 15))


def test_a_sample_that_the_checkpoint_does_not_hold_is_gathered_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_subspace.probe.sample_state.LARGEST", 100)
    with caplog.at_level("INFO", "lightning.pytorch"):
        (before, _), (after, monitor) = stopped_and_resumed(
            tmp_path, lambda: by_index(shuffle=True, collate_fn=_of_dict)
        )
    assert "the sample is gathered anew, as the checkpoint does not hold it" in caplog.text
    assert min(after) == 8  # after the second batch
    assert not torch.equal(after[8].hessian[0].data["x"], before[6].hessian[0].data["x"])
    assert [record.step for record in monitor.history] == [*range(1, 7), *range(8, 15)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_is_resumed_before_its_sample_is_full_fills_it(tmp_path, caplog):
    def fit_to(end, path=None):
        keep = KeepSample()
        monitor = SubspaceMonitor(
            k=0, every_n_steps=100, max_overhead=None, sample=32, gradient_sample=32, measurements=[keep]
        )
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator="cpu", logger=False, callbacks=[monitor], max_steps=end, max_epochs=-1, **quiet)
        torch.manual_seed(0)
        trainer.fit(Classifier(), by_index(), ckpt_path=path)
        trainer.save_checkpoint(tmp_path / "short.ckpt")
        return [record.step for record in monitor.history], keep.samples

    whole, samples = fit_to(6)
    assert whole == [3, 6]
    with caplog.at_level("INFO", "lightning.pytorch"):
        stopped, _ = fit_to(2)  # with half of the sample, which has to do at the end
        resumed, again = fit_to(6, tmp_path / "short.ckpt")
    assert stopped == [2]
    assert "gathered anew" not in caplog.text
    assert resumed == [2, 6]
    assert indices(again[6].hessian)[:16] == indices(samples[6].hessian)[:16]


def test_a_reading_that_takes_too_long_measures_nothing_and_training_goes_on():
    class Slow(Numbered):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    monitor = SubspaceMonitor(k=0, sample="all", read_timeout=0.1)
    with pytest.warns(
        UserWarning, match=r"nothing is measured, training goes on. TimeoutError: read_timeout: expected"
    ):
        trainer = fit(monitor, loader(Slow()))
    assert trainer.global_step == 4
    assert monitor.history == []
