"""Training under DDP: nothing of it changes, and what is measured is what one process measures.

The processes are forked and talk over gloo. A DistributedSampler without shuffling deals examples out in turn, so W
ranks with batches of b take the steps of one process with batches of W b. Lightning's own shuffles training.
"""

import contextlib
import functools
import io
import logging
import os
import random
import time
import types
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_subspace import SubspaceMonitor, measure_subspace
from lightning_subspace.callbacks.strategy import ranks_of
from lightning_subspace.subspace.sketch import Sketch
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.modules import CLASSES, FEATURES, Observer, RandomDataset, differences
from tests.processes import run
from tests.thorough import IS_THOROUGH, how_many, usual

COUNT, GLOBAL_BATCH = 60, 12  # divisible by 2 and 3
COSTS = ("solver/seconds", "solver/overhead", "solver/megabytes_moved")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
# What `self.all_gather` of Lightning 2.6 has to hear from torch 2.14.
GATHERING = "ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning"


class Net(LightningModule):
    """A smooth classifier in float64; `width=600` has 5,403 parameters, more than a sketch has cells."""

    def __init__(self, width=6, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def dataset(count=COUNT):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % CLASSES
    inputs = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs + torch.eye(CLASSES, FEATURES, dtype=torch.float64)[labels], labels)


