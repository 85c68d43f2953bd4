"""What a probe costs, in what no machine changes: products, evaluations of the loss and sums over ranks, never seconds.

The counts are upper bounds. Where a residual falls just below or just above its tolerance the rounding of a platform
can move a single probe by one product: so bounds on one probe leave one more than was measured, and medians leave none.
"""

import statistics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_subspace.curvature import FiniteDifferenceHessian, ForwardDifferenceHessian, GaussNewton, Hessian
from lightning_subspace.linalg import eigsh
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.sample import sample_of_batches
from lightning_subspace.solver import Solver
from lightning_subspace.training_loss import TrainingLoss

FIRST, LAST, EVERY = 300, 500, 20


def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def network():
    return nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))


@pytest.fixture(scope="module")
def products():
    """Products of every probe from step 300 on: cold, warm from the probe before, and warm with the certificate."""
    images, labels = digits()
    sample = sample_of_batches([(images[:1024], labels[:1024])])
    counts = {"cold": [], "warm": [], "verified": []}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        previous = None
        for step in range(LAST + 1):
            if step >= FIRST - EVERY and step % EVERY == 0:
                with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
                    hessian = Hessian(loss, sample.hessian)
                    solver = Solver(k=10, tol=1e-3)
                    cold = solver.solve(hessian, verify=False)
                    assert cold.trusted
                    if previous is not None:
                        warm = solver.solve(hessian, start=previous, verify=False)
                        verified = solver.solve(hessian, start=previous, verify=True)
                        assert warm.trusted
                        assert verified.verified
                        for way, found in (("cold", cold), ("warm", warm), ("verified", verified)):
                            counts[way].append(found.num_matvecs)
                    previous = cold.basis
            picked = torch.randint(len(labels), (64,))
            optimizer.zero_grad()
            cross_entropy(net, (images[picked], labels[picked]), 0).backward()
            optimizer.step()
    return counts


@pytest.mark.parametrize(("way", "median", "most"), [("warm", 16, 19), ("verified", 21, 25), ("cold", 20, 24)])
def test_products_of_a_probe_on_digits(products, way, median, most):
    assert statistics.median(products[way]) <= median
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
