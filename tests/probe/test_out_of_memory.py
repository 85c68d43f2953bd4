"""Memory that runs out in a probe: fewer graphs are kept, then none, and the numbers are the same to the last bit.

The memory is one of this test: the activations of so many micro-batches fit, whoever keeps them, and the next forward
or backward pass raises what torch or Python raise. So a graph that is not freed in time fails a test.
"""

import functools
import logging
import types

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, measure_subspace
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import WrittenError
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.screening import Screening
from tests.processes import run

EXAMPLES, BATCHES = 8, 6
KINDS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "host": MemoryError(),
    "torch on the host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 123 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


class Room(types.ModuleType):
    """Room for the activations of so many micro-batches; a module, as the state of these is not put back."""

    def __init__(self, forward=None, backward=None, kind="device"):
        super().__init__("room")
        self.most = {"forward": forward, "backward": backward}  # None: any number
        self.kind, self.taken, self.highest = kind, [], 0

    def require(self, where):
        alive = sum(not reference.expired() for reference in self.taken)
        if self.most[where] is not None and alive > self.most[where]:
            raise type(KINDS[self.kind])(*KINDS[self.kind].args)
        self.highest = max(self.highest, alive)

    def take(self, activation):
        self.taken = [reference for reference in self.taken if not reference.expired()]
        self.taken.append(StorageWeakRef(activation.untyped_storage()))
        self.require("forward")


class Net(LightningModule):
    def __init__(self, room=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.room = Room() if room is None else room

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if self.room is not None and torch.is_grad_enabled():
            self.room.take(hidden)
            hidden.register_hook(lambda gradient: self.room.require("backward"))
        return self.second(hidden)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXAMPLES * BATCHES, 5, generator=generator), torch.arange(EXAMPLES * BATCHES) % 3


def batches():
    return list(zip(*(tensor.split(EXAMPLES) for tensor in data()), strict=True))


@pytest.fixture(autouse=True)
def single(monkeypatch):
    """Micro-batches one by one: what becomes of joined ones, which differ by rounding, is in `test_joining.py`."""
    monkeypatch.setattr(CurvatureConfig, "joining", lambda self, *args: self)


def numbers(record):
    return record.metrics, record.subspace.eigenvalues.tolist(), record.subspace.gather().tolist()


@functools.cache
def expected(curvature):
    """Numbers where there is room for all."""
    return numbers(measure_subspace(Net(), batches(), k=2, curvature=curvature))


@pytest.fixture
def told(caplog):
    """A function that gives what was logged of memory."""
    caplog.set_level(logging.INFO)
    return lambda: [message for message in caplog.messages if "memory ran out" in message]


FEWER = [
    ("forward", 5, 2, "device"),
    ("forward", 3, 1, "host"),
    ("forward", 2, 1, "torch on the host"),
    ("forward", 1, 0, "device"),
    ("backward", 4, 2, "device"),
    ("backward", 2, 1, "host"),
]


@pytest.mark.parametrize(("where", "most", "kept", "kind"), FEWER)
def test_fewer_graphs_are_kept_with_the_same_numbers(where, most, kept, kind, told):
    with_room = expected("hessian")
    assert told() == []
    room = Room(**{where: most}, kind=kind)
    assert numbers(measure_subspace(Net(room), batches(), k=2)) == with_room
    assert where == "backward" or room.highest <= most
    (line,) = told()
    assert f"; at most {kept} are kept from now on" in line


@pytest.mark.parametrize("curvature", ["ggn", "empirical-fisher"])
def test_other_matrices_keep_less(curvature, told):
    with_room = expected(curvature)
    if curvature == "ggn":
        assert numbers(measure_subspace(Net(Room(forward=2)), batches(), k=2, curvature=curvature)) == with_room
    else:  # keeps gradients: memory runs out once, wherever that is
        failing = Room()
        failing.count = 0

        def once(where):
            failing.count += where == "backward"
            if where == "backward" and failing.count == 20:
                raise MemoryError

        failing.require = once
        assert numbers(measure_subspace(Net(failing), batches(), k=2, curvature=curvature)) == with_room
    (line,) = told()
    assert "graphs" in line


