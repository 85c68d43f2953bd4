"""Operators end with their loss: nothing of them is kept, whoever holds them."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.curvature import EmpiricalFisher, FiniteDifferenceHessian, GaussNewton, Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.copied_bytes import copied_bytes
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace


def opened(dtype=torch.float64):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return TrainingLoss(module, ParameterSpace.of(module), lambda m, x, i: F.cross_entropy(m(x[0]), x[1]), dtype=dtype)


BATCHES = sample_of_batches([(torch.ones(6, 4), torch.arange(6) % 3)] * 2).hessian


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, EmpiricalFisher, FiniteDifferenceHessian])
def test_an_operator_that_is_held_has_nothing_left(kind):
    held, graphs = [], []
    gc.collect()
    gc.disable()
    try:
        with opened() as loss:
            operator = kind(loss, BATCHES)
            part = operator.part([0])
            held += [operator, part]
            operator.gradient()
            part.matvec(torch.ones(operator.n, dtype=operator.dtype))
            graphs += [weakref.ref(one) for one in operator._retained if one is not None and not isinstance(one, tuple)]
            buffers = weakref.ref(operator._buffers)
        assert all(reference() is None for reference in (*graphs, buffers))
        assert all(one._mean is None and one._retained == [None] * len(one._retained) for one in held)
    finally:
        gc.enable()
    with pytest.raises((RuntimeError, TypeError)):
        operator.matvec(torch.ones(operator.n, dtype=operator.dtype))


def test_a_loss_keeps_no_operator_alive():
    with opened() as loss:
        reference = weakref.ref(Hessian(loss, BATCHES))
        assert reference() is None


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), (torch.float32, 4), (torch.float64, 8)])
def test_copies_have_their_types(dtype, size):
    module = nn.BatchNorm1d(10).bfloat16()
    assert copied_bytes(module, dtype) == 4 * 10 * size + 8  # weight, bias, mean, variance, and an integer
