"""Each kind of state at each place is contained, or refused when it is used; what other threads use is left alone."""

import queue
import sys
import threading
import types

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_subspace import LossError, SubspaceMonitor
from lightning_subspace.loss import surroundings, watched
from lightning_subspace.loss.findings import findings_of
from lightning_subspace.loss.shadow import Shadow
from tests.loss import kinds_of_state as table
from tests.loss.generated_modules import OWNERS, State, require_the_same
from tests.modules import Holder
from tests.thorough import covering

ALWAYS = ("always", True)


@pytest.mark.parametrize("kind", table.KINDS)
def test_every_kind_in_a_module_is_contained_or_refused_when_it_is_used(kind):
    require_the_same([State(kind, "itself", "module", *ALWAYS)])


@pytest.mark.parametrize(
    ("place", "kind"), covering(list(table.PLACES), ["tensor", "list", "large list of tensors", "replay memory"])
)
def test_every_place_is_looked_at(kind, place):
    require_the_same([State(kind, place, "module", "for some batches", True)])


@pytest.mark.parametrize(
    ("owner", "kind"),
    covering(list(OWNERS), ["tensor through .data", "array", "object", "large list of pairs, an entry", "queue"]),
)
def test_every_owner_is_looked_at(kind, owner):
    require_the_same([State(kind, "itself", owner, *ALWAYS)])


# Found by drawing modules at random.
@pytest.mark.parametrize(
    "states",
    [
        [State("module in a list", "itself", "callback", *ALWAYS)],  # copies around a module are not widened
        [State("bound method", "itself", "class", *ALWAYS)],
        [State("simple queue", "itself", "file", *ALWAYS)],
        [State("closure", "partial", "file", "for some batches", False)],
        [State("data set of weights", "object of another package", "submodule", "later", True)],
        [State("tensor through .data", "list", "callback", "for some batches", True)],
        [State("large list of tensors, through .data", "dict", "trainer", "for some batches", True)],
        [State("tensor through .data", "list", "file", "for some batches", False)],
        [State("dict", "large dict of lists", "file", *ALWAYS)],
        [State("torch generator", "closure", "class", "at every second call", True)],
        [State("iterator", "read-only dict", "data module", "later", False)],
        [State("long tensor", "read-only dict", "trainer", "always", False)],
        [State("count", "thread-local", "file", "for some batches", False)],
        [  # the refusal of the one comes before the other could be noticed
            State("queue", "object", "class", "later", False),
            State("simple queue", "thread-local", "data module", "later", True),
        ],
        [  # what is written to has others found anew in the middle of a probe
            State("array of a record", "data set", "optimizer", "for some batches", True),
            State("replay memory", "wrapped by another package", "parameter", "for some batches", True),
        ],
    ],
    ids=str,
)
def test_counterexamples(states):
    require_the_same(states)


# -- what cannot be put back ------------------------------------------------------------------------------------------


def test_a_tensor_without_a_copy_is_noticed_named_and_refused_from_then_on(monkeypatch):
    monkeypatch.setattr(watched, "MOST_COMPARED", 0)
    module, state = Holder(), types.SimpleNamespace(momentum=[torch.zeros(3)])
    for probe in range(2):  # in the first one it is left alone, so that the second one has no copy of it
        shadow = Shadow(module, extra_roots=[state])
        shadow.reset()
        if probe:
            state.momentum[0].add_(1)
            with pytest.raises(
                LossError, match=r"writes to SimpleNamespace.momentum\[0\], which could not be put back"
            ):
                shadow.settle()
        else:
            assert not shadow.settle()
        if not probe:
            shadow.close()
    with pytest.raises(LossError, match="is not evaluated again; pass loss_fn="):
        Shadow(module, extra_roots=[state])
    Shadow(module, extra_roots=[state], loss_key="another loss").close()


def test_a_field_of_c_that_a_reader_fills_is_no_change():
    module = Holder(node=table.Node("a"))
    shadow = Shadow(module)
    shadow.reset()
    assert module.node.attrib == {}  # is made when it is asked for
    assert not shadow.settle()
    shadow.close()


