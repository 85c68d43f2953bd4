"""What a probe costs, in what no machine changes: products, evaluations of the loss and sums over ranks, never seconds.

The counts are upper bounds. Where a residual falls just below or just above its tolerance the rounding of a platform
can move a single probe by one product: so bounds on one probe leave one more than was measured, and means over probes
and random starts a few tenths.
"""

import itertools
import statistics
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_subspace.curvature import FiniteDifferenceHessian, ForwardDifferenceHessian, GaussNewton, Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg import eigsh
from lightning_subspace.loss import leaves as leaf
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.subspace.solver import Solver
from tests.thorough import how_many

# Those in the middle take as many in the mean as all do.
FIRST, LAST, EVERY = how_many(380, thorough=300), how_many(460, thorough=500), 20
SEEDS = range(4)  # of the solver's start


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def network():
    return nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.fixture(scope="module")
def products():
    """Products of probes from step 300 on, by seeds: cold, warm from the one before, and warm with the certificate."""
    images, labels = digits()
    sample = sample_of_batches([(images[:1024], labels[:1024])])
    counts = {"cold": [], "warm": [], "verified": []}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        previous = {}
        for step in range(LAST + 1):
            if step >= FIRST - EVERY and step % EVERY == 0:
                with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
                    hessian = Hessian(loss, sample.hessian)
                    for seed in SEEDS:
                        solver = Solver(k=10, tol=1e-3, seed=seed)
                        cold = solver.solve(hessian, verify=False)
                        assert cold.trusted
                        if seed in previous:
                            warm = solver.solve(hessian, start=previous[seed], verify=False)
                            verified = solver.solve(hessian, start=previous[seed], verify=True)
                            assert warm.trusted
                            assert verified.verified
                            for way, found in (("cold", cold), ("warm", warm), ("verified", verified)):
                                counts[way].append(found.num_matvecs)
                        previous[seed] = cold.basis
            picked = torch.randint(len(labels), (64,))
            optimizer.zero_grad()
            cross_entropy(net, (images[picked], labels[picked]), 0).backward()
            optimizer.step()
    return counts


@pytest.mark.parametrize(("way", "mean", "most"), [("warm", 17.0, 19), ("verified", 26.0, 31), ("cold", 20.5, 28)])
def test_products_of_a_probe_on_digits(products, way, mean, most):
    assert statistics.mean(products[way]) <= mean
    assert max(products[way]) <= most


class CountingLoss(TrainingLoss):
    """Counts evaluations."""

    evaluations = 0

    def __call__(self, batch):
        self.evaluations += 1
        return super().__call__(batch)


@pytest.mark.parametrize(
    ("operator", "options", "setup", "each"),
    [
        (Hessian, {}, 3, 0),  # one graph a micro-batch, kept
        (Hessian, {"memory": 0.0}, 3, 3),
        (GaussNewton, {}, 3, 0),
        (ForwardDifferenceHessian, {}, 0, 3),
        (FiniteDifferenceHessian, {}, 0, 6),
    ],
)
def test_evaluations_of_the_loss(operator, options, setup, each):
    images, labels = digits()
    batches = [(images[:64], labels[:64])] * 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    with CountingLoss(net, ParameterSpace.of(net), cross_entropy, dtype=torch.float64) as loss:
        hessian = operator(loss, sample_of_batches(batches).hessian, **options)
        assert loss.evaluations == setup
        hessian.matvec(hessian.gradient())  # the gradient of differences, if it was not known yet, is taken here
        before = loss.evaluations
        for seed in range(4):
            hessian.matvec(torch.randn(hessian.n, generator=torch.Generator().manual_seed(seed)).to(hessian.dtype))
        assert loss.evaluations - before == 4 * each


class Reads(TorchDispatchMode):
    """Counts what waits for a device: to read numbers from it, or a shape that depends on numbers."""

    OPERATIONS = frozenset({"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"})
    METHODS = ("tolist", "numpy", "cpu")  # on a CPU these are no operations

    def __enter__(self):
        self.count = 0
        self._patches, self._is_inside = ExitStack(), False
        for name in self.METHODS:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._counted(name)))
        return super().__enter__()

    def __exit__(self, *exc_info):
        self._patches.close()
        return super().__exit__(*exc_info)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1:])
        )
        self.count += is_masked or name in self.OPERATIONS
        return func(*args, **(kwargs or {}))

    def _counted(self, name):
        original = getattr(torch.Tensor, name)

        def method(tensor, *args):
            before, self._is_inside = self._is_inside, True
            self.count += not before  # a mode of torch functions calls it again, from within
            try:
                return original(tensor, *args)
            finally:
                self._is_inside = before

        return method


@pytest.mark.parametrize(
    ("operator", "options", "reads"),
    [
        (Hessian, {}, 0),  # kernels of all micro-batches are queued one after another, and nothing waits for them
        (GaussNewton, {}, 0),
        # An evaluation: whether the copies of the parameters are intact, before and behind it, and the loss finite.
        (Hessian, {"memory": 0.0}, 2 * 3),
        (ForwardDifferenceHessian, {}, 2 * 3 + 1),  # and |v|
    ],
)
def test_what_a_product_reads_from_the_device(operator, options, reads, monkeypatch):
    """Whatever the number of parameters."""
    monkeypatch.setattr(leaf, "_is_on_host", lambda tensor: False)
    images, labels = digits()
    batches = [(images[start : start + 64], labels[start : start + 64]) for start in (0, 64)]
    for widths in ((64, 10), (64, 8, 8, 8, 10)):
        net = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))
        with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
            hessian = operator(loss, sample_of_batches(batches).hessian, **options)
            direction = torch.ones(hessian.n)
            hessian.matvec(direction)
            with Reads() as seen:
                hessian.matvec(direction)
            assert seen.count == reads


def test_reads_are_seen():
    with Reads() as seen:
        for number, read in enumerate(
            [
                lambda: float(torch.ones(1)),
                lambda: bool(torch.ones(2).any()),
                lambda: torch.ones(2).tolist(),
                lambda: torch.equal(torch.ones(2), torch.ones(2)),
                lambda: torch.ones(2)[torch.ones(2) > 0],
            ]
        ):
            read()
            assert seen.count == number + 1


@pytest.mark.parametrize("verify", ["never", "always"])
def test_sums_over_ranks(verify):
    spectrum = torch.cat([torch.arange(10.0, 0.0, -1.0), torch.linspace(0.1, -0.1, 490)]).double()
    sums = 0

    def all_sum(part):
        nonlocal sums
        sums += 1
        return part

    def draw(seed, i):
        return torch.randn(500, generator=torch.Generator().manual_seed(1000 * seed + i), dtype=torch.float64)

    found = eigsh(
        lambda v: spectrum * v, 500, 10, tol=1e-3, verify=verify, dtype=torch.float64, all_sum=all_sum, random=draw
    )
    starts = 1 if verify == "never" else 2
    # Two passes of orthogonalisation a product and a start, the dimension, and the test of the result.
    assert sums == 2 * (found.num_matvecs + starts) + 2
    assert found.num_matvecs <= (14 if verify == "never" else 18)
