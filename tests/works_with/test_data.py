"""Data of every kind: training is bit for bit what it is without the monitor, and the sample is what it should be."""

import collections
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_subspace import SubspaceMonitor
from tests.modules import BATCH, EXAMPLES, RandomDataset, examples
from tests.works_with.same_run import Classifier, KeepSample, Validated, compare

pytestmark = pytest.mark.filterwarnings(
    "ignore:SubspaceMonitor. at step",  # two eigenvalues may lie close together
    "ignore:You have overridden `on_.*_batch_transfer` in `LightningModule`",  # beside a data module
    "ignore:You requested to overfit but enabled train dataloader shuffling",
)


class Numbered(Dataset):
    """Example i is (x_i, y_i, i); x_i[0] is i / 10, so that an example is known wherever it goes."""

    def __init__(self, first: int = 0, count: int = EXAMPLES) -> None:
        self.x, self.y = (column.clone() for column in examples().tensors)
        self.x[:, 0] = torch.arange(EXAMPLES) / 10
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[self.first + index], self.y[self.first + index]


def loader(dataset: Any = None, **options: Any) -> DataLoader:
    size = {} if "batch_sampler" in options else {"batch_size": BATCH}
    return DataLoader(Numbered() if dataset is None else dataset, **{**size, **options})


def indices(batches: Any, read: Any = tuple) -> list[int]:
    """Which examples are in micro-batches."""
    return [round(10 * float(v)) for batch in batches for v in read(batch.data)[0][:, 0]]


def everything(sample: Any) -> tuple[Any, ...]:
    return (*sample.hessian, *sample.extra)


# -- batches of every structure ---------------------------------------------------------------------------------------


