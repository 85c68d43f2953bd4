"""Singular values of the last updates, against weights saved after every step and against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_subspace import SubspaceMonitor, UpdateSpectrum
from lightning_subspace.measurements.update_spectrum import spectrum_of
from tests.measurements.test_measurements import Classifier, Weights, blobs, fit, small

W = 8


def found_in(history):
    return {
        r.step: {k.removeprefix("updates/"): v for k, v in r.metrics.items() if k.startswith("updates/")}
        for r in history
    }


def expected(weights, step, stride=1, count=W):
    ends = [weights.at[step - stride * i].double() for i in range(count, -1, -1)]
    return torch.linalg.svdvals(torch.stack([b - a for a, b in pairwise(ends)]))


@pytest.mark.parametrize("stride", [1, 3])
def test_it_is_that_of_the_saved_weights(stride):
    module, weights = small(lr=0.3), Weights()
    measurement = UpdateSpectrum(window=W, stride=stride)
    monitor = SubspaceMonitor(
        k=0, sample="all", every_n_steps=[5, 30, 33, 60], max_overhead=None, measurements=[measurement]
    )
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=61)
    found = found_in(monitor.history)
    assert found[5] == {}  # fewer steps than the window
    for step in (30, 33, 60):
        sigma = expected(weights, step, stride)
        own = found[step]
        assert own["participation"] == pytest.approx(float(sigma.square().sum() ** 2 / sigma.pow(4).sum()), rel=1e-4)
        assert own["first_share"] == pytest.approx(float(sigma[0] ** 2 / sigma.square().sum()), rel=1e-4)
        assert own["gap_ratio"] == pytest.approx(float(sigma[0] / sigma[1]), rel=1e-4)
        assert own["gap_index"] == float((sigma[:-1] / sigma[1:]).argmax() + 1)
        values = [own[f"singular_value/{i:02}"] for i in range(1, W + 1)]
        assert values == pytest.approx(sigma.tolist(), rel=1e-3)


def test_sketches_of_a_larger_net_are_within_a_few_percent():
    torch.manual_seed(0)
    module, weights = Classifier(5, 60, 70, 3, lr=0.3), Weights()
    monitor = SubspaceMonitor(
        k=0, sample="all", every_n_steps=[40], max_overhead=None, measurements=[UpdateSpectrum(window=W)]
    )
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=40)
    own, sigma = found_in(monitor.history)[40], expected(weights, 40)
    assert own["gap_ratio"] == pytest.approx(float(sigma[0] / sigma[1]), rel=0.05)
    assert own["participation"] == pytest.approx(float(sigma.square().sum() ** 2 / sigma.pow(4).sum()), rel=0.1)


def test_orthogonal_updates_of_one_length_have_no_gap():
    found = spectrum_of(4.0 * torch.eye(W))
    assert found["updates/participation"] == pytest.approx(W)
    assert found["updates/gap_ratio"] == pytest.approx(1.0)


def test_equal_updates_are_one_direction():
    found = spectrum_of(torch.ones(W, W))
    assert found["updates/participation"] == pytest.approx(1.0)
    assert found["updates/first_share"] == pytest.approx(1.0)
    assert "updates/gap_ratio" not in found  # the others are rounding
    assert spectrum_of(torch.zeros(W, W)) == {}


def test_a_drop_of_the_learning_rate_is_a_gap_of_its_factor():
    lengths = torch.tensor([1.0] * 3 + [0.1] * 5)
    found = spectrum_of(torch.diag(lengths.square()))
    assert found["updates/gap_index"] == 3
    assert max(a / b for a, b in zip(values(found), values(found)[1:], strict=False)) == pytest.approx(10.0)


def values(found):
    return [value for key, value in found.items() if "singular_value" in key]


def walk(momentum, count=16, n=100_000):
    """Updates of pure noise."""
    generator, velocity, updates = torch.Generator().manual_seed(0), torch.zeros(n), []
    for step in range(count + 100):
        velocity = momentum * velocity + torch.randn(n, generator=generator)
        updates += [velocity] if step >= 100 else []
    return torch.stack(updates)


@pytest.mark.parametrize(("momentum", "ratio"), [(0.0, 1.005), (0.9, 1.83)])
def test_noise_alone_has_the_gap_that_the_docstring_tells(momentum, ratio):
    updates = walk(momentum)
    found = spectrum_of(updates @ updates.T)
    assert found["updates/gap_ratio"] == pytest.approx(ratio, rel=0.02)
    if momentum == 0.0:
        assert found["updates/participation"] == pytest.approx(16.0, rel=0.01)
    assert not any(math.isnan(value) for value in found.values())


def test_training_is_the_same_to_the_bit():
    states = []
    for measurements in ([], [UpdateSpectrum(window=3)]):
        module = small(optimizer=torch.optim.Adam)
        monitor = SubspaceMonitor(k=0, sample="all", every_n_steps=4, max_overhead=None, measurements=measurements)
        fit(module, DataLoader(blobs(), batch_size=8), monitor, max_steps=9)
        states.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*states)
