"""The table of operators: the words that name them, and what a new one takes."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace import measure_subspace
from lightning_subspace.curvature import (
    BatchMean,
    CheckOutcome,
    CurvatureConfig,
    EmpiricalFisher,
    FiniteDifferenceHessian,
    SelfCheck,
)
from lightning_subspace.curvature.selection import OPERATORS, Curvature, OnCheckFail, Precision, Row
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(size, 4, generator=GENERATOR), torch.randint(3, (size,), generator=GENERATOR)) for size in (5, 3)
]


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.fixture
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_every_word_has_a_row():
    assert tuple(OPERATORS) == get_args(Curvature)


@pytest.mark.parametrize("curvature", get_args(Curvature))
def test_every_word_is_measured(module, curvature):
    k = {} if curvature == "none" else {"k": 2}
    record = measure_subspace(module, BATCHES, **k, loss_fn=classify, curvature=curvature)
    assert record.metrics["gradient_norm"] > 0.0
    assert record.subspace is None if curvature == "none" else record.subspace.trusted


@pytest.mark.parametrize(
    ("name", "choices"), [("curvature", Curvature), ("on_check_fail", OnCheckFail), ("dtype", Precision)]
)
def test_a_word_that_is_none_of_them(name, choices):
    with pytest.raises(ValueError, match=f"{name}: expected one of {', '.join(map(repr, get_args(choices)))}, got 'x'"):
        CurvatureConfig(**{name: "x"})


@pytest.mark.parametrize("outcome", [CheckOutcome.FAILED, CheckOutcome.UNAVAILABLE])
def test_a_check_that_fails_after_one_that_has_passed(module, outcome):
    """As where more parameters are trained: what the first has allowed is over."""
    choice, _ = CurvatureConfig(classify, on_check_fail="finite-difference").after_check(SelfCheck(CheckOutcome.PASSED))
    choice, notice = choice.after_check(SelfCheck(outcome, float("inf")))
    assert "finite differences of float64" in notice
    with choice.loss(module, ParameterSpace.of(module)) as loss:
        assert isinstance(choice.operator(loss, sample_of_batches(BATCHES)), FiniteDifferenceHessian)


class SecondMoment(BatchMean):
    """An operator in one method: the second moment of the gradients of micro-batches."""

    def matvec(self, v):
        def images(whole):
            for batch, _ in self._assignments:
                gradient = self._gradient_of(batch)
                yield gradient * (gradient @ whole)

        return self._product(v, images)


def test_a_new_operator_is_one_method_and_one_row(module, monkeypatch):
    monkeypatch.setitem(OPERATORS, "second-moment", Row(SecondMoment, order=1))
    choice, sample = CurvatureConfig(classify, dtype="float64", curvature="second-moment"), sample_of_batches(BATCHES)
    choice, notice = choice.after_check(choice.check(module, sample))
    assert notice is None
    with choice.loss(module, ParameterSpace.of(module)) as loss:
        _, record = take_probe(loss, sample, Solver(k=2, tol=1e-8), (), operator=choice.operator)
    sample = sample.hessian
    with TrainingLoss(module, ParameterSpace.of(module), classify, dtype=torch.float64) as loss:
        same = EmpiricalFisher(loss, sample, examples=False)
        matrix = torch.stack([same.matvec(column) for column in torch.eye(same.n, dtype=torch.float64)])
        part = SecondMoment(loss, sample).part([1])
        torch.testing.assert_close(part.matvec(part.gradient()), part.gradient() * part.gradient().square().sum())
    values = torch.linalg.eigvalsh(matrix).flip(0)[:2]
    torch.testing.assert_close(record.subspace.eigenvalues, values, rtol=1e-8, atol=0.0)