def test_a_large_tensor_is_put_back_at_the_first_evaluation_and_a_copy_from_then_on(monkeypatch):
    monkeypatch.setattr(watched, "MOST_COMPARED", 0)
    module, state = Holder(), types.SimpleNamespace(momentum=torch.zeros(3))
    original = state.momentum
    shadow = Shadow(module, extra_roots=[state])
    shadow.reset()
    assert state.momentum is original
    state.momentum.data.add_(1)
    assert shadow.settle()
    assert original.tolist() == [0, 0, 0]
    for _ in range(2):
        shadow.reset()
        assert state.momentum is not original
        state.momentum.add_(1)
        assert state.momentum.tolist() == [1, 1, 1]
        assert not shadow.settle()
    shadow.close()
    assert state.momentum is original
    assert original.tolist() == [0, 0, 0]


def test_a_write_past_the_counter_shows_in_a_checksum(monkeypatch):
    monkeypatch.setattr(watched, "MOST_COMPARED", 0)
    tensors = [
        torch.arange(n, dtype=dtype) for n in (1, 7, 64) for dtype in (torch.float16, torch.float32, torch.uint8)
    ]
    tensors += [torch.zeros(5, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.zeros(4, 4)[:, 1]]
    findings = findings_of(nn.Linear(1, 1))
    watched.WatchedTensors(tensors, findings).verify()
    for tensor in tensors:
        watch = watched.WatchedTensors(tensors, findings)
        (tensor._values() if tensor.is_sparse else tensor).data[-1] = 9
        assert [found is tensor for found in watch.changed(thorough=True)] == [True]
        assert not watch.put_back(tensor)


def test_the_bounds_hold(monkeypatch):
    monkeypatch.setattr(surroundings, "MOST_AROUND", 50)
    deep = [[[i]] for i in range(100)]
    module = Holder(env=table.FOREIGN.Box([deep, deep]))
    shadow = Shadow(module)
    assert len(shadow._around._containers) <= 50
    shadow.close()


DEEP = [[[[[]]]]]


class Deep(nn.Module):
    """Writes to a global that lies deep."""

    def forward(self):
        DEEP[0][0][0][0].append(1)


def test_what_has_imported_a_file_is_no_state_of_it(monkeypatch):
    """Such as pytest, behind the import hook of a test: it would take the place of what is looked for."""
    hook = table.FOREIGN.Box([[[i] for i in range(50)] for _ in range(50)])
    assert sum(map(len, hook.held)) > surroundings.MOST_GLOBAL
    monkeypatch.setitem(globals(), "__loader__", hook)
    module = Deep()
    shadow = Shadow(module)
    for _ in range(2):
        shadow.reset()
        module()
        shadow.settle()
        assert DEEP == [[[[[]]]]]
    shadow.close()


# -- other threads ----------------------------------------------------------------------------------------------------


class Prefetcher:
    """Fills a queue and a list from a thread of its own."""

    def __init__(self):
        self.ready, self.seen, self.is_over = queue.Queue(), [], threading.Event()
        self.asked = threading.Semaphore(0)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.is_over.is_set():
            self.asked.acquire()
            self.seen.append(len(self.seen))
            self.ready.put(len(self.seen))

    def end(self):
        self.is_over.set()
        self.asked.release()
        self.thread.join()


def test_what_another_thread_does_during_a_probe_stays():
    fetcher = Prefetcher()
    module = Holder(fetcher=fetcher, mine=[])
    shadow = Shadow(module)
    try:
        for count in range(1, 4):
            shadow.reset()
            module.mine.append(1)
            fetcher.asked.release()
            while len(fetcher.seen) < count:
                pass
            shadow.settle()
    finally:
        shadow.close()
        fetcher.end()
    assert fetcher.seen[:3] == [0, 1, 2]
    assert fetcher.ready.qsize() >= 3
    assert module.mine == []


CELLS = """
from torch import nn

HISTORY = []

class Net(nn.Module):
    def forward(self, x):
        HISTORY.append(1)
        return x

def run(started, ended):
    exec("started.set(); ended.wait()", globals() | {"started": started, "ended": ended})
"""


@pytest.mark.parametrize("how", ["a kernel's thread has the namespace", "a thread runs code in it"])
def test_a_thread_does_not_own_what_a_notebook_has_defined(how, monkeypatch):
    notebook = types.ModuleType("notebook_of_this_test")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    exec(CELLS, vars(notebook))
    started, ended = threading.Event(), threading.Event()
    if how == "a thread runs code in it":
        thread = threading.Thread(target=notebook.run, args=(started, ended))
    else:
        thread = threading.Thread(target=lambda kernel: (started.set(), ended.wait()), args=[{"ns": vars(notebook)}])
    thread.start()
    started.wait()
    shadow = Shadow(notebook.Net())
    try:
        shadow.reset()
        shadow._module(torch.ones(1))
        shadow.settle()
        shadow.reset()
        assert notebook.HISTORY == []
    finally:
        shadow.close()
        ended.set()
        thread.join()
    assert notebook.HISTORY == []


def test_a_queue_that_is_held_and_not_used_is_not_refused():
    module = Holder(requests=queue.Queue())
    shadow = Shadow(module)
    shadow.reset()
    assert module.requests.empty()
    answers = []
    thread = threading.Thread(
        target=lambda stand_in: answers.append((stand_in.put(3), stand_in.get())), args=[module.requests]
    )
    thread.start()
    thread.join()
    with pytest.raises(TypeError, match=r"type Queue .* cannot be put back afterwards; pass loss_fn="):
        module.requests.get_nowait()
    shadow.close()
    assert answers == [(None, 3)]


# -- in a Trainer -----------------------------------------------------------------------------------------------------

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))


