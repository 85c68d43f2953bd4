"""The gradient of the mean loss, as operators take it, against `backward()` of the whole."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.curvature import ForwardDifferenceHessian, Hessian
from lightning_subspace.curvature.gradient import backward_gradient, pruned_gradient
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.oracles import EPS, dense_gradient

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(11, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(3, (11,), generator=GENERATOR)


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


@pytest.fixture
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def whole(module, loss_fn=cross_entropy):
    return dense_gradient(module, lambda m: loss_fn(m, (INPUTS, LABELS), 0))


def batches(sizes):
    return list(zip(INPUTS.split(sizes), LABELS.split(sizes), strict=True))


OPERATORS = pytest.mark.parametrize("operator", [Hessian, ForwardDifferenceHessian])


@OPERATORS
@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1] * 11])
def test_uneven_batches_give_the_gradient_of_the_whole(module, operator, sizes):
    sample = sample_of_batches(batches(sizes)).hessian
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        found = [operator(loss, sample).gradient(), operator(loss, sample[:1]).mean_gradient(sample)]
    for gradient in found:
        torch.testing.assert_close(gradient, whole(module), rtol=0.0, atol=100 * EPS)


@OPERATORS
def test_weights_need_not_be_normalised(module, operator):
    pairs = [(batch, 1e6 * len(batch[0])) for batch in batches([4, 4, 3])]
    sample = sample_of_batches(pairs).hessian
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        found = [operator(loss, sample).gradient(), operator(loss, sample[:1]).mean_gradient(sample)]
    for gradient in found:
        torch.testing.assert_close(gradient, whole(module), rtol=0.0, atol=100 * EPS)


@pytest.mark.parametrize("gradient_of", [backward_gradient, pruned_gradient])
def test_one_batch_is_bit_for_bit_what_backward_gives(module, gradient_of):
    module.float()
    batch = (INPUTS.float(), LABELS)
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        gradient = gradient_of(loss, sample_of_batches([batch]).hessian[0])
    assert torch.equal(gradient, dense_gradient(module, lambda m: cross_entropy(m, batch, 0)))


@OPERATORS
def test_unused_parameters_have_no_gradient(module, operator):
    def first_layer_only(m, batch, batch_idx):
        return m[0](batch[0]).square().mean()

    sample = sample_of_batches(batches([4, 4, 3])).hessian
    with TrainingLoss(module, ParameterSpace.of(module), first_layer_only) as loss:
        gradient = operator(loss, sample[:1]).mean_gradient(sample)
    torch.testing.assert_close(gradient, whole(module, first_layer_only), rtol=0.0, atol=100 * EPS)
    assert not gradient[25:].any()


@OPERATORS
def test_the_module_has_no_gradients_afterwards(module, operator):
    sample = sample_of_batches(batches([11])).hessian
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        operator(loss, sample).mean_gradient(sample)
    assert all(parameter.grad is None for parameter in module.parameters())