@dataclass
class Labelled:
    x: Tensor
    y: Tensor
    name: str = "batch"


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def columns(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.stack(y)


# kind: how a batch is made of columns, and read again
STRUCTURES = {
    "tuple": (lambda x, y: (x, y), tuple),
    "list": (lambda x, y: [x, y], tuple),
    "named tuple": (Pair, tuple),
    "dict": (lambda x, y: {"x": x, "y": y, "name": "batch"}, lambda b: (b["x"], b["y"])),
    "dataclass": (Labelled, lambda b: (b.x, b.y)),
    "nested": (
        lambda x, y: {"inputs": [{"x": x}], "targets": ({"y": y, "none": None}, "text")},
        lambda b: (b["inputs"][0]["x"], b["targets"][0]["y"]),
    ),
    "ordered dict": (lambda x, y: collections.OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
}


class Collate:
    """A collate function that worker processes can be given."""

    def __init__(self, structure: str) -> None:
        self.structure = structure

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> Any:
        return STRUCTURES[self.structure][0](*columns(items))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_every_structure(structure, tmp_path):
    read = STRUCTURES[structure][1]
    run = compare(tmp_path, lambda: Classifier(read), lambda: loader(shuffle=True, collate_fn=Collate(structure)))
    assert run.differing == []
    assert run.steps == [0, 2, 4, 6, 8]
    first, rest = indices(run.sample.hessian, read), indices(run.sample.extra, read)
    assert (len(set(first)), len(set(rest))) == (16, 8)
    assert not set(first) & set(rest)


# -- which examples: samplers and limits ------------------------------------------------------------------------------

ALLOWED = list(range(0, EXAMPLES, 2))
WEIGHTS = torch.tensor([0.0, 1.0, 0.0, 3.0] * (EXAMPLES // 4))


class Reversed(Sampler):
    def __iter__(self):
        return iter(range(EXAMPLES - 1, -1, -1))

    def __len__(self):
        return EXAMPLES


class Lists(Sampler):
    """A batch sampler of the user's own, without a sampler inside."""

    def __iter__(self):
        return iter([[0, 1, 2, 3], [4, 5], list(range(6, 20)), list(range(20, EXAMPLES))])

    def __len__(self):
        return 4


FIRST = range(EXAMPLES)

# case: arguments of the loader, of the Trainer, and the examples that a sample of all of them holds
SAMPLERS = {
    "shuffle": ({"shuffle": True}, {}, FIRST),
    "in order": ({}, {}, FIRST),
    "SubsetRandomSampler": ({"sampler": SubsetRandomSampler(ALLOWED)}, {}, ALLOWED),
    "RandomSampler with replacement": ({"sampler": RandomSampler(FIRST, replacement=True)}, {}, FIRST),
    "another sampler": ({"sampler": Reversed()}, {}, FIRST),
    "BatchSampler": ({"batch_sampler": BatchSampler(SubsetRandomSampler(ALLOWED), 4, True)}, {}, ALLOWED),
    "another batch sampler": ({"batch_sampler": Lists()}, {}, FIRST),
    "batching off": ({"batch_size": None, "sampler": BatchSampler(SubsetRandomSampler(ALLOWED), 4, True)}, {}, ALLOWED),
    "persistent workers": ({"shuffle": True, "num_workers": 1, "persistent_workers": True}, {}, FIRST),
    "overfit_batches": ({"shuffle": True}, {"overfit_batches": 2}, range(2 * BATCH)),
    "overfit_batches, a share": ({}, {"overfit_batches": 0.5}, range(2 * BATCH)),
    "limit_train_batches in order": ({}, {"limit_train_batches": 3}, range(3 * BATCH)),
    "limit_train_batches shuffled": ({"shuffle": True}, {"limit_train_batches": 3}, FIRST),
    "drop_last in order": ({"drop_last": True, "batch_size": 12}, {}, range(24)),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_the_sample_holds_what_training_draws_from(case, tmp_path):
    options, limits, expected = SAMPLERS[case]
    monitor = {"sample": "all", "batch_size": BATCH}
    data = (lambda: loader(ByList(), **options)) if case == "batching off" else (lambda: loader(**options))
    run = compare(tmp_path, Classifier, data, monitor=monitor, **limits)
    assert run.differing == []
    assert len(run.steps) >= 3
    assert sorted(indices(run.sample.hessian)) == list(expected)


class ByList(Numbered):
    """Takes a list of indices."""

    def __getitem__(self, listed):
        return self.x[listed], self.y[listed]


@pytest.mark.parametrize("replacement", [True, False])
def test_a_weighted_sampler_is_followed(replacement, tmp_path):
    def data():
        return loader(sampler=WeightedRandomSampler(WEIGHTS, 12, replacement), batch_size=4)

    run = compare(tmp_path, Classifier, data, monitor={"sample": "all"})
    drawn = indices(run.sample.hessian)
    assert run.differing == []
    assert len(drawn) == 12
    assert all(WEIGHTS[i] > 0 for i in drawn)
    assert (len(set(drawn)) == 12) is not replacement


class Whole(Numbered):
    """Each item is a batch."""

    def __init__(self):
        super().__init__(count=EXAMPLES // BATCH)

    def __getitem__(self, index):
        part = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[part], self.y[part]


def test_a_dataset_of_batches(tmp_path):
    run = compare(tmp_path, Classifier, lambda: loader(Whole(), batch_size=None, shuffle=True))
    assert run.differing == []
    assert [len(run.sample.hessian), len(run.sample.extra)] == [2, 1]
    assert len(set(indices(everything(run.sample)))) == 24


# -- several loaders --------------------------------------------------------------------------------------------------


def two(first: int = 20, second: int = EXAMPLES - 20, **options: Any) -> dict[str, DataLoader]:
    """Two loaders over different examples: 5 batches of 4, and 2 of 6."""
    return {
        "a": loader(Numbered(0, first), batch_size=4, shuffle=True, **options),
        "b": loader(Numbered(first, second), batch_size=6, shuffle=True, **options),
    }


def of_both(batch: Any) -> tuple[Tensor, Tensor]:
    parts = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


# case: the loaders, how a batch is read, number of combined batches in an epoch, sizes of the parts in them
COMBINED = {
    "dict": (two, of_both, [(4, 6)] * 5),
    "list": (lambda: list(two().values()), of_both, [(4, 6)] * 5),
    "max_size_cycle": (lambda: CombinedLoader(two(), "max_size_cycle"), of_both, [(4, 6)] * 5),
    "min_size": (lambda: CombinedLoader(two(), "min_size"), of_both, [(4, 6)] * 2),
    "max_size": (lambda: CombinedLoader(two(), "max_size"), of_both, [(4, 0)] * 3 + [(4, 6)] * 2),
    "one in a dict": (lambda: {"a": two()["a"]}, of_both, [(4, 0)] * 5),
}


def composition(batches: Any, read: Any) -> list[tuple[int, int]]:
    found = [indices([batch], read) for batch in batches]
    return sorted((sum(i < 20 for i in one), sum(i >= 20 for i in one)) for one in found)


@pytest.mark.parametrize("case", COMBINED)
def test_several_loaders(case, tmp_path):
    make, read, expected = COMBINED[case]
    run = compare(tmp_path, lambda: Classifier(read), make, monitor={"sample": "all"})
    assert run.differing == []
    assert len(run.steps) >= 3
    assert composition(run.sample.hessian, read) == expected
    assert all(batch.weight == len(read(batch.data)[0]) for batch in run.sample.hessian)


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])  # Lightning refuses "sequential" in fit
def test_a_part_of_several_loaders(mode, tmp_path):
    run = compare(
        tmp_path,
        lambda: Classifier(of_both),
        lambda: CombinedLoader(two(), mode),
        monitor={"sample": 6, "gradient_sample": 14},
        limit_train_batches=3,
    )
    assert run.differing == []
    counts = [sum(batch.size for batch in part) for part in (run.sample.hessian, run.sample.extra)]
    assert 6 <= counts[0] < 16
    assert 14 <= sum(counts) < 24


def test_several_loaders_keep_their_batch_sizes(tmp_path):
    with pytest.raises(MisconfigurationException, match="batch_size: several training loaders keep"):
        compare(tmp_path, lambda: Classifier(of_both), two, monitor={"batch_size": 3})


# -- what is done to a batch on its way -------------------------------------------------------------------------------


class Transfers:
    """Doubles before the transfer, adds one after it; both show in what training_step gets."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


class TransferringModule(Transfers, Classifier):
    def training_step(self, batch, batch_idx):
        assert isinstance(batch, tuple)
        self.got = getattr(self, "got", [])
        self.got.append(batch[0])
        return super().training_step(batch, batch_idx)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)


class TransferringData(Transfers, Data):
    pass


def assert_transferred_once(seen: list[Tensor]) -> None:
    raw = Numbered().x.double()
    assert len(seen) > 0
    for row in torch.cat(seen):
        assert (row - (2 * raw + 1)).abs().amax(dim=1).min() < 1e-6


def measured(seen: list[Tensor]) -> Any:
    """The training loss, as loss_fn that keeps what it gets."""

    def loss_fn(module, batch, batch_idx):
        seen.append(batch[0].double())
        return module.training_step(batch, batch_idx)

    return loss_fn


@pytest.mark.xfail(reason="_lightning.transfer leaves out on_before_batch_transfer: the training loop calls that")
@pytest.mark.parametrize(
    ("module", "data"),
    [(TransferringModule, Data), (TransferringModule, lambda: loader(shuffle=True)), (Classifier, TransferringData)],
    ids=["module", "module, no data module", "data module"],
)
def test_transfer_hooks_are_applied_once(module, data, tmp_path):
    seen = []
    run = compare(tmp_path, module, data, monitor={"loss_fn": measured(seen)})
    assert run.differing == []
    assert_transferred_once(seen)


@pytest.mark.parametrize("sample", ["current", 8])
def test_batches_of_training_do_not_go_through_the_hooks_again(sample, tmp_path):
    seen = []
    data = (lambda: loader(Stream())) if sample == 8 else Data
    monitor = {"loss_fn": measured(seen), "sample": sample}
    run = compare(tmp_path, TransferringModule, data, monitor=monitor)
    assert run.differing == []
    assert_transferred_once(seen)


def test_a_data_module(tmp_path):
    run = compare(tmp_path, Classifier, Data)
    assert run.differing == []
    assert run.steps == [0, 2, 4, 6, 8]


# -- randomness -------------------------------------------------------------------------------------------------------


class Holding(Classifier):
    """Has the dataset in sight, so that its own random numbers are compared."""

    def __init__(self, dataset):
        super().__init__()
        self.data = dataset


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_augmented_at_random_is_fixed(workers, tmp_path):
    dataset = []

    def data():
        return loader(dataset[-1], shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def module():
        dataset.append(RandomDataset())
        return Holding(dataset[-1])

    run = compare(tmp_path, module, data)
    assert run.differing == []
    first, *others = ([batch.data[0] for batch in everything(sample)] for sample in run.samples.values())
    assert len(others) == 4
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_loader_of_the_users_own_moves_nothing_random(tmp_path):
    dataset = RandomDataset()
    own = loader(dataset, shuffle=True)
    before = dataset.generator.get_state()
    run = compare(tmp_path, Classifier, lambda: loader(shuffle=True), monitor={"sample": own})
    assert run.differing == []
    assert torch.equal(dataset.generator.get_state(), before)
    assert dataset.served == []
    assert sum(len(batch.data[0]) for batch in run.sample.hessian) == EXAMPLES


# -- iterable datasets ------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Gives its examples in order, and has counted how often it was begun."""

    def __init__(self, count=EXAMPLES):
        self.data, self.count, self.begun = Numbered(), count, 0
        self.generator = np.random.default_rng(1)

    def __iter__(self):
        self.begun += 1
        for i in range(self.count):
            self.generator.normal()
            yield self.data[i]


class Sources:
    """Makes a module that holds the stream it is trained on."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def module(self) -> Holding:
        self.stream = Stream(*self.args)
        return Holding(self.stream)

    def data(self) -> DataLoader:
        return loader(self.stream)


def test_an_iterable_dataset_gives_the_first_examples_seen(tmp_path):
    source = Sources()
    run = compare(tmp_path, source.module, source.data, monitor={"sample": 16, "gradient_sample": 24})
    assert run.differing == []
    assert source.stream.begun == 2  # once an epoch
    assert run.steps == [1, 2, 4, 6, 8]  # from the batch with which the sample is full
    assert indices(run.samples[1].hessian) == list(range(16))
    assert indices(run.samples[1].extra) == []
    for step in run.steps[1:]:
        assert indices(run.samples[step].hessian) == list(range(16))
    assert indices(run.sample.extra) == list(range(16, 24))
    assert run.sample.hessian_share == 0.0


def test_a_short_iterable_dataset_is_complete_after_an_epoch(tmp_path):
    source = Sources()
    run = compare(tmp_path, source.module, source.data, monitor={"sample": 1000, "gradient_sample": 2000})
    assert run.differing == []
    assert run.steps == [4, 6, 8]  # an epoch has four batches
    assert indices(run.sample.hessian) == list(range(EXAMPLES))


def test_a_run_that_ends_before_its_sample_is_full_is_probed_at_the_end(tmp_path):
    source = Sources()
    run = compare(tmp_path, source.module, source.data, monitor={"sample": 1000, "gradient_sample": 1000}, max_steps=3)
    assert run.differing == []
    assert run.steps == [3]
    assert indices(run.sample.hessian) == list(range(24))


def test_an_iterable_dataset_has_no_all(tmp_path):
    for sizes in ({"sample": "all"}, {"gradient_sample": "all"}):
        with pytest.raises(MisconfigurationException, match="'all' needs a training set whose end is known"):
            compare(tmp_path, Classifier, lambda: loader(Stream()), monitor=sizes)


def test_an_iterable_dataset_beside_another(tmp_path):
    def data():
        return {"a": loader(Stream(20), batch_size=4), "b": loader(Numbered(20, 12), batch_size=6)}

    run = compare(tmp_path, lambda: Classifier(of_both), data, monitor={"sample": 8, "gradient_sample": 12})
    assert run.differing == []
    assert run.steps == [1, 2, 4, 6, 8, 10]
    assert [indices([batch], lambda b: b["a"]) for batch in run.sample.hessian] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class AnyLoader:
    """Not a DataLoader: anything that gives batches."""

    def __iter__(self):
        x, y = Numbered().x, Numbered().y
        return iter([(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, EXAMPLES, BATCH)])

    def __len__(self):
        return EXAMPLES // BATCH


def test_any_iterable_of_batches(tmp_path):
    run = compare(tmp_path, Classifier, AnyLoader)
    assert run.differing == []
    assert indices(run.sample.hessian) == list(range(16))


def test_a_streamed_sample_is_kept_when_training_writes_into_its_batches(tmp_path):
    class Writing(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step([batch[0].clone(), batch[1]], batch_idx)
            batch[0].zero_()
            return loss

    run = compare(tmp_path, Writing, lambda: loader(Stream()))
    assert run.differing == []
    assert indices(run.sample.hessian) == list(range(16))


def test_accumulated_batches_of_an_iterable_dataset(tmp_path):
    run = compare(
        tmp_path, Classifier, lambda: loader(Stream()), accumulate_grad_batches=3, monitor={"every_n_steps": 1}
    )
    assert run.differing == []
    assert run.steps == [0, 1, 2, 3, 4]  # the sample is full at the second batch of the first step


# -- an iterable dataset over several fits ----------------------------------------------------------------------------


def streaming(sample: int = 16) -> SubspaceMonitor:
    return SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, sample=sample, on_failure="raise")


def trainer_of(monitor: SubspaceMonitor, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [monitor, *options.pop("callbacks", [])]
    return Trainer(accelerator="cpu", logger=False, callbacks=callbacks, **{"max_epochs": 2, **quiet, **options})


def steps_of(monitor: SubspaceMonitor) -> list[int]:
    return [record.step for record in monitor.history]


def test_a_streamed_sample_is_kept_when_a_run_goes_on():
    torch.manual_seed(0)
    keep = KeepSample()
    monitor = SubspaceMonitor(
        k=2, every_n_steps=2, max_overhead=None, sample=16, gradient_sample=16, on_failure="raise", measurements=[keep]
    )
    trainer, module = trainer_of(monitor, max_epochs=1), Validated()
    trainer.fit(module, loader(Stream()), loader())
    trainer.validate(module, loader(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(Stream()), loader())
    assert steps_of(monitor) == [1, 2, 4, 6, 8]
    assert [indices(sample.hessian) for sample in keep.samples.values()] == [list(range(16))] * 5
    trainer_of(monitor, max_epochs=1).fit(Classifier(), loader(Stream(8)), loader())  # a new run gathers anew
    assert steps_of(monitor) == [1]
    assert indices(keep.samples[1].hessian) == list(range(8))


class Interrupting(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
@pytest.mark.parametrize(("batch", "steps"), [(0, []), (2, [1, 2])])
def test_an_interrupt_before_and_after_a_streamed_sample_is_full(batch, steps):
    torch.manual_seed(0)
    monitor = streaming()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer_of(monitor, callbacks=[Interrupting(batch)]).fit(Classifier(), loader(Stream()))
    assert steps_of(monitor) == steps
    trainer_of(monitor).fit(Classifier(), loader(Stream()))
    assert steps_of(monitor) == [1, 2, 4, 6, 8]