def loader(ranks=1, **options):
    return DataLoader(dataset(), batch_size=GLOBAL_BATCH // ranks, **options)


def in_turn(ranks=1, batch=GLOBAL_BATCH):
    """With a sampler of the user's own, which deals examples out without shuffling."""
    sampler = DistributedSampler(dataset(), ranks, rank_of_this(), shuffle=False) if ranks > 1 else None
    return DataLoader(dataset(), batch_size=batch // ranks, sampler=sampler)


def rank_of_this():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def monitor(**arguments):
    settings = {"k": 2, "max_overhead": None, "dtype": "float64", "on_failure": "raise", "log": "all"}
    return SubspaceMonitor(**{**settings, "sample": 24, "gradient_sample": 36, "batch_size": 6, **arguments})


def fit(module, data, *callbacks, ranks=1, strategy="ddp", steps=4, ckpt_path=None, **settings):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    is_dealt_out = data is not None and isinstance(data.sampler, DistributedSampler)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=ranks,
        strategy=strategy if ranks > 1 else "auto",
        callbacks=list(callbacks),
        **{"logger": False, "use_distributed_sampler": not is_dealt_out, **QUIET, **settings},
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def on(ranks, function, *args):
    """What a function gives on every rank; it gets the number of ranks first."""
    return run(function, ranks, ranks, *args, group=False, timeout=120) if ranks > 1 else [function(1, *args)]


def rows(one):
    """What was measured, without what it cost."""
    return [{key: value for key, value in row.items() if key not in COSTS} for row in one.to_rows()]


def steps_of(one):
    return [record.step for record in one.history]


@contextlib.contextmanager
def probes_alone(is_so=True):
    """Without a self-check and an error bar, for tests of something else; in forked processes too."""
    with pytest.MonkeyPatch.context() as patch:
        if is_so:
            leave_self_check_out(patch)
            leave_error_bar_out(patch)
        yield


@pytest.fixture
def _probes_alone():
    with probes_alone():
        yield


def assert_close(name, found, expected, tolerance=1e-9, apart=()):
    """All numbers of two histories, but for some keys."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() - set(apart) == other.keys() - set(apart)
        for key in other.keys() - set(apart):
            close = pytest.approx(other[key], rel=tolerance, abs=tolerance, nan_ok=True)
            assert one[key] == close, (name, other["step"], key)


def assert_equal_on_all(histories):
    """To the bit, nan for nan."""
    for history in histories:
        assert repr(history) == repr(histories[0])


# -- training is what it is without a monitor -------------------------------------------------------------------------


class Busy(LightningModule):
    """Batch-norm and dropout, a dataset with random numbers from everywhere, and a count."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(5, CLASSES)
        self.data, self.count = RandomDataset(), 0

    def loss(self, batch, batch_idx=0):
        return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def training_step(self, batch, batch_idx):
        self.count += 1
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Sparing(Busy):
    """Leaves some parameters out of every other step."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(5, CLASSES)

    def training_step(self, batch, batch_idx):
        hidden = self.body(batch[0])
        logits = self.head(hidden) + (self.spare(hidden) if batch_idx % 2 else 0.0)
        return F.cross_entropy(logits, batch[1])


class Manual(Busy):
    """Accumulates by itself, without synchronisation in between."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, is_last = self.optimizers(), batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=is_last):
            self.manual_backward(self.loss(batch) / 2)
        if is_last:
            optimizer.step()
            optimizer.zero_grad()


class NoSync(Busy):
    """Opens DDP's own `no_sync` around every other batch, and leaves it open while others hooks run."""

    def on_train_start(self):
        self.stack = contextlib.ExitStack()

    def on_train_batch_start(self, batch, batch_idx):
        self.stack.close()
        if batch_idx % 2 == 0:
            self.stack.enter_context(self.trainer.strategy.model.no_sync())


WAYS = {
    "plain": (Busy, lambda: "ddp", {}),
    "unused parameters": (Sparing, lambda: DDPStrategy(find_unused_parameters=True), {}),
    "static graph": (Busy, lambda: DDPStrategy(static_graph=True, gradient_as_bucket_view=True), {}),
    "accumulated": (Busy, lambda: "ddp", {"accumulate_grad_batches": 2}),
    "accumulated by hand": (Manual, lambda: "ddp", {}),
    "no_sync of its own": (NoSync, lambda: "ddp", {"accumulate_grad_batches": 2}),
}


USUAL_WAYS = [name for name in WAYS if name != "accumulated"]  # as is "no_sync of its own"


def train_twice(ranks, ways):
    """The differences that a monitor makes, and what it measured, for each way."""
    found = {}
    for name in ways:
        make, strategy, settings = WAYS[name]
        seen, own = [], {"loss_fn": Manual.loss} if make is Manual else {}
        sizes = {"sample": 8, "gradient_sample": 16, "batch_size": None}
        k = 2 if name == "plain" else 1  # few products: each is taken in the same way
        steps = [0, 1, 2] if name == "plain" else [0, 2]
        one = monitor(k=k, every_n_steps=steps, dtype="float32", **sizes, **own)
        for callbacks in ([], [one]):
            seed_everything(1, verbose=False)
            observer = Observer()
            with probes_alone(name != "plain"):
                fit(make(), None, *callbacks, observer, ranks=ranks, strategy=strategy(), steps=3, **settings)
            seen.append(observer.seen)
        found[name] = differences(*seen), rows(one), len(seen[0])
    return found


@pytest.mark.parametrize(
    ("ranks", "ways"), usual([(2, usual(USUAL_WAYS, thorough=["accumulated"]))], thorough=[(3, ["plain"])])
)
def test_training_is_what_it_is_without_a_monitor(ranks, ways):
    """Weights, gradients, buffers, optimizer states, attributes and random numbers, after each batch on every rank."""
    found = on(ranks, train_twice, ways)
    for name in ways:
        for differing, history, size in (of_rank[name] for of_rank in found):
            assert not differing, name
            assert size > 100
            assert len(history) >= (3 if name == "plain" else 2), name
            assert repr(history) == repr(found[0][name][1]), name
        assert "gradient_fraction" in found[0][name][1][0], name


# -- as in one process ------------------------------------------------------------------------------------------------


class Collective(Net):
    """Talks to the other ranks in its training step, in ways that leave the mean over all examples what it is."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        if dist.is_initialized():
            everywhere = loss.detach().clone()
            dist.all_reduce(everywhere)
            assert torch.allclose(self.all_gather(loss.detach()).sum(), everywhere)
        return self.all_gather(loss, sync_grads=True).mean()


def train(ranks, make, steps=4, *, accumulate=1, **arguments):
    seed_everything(1, verbose=False)
    one, data = monitor(**{"every_n_steps": 2, **arguments}), in_turn(ranks, GLOBAL_BATCH // accumulate)
    trainer = fit(make(), data, one, ranks=ranks, steps=steps, accumulate_grad_batches=accumulate)
    return rows(one), one.overlap_matrix()[1], [p.tolist() for p in trainer.model.parameters()]


RUNS = {
    "plain": lambda ranks: train(ranks, Net, reference_step=2),
    "sketched": lambda ranks: train(ranks, lambda: Net(600), reference_step=0, k=1),
    "differences": lambda ranks: train(ranks, Net, steps=2, k=1, every_n_steps=[0], curvature="finite-difference"),
    "k = 0": lambda ranks: train(ranks, Net, k=0),
    "accumulated": lambda ranks: train(ranks, Net, accumulate=2, k=0),
    # In every round each of 2 or of 3 ranks has a batch: the loss of one is the mean over those of its round.
    "collectives": lambda ranks: train(
        ranks, Collective, steps=2, k=1, every_n_steps=[1], gradient_sample=48, batch_size=4
    ),
}


def train_in(ranks, names):
    return {name: run_one(ranks, name) for name in names}


@functools.cache
def run_alone(name):
    return run_one(1, name)


def run_one(ranks, name):
    with probes_alone(name != "plain"):  # of the others: tests/probe/test_ranks.py
        return RUNS[name](ranks)


ELSEWHERE = ["differences", "k = 0"]  # in tests/probe/test_ranks.py


@pytest.mark.filterwarnings(GATHERING)
# What three ranks do otherwise, how batches and vectors are dealt: tests/probe/test_ranks.py, and test_faults.py.
@pytest.mark.parametrize(
    ("ranks", "names"),
    usual(
        [(2, usual([name for name in RUNS if name not in ELSEWHERE], thorough=ELSEWHERE))],
        thorough=[(3, list(RUNS))],
    ),
)
def test_records_are_those_of_one_process(ranks, names):
    """Every number, those of the steps between the probes too; to the bit the same on all ranks."""
    alone = {name: run_alone(name) for name in names}
    found = on(ranks, train_in, names)
    for name, (history, overlaps, weights) in alone.items():
        assert_equal_on_all([of_rank[name] for of_rank in found])
        assert history, name
        np.testing.assert_allclose(found[0][name][2][0], weights[0], rtol=0, atol=1e-12)  # training is the same
        # Differences of gradients blow rounding up.
        assert_close(name, found[0][name][0], history, 1e-7 if name == "differences" else 1e-9)
        np.testing.assert_allclose(found[0][name][1], overlaps, rtol=0, atol=1e-6)
    keys = {key for row in run_alone("plain")[0] for key in row}
    assert {
        "update_fraction",
        "batch_gradient_fraction",
        "overlap_previous",
        "overlap_reference",
    } <= keys  # "reliability" is among those of tests/probe/test_ranks.py
    assert "sketched" not in alone or len(alone["sketched"][0]) == 3


def fit_twice(ranks, folder):
    """Half of the steps in one fit, half in another; and the best checkpoint by a measured value."""
    one = monitor(k=1, every_n_steps=2)
    saver = ModelCheckpoint(folder, "{step}", monitor="subspace/sharpness", mode="min", every_n_train_steps=1)
    module, data = Net(), in_turn(ranks)
    trainer = fit(module, data, one, saver, ranks=ranks, steps=2, enable_checkpointing=True)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, data)
    return rows(one), one.overlap_matrix()[0], saver.best_model_path.rpartition("/")[2]


@pytest.mark.usefixtures("_probes_alone")
@pytest.mark.filterwarnings(r"ignore:ModelCheckpoint\(monitor='subspace/sharpness'\) saves nothing before:UserWarning")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_run_goes_on_in_another_fit(tmp_path):
    (alone,) = on(1, fit_twice, tmp_path / "1")
    found = on(2, fit_twice, tmp_path / "2")
    assert_equal_on_all(found)
    assert_close("in two fits", found[0][0], alone[0])
    assert found[0][1:] == alone[1:]
    assert alone[1] == [0, 2, 4]
    best = min(alone[0], key=lambda row: row["sharpness"])["step"]
    assert alone[2] == f"step={int(best)}.ckpt"


def told_of_other_labels(ranks):
    inputs, labels = dataset().tensors
    parts = zip(inputs.split(GLOBAL_BATCH), ((labels + 1) % CLASSES).split(GLOBAL_BATCH), strict=True)
    one = monitor(k=0, every_n_steps=20, sample=list(parts), batch_size=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Net(lr=0.3), in_turn(ranks), one, ranks=ranks, steps=80)
    said = sum("at two probes in a row" in str(w.message) for w in caught)
    return said, one._recorder.losses.opinion.last, [row["training_loss"] for row in rows(one)]


def test_a_sample_of_something_else_is_told_of_by_the_first_rank():
    found = on(2, told_of_other_labels)
    assert [said for said, _, _ in found] == [1, 0]
    assert found[0][1:] == found[1][1:]
    assert found[0][1].side == 1
    (alone,) = on(1, told_of_other_labels)
    assert alone[0] == 1
    assert found[0][2] == pytest.approx(alone[2], rel=1e-9)


# -- the sample -------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Deals its examples out to the ranks by itself."""

    def __iter__(self):
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return (dataset()[i] for i in range(rank, COUNT, ranks))


def batches():
    return [dataset()[start : start + 9] for start in range(0, 45, 9)]


def noisy(ranks):
    """Examples with random numbers."""
    torch.manual_seed(0)
    return DataLoader(Noisy(), batch_size=GLOBAL_BATCH // ranks)


class Noisy(RandomDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x.double(), y


WEIGHTS = torch.linspace(0.1, 1.0, COUNT)
CHEAP = {"k": 0, "every_n_steps": [0]}
TWICE = {"k": 1, "every_n_steps": [0, 2]}
LIMITED = {"sample": "all", "limit_train_batches": 2, **CHEAP}
SAMPLES = {
    "number": (loader, TWICE),
    "all": (loader, {"sample": "all", "batch_size": 7, **CHEAP}),
    "all that is ever reached": (in_turn, LIMITED),
    "current": (in_turn, {"sample": "current", **TWICE}),
    "batches": (loader, {"sample": batches, **CHEAP}),
    "weighted batches": (loader, {"sample": lambda: [(b, 1.0 + i) for i, b in enumerate(batches())], **CHEAP}),
    "loader": (loader, {"sample": lambda: DataLoader(dataset(), batch_size=13), **CHEAP}),
    "shuffling loader": (loader, {"sample": lambda: DataLoader(dataset(), batch_size=13, shuffle=True), **CHEAP}),
    "iterable": (lambda ranks: DataLoader(Stream(), batch_size=GLOBAL_BATCH // ranks), {"k": 0, "gradient_sample": 48}),
    "random examples": (noisy, {"sample": "all", **CHEAP}),
    "shuffled": (lambda ranks: loader(ranks, shuffle=True), CHEAP),
    "subset": (lambda ranks: loader(ranks, sampler=SubsetRandomSampler(range(5, 53))), CHEAP),
    "weighted": (lambda ranks: loader(ranks, sampler=WeightedRandomSampler(WEIGHTS, 48)), CHEAP),
    "all of a subset": (lambda ranks: loader(ranks, sampler=SubsetRandomSampler(range(9))), {"sample": "all", **CHEAP}),
}


class Apart(Callback):
    """Random numbers that differ by rank, as they do where nobody has seeded them."""

    def on_fit_start(self, trainer, pl_module):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(17 + trainer.global_rank)


def take_samples(ranks, names):
    """What is measured with each sample, at weights that stay where they are."""
    found = {}
    for name in names:
        make, asked = SAMPLES[name]
        settings = {key: asked[key] for key in asked.keys() & {"limit_train_batches"}}
        arguments = {
            key: asked[key]() if callable(asked[key]) else asked[key] for key in asked.keys() - settings.keys()
        }
        one = monitor(**arguments)
        with probes_alone():
            fit(Net(lr=0.0), make(ranks), Apart(), one, ranks=ranks, steps=3, **settings)
        found[name] = rows(one)
    return found


# Those that differ in a detail from one of the others.
DETAILS = ["weighted batches", "loader", "shuffled", "subset", "all of a subset"]


@pytest.mark.parametrize(
    ("ranks", "names"),
    usual(
        [(2, usual([name for name in SAMPLES if name not in DETAILS], thorough=DETAILS))],
        thorough=[(3, ["number", "current", "iterable", "weighted"])],
    ),
)
def test_the_sample_is_that_of_one_process(ranks, names):
    (alone,) = on(1, take_samples, names)
    found = on(ranks, take_samples, names)
    for name in names:
        assert_equal_on_all([of_rank[name] for of_rank in found])
        apart = ["batch_gradient_fraction", "training_loss"]  # training takes other batches, as it is shuffled
        if name in ("current", "iterable"):  # the batches are those of training, which cannot be halved in the same way
            every = [*alone[name], *(row for of in found for row in of[name])]
            apart += [key for row in every for key in row if key.startswith("noise/")]
        assert alone[name], name
        assert_close(name, found[0][name], alone[name], apart=apart)
    norms = {alone[name][0]["gradient_norm"] for name in names}
    assert len(norms) >= len(names) - how_many(2, thorough=5)  # some of the samples are the same, not all


class Dropping(Net):
    """Random beside its examples."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.net.insert(2, nn.Dropout(0.3))


def gather_a_random_loss(ranks):
    one = monitor(k=0, every_n_steps=[4], gradient_sample=48, batch_size=None)
    data = DataLoader(Stream(), batch_size=GLOBAL_BATCH // ranks)
    fit(Dropping(), data, one, ranks=ranks, steps=4)
    return rows(one), one._runner.run.examples.is_random


def test_a_random_loss_of_examples_that_are_gathered():
    """Each rank holds its own batches alone, and the first one's tells whether the loss is random."""
    found = on(2, gather_a_random_loss)
    assert_equal_on_all([history for history, _ in found])
    assert [is_random for _, is_random in found] == [True, True]
    # Step by step a batch of each rank: the seed of a batch is its place among all of them.
    given = [dataset()[list(range(rank + 12 * step, 12 * step + 12, 2))] for step in range(4) for rank in (0, 1)]
    expected = measure_subspace(Dropping(), given, k=0, dtype="float64").metrics
    (row,) = found[0][0]
    assert row["solver/sample_filled"] == 1.0
    assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-9)


# -- batch-norm -------------------------------------------------------------------------------------------------------


class Normed(Net):
    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm1d(FEATURES, momentum=0.5)
        self.net = nn.Sequential(norm, nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


class Snapshot(Callback):
    """The state of the module at a step, right before a monitor behind it probes."""

    def __init__(self, step):
        self.step, self.state = step, None

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


def probe_in_both_modes(ranks):
    found, snapshot = {}, Snapshot(3)
    both = [monitor(k=1, every_n_steps=[3], sample=batches(), mode=mode, name=mode) for mode in ("train", "eval")]
    trainer = fit(Normed(), loader(ranks), snapshot, *both, ranks=ranks, steps=3)
    after = trainer.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in snapshot.state.items())
    found["records"] = [rows(one)[0] for one in both]
    found["state"] = {key: value.numpy() for key, value in snapshot.state.items()}
    return found


@pytest.mark.usefixtures("_probes_alone")
def test_batch_norm_statistics_are_those_of_the_first_rank():
    """They differ between ranks after a step; the loss in eval mode is one function all the same."""
    found = on(2, probe_in_both_modes)
    states = [of_rank["state"] for of_rank in found]
    assert (states[0]["net.0.running_mean"] != states[1]["net.0.running_mean"]).all()
    assert (states[0]["net.1.weight"] == states[1]["net.1.weight"]).all()
    assert_equal_on_all([of_rank["records"] for of_rank in found])
    module = Normed()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in states[0].items()})
    for mode, record in zip(("train", "eval"), found[0]["records"], strict=True):
        expected = measure_subspace(module, batches(), k=1, mode=mode, dtype="float64").metrics
        for key in ("sharpness", "gradient_fraction", "gradient_norm", "gradient_hessian_cosine"):
            assert record[key] == pytest.approx(expected[key], rel=1e-9), (mode, key)


# -- when -------------------------------------------------------------------------------------------------------------


class Slow(Net):
    """Takes its time on one rank, in training and in every evaluation of a probe."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def training_step(self, batch, batch_idx):
        time.sleep(0.01 if self.global_rank == self.rank else 0.001)
        return super().training_step(batch, batch_idx)


class Contrary(SubspaceMonitor):
    """Wants other steps on every rank."""

    def should_measure(self, step):
        return step % (2 + dist.get_rank()) == 0


SCHEDULES = {
    "budget": {"max_overhead": 0.3, "every_n_steps": 1, "k": 0},
    "list": {"every_n_steps": [1, 2, 5], "k": 0},
    "list in a budget": {"max_overhead": 0.3, "every_n_steps": [0, 1, 2, 5, 6, 8], "k": 0},
    "by the clock": {"max_overhead": 0.5, "every_n_steps": 1, "k": 0},
}


def ticking(slow, arguments):
    """A monitor with a clock of its own: a step takes a second, and a probe ten times as long on the slow rank."""
    clock = types.ModuleType("clock")  # no state of the callbacks, which would be put back
    clock.now = 0.0

    def evaluate(module, batch, batch_idx):
        clock.now += 1.0 if module.global_rank == slow else 0.1
        return Net.training_step(module, batch, batch_idx)

    def tick(*args):
        clock.now += 1.0

    one = monitor(sample=12, gradient_sample=12, loss_fn=evaluate, **arguments)
    one._schedule._clock = lambda: clock.now
    return one, Net(), [LambdaCallback(on_train_batch_start=tick)]


def choose_steps(ranks):
    """The steps at which there were probes: by schedule, and by the rank that is slow."""
    found = {}
    for slow in range(ranks):
        for name, arguments in SCHEDULES.items():
            if not IS_THOROUGH and (name == "list" or (slow and name != "budget")):  # a list is one in a budget, too
                continue
            one, module, callbacks = monitor(sample=12, gradient_sample=12, **arguments), Slow(slow), []
            if "budget" in name:
                one, module, callbacks = ticking(slow, arguments)
            with warnings.catch_warnings(), probes_alone():
                warnings.filterwarnings("ignore", ".*steps .* were passed over", UserWarning)
                fit(module, loader(ranks), one, *callbacks, ranks=ranks, steps=8)
            found[slow, name] = steps_of(one)
    one = Contrary(k=0, every_n_steps=1, max_overhead=None, sample=12, gradient_sample=12)
    with probes_alone():
        fit(Net(), loader(ranks), one, ranks=ranks, steps=7)
    found["contrary"] = steps_of(one)
    return found


def test_all_ranks_choose_the_same_steps():
    """Whichever is slow, and where they would choose differently: what the first rank wants is done."""
    found, other = on(2, choose_steps)
    assert found == other
    # The first rank is the slow one, and then the fast one; the other would have chosen as in the other case.
    assert found[1, "budget"] == list(range(9))
    assert 1 < len(found[0, "budget"]) < 9
    assert 1 < len(found[0, "list in a budget"]) < 6
    if IS_THOROUGH:
        assert found[1, "list in a budget"] == [0, 1, 2, 5, 6, 8]
        assert found[0, "list"] == found[1, "list"] == [1, 2, 5]
    for slow in range(how_many(1, thorough=2)):
        assert found[slow, "by the clock"][0] == 0
    assert found["contrary"] == [0, 2, 4, 6, 7]


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Saving(Callback):
    """Writes a checkpoint behind every step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def train_on(ranks, folder, resume, width):
    """Train to step 7, from the start or from a checkpoint, and leave one behind every step."""
    one, data = monitor(every_n_steps=2, reference_step=2), in_turn(ranks, COUNT)  # one step an epoch
    trainer = fit(Net(width), data, one, Saving(folder), ranks=ranks, steps=7, max_epochs=-1, ckpt_path=resume)
    steps, matrix = one.overlap_matrix()
    return rows(one), steps, matrix, [p.tolist() for p in trainer.model.parameters()], one._runner.run.num_probes


EXACT = pytest.param(
    6, usual([(1, 2, 4)], thorough=[(2, 3, 4), (1, 2, 5), (2, 1, 4), (2, 3, 5), (2, 1, 5)]), id="sketch is basis"
)
# Sketches of two ranks that estimate are among the records above, and such ones of a checkpoint in test_state.py.
ESTIMATED = pytest.param(600, [(2, 1, 5), (1, 2, 5)], id="sketch estimates")


@pytest.mark.usefixtures("_probes_alone")
@pytest.mark.parametrize(("width", "changes"), usual([EXACT], thorough=[ESTIMATED]))
def test_a_checkpoint_can_be_resumed_on_another_number_of_ranks(tmp_path, width, changes):
    """History, overlaps and schedule go on: behind a probe, whose record is open, and between two.

    Overlaps are exact with up to 4,096 parameters, and estimated beyond.
    """
    started = sorted({1, *(before for before, _, _ in changes)})
    straight = {ranks: on(ranks, train_on, tmp_path / str(ranks), None, width)[0] for ranks in started}
    history, steps, matrix, weights, num_probes = straight[1]
    assert steps == [0, 2, 4, 6, 7]
    for other, *_ in straight.values():
        assert_close("straight", other, history)
    error = 5 * Sketch(torch.eye(2, 4096), exact=False).error if width == 600 else 1e-6
    for before, after, at in changes:
        found = on(after, train_on, tmp_path / "other", tmp_path / str(before) / f"{at}.ckpt", width)
        assert_equal_on_all([of_rank[:2] for of_rank in found])
        rows_then, steps_then, overlaps, parameters, count = found[0]
        assert (steps_then, count) == (steps, num_probes)
        np.testing.assert_allclose(parameters[0], weights[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(overlaps, matrix, rtol=0, atol=error)
        for one, expected in zip(rows_then, history, strict=True):
            assert one.keys() == expected.keys()
            # The running mean of training's losses begins anew, and the step before was not taken in this run.
            apart = ("solver/", "training_loss", *(["step/cosine_previous"] if expected["step"] == at else []))
            for key in (key for key in expected if not key.startswith(apart)):
                # Beyond 4,096 parameters there are no eigenvectors to begin with, and it ends as near as the tolerance.
                near = error if "overlap" in key or width == 6 else 1e-3
                assert one[key] == pytest.approx(expected[key], rel=near, abs=near, nan_ok=True), (
                    expected["step"],
                    key,
                )


# -- what is written --------------------------------------------------------------------------------------------------


class Everywhere(Logger):
    """Writes on every rank, as Lightning's own loggers take care not to."""

    def __init__(self):
        super().__init__()
        self.calls = []

    name = version = "everywhere"

    def log_metrics(self, metrics, step=None):
        self.calls.extend(key for key in metrics if key.startswith("subspace"))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def speak(ranks):
    """What is written: to a logger, as warnings, as messages and to the streams."""
    logger, messages = Everywhere(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    streams = io.StringIO()
    one = monitor(every_n_steps=[0, 1, 2], max_overhead=1e-6, max_matvecs=2, on_failure="warn")
    with warnings.catch_warnings(record=True) as heard, contextlib.redirect_stderr(streams):
        warnings.simplefilter("always")
        with contextlib.redirect_stdout(streams):
            log = logging.getLogger("lightning.pytorch")
            log.addHandler(handler)
            fit_loudly(Net(), loader(ranks), one, logger, ranks)
            log.removeHandler(handler)
    told = [str(warning.message) for warning in heard if "SubspaceMonitor" in str(warning.message)]
    said = [message for message in messages if "SubspaceMonitor" in message]
    return sorted(set(logger.calls)), told, said, streams.getvalue()


def fit_loudly(module, data, one, logger, ranks):
    settings = {"accelerator": "cpu", "devices": ranks, "strategy": "ddp", "max_steps": 3, "log_every_n_steps": 1}
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    trainer = Trainer(logger=logger, callbacks=[one], **settings, **QUIET)
    trainer.fit(module, data)


def test_only_the_first_rank_writes():
    (logged, told, said, written), (*others, written_there) = on(2, speak)
    assert "subspace/gradient_norm" in logged
    assert len(told) == 2, told  # no convergence; steps passed over
    assert any("about" in message and "on each of 2 ranks" in message for message in said)
    assert others == [[], [], []]
    assert "subspace" not in (written + written_there).lower()


# -- what is refused --------------------------------------------------------------------------------------------------


def trainer_of(strategy, world_size=2):
    return SimpleNamespace(strategy=strategy, world_size=world_size, callbacks=[])


class DeepSpeedStrategy(DDPStrategy):
    """In the name of Lightning's own, which cannot be made without its package."""


class Foreign:
    pass


REFUSED = {
    "FSDP1": (FSDPStrategy(), ["FSDP1", "use FSDP2", "strategy='ddp'"]),
    "DeepSpeed": (DeepSpeedStrategy(), ["DeepSpeed", "use strategy='ddp'", "FSDP2"]),
    "foreign": (Foreign(), ["Foreign", "2 processes", "strategy='ddp'", "devices=1"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_strategies_that_cannot_be_measured_under_are_refused(name):
    strategy, words = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=r"^SubspaceMonitor: ") as caught:
        SubspaceMonitor().setup(trainer_of(strategy), Net(), "fit")
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert said.count(". ") == 0  # one sentence
    assert said.endswith(".")
    SubspaceMonitor().setup(trainer_of(strategy), Net(), "test")  # only training is measured


def test_one_process_is_measured_under_any_strategy():
    assert ranks_of(trainer_of(Foreign(), world_size=1)).count == 1


class Parallel(Net):
    def configure_model(self):
        pass


def train_in_tensor_parallel(ranks):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=ranks)
    with pytest.raises(MisconfigurationException, match=r"tensor parallel layers are wrong.*tensor_parallel_size=1"):
        fit(Parallel(), loader(ranks), monitor(), ranks=ranks, strategy=strategy)
    return True


def test_tensor_parallelism_is_refused():
    assert on(2, train_in_tensor_parallel) == [True, True]


class WritingOnOne(Net):
    """The first rank alone writes to state around the module, and all ranks talk to each other in a training step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if dist.is_initialized():
            dist.all_reduce(loss.detach().clone())
            self.seen.append(self.trainer.global_step)
        if rank_of_this() == 0:
            self.trainer.callbacks[0].seen[0] += 1.0
        return loss


class Counter(Callback):
    def __init__(self):
        self.seen = torch.zeros(1)


def written_on_one(ranks):
    """Of a fit without a monitor and one with it."""
    found = []
    for watching in ([], [monitor(k=1, every_n_steps=[0, 1], sample=12, gradient_sample=24)]):
        module, counter = WritingOnOne(), Counter()
        fit(module, in_turn(ranks), counter, *watching, ranks=ranks, steps=3)
        weights = [p.tolist() for p in module.parameters()]
        found.append((weights, counter.seen.item(), module.seen, [steps_of(one) for one in watching]))
    return found


def test_an_evaluation_that_writes_on_one_rank_is_taken_again_on_all(monkeypatch):
    leave_error_bar_out(monkeypatch)
    alone, watched = zip(*on(2, written_on_one), strict=True)
    assert [one[3] for one in watched] == [[[0, 1]]] * 2
    assert [one[:3] for one in watched] == [one[:3] for one in alone]
