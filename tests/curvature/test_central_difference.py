"""Differences of float64 gradients against double backward, on networks with and without kinks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.curvature import FiniteDifferenceHessian, Hessian, batch_mean
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import measure_subspace
from tests.thorough import covering, usual

SEEDS = range(3)


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def relu_net():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def relu_conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


def smooth_net():
    return nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 5))


NETS = {"relu": relu_net, "relu-conv-maxpool": relu_conv, "gelu-layernorm-dropout": smooth_net}


def built(make, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batches(seed=0, sizes=(64, 64, 40)):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, 20, generator=generator), torch.randint(5, (s,), generator=generator)) for s in sizes]


def opened(module, dtype=torch.float64):
    return TrainingLoss(module, ParameterSpace.of(module), classify, dtype=dtype)


def direction(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("seed", "name"), covering(list(SEEDS), list(NETS)))
def test_products_are_those_of_double_backward(name, seed):
    sample = sample_of_batches(batches(seed)).hessian
    with opened(built(NETS[name], seed)) as loss:
        exact, differences = Hessian(loss, sample), FiniteDifferenceHessian(loss, sample, dtype=torch.float64)
        for length in (1e-3, 1.0, 1e3):  # the step does not depend on the length of v
            v = length * direction(exact.n, seed)
            expected = exact.matvec(v)
            assert (differences.matvec(v) - expected).norm() < 1e-7 * expected.norm()
        assert torch.allclose(differences.gradient(), exact.gradient(), rtol=0, atol=1e-15)


class NearAKink(nn.Module):
    """w^2 / 2 with a kink of slope 1 at a given distance from w = 1."""

    def __init__(self, distance):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.distance = distance

    def forward(self, x):
        return (0.5 * self.weight.square() + F.relu(self.weight - 1.0 - self.distance)).mean() + 0.0 * x.sum()


@pytest.mark.parametrize("distance", [1e-6, 1e-7, -1e-7, 1e-8, -1e-8])
def test_a_step_across_a_kink_is_taken_again_shorter(distance):
    def loss_fn(module, batch, batch_idx):
        return module(batch)

    module = NearAKink(distance)
    batch = sample_of_batches([torch.ones(2, 1)]).hessian
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64) as loss:
        operator = FiniteDifferenceHessian(loss, batch, dtype=torch.float64)
        assert float(operator.matvec(torch.ones(1))) == pytest.approx(1.0, abs=1e-6)


def test_no_curvature_is_no_kink(monkeypatch):
    def linear(module, batch, batch_idx):
        return module(batch).sum()

    module, calls = nn.Linear(3, 1), []
    gradient = batch_mean.backward_gradient
    monkeypatch.setattr(batch_mean, "backward_gradient", lambda *args: calls.append(args) or gradient(*args))
    with TrainingLoss(module, ParameterSpace.of(module), linear, dtype=torch.float64) as loss:
        operator = FiniteDifferenceHessian(loss, sample_of_batches([torch.ones(2, 3)]).hessian)
        assert torch.equal(operator.matvec(torch.ones(4)), torch.zeros(4))
    assert len(calls) == 3  # on both sides, and at theta itself, once


def test_parts_and_batches_are_those_of_the_exact_operator():
    sample = sample_of_batches(batches()).hessian
    with opened(built(smooth_net, 0)) as loss:
        exact, differences = Hessian(loss, sample), FiniteDifferenceHessian(loss, sample, dtype=torch.float64)
        v = direction(exact.n, 1)
        for operator, other in ((exact, differences), (exact.part([2, 0]), differences.part([2, 0]))):
            assert len(operator.batches) == len(other.batches)
            assert torch.allclose(operator.matvec(v), other.matvec(v), rtol=0, atol=1e-7 * float(v.norm()))
            assert torch.allclose(operator.gradient(), other.gradient(), rtol=0, atol=1e-15)
            for (batch, gradient), (same, own) in zip(operator.batch_gradients(), other.batch_gradients(), strict=True):
                assert batch is same
                assert torch.allclose(gradient, own, rtol=0, atol=1e-15)


def test_what_goes_in_and_out_has_the_type_of_the_solver():
    sample = sample_of_batches(batches()).hessian
    with opened(built(relu_net, 0)) as loss:
        operator = FiniteDifferenceHessian(loss, sample)
        v = direction(operator.n, 0).float()
        before = v.clone()
        products = [operator.matvec(v), operator.gradient(), operator.mean_gradient(sample)]
        products += [g for _, g in operator.batch_gradients()]
        assert {p.dtype for p in products} == {torch.float32} == {operator.dtype}
        assert torch.equal(v, before)
        assert not any(operator._retained)


def test_zero_and_what_is_not_finite():
    with opened(built(relu_net, 0)) as loss:
        operator = FiniteDifferenceHessian(loss, sample_of_batches(batches()).hessian)
        zero = torch.zeros(operator.n)
        assert torch.equal(operator.matvec(zero), zero)
        assert operator.matvec(zero + float("nan")).isnan().all()


def test_a_product_leaves_the_loss_where_it_was():
    sample = sample_of_batches(batches()).hessian
    with opened(built(smooth_net, 0)) as loss:
        value = loss(sample[0]).value
        operator = FiniteDifferenceHessian(loss, sample)
        operator.matvec(torch.ones(operator.n))
        assert torch.equal(loss(sample[0]).value, value)


def test_the_module_is_untouched():
    module = built(smooth_net, 0)
    before = {name: (id(p), p.detach().clone()) for name, p in module.named_parameters()}
    state = torch.get_rng_state()
    measure_subspace(module, batches(), k=2, loss_fn=classify, curvature="finite-difference")
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in module.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", usual(["relu-conv-maxpool"], thorough=["relu"]))
def test_eigenpairs_are_those_of_the_exact_operator(name):
    module = built(NETS[name], 0)
    options = {"k": 4, "loss_fn": classify, "dtype": "float64", "tol": 1e-6}
    exact = measure_subspace(module, batches(), **options)
    other = measure_subspace(module, batches(), curvature="finite-difference", **options)
    assert torch.allclose(other.subspace.eigenvalues, exact.subspace.eigenvalues, rtol=1e-6)
    keys = {key for key in exact.metrics if not key.startswith("solver/")}
    assert keys == {key for key in other.metrics if not key.startswith("solver/")}
    assert all(other.metrics[key] == pytest.approx(exact.metrics[key], abs=1e-4, rel=1e-4) for key in keys)


def test_float64_is_asked_for():
    with opened(built(relu_net, 0), torch.float32) as loss, pytest.raises(ValueError, match="float64"):
        FiniteDifferenceHessian(loss, sample_of_batches(batches()).hessian)


def test_an_empty_sample_is_refused():
    with opened(built(relu_net, 0)) as loss, pytest.raises(ValueError, match="empty sample"):
        FiniteDifferenceHessian(loss, [])
