"""The memory in the forecast, beside what is alive: every tensor that is made in a probe is seen, and when it goes."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_subspace.curvature import graph_memory, hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.probe.forecast import Forecast, Held
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace.room import Place

BATCHES, EXAMPLES, WIDTH = 5, 64, 50
MB = 10**6
SIZE = {"float32": 4, "native": 4, "float64": 8}
NUMBERS = 20_000  # about what a graph of `network` has


class Alive(TorchDispatchMode):
    """Bytes of what was made meanwhile and is still there, and the most that it has been."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not function.is_view and not function._schema.is_mutable:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    reference = StorageWeakRef(storage)
                    self.made[reference.cdata] = reference, storage.nbytes()
            self.peak = max(self.peak, self.now())
        return result

    def now(self):
        self.made = {key: pair for key, pair in self.made.items() if not pair[0].expired()}
        return sum(nbytes for _, nbytes in self.made.values())


def network():
    torch.manual_seed(0)
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def sample():
    generator = torch.Generator().manual_seed(1)
    return sample_of_batches(
        [(torch.randn(EXAMPLES, WIDTH, generator=generator), torch.arange(EXAMPLES) % 3) for _ in range(BATCHES)]
    )


@pytest.mark.parametrize(
    ("dtype", "curvature", "kept", "ncv"),
    [
        ("float32", "hessian", 5, None),
        ("float64", "hessian", 2, 9),
        ("float32", "ggn", 0, 9),
        ("native", "hessian", 3, 9),
    ],
)
def test_what_is_held_is_what_is_alive(dtype, curvature, kept, ncv, monkeypatch):
    module, k = network(), 4
    if kept < BATCHES:
        budget = (kept + 0.5) * NUMBERS * SIZE[dtype]
        monkeypatch.setattr(hessian, "memory_budget", lambda device, num_ranks: budget)
    settings = ProbeSettings(
        k=k,
        ncv=ncv,
        dtype=dtype,
        curvature=curvature,
        loss_fn=cross_entropy,
        measurements=(),
        defaults=False,
        max_matvecs=15,
    )
    run, alive, seen = ProbeRun(settings, module), Alive(), {}
    enter = TrainingLoss.__enter__

    def entered(self):
        loss = enter(self)
        self._stack.enter_context(alive)
        return loss

    monkeypatch.setattr(TrainingLoss, "__enter__", entered)
    batches = sample()
    forecast = Forecast(
        settings,
        Prospect(0, settings.solver, batches),
        run.partition,
        None,
        run.examples.footprint,
        torch.device("cpu"),
    )
    allocate = Lanczos.__init__

    def allocated(self, *args, **kwargs):
        allocate(self, *args, **kwargs)
        seen["basis"] = self.basis.nbytes

    monkeypatch.setattr(Lanczos, "__init__", allocated)
    monkeypatch.setattr(Held, "text", lambda self, *args: seen.update(held=self, told=args) or "")

    def on_matvec(count, residual):
        forecast.see(count)
        seen.setdefault("alive", []).append(alive.now())

    run.measure(module, batches, 0, on_matvec=on_matvec)
    held, (num_kept, rounds, peak, num_ranks, place) = seen["held"], seen["told"]
    assert place == Place(18 if ncv is None else ncv, 18 if ncv is None else ncv, "device")
    assert (num_kept, rounds, peak, num_ranks) == (kept, BATCHES, None, 1)
    n, itemsize = run.partition.n, module[1].weight.element_size() if dtype == "native" else SIZE[dtype]
    assert held.copies == sum(
        t.numel() * (itemsize if t.is_floating_point() else t.element_size())
        for t in (*module.parameters(), *module.buffers())
    )
    assert held.basis == seen["basis"] == (min(n, 18 if ncv is None else ncv) + 1) * n * itemsize
    assert held.examples == BATCHES * EXAMPLES * (4 * WIDTH + 8)
    assert (held.graphs > 0) == (kept > 0)
    # What is alive in the solve: the three above, and some vectors. The examples were made before.
    alive_then = max(seen["alive"]) - (held.total - held.examples)
    assert 0 <= alive_then <= 5 * n * itemsize
    # And the most that was alive at any time, in a product, is little less than what was computed.
    assert 0.85 <= alive.peak / (held.total - held.examples + held.more) <= 1.0


def test_copies_of_the_examples_are_held_too():
    module, batches = network(), sample()
    run = ProbeRun(settings := ProbeSettings(k=2, loss_fn=cross_entropy), module)
    texts = [
        Forecast(
            settings,
            Prospect(0, settings.solver, batches),
            run.partition,
            None,
            graph_memory.Footprint(joined=joined),
            torch.device("cpu"),
        )._held()
        for joined in (0, 3 * MB)
    ]
    assert "examples 0.1)" in texts[0]
    assert "examples 3.1)" in texts[1]


def test_the_text_has_the_parts_and_the_peak():
    held = Held(copies=8 * MB, basis=31 * MB, graphs=9 * MB, examples=2 * MB, more=50 * MB)
    assert held.text(4, 16, None, 1) == (
        "50.0 MB held (copies 8.0, basis 31.0, 4 of 16 graphs 9.0, examples 2.0), a peak of 100.0 MB (computed)"
    )
    measured = held.text(0, 0, "a peak of 99.0 MB (measured)", 3)  # of differences: no graphs
    assert measured == (
        "50.0 MB held on each of 3 ranks (copies 8.0, basis 31.0, examples 2.0), a peak of 99.0 MB (measured)"
    )


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (Place(30, 30, "device"), "basis 31.0, "),
        (Place(16, 30, "device"), "basis 31.0 where 16 of 30 vectors fit, "),
        (Place(30, 30, "cpu"), "basis 31.0 in host memory, "),
        (Place(16, 30, "cpu"), "basis 31.0 in host memory where 16 of 30 vectors fit, "),
    ],
)
def test_the_text_says_where_the_basis_lies_and_what_memory_has_bounded(place, told):
    held = Held(copies=8 * MB, basis=31 * MB, graphs=9 * MB, examples=2 * MB, more=50 * MB)
    assert told in held.text(4, 16, None, 1, place)
