"""One gradient a product: how well it agrees on smooth networks, and that others do not get it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace import measure_subspace
from lightning_subspace.curvature import (
    CheckOutcome,
    CurvatureConfig,
    FiniteDifferenceHessian,
    ForwardDifferenceHessian,
    Hessian,
    smoothness_check,
)
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.thorough import covering

SEEDS = range(3)
EXAMPLES = 128


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def convolutional(act):
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 8, 3, padding=1), act, nn.Flatten(), nn.Linear(160, 5)
    )  # fmt: skip


def dense(act):
    return nn.Sequential(nn.Linear(20, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 5))


NETS = {
    "gelu": lambda: dense(nn.GELU()),
    "tanh": lambda: nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5)),
    "layer-norm, dropout": lambda: nn.Sequential(
        nn.Linear(20, 32), nn.LayerNorm(32), nn.SiLU(), nn.Dropout(0.2), nn.Linear(32, 5)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (5, 4)),
        nn.TransformerEncoderLayer(4, 2, 16, dropout=0.0, activation="gelu", batch_first=True),
        nn.Flatten(),
        nn.Linear(20, 5),
    ),
    "convolution": lambda: convolutional(nn.GELU()),
}
KINKED = {
    "relu": lambda: dense(nn.ReLU()),
    "leaky": lambda: dense(nn.LeakyReLU()),
    "relu-conv": lambda: convolutional(nn.ReLU()),
}  # fmt: skip


def built(make, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(EXAMPLES, 20, generator=generator), torch.randint(5, (EXAMPLES,), generator=generator))]


def opened(module, **options):
    return TrainingLoss(module, ParameterSpace.of(module), classify, **options)


@pytest.mark.parametrize(("seed", "name"), covering(list(SEEDS), list(NETS)))
def test_float64_products_are_those_of_double_backward_up_to_truncation(name, seed):
    sample = sample_of_batches(batches(seed)).hessian
    with opened(built(NETS[name], seed), dtype=torch.float64) as loss:
        exact = Hessian(loss, sample)
        direction = torch.randn(exact.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for length in (1e-3, 1.0, 1e3):  # the step does not depend on the length of v
            v = length * direction
            coarse = ForwardDifferenceHessian(loss, sample).matvec(v, 1e-5) - exact.matvec(v)
            fine = ForwardDifferenceHessian(loss, sample).matvec(v, 1e-6) - exact.matvec(v)
            assert fine.norm() < 1e-4 * exact.matvec(v).norm()
            assert float(coarse.norm() / fine.norm()) == pytest.approx(10.0, rel=0.05)  # first order
        assert torch.allclose(ForwardDifferenceHessian(loss, sample).gradient(), exact.gradient(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "outcome"), [
    *((name, CheckOutcome.PASSED) for name in NETS), *((name, CheckOutcome.SKIPPED) for name in KINKED)
])  # fmt: skip
def test_only_smooth_networks_pass(name, outcome, seed):
    module = built((NETS | KINKED)[name], seed)
    check = smoothness_check(opened(module, dtype=torch.float64, order=1), sample_of_batches(batches(seed)).hessian[0])
    assert check.outcome is outcome, check.reason


def test_parts_and_batches_are_those_of_the_exact_operator():
    sample = sample_of_batches(batches(0) + batches(1) + batches(2)).hessian
    with opened(built(NETS["gelu"], 0), dtype=torch.float64) as loss:
        exact, differences = Hessian(loss, sample), ForwardDifferenceHessian(loss, sample)
        for operator, other in ((exact, differences), (exact.part([2, 0]), differences.part([2, 0]))):
            assert torch.allclose(operator.gradient(), other.gradient(), rtol=0, atol=1e-15)
            v = operator.gradient()
            assert torch.allclose(operator.matvec(v), other.matvec(v, 1e-6), rtol=0, atol=1e-4 * float(v.norm()))
            for (batch, gradient), (same, own) in zip(operator.batch_gradients(), other.batch_gradients(), strict=True):
                assert batch is same
                assert torch.allclose(gradient, own, rtol=0, atol=1e-15)


def test_zero_and_nan_come_back():
    with opened(built(NETS["gelu"], 0), order=1) as loss:
        operator = ForwardDifferenceHessian(loss, sample_of_batches(batches()).hessian)
        assert not operator.matvec(torch.zeros(operator.n)).any()
        assert operator.matvec(torch.full((operator.n,), float("nan"))).isnan().all()


def chosen(name, **options):
    module = built((NETS | KINKED)[name], 0)
    choice = CurvatureConfig(classify, curvature="finite-difference", **options)
    space, sample = ParameterSpace.of(module), sample_of_batches(batches())
    choice, notice = choice.after_check(choice.check(module, sample))
    assert notice is None
    with choice.loss(module, space) as loss:
        operator = choice.operator(loss, sample)
    return type(operator), loss.dtype


def test_the_choice():
    assert chosen("gelu") == (ForwardDifferenceHessian, torch.float32)
    assert chosen("relu") == (FiniteDifferenceHessian, torch.float64)
    assert chosen("gelu", dtype="float64") == (FiniteDifferenceHessian, torch.float64)


@pytest.mark.parametrize("name", NETS)
def test_a_probe_by_differences_is_the_exact_one(name):
    module = built(NETS[name], 0)
    exact, fast = (
        measure_subspace(module, batches(), k=4, loss_fn=classify, curvature=curvature)
        for curvature in ("hessian", "finite-difference")
    )
    assert fast.subspace.converged
    scale = float(exact.subspace.eigenvalues[0])
    assert torch.allclose(fast.subspace.eigenvalues, exact.subspace.eigenvalues, rtol=0, atol=2e-3 * scale)
