"""Density, trace and norm against dense spectra."""

import copy
import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from lightning_subspace import Density, Measurement, Trace, measure_subspace
from lightning_subspace.subspace.spectral_density import NEGATIVE
from tests.measurements.test_measurements import Classifier, batched_hessian, digits, fit
from tests.thorough import how_many

from .probes import F64, derivatives, metrics, net, stepped


@pytest.fixture(scope="module")
def trained():
    module, _ = stepped(lambda m: torch.optim.SGD(m.parameters(), lr=0.5), 30)
    return module, torch.linalg.eigvalsh(derivatives(module)[1])


@pytest.mark.parametrize("k", [0, 4])
def test_with_as_many_steps_as_dimensions_only_the_random_vectors_are_left(trained, k):
    """The standard errors hold, and shrink by what is taken out; the smallest eigenvalue is exact."""
    module, eigenvalues = trained
    density = Density(steps=57, vectors=how_many(8, thorough=20))
    found = metrics(module, density, k=k)
    edge = -NEGATIVE * float(eigenvalues.abs().max())
    negative = eigenvalues[eigenvalues < edge]
    assert len(negative) > 3
    truth = {
        "trace": float(eigenvalues.sum()),
        "frobenius": float(eigenvalues.norm()),
        "negative_mass": float(negative.abs().sum() / eigenvalues.abs().sum()),
    }
    assert abs(found["trace"] - truth["trace"]) < 3.5 * found["trace_error"]
    assert abs(found["frobenius_norm"] - truth["frobenius"]) < 3.5 * found["frobenius_error"] + 1e-9
    assert abs(found["negative_mass"] - truth["negative_mass"]) < 3.5 * found["negative_mass_error"]
    assert found["negative_share_low"] <= len(negative) / 57 <= found["negative_share_high"]
    assert found["negative_share_low"] <= found["negative_share"] <= found["negative_share_high"]
    assert found["lowest_eigenvalue"] == pytest.approx(float(eigenvalues[0]), rel=1e-6)


def test_what_is_taken_out_makes_the_trace_more_exact(trained):
    module, eigenvalues = trained
    plain, deflated = (metrics(module, Trace(vectors=6), k=k) for k in (0, 6))
    assert deflated["trace_error"] < 0.5 * plain["trace_error"]
    rest = eigenvalues[:-6]
    variance = float(rest.square().mean() - rest.mean() ** 2)
    expected = 51 * math.sqrt(2 * variance / (53 * 6))  # of the formula, with the true spectrum
    assert deflated["trace_error"] == pytest.approx(expected, rel=0.4)
    for found in (plain, deflated):
        assert abs(found["trace"] - float(eigenvalues.sum())) < 3.5 * found["trace_error"]


def test_trace_and_density_agree_where_their_vectors_are_the_same(trained):
    module, _ = trained
    one, other = metrics(module, Density(steps=10, vectors=3)), metrics(module, Trace(vectors=3))
    for key in ("trace", "trace_error", "frobenius_norm"):
        assert one[key] == pytest.approx(other[key], rel=1e-9)


class ManySeeds(Measurement):
    """The traces of forty seeds in one probe."""

    def measure(self, probe):
        each = {seed: Trace(vectors=2, seed=seed).measure(probe) for seed in range(40)}
        return {f"{seed}/{key}": value for seed, found in each.items() for key, value in found.items()}


def test_the_standard_errors_are_those_of_many_seeds(trained):
    module, eigenvalues = trained
    found = metrics(module, ManySeeds(), k=2)
    runs = [{key: found[f"{seed}/{key}"] for key in ("trace", "trace_error")} for seed in range(40)]
    values = torch.tensor([run["trace"] for run in runs], dtype=F64)
    stated = math.sqrt(sum(run["trace_error"] ** 2 for run in runs) / len(runs))
    assert float(values.std()) == pytest.approx(stated, rel=0.4)
    assert abs(float(values.mean() - eigenvalues.sum())) < 3.5 * stated / math.sqrt(len(runs))


def test_on_the_digits_the_numbers_are_those_of_the_dense_hessian():
    torch.manual_seed(0)
    module = Classifier(64, 10, 10, 10, activation=nn.ReLU)
    fit(module, DataLoader(digits(), batch_size=64, shuffle=True), max_steps=200)
    images, labels = (tensor[:600] for tensor in digits().tensors)  # of all of them the dense Hessian takes long
    eigenvalues = torch.linalg.eigvalsh(batched_hessian(copy.deepcopy(module).double(), (images.double(), labels)))
    record = measure_subspace(
        module,
        [(images, labels)],
        k=10,
        measurements=[Density()],
        loss_fn=lambda m, batch, i: m.training_step(batch, i),
    )
    found = record.metrics
    assert abs(found["trace"] - float(eigenvalues.sum())) < 3 * found["trace_error"] < 0.2 * found["trace"]
    assert abs(found["frobenius_norm"] - float(eigenvalues.norm())) < 3 * found["frobenius_error"]
    edge = NEGATIVE * float(eigenvalues[-1])
    negative = eigenvalues[eigenvalues < -edge]
    assert found["negative_share_low"] <= len(negative) / len(eigenvalues) <= found["negative_share_high"] < 0.5
    mass = float(negative.abs().sum() / eigenvalues.abs().sum())
    assert abs(found["negative_mass"] - mass) < 3 * found["negative_mass_error"]
    assert found["lowest_eigenvalue"] == pytest.approx(float(eigenvalues[0]), rel=0.02)


def test_the_history_is_of_one_run_and_bounded(trained):
    module, _ = trained
    density = Density(steps=4, vectors=1, keep=4)
    metrics(module, density)
    metrics(module, density)
    assert [d.step for d in density.history] == [0]  # number 0 begins a run
    for step in range(1, 12):
        density._history.append(density.history[0])
        if len(density._history) > density.keep:
            half = len(density._history) // 2
            density._history[:half] = density._history[:half:2]
        assert len(density.history) <= density.keep, step


@pytest.mark.parametrize("count", [0, 1, 30])
def test_it_draws(trained, count):
    density = Density(steps=6, vectors=2)
    metrics(trained[0], density)
    density._history *= count
    for figure in (density.plot(), density.plot_ridge()):
        assert isinstance(figure, Figure)
        figure.canvas.draw()


def test_a_spectrum_of_zeros_draws_and_has_no_mass():
    module = net()
    density = Density(steps=5, vectors=1)
    found = metrics(module, density, k=2, loss_fn=lambda m, batch, i: m[0].weight.sum())
    assert (found["trace"], found["negative_mass"], found["negative_share_high"]) == (0.0, 0.0, 0.0)
    density.plot().canvas.draw()
    density.plot_ridge().canvas.draw()


@pytest.mark.parametrize("make", [Density, Trace])
@pytest.mark.parametrize("argument", ["vectors", "every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_what_is_not_a_count_is_refused(make, argument, value):
    with pytest.raises(ValueError, match=f"{argument}: expected a positive integer"):
        make(**{argument: value})
