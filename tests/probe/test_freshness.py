"""Two samples of one loss: told apart where their data differ, and not where they are of the same."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import NoLossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.freshness import _size, are_apart, differ, traits_of


@pytest.mark.parametrize("count", [2, 3, 5, 16, 32])
@pytest.mark.parametrize("draw", ["normal", "lognormal", "exponential"])
def test_samples_of_the_same_are_hardly_ever_told_apart(count, draw):
    rng = np.random.default_rng(0)
    make = {
        "normal": lambda: rng.normal(1.0, 0.2, count),
        "lognormal": lambda: rng.lognormal(0.0, 0.4, count),
        "exponential": lambda: rng.gamma(8.0, 1.0, count),  # means over eight of them
    }[draw]
    apart = sum(are_apart(make().tolist(), make().tolist()) for _ in range(2000))
    assert apart <= 10  # once in 200 epochs; the sample is then replaced, and that is all


@pytest.mark.parametrize("count", [8, 32])
def test_a_gross_difference_is_told(count):
    rng = np.random.default_rng(1)
    told = [are_apart(rng.normal(1, 0.2, count).tolist(), rng.normal(4, 0.8, count).tolist()) for _ in range(200)]
    assert np.mean(told) > 0.9


def test_nothing_is_not_told_apart():
    assert not are_apart([], [1.0])
    assert not are_apart([1.0], [100.0])  # single ones have no spread
    assert not differ([], [(1.0, 2.0)])
    assert not are_apart([0.0, 0.0], [0.0, 0.0])


def batches(scale, count=4):
    generator = torch.Generator().manual_seed(scale)
    return tuple(MicroBatch(scale * torch.randn(8, 3, generator=generator), 8.0, i, size=8) for i in range(count))


def test_the_traits_are_the_loss_and_the_sizes_of_the_tensors():
    net = nn.Linear(3, 1)

    def loss_fn(module, batch, batch_idx):
        if batch_idx == 2:
            raise NoLossError("none")
        return module(batch).square().mean()

    samples = [Sample(batches(scale)) for scale in (1, 7)]
    with TrainingLoss(net, ParameterSpace.of(net), loss_fn, dtype=torch.float64) as loss:
        one, other = (traits_of(loss, sample, Ranks()) for sample in samples)
    assert len(one) == 3  # those with a loss
    assert one[0] == pytest.approx(
        (net(batches(1)[0].data).square().mean().item(), float(batches(1)[0].data.square().mean().sqrt())), rel=1e-5
    )
    assert differ(one, other)
    assert not differ(one, one)


def test_samples_of_other_structures_are_compared_by_their_losses():
    one, other = [(1.0, 5.0), (1.1, 5.0, 2.0)], [(1.0, 90.0), (1.2, 80.0)]
    assert not differ(one, other)
    assert differ([(value + 50.0, *rest) for value, *rest in one], other)


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        (torch.tensor([True, False, False, False]), 0.5),
        (torch.tensor([3, -4], dtype=torch.int8), 12.5**0.5),
        (torch.tensor([200, 200], dtype=torch.uint8), 200.0),
        (torch.tensor([3 + 4j]), 5.0),
        (torch.tensor([3 + 4j]).conj(), 5.0),
        (torch.tensor([0.5], dtype=torch.bfloat16), 0.5),
        (torch.zeros(0), 0.0),
    ],
)
def test_the_size_of_a_tensor_of_any_type(tensor, size):
    assert _size(tensor) == pytest.approx(size)
