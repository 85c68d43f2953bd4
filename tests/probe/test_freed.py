"""What is alive after a probe, taken or failed, before any garbage collection: nothing that was made for it.

A mode sees every tensor that is made meanwhile, in forward passes, in backward passes and by the package, and holds a
weak reference to its memory. A failure of some kind comes in some phase, inside of the user's own code.
"""

import contextlib
import gc
import threading
import types

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, Needs, SubspaceMonitor, SubspaceProjection, measure_subspace
from lightning_subspace.curvature import CurvatureConfig, Hessian
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.subspace.solver import Solver

EXAMPLES, WIDTH = 13, 11  # sizes that nothing else has: what has so many numbers is of a batch or of a layer
PHASES = ("sample", "self-check", "graphs", "solve", "measurement")
KINDS = (RuntimeError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)


class Made(TorchDispatchMode):
    """Weak references to the memory of all that is made of a size like that of a batch, a layer, or of parameters."""

    def __init__(self):
        super().__init__()
        self.memory = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        is_new = not function.is_view and not function._schema.is_mutable
        for leaf in tree_leaves(result) if is_new else []:
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= EXAMPLES * WIDTH:
                self.memory.append(StorageWeakRef(leaf.untyped_storage()))
        return result

    def num_alive(self, held=()):
        """Of how many the memory is still there, but for those of tensors that may stay."""
        alive = {ref.cdata for ref in self.memory if not ref.expired()}
        return len(alive - {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in held})


class Fuse(types.ModuleType):
    """Raises in a phase, at the n-th place of it that is reached, and at all behind.

    A module, as the state of these is not put back.
    """

    def __init__(self, phase="", kind=RuntimeError, number=1):
        super().__init__("fuse")
        self.phase, self.kind, self.left = phase, kind, number
        self.here = ""
        self.reached = set()

    def reach(self):
        self.reached.add(self.here)
        if self.here == self.phase and self.here:
            self.left -= 1
            if self.left <= 0:
                raise self.kind("on purpose")


