"""What a forecast is made of: the products that a probe and its measurements are expected to take, and take."""

from dataclasses import replace

import pytest
import torch

from lightning_subspace.curvature import Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import (
    BatchSharpness,
    Chi,
    Control,
    Density,
    GradientCurvature,
    GradientNoise,
    Layers,
    LossChange,
    Measurement,
    Reliability,
    SpectralSharpness,
    Stability,
    Trace,
)
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.forecast import expected_products
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace.solver import Solver
from tests.claims.test_counts import digits, network
from tests.measurements.probes import data, loss_fn, stepped
from tests.thorough import usual

K = 4


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.01)


def part_of_a_set(batches, share=0.5):
    """A sample that is so much of a training set."""
    found = tuple(replace(batch, size=int(batch.weight)) for batch in sample_of_batches(batches).hessian)
    return Sample(found, population=sum(batch.size for batch in found) / share)


class Products:
    """Counts those with the whole sample; one with a part of it counts as that part."""

    def __init__(self, monkeypatch, total):
        self.count = 0.0
        original = Hessian.matvec

        def matvec(hessian, v):
            self.count += sum(batch.weight for batch in hessian.batches) / total
            return original(hessian, v)

        monkeypatch.setattr(Hessian, "matvec", matvec)


def expected_and_taken(measurement, monkeypatch, optimizer=sgd, number=0, k=K):
    module, optimizer = stepped(optimizer, count=3)
    sample = part_of_a_set(data())
    solver = Solver(k)
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        probe, _ = take_probe(loss, sample, solver, [], optimizer=optimizer, number=number, verify=False)
        products = Products(monkeypatch, sum(batch.weight for batch in sample.hessian))
        measurement.measure(probe)
    prospect = Prospect(number, solver, sample, optimizer, space=ParameterSpace.of(module))
    return measurement.expected_products(prospect), products.count


@pytest.mark.parametrize(
    "measurement",
    [
        Chi(),
        Density(steps=5, vectors=3),
        Trace(vectors=4),
        GradientCurvature(),
        GradientNoise(batches=3),
        GradientNoise(batches=100),
        LossChange(),
        Stability(),
        Trace(vectors=4, groups="tensors"),
        Stability(eigensolve=False),
    ],
    ids=lambda measurement: type(measurement).__name__,
)
def test_products_that_are_known_beforehand(measurement, monkeypatch):
    expected, taken = expected_and_taken(measurement, monkeypatch, number=1, k=1)
    assert expected == taken


@pytest.mark.parametrize(
    ("measurement", "optimizer"),
    [
        (Control(), sgd),
        (Layers(exact=True), sgd),
        (Reliability(), sgd),
        (Stability(), adam),
        (SpectralSharpness(), sgd),
    ],
    ids=["Control", "Layers", "Reliability", "Stability", "SpectralSharpness"],
)
def test_eigensolves_are_guessed_within_a_factor(measurement, optimizer, monkeypatch):
    expected, taken = expected_and_taken(measurement, monkeypatch, optimizer)
    assert taken / 2 <= expected <= 2 * taken


def test_there_is_no_error_bar_for_all_of_the_training_set_nor_for_one_batch():
    for sample in (part_of_a_set(data(), share=1.0), part_of_a_set(data()[:1])):
        assert Reliability().expected_products(Prospect(0, Solver(K), sample)) == 0.0


def test_ranks_exchange_as_many_messages_for_a_half():
    alone, together = (Prospect(0, Solver(K), part_of_a_set(data()), num_ranks=ranks) for ranks in (1, 2))
    assert Reliability().expected_products(together) > 1.5 * Reliability().expected_products(alone)


@pytest.mark.parametrize("k", usual([5], thorough=[1, 2, 10]))
def test_the_first_probe_of_a_classifier_is_guessed_within_a_factor(k, monkeypatch):
    images, labels = digits()
    batches = [(images[start : start + 64], labels[start : start + 64]) for start in range(0, 512, 64)]
    sample, solver = part_of_a_set(batches), Solver(k)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = network()
    settings = ProbeSettings(k=k)
    expected, later = expected_products(settings, Prospect(0, solver, sample))
    products = Products(monkeypatch, 512.0)
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        take_probe(loss, sample, solver, settings.taken)
    assert products.count / 2 <= expected <= 2 * products.count
    assert later < expected


@pytest.mark.parametrize("kind", [BatchSharpness, Control, Density, GradientNoise, Reliability, Trace])
def test_what_is_taken_seldom_is_expected_seldom(kind):
    sample = part_of_a_set(data())
    prospect = Prospect(0, Solver(K), sample)
    added = ([], [kind(every=1)], [kind(every=2)])
    each = [expected_products(ProbeSettings(k=K, measurements=m, defaults=False), prospect) for m in added]
    first, later = ([one[i] for one in each] for i in (0, 1))
    assert first[1] == first[2] > first[0]
    assert later[2] - later[0] == pytest.approx((later[1] - later[0]) / 2)
    assert later[1] > later[0]


def test_later_probes_are_averaged_and_nothing_is_solved_for_without_pairs():
    class Sixth(Measurement):
        every = 6

        def expected_products(self, prospect):
            return 60.0

    sample = part_of_a_set(data())
    first, later = expected_products(
        ProbeSettings(k=0, measurements=[Sixth()], defaults=False), Prospect(0, Solver(0), sample)
    )
    assert (first, later) == (60.0, 6.0)  # of the probes 1 to 10 one is a sixth one