def test_only_then_it_fails(told):
    with pytest.raises(torch.OutOfMemoryError):
        measure_subspace(Net(Room(forward=0)), batches(), k=2)
    assert told() == []


def test_another_failure_is_not_tried_again():
    room = Room()
    room.require = lambda where: 1 / 0
    with pytest.raises(ZeroDivisionError):
        measure_subspace(Net(room), batches(), k=2)
    assert len(room.taken) == 1


def fit(room, **arguments):
    monitor = SubspaceMonitor(k=2, sample=EXAMPLES * BATCHES, every_n_steps=2, max_overhead=None, **arguments)
    net = Net(room)
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    trainer.fit(net, DataLoader(TensorDataset(*data()), EXAMPLES))
    return monitor, net


def test_a_monitor_tells_it_once_and_remembers(told):
    expected, trained = fit(Room())
    assert told() == []
    room = Room(forward=3)
    monitor, net = fit(room)
    rows = [
        [{key: value for key, value in row.items() if key not in ("solver/seconds", "solver/overhead")} for row in of]
        for of in (expected.to_rows(), monitor.to_rows())
    ]
    assert len(rows[0]) > 2
    assert str(rows[0]) == str(rows[1])  # where a value is nan, too
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), net.parameters(), strict=True))
    (line,) = told()
    assert line.startswith("SubspaceMonitor: memory ran out while the graphs of 3 micro-batches were kept on a rank; ")
    assert "at most 1 are kept from now on" in line


def test_one_rank_without_memory_has_all_keep_fewer():
    """All begin again together: their collectives stay the same, and the numbers too."""

    def in_a_process():
        found = []
        for most in ({}, {"forward": 2}, {"backward": 2}):
            room = Room(**(most if dist.get_rank() == 1 else {}))
            record = measure_subspace(Net(room), batches(), k=2, group=dist.group.WORLD)
            found.append((numbers(record), room.highest))
        return found

    first, second = run(in_a_process, 2)
    with_room, every = second[0]
    assert every == BATCHES // 2
    assert [found for found, _ in (*first, *second)] == [with_room] * 6
    assert [held for _, held in (first[1], second[1])] == [every, 2]  # of room in the forward pass


def test_half_as_many_each_time_until_there_are_none():
    footprint, kept, seen = Footprint(), 11, []
    while footprint.lower(kept):
        kept = footprint.most
        seen.append(kept)
    assert seen == [5, 2, 1, 0]


@pytest.mark.parametrize("around", [None, torch.OutOfMemoryError, MemoryError])
def test_a_lack_of_memory_that_the_user_handles_is_not_the_probes(around, told):
    """As where training is tried again in the handler of the first trial's failure."""

    def broken():
        failing, calls = Room(), []

        def fail_late(where):
            calls.append(where)
            if len(calls) > 60:  # in the solver
                raise ValueError("a bug of the user's")

        failing.require = fail_late
        with pytest.raises(ValueError, match="a bug of the user's"):
            measure_subspace(Net(failing), batches(), k=2)
        return len(calls)

    def first_trial():
        local = "the user's"
        raise around(local)

    expected = broken()
    if around is not None:
        try:
            first_trial()
        except around as error:
            frame = error.__traceback__.tb_next.tb_frame
            assert broken() == expected
            with pytest.raises(torch.OutOfMemoryError):
                measure_subspace(Net(Room(forward=0)), batches(), k=2)
            assert frame.f_locals["local"] == "the user's"
    assert told() == []


def test_what_an_evaluation_writes_is_put_back_also_beside_a_rank_without_memory():
    """Which keeps no graphs, so that fewer help nobody; the other rank knows now what has to be put back."""

    def in_a_process():
        screening, runs = Screening(), []

        def block(sample):
            runs.append(sample)
            if len(runs) == 1:
                raise WrittenError("written to") if dist.get_rank() == 0 else MemoryError
            return "measured"

        ranks = Ranks(dist.group.WORLD)
        return screening.run(block, Sample(()), lambda: None, ranks), len(runs)

    assert run(in_a_process, 2) == [("measured", 2)] * 2