class Weighted(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.weights = torch.ones(32, dtype=torch.double)

    def train_dataloader(self):
        data = TensorDataset(X, X[:, :3].argmax(1), torch.arange(32))
        return DataLoader(data, batch_size=8, sampler=WeightedRandomSampler(self.weights, 32))


class Counter(pl.Callback):
    n = 0


def reweigh(net, batch):
    net.trainer.datamodule.weights[batch[2]] = batch[0][:, 0].exp().double()


def reweigh_by_the_loader(net, batch):
    net.trainer.train_dataloader.sampler.weights.mul_(batch[0][:, 0].exp().mean())


def count_in_a_callback(net, batch):
    net.trainer.callbacks[0].n += 1


def damp(net, batch):
    for state in net.trainer.optimizers[0].state.values():
        state["momentum_buffer"].mul_(0.9)


def damp_past_the_counter(net, batch):
    for state in net.trainer.optimizers[0].state.values():
        state["momentum_buffer"].data.mul_(0.9)


def count_in_the_loop(net, batch):
    net.trainer.fit_loop.epoch_loop.n = 1 + getattr(net.trainer.fit_loop.epoch_loop, "n", 0)


def remember(net, batch):
    net.memory.items.append(batch[0])


WAYS = (reweigh, reweigh_by_the_loader, count_in_a_callback, damp, damp_past_the_counter, count_in_the_loop, remember)


class Net(pl.LightningModule):
    def __init__(self, way):
        super().__init__()
        self.net, self.memory, self.way = nn.Linear(5, 3), table.Buffer(), way

    def training_step(self, batch, batch_idx):
        self.way(self, batch)
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, *args):
        count = (
            len(self.memory.items) + self.trainer.callbacks[0].n + getattr(self.trainer.fit_loop.epoch_loop, "seen", 0)
        )
        self.trainer.optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + count)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fitted(way, *monitors):
    pl.seed_everything(0, verbose=False)
    net = Net(way)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Counter(), *monitors],
    )  # fmt: skip
    trainer.fit(net, datamodule=Weighted())
    return [p.detach().numpy().tobytes() for p in net.parameters()]


@pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step")
@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_whatever_its_step_reaches_by_the_trainer(way):
    monitor = SubspaceMonitor(
        k=2, every_n_steps=2, max_overhead=None, sample=16, gradient_sample=24, on_failure="raise"
    )
    assert fitted(way, monitor) == fitted(way)
    assert len(monitor.history) >= 3


# -- large containers -------------------------------------------------------------------------------------------------


def test_a_large_container_is_looked_through_once():
    module = Holder(pairs=[(str(i), i) for i in range(1000)], table={str(i): [i] for i in range(1000)})
    shadow = Shadow(module)
    first = list(shadow._around._bulks)
    assert len(first) == 2
    shadow.close()
    again = Shadow(module)
    assert all(a is b for a, b in zip(first, again._around._bulks, strict=True))
    again.close()
    module.pairs.append(("new", 1))
    other = Shadow(module)
    assert [a is b for a, b in zip(first, other._around._bulks, strict=True)].count(False) == 1
    other.close()


def test_arrays_that_share_memory_share_it_among_the_copies():
    whole = np.zeros((3, 4))
    module = Holder(row=whole[1], whole=whole, other=whole.T[2:], alone=np.zeros(2)[1:])
    shadow = Shadow(module)
    shadow.reset()
    module.row += 1
    module.other[0, 1] = 5
    assert module.whole is not whole
    assert module.whole[1].tolist() == [1, 1, 5, 1]
    shadow.close()
    assert module.whole is whole
    assert not whole.any()
