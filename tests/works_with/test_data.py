"""Data of every kind: training is bit for bit what it is without the monitor, and the sample is what it should be."""

import collections
import os
import runpy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_subspace.data.drawn import sample_of_dataset
from tests.modules import BATCH, EXAMPLES, RandomDataset
from tests.processes import environment
from tests.processes import run as run_in_processes
from tests.thorough import IS_THOROUGH, usual
from tests.works_with.numbered import ByList, Holding, Numbered, everything, indices, loader
from tests.works_with.same_run import Classifier, compare

pytestmark = pytest.mark.filterwarnings(
    "ignore:SubspaceMonitor. the dataset was read for sample='all', but",  # see test_gathered.py
    "ignore:SubspaceMonitor. at step",  # two eigenvalues may lie close together
    "ignore:You requested to overfit but enabled train dataloader shuffling",
)


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


# The others are batches of most tests, or a dictionary by another name.
@pytest.mark.parametrize(
    "structure",
    usual(["named tuple", "dict", "dataclass", "nested"], thorough=["tuple", "list", "ordered dict"]),
)
def test_batches_of_every_structure(structure, tmp_path):
    read = STRUCTURES[structure][1]
    run = compare(
        tmp_path,
        lambda: Classifier(read),
        lambda: loader(shuffle=True, collate_fn=Collate(structure)),
        monitor={"k": 0},
    )
    assert run.differing == []
    assert run.steps == [1, 2, 4, 6, 8]  # a collate function may do anything: its batches are gathered
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


# Those that differ in a detail from one of the others.
DETAILS = ("another sampler", "overfit_batches, a share", "BatchSampler")


@pytest.mark.parametrize("case", usual([case for case in SAMPLERS if case not in DETAILS], thorough=DETAILS))
def test_the_sample_holds_what_training_draws_from(case, tmp_path):
    options, limits, expected = SAMPLERS[case]
    monitor = {"k": 0, "sample": "all", "batch_size": BATCH}  # a sample is the same for every k
    data = (lambda: loader(ByList(), **options)) if case == "batching off" else (lambda: loader(**options))
    run = compare(tmp_path, Classifier, data, monitor=monitor, **limits)
    assert run.differing == []
    assert len(run.steps) >= 3
    assert sorted(indices(run.sample.hessian)) == list(expected)


@pytest.mark.parametrize("replacement", [True, False])
def test_a_weighted_sampler_is_followed(replacement, tmp_path):
    def data():
        return loader(sampler=WeightedRandomSampler(WEIGHTS, 12, replacement), batch_size=4)

    run = compare(tmp_path, Classifier, data, monitor={"k": 0, "sample": "all"})
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


# -- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_augmented_at_random_is_fixed(workers, tmp_path):
    dataset = []

    def data():
        return loader(dataset[-1], shuffle=True, num_workers=workers, persistent_workers=workers > 0)

    def module():
        dataset.append(RandomDataset())
        return Holding(dataset[-1])

    run = compare(tmp_path, module, data, monitor={"k": 0})
    assert run.differing == []
    first, *others = ([batch.data[0] for batch in sample.hessian] for sample in run.samples.values())
    assert len(others) == 4
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_loader_of_the_users_own_moves_nothing_random(tmp_path):
    dataset = RandomDataset()
    own = loader(dataset, shuffle=True)
    before = dataset.generator.get_state()
    run = compare(tmp_path, Classifier, lambda: loader(shuffle=True), monitor={"k": 0, "sample": own})
    assert run.differing == []
    assert torch.equal(dataset.generator.get_state(), before)
    assert dataset.served == []
    assert sum(len(batch.data[0]) for batch in run.sample.hessian) == EXAMPLES


# -- worker processes -------------------------------------------------------------------------------------------------

WITHOUT_A_GUARD = """
import multiprocessing
multiprocessing.set_start_method("{method}", force=True)
import lightning as L, torch
from torch.utils.data import DataLoader, TensorDataset
from lightning_subspace import SubspaceMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)
def tell(*what):
    with open("told.txt", "a") as file:
        print(*what, file=file)
tell("script begins")
monitor = SubspaceMonitor(k=1, every_n_steps=1, max_overhead=None, on_failure="raise")
options = dict(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
loader = DataLoader(TensorDataset(torch.randn(8, 32)), batch_size=4)
L.Trainer(**options, callbacks=[monitor]).fit(Model(), loader)
tell("probes", [record.step for record in monitor.history])
"""


def run_script(path):
    """What a new interpreter does, without its start: it is `__main__` for processes that are spawned from here."""
    for name in environment(0, 1):
        os.environ.pop(name, None)
    os.chdir(path.parent)
    runpy.run_path(str(path), run_name="__main__")


# The other two under `thorough` alone: of a spawned process Python runs the script again, if there is one.
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"] if IS_THOROUGH else ["spawn"])
def test_a_script_without_workers_needs_no_main_guard(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_A_GUARD.format(method=method))
    run_in_processes(run_script, 1, script, group=False)
    assert (tmp_path / "told.txt").read_text().splitlines() == ["script begins", "probes [0, 1, 2]"]


def test_without_forking_the_examples_are_loaded_here_and_nothing_random_moves(tmp_path, monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    dataset = RandomDataset()
    before, served = dataset.generator.get_state(), list(dataset.served)
    numpy_state, torch_state = np.random.get_state()[1].tobytes(), torch.get_rng_state()
    sample = sample_of_dataset(loader(dataset, shuffle=True), None)
    assert sum(batch.size for batch in sample.hessian) == EXAMPLES
    assert torch.equal(dataset.generator.get_state(), before)
    assert dataset.served == served
    assert np.random.get_state()[1].tobytes() == numpy_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert compare(tmp_path, Classifier, lambda: loader(RandomDataset(), shuffle=True)).differing == []