class Net(LightningModule):
    def __init__(self, fuse):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.fuse = fuse

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        activation = hidden * torch.sigmoid(hidden)  # local, and saved
        self.fuse.reach()
        if activation.requires_grad:
            activation.register_hook(lambda gradient: self.fuse.reach())
        return self.second(activation)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Curved(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        return {"curved": probe.dot(probe.gradient, probe.operator.matvec(probe.gradient))}


def follow(fuse, monkeypatch):
    """Have a fuse told in which phase a probe is."""

    def within(owner, name, phase):
        original = getattr(owner, name)

        def followed(*args, **kwargs):
            before, fuse.here = fuse.here, fuse.here or phase
            try:
                return original(*args, **kwargs)
            finally:
                fuse.here = before

        monkeypatch.setattr(owner, name, followed)

    within(CurvatureConfig, "check", "self-check")
    within(Hessian, "__init__", "graphs")
    within(Solver, "solve", "solve")
    within(Curved, "measure", "measurement")


@contextlib.contextmanager
def without_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def batches(fuse, count=3):
    """Micro-batches whose reading may fail."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        fuse.here = "sample"
        fuse.reach()
        fuse.here = ""
        yield torch.randn(EXAMPLES, WIDTH, generator=generator), torch.arange(EXAMPLES) % 3


def probe(net, fuse, **kwargs):
    return measure_subspace(net, batches(fuse), k=1, measurements=[Curved()], tol=0.1, verify="never", **kwargs)


FAILURES = [(phase, RuntimeError, 2) for phase in PHASES]
FAILURES += [(phase, kind, 1) for phase in ("graphs", "solve") for kind in KINDS[1:]]


@pytest.mark.parametrize(("phase", "kind", "number"), FAILURES)
def test_nothing_is_alive_after_a_failure(phase, kind, number, monkeypatch):
    fuse = Fuse(phase, kind, number)
    follow(fuse, monkeypatch)
    torch.manual_seed(0)
    net, made = Net(fuse), Made()
    with without_collection():
        with pytest.raises(kind, match="on purpose"), made:
            probe(net, fuse)
        assert fuse.left <= 0
        assert made.memory
        assert made.num_alive() == 0


@pytest.mark.parametrize("kind", [None, RuntimeError])
def test_nothing_is_alive_after_a_probe_but_its_record(kind, monkeypatch):
    """Also where the self-check has failed in a way that decides nothing."""
    fuse = Fuse() if kind is None else Fuse("self-check", kind, 8)
    follow(fuse, monkeypatch)
    net, made = Net(fuse), Made()
    told = contextlib.nullcontext() if kind is None else pytest.warns(UserWarning, match="could not be checked")
    with without_collection():
        with told, made:
            record = probe(net, fuse)
        assert fuse.reached >= set(PHASES)
        assert made.num_alive(held=[record.subspace.basis, record.sketch.basis]) == 0


def test_nothing_is_alive_after_a_probe_beside_another_thread():
    """Such as the writer of a logger has, or a compiler."""
    fuse, done = Fuse(), threading.Event()
    net, made = Net(fuse), Made()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    try:
        with without_collection():
            with made:
                record = probe(net, fuse)
            assert made.memory
            assert made.num_alive(held=[record.subspace.basis, record.sketch.basis]) == 0
    finally:
        done.set()
        thread.join()


def seen_in_probes(monkeypatch):
    """What is made while the loss of a probe is open, without the sample and without training."""
    made, enter = Made(), TrainingLoss.__enter__

    def entered(self):
        loss = enter(self)
        self._stack.enter_context(made)
        return loss

    monkeypatch.setattr(TrainingLoss, "__enter__", entered)
    return made


@pytest.mark.parametrize(
    ("phase", "kind"), [("graphs", MemoryError), ("solve", MemoryError), ("measurement", torch.OutOfMemoryError)]
)
def test_who_catches_that_memory_has_run_out_has_it_back_at_once(phase, kind, monkeypatch):
    """Inside of the `except`, too, where the exception still has its traceback: there one tries again."""
    fuse = Fuse(phase, kind)
    follow(fuse, monkeypatch)
    net, made = Net(fuse), seen_in_probes(monkeypatch)
    with without_collection():
        try:
            probe(net, fuse)
        except kind:
            assert made.memory
            assert made.num_alive() == 0
        else:
            pytest.fail("nothing was raised")


class Watch(Callback):
    """Behind the monitor in each hook: how much of its probe is alive."""

    def __init__(self, fuse, made):
        self.seen = types.ModuleType("seen")  # the state of a module is not put back
        self.seen.fuse, self.seen.made, self.seen.alive = fuse, made, []

    def on_train_batch_end(self, *args):
        self.seen.alive.append(self.seen.made.num_alive())
        self.seen.fuse.phase = ""


def callback(name):
    arguments = {"k": 2, "sample": 2 * EXAMPLES, "batch_size": EXAMPLES, "tol": 0.1, "verify": "never"}
    if name == "projection":
        return SubspaceProjection("bulk", **arguments)
    return SubspaceMonitor(
        gradient_sample=2 * EXAMPLES, every_n_steps=1, max_overhead=None, measurements=[Curved()], **arguments
    )


@pytest.mark.parametrize(
    ("name", "phase", "kind"),
    [
        *(("monitor", phase, RuntimeError) for phase in PHASES[2:]),
        ("monitor", "solve", torch.OutOfMemoryError),
        ("monitor", "solve", KeyboardInterrupt),
        ("projection", "solve", RuntimeError),
    ],
)
def test_nothing_is_alive_when_training_goes_on(name, phase, kind, monkeypatch):
    fuse = Fuse(phase, kind, 2)
    follow(fuse, monkeypatch)
    made = seen_in_probes(monkeypatch)
    watch, measuring = Watch(fuse, made), callback(name)
    data = DataLoader(TensorDataset(torch.randn(4 * EXAMPLES, WIDTH), torch.arange(4 * EXAMPLES) % 3), EXAMPLES)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measuring, watch],
    )
    net = Net(fuse)
    is_interrupt = kind is KeyboardInterrupt
    told = contextlib.nullcontext() if is_interrupt else pytest.warns(UserWarning, match="on purpose")
    with without_collection():
        with told, pytest.raises(SystemExit) if is_interrupt else contextlib.nullcontext():
            trainer.fit(net, data)
        del told
        assert fuse.left <= 0
        assert made.memory
        assert (made.num_alive() if is_interrupt else watch.seen.alive[0]) == 0
