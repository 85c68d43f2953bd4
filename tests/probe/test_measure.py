"""One measurement against dense linear algebra: what is reported, and what is withheld."""

import copy
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import SampleError
from lightning_subspace.data.sample import Sample
from lightning_subspace.linalg import Outcome, eigsh
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import Measurement, Probe
from lightning_subspace.measurements.base import Needs
from lightning_subspace.measurements.optimizer_rules import sgd_threshold
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import measure_subspace, take_probe
from lightning_subspace.subspace import solver as solver_module
from lightning_subspace.subspace.solver import Solver
from lightning_subspace.subspace.subspace import SubspaceIntegrityError
from tests.left_out import leave_self_check_out
from tests.oracles import dense_gradient, dense_hessian, mean_square_cosine, projected_share, top_eigenspace
from tests.thorough import IS_THOROUGH

# With tol = 1e-10 in float64 spaces are right to about 1e-8, and what is quadratic in their error to rounding.
TIGHT = {"tol": 1e-10, "dtype": torch.float64, "max_matvecs": 1000}
CLOSE = 1e-8

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 4, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(3, (40,), generator=GENERATOR)
BATCHES = list(zip(INPUTS.split(16), LABELS.split(16), strict=True))


@pytest.fixture(autouse=True)
def _left_out(monkeypatch):
    """The self-check: here it takes longer than what is measured."""
    leave_self_check_out(monkeypatch)


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def whole(module):
    return classify(module, (INPUTS, LABELS), 0)


@pytest.fixture(scope="module")
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture(scope="module")
def dense(module):
    """Hessian and gradient."""
    return dense_hessian(module, whole), dense_gradient(module, whole)


def measure(module, k=4, **options):
    return measure_subspace(module, BATCHES, k=k, **({"loss_fn": classify} | TIGHT | options))


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


# What is reported


class Halves(Measurement):
    """Solves for a part of the sample: as an operator, and as a function."""

    def __init__(self, *solved):
        self.solved = solved

    def measure(self, probe):
        half = probe.operator.part([0, 2])
        found = [probe.solve(kind(half), k=3) for kind in self.solved]
        return {f"{i}/{j}": float(value) for i, part in enumerate(found) for j, value in enumerate(part.eigenvalues)}


def test_a_measurement_solves_for_an_operator_or_a_function(module):
    metrics = measure(module, measurements=[Halves(lambda part: part, lambda part: part.matvec)]).metrics
    inputs, labels = (torch.cat([BATCHES[i][j] for i in (0, 2)]) for j in (0, 1))
    values, _ = top_eigenspace(dense_hessian(module, lambda m: classify(m, (inputs, labels), 0)), 3)
    for way in range(2):
        assert [metrics[f"{way}/{j}"] for j in range(3)] == pytest.approx(values.tolist(), abs=CLOSE)


def test_what_is_neither_is_named(module):
    message = r"matvec: expected a function v -> A v, .* type SimpleNamespace; pass its method"
    with pytest.raises(TypeError, match=message):
        measure(module, measurements=[Halves(lambda part: SimpleNamespace(matvec=part.matvec))])


def test_frozen_parameters_may_be_of_any_type():
    module = nn.Linear(4, 3).double()
    for name, values in (("flags", [True, False]), ("numbers", [1, 2]), ("missing", [math.nan, 1.0])):
        module.register_parameter(name, nn.Parameter(torch.tensor(values), requires_grad=False))
    assert measure(module).subspace.trusted


@pytest.mark.parametrize("k", [1, 4, 11])
def test_every_number_is_that_of_dense_linear_algebra(module, dense, k):
    matrix, gradient = dense
    values, basis = top_eigenspace(matrix, k + 1)
    record = measure(module, k)
    metrics, image = record.metrics, matrix @ gradient
    assert record.subspace.trusted
    assert [metrics[f"eigenvalues/{i:02d}"] for i in range(1, k + 1)] == pytest.approx(values[:k].tolist(), abs=CLOSE)
    assert metrics["sharpness"] == pytest.approx(float(values[0]), rel=CLOSE)
    assert metrics["gradient_fraction"] == pytest.approx(projected_share(basis[:k], gradient), abs=CLOSE)
    assert metrics["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=CLOSE)
    assert metrics["gradient_curvature"] == pytest.approx(float(gradient @ image / gradient.dot(gradient)), rel=CLOSE)
    assert metrics["gradient_hessian_cosine"] == pytest.approx(cosine(gradient, image), rel=CLOSE)
    assert mean_square_cosine(record.subspace.basis, basis[:k]) == pytest.approx(1.0, abs=CLOSE)
    assert record.step == 0
    assert record.sketch is not None


def test_without_eigenvectors_there_is_what_one_product_tells(module, dense, caplog):
    matrix, gradient = dense
    with caplog.at_level(logging.INFO, "lightning_subspace"):
        record = measure(module, k=0)
    assert "tol, max_matvecs without effect: no eigenpairs are computed with k=0." in caplog.messages
    image = matrix @ gradient
    assert record.subspace is None
    assert record.sketch is None
    assert {key: value for key, value in record.metrics.items() if not key.startswith("noise/")} == {
        "gradient_norm": pytest.approx(float(gradient.norm()), rel=CLOSE),
        "gradient_curvature": pytest.approx(float(gradient @ image / gradient.dot(gradient)), rel=CLOSE),
        "gradient_hessian_cosine": pytest.approx(cosine(gradient, image), rel=CLOSE),
        "sample_loss": pytest.approx(float(whole(module).detach()), rel=CLOSE),
    }


def test_the_whole_space(module, dense):
    matrix, _ = dense
    n = len(matrix)
    record = measure(module, k=n)
    assert record.subspace.outcome is Outcome.EXACT
    assert record.subspace.eigenvalues.tolist() == pytest.approx(
        torch.linalg.eigvalsh(matrix).flip(0).tolist(), abs=CLOSE
    )
    assert record.metrics["gradient_fraction"] == pytest.approx(1.0, abs=CLOSE)
    assert record.metrics["solver/subspace_error"] == 0.0
    assert f"eigenvalues/{n + 1:02d}" not in record.metrics  # there is none


@pytest.mark.parametrize("which", ["SA", "LM", "BE"])
def test_other_ends_of_the_spectrum(module, dense, which):
    values = torch.linalg.eigvalsh(dense[0])
    expected = {
        "SA": values[:4],
        "LM": values[values.abs().argsort(descending=True)][:4],
        "BE": torch.cat([values.flip(0)[:2], values[:2]]),
    }[which]
    record = measure(module, which=which)
    assert sorted(record.subspace.eigenvalues.tolist()) == pytest.approx(sorted(expected.tolist()), abs=CLOSE)
    assert ("sharpness" in record.metrics) == (which == "BE")
    assert "gap_index" not in record.metrics


def test_the_gap_index_is_where_the_ratio_of_eigenvalues_is_largest(module, dense):
    values, _ = top_eigenspace(dense[0], 9)
    ratios = (values[:-1] / values[1:])[values[1:] > 0]
    assert measure(module, k=8).metrics["gap_index"] == int(ratios.argmax()) + 1


def test_the_gradient_may_come_from_more_examples(module, dense):
    first, rest = sample_of_batches(BATCHES[:1]).hessian, sample_of_batches(BATCHES).hessian[1:]
    space = ParameterSpace.of(module)
    with TrainingLoss(module, space, classify, dtype=torch.float64) as loss:
        probe, record = take_probe(loss, Sample(first, rest), Solver(k=3, tol=1e-10), [], step=7, number=2)
        assert [batch.index for batch, _ in probe.batch_gradients()] == [0, 1, 2]
    torch.testing.assert_close(probe.gradient, dense[1], rtol=0.0, atol=1e-14)
    on_the_first = dense_hessian(module, lambda m: classify(m, BATCHES[0], 0))
    values, _ = top_eigenspace(on_the_first, 3)
    assert record.subspace.eigenvalues.tolist() == pytest.approx(values.tolist(), abs=CLOSE)
    assert (probe.step, probe.number, record.step) == (7, 2, 7)


def test_the_module_is_untouched(module):
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    measure(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_bits(module):
    first, again, other = measure(module), measure(module), measure(module, seed=1)
    assert torch.equal(first.subspace.basis, again.subspace.basis)
    assert first.metrics == again.metrics
    assert not torch.equal(first.subspace.basis, other.subspace.basis)
    assert first.metrics["gradient_fraction"] == pytest.approx(other.metrics["gradient_fraction"], abs=CLOSE)


# Between two probes


def moved(module, size):
    other = copy.deepcopy(module)
    with torch.no_grad():
        for i, parameter in enumerate(other.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            parameter += size * noise
    return other


def test_the_overlap_with_a_previous_record(module, dense):
    previous, later = measure(module), moved(module, 0.3)
    _, before = top_eigenspace(dense[0], 4)
    _, after = top_eigenspace(dense_hessian(later, whole), 4)
    record = measure(later, previous=previous)
    expected = mean_square_cosine(before, after)
    assert 0.05 < expected < 0.95
    assert record.metrics["overlap_previous"] == pytest.approx(expected, abs=CLOSE)
    assert "overlap_previous" not in previous.metrics


def test_a_previous_record_saves_products_and_changes_no_number(module):
    later = moved(module, 1e-6)
    cold = measure(later, verify="never")
    warm = measure(later, verify="never", previous=measure(module))
    assert warm.subspace.num_matvecs <= cold.subspace.num_matvecs
    assert warm.metrics["gradient_fraction"] == pytest.approx(cold.metrics["gradient_fraction"], abs=CLOSE)
    assert warm.metrics["overlap_previous"] == pytest.approx(1.0, abs=CLOSE)


def test_a_previous_record_that_cannot_be_used(module):
    previous = measure(module)
    assert "overlap_previous" not in measure(module, previous=measure(module, k=0)).metrics
    untrusted = replace(previous, subspace=replace(previous.subspace, error=0.5))
    assert "overlap_previous" not in measure(module, previous=untrusted).metrics
    with pytest.raises(ValueError, match="previous: expected a record over the same 43"):
        measure(module, previous=measure(module, params=["0.*"]))
    with pytest.raises(ValueError, match="eigenvectors"):
        measure(module, previous=replace(previous, subspace=previous.subspace.without_eigenvectors()))


# What is withheld


class Everything(Measurement):
    """One key for each level of need, taken together."""

    def __init__(self, needs):
        self.needs = needs

    def measure(self, probe):
        assert isinstance(probe, Probe)
        return {f"user/{self.needs.name}": 1.0, "user/undefined": math.nan, "user/infinite": math.inf}


LEVELS = [Everything(needs) for needs in Needs]


def taken(record):
    return {key.removeprefix("user/") for key in record.metrics if key.startswith("user/")}


def withheld_keys(record):
    prefixes = ("gradient_fraction", "overlap", "reliability", "sharpness", "gap_index", "eigenvalues/")
    return {key for key in record.metrics if key.startswith(prefixes)}


def test_a_converged_probe_reports_everything_but_what_is_not_finite(module):
    record = measure(module, measurements=LEVELS)
    assert taken(record) == {"NOTHING", "EIGENVALUES", "SUBSPACE"}
    assert all(math.isfinite(value) for value in record.metrics.values())


@pytest.mark.parametrize("max_matvecs", [1, 3, 6])
def test_what_has_not_converged_is_not_reported(module, max_matvecs):
    record = measure(module, max_matvecs=max_matvecs, measurements=LEVELS, previous=measure(module))
    assert record.subspace.outcome is Outcome.MAX_MATVECS
    assert withheld_keys(record) == set()
    assert taken(record) == {"NOTHING"}
    assert record.sketch is None
    metrics = record.metrics
    assert metrics["solver/converged"] == metrics["solver/verified"] == 0.0
    assert metrics["solver/matvecs"] == max_matvecs
    assert metrics["solver/residual"] > 1e-10
    assert {"gradient_norm", "gradient_curvature", "gradient_hessian_cosine"} <= metrics.keys()


def test_eigenvalues_without_a_gap_are_reported_and_their_space_is_not(module, monkeypatch):
    def without_gap(*args, **options):
        return replace(eigsh(*args, **options), gap=0.0)

    monkeypatch.setattr(solver_module, "eigsh", without_gap)
    record = measure(module, measurements=LEVELS)
    assert record.subspace.converged
    assert not record.subspace.trusted
    assert "gradient_fraction" not in record.metrics
    assert "solver/subspace_error" not in record.metrics  # infinite
    assert {"eigenvalues/01", "sharpness", "gap_index"} <= record.metrics.keys()
    assert taken(record) == {"NOTHING", "EIGENVALUES"}
    assert record.sketch is None


@pytest.mark.parametrize("spoil", [lambda v: 1.01 * v, lambda v: v[[0, 0, 1, 2]], lambda v: v * math.nan])
def test_a_basis_that_is_not_orthonormal_is_never_projected_on(module, monkeypatch, spoil):
    def broken(*args, **options):
        result = eigsh(*args, **options)
        return replace(result, eigenvectors=spoil(result.eigenvectors))

    monkeypatch.setattr(solver_module, "eigsh", broken)
    with pytest.raises(SubspaceIntegrityError, match="orthonormal"):
        measure(module)


@pytest.mark.parametrize("good_products", [0, 1, 6])
def test_an_operator_that_fails_on_the_way(module, monkeypatch, good_products):
    def failing(matvec, *args, **options):
        products = iter([1.0] * good_products)
        return eigsh(lambda v: matvec(v) * next(products, math.nan), *args, **options)

    monkeypatch.setattr(solver_module, "eigsh", failing)
    record = measure(module)
    assert record.subspace.outcome is Outcome.NONFINITE
    assert withheld_keys(record) == set()
    assert record.metrics["solver/converged"] == 0.0
    assert ("solver/residual" in record.metrics) == (good_products > 0)


def test_a_stationary_point_has_no_gradient_fraction():
    module = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(module.weight)

    def square(m, batch, batch_idx):
        return m(batch).square().mean()

    record = measure_subspace(module, [INPUTS[:, :3]], k=1, loss_fn=square, **TIGHT)
    assert record.metrics["gradient_norm"] == 0.0
    assert "gradient_fraction" not in record.metrics
    assert "gradient_hessian_cosine" not in record.metrics


def test_a_linear_loss_has_no_curvature():
    module = nn.Linear(3, 1, bias=False).double()
    record = measure_subspace(module, [INPUTS[:, :3]], k=2, loss_fn=lambda m, x, i: m(x).mean(), **TIGHT)
    assert record.metrics["sharpness"] == 0.0
    assert record.metrics["gradient_curvature"] == 0.0
    assert record.metrics["solver/residual"] == 0.0
    assert "gradient_fraction" not in record.metrics  # any two directions are as good
    assert "gap_index" not in record.metrics


# Arguments


@pytest.mark.parametrize("k", [-1, 44])
def test_k_must_fit(module, k):
    with pytest.raises(ValueError, match=r"k: expected (0\.\.43|an integer of at least 0)"):
        measure(module, k=k)


def test_an_empty_sample(module):
    with pytest.raises(SampleError, match="at least one"):
        measure_subspace(module, [], loss_fn=classify)


def test_a_module_without_a_loss(module):
    with pytest.raises(TypeError, match="loss_fn"):
        measure_subspace(module, BATCHES)


# The stability threshold, against descent on a quadratic


def diverges(curvature, optimizer, **settings):
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer([theta], **settings)
    for _ in range(2000):
        theta.grad = curvature * theta.detach()
        optimizer.step()
    return not bool(theta.detach().abs() < 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 2.0},
        {"momentum": 0.9, "weight_decay": 2.0},
    ],
    ids=str,
)
def test_the_threshold_is_where_descent_on_a_quadratic_diverges(settings):
    settings = {"lr": 0.1} | settings
    threshold = sgd_threshold(torch.optim.SGD([torch.zeros(1)], **settings))
    assert not diverges(0.99 * threshold, torch.optim.SGD, **settings)
    assert diverges(1.01 * threshold, torch.optim.SGD, **settings)


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        torch.optim.Adam([torch.zeros(1)], lr=0.1),
        torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, dampening=0.5),
        torch.optim.SGD([torch.zeros(1)], lr=0.1, maximize=True),
        torch.optim.SGD([torch.zeros(1)], lr=0.0),
        torch.optim.SGD([torch.zeros(1)], lr=0.1, weight_decay=30.0),  # diverges on any quadratic
    ],
)
def test_no_threshold_is_made_up(optimizer):
    assert sgd_threshold(optimizer) is None


def test_the_largest_learning_rate_counts(module):
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.5, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert sgd_threshold(optimizer) == 4.0
    record = measure(module, optimizer=optimizer)
    assert record.metrics["sharpness_over_threshold"] == pytest.approx(record.metrics["sharpness"] / 4.0)
    assert "sharpness_over_threshold" not in measure(module).metrics


# The digits: a network that is trained, in float32, as a user would measure it


def test_trained_on_digits_every_number_is_that_of_the_dense_hessian():
    digits = load_digits()
    every, width = (1, 20) if IS_THOROUGH else (3, 12)  # which examples, and of the hidden layers
    inputs, labels = torch.tensor(digits.data / 16, dtype=torch.float32)[::every], torch.tensor(digits.target)[::every]
    batches = list(zip(inputs.split(256), labels.split(256), strict=True))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
        )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    record = truth = None
    steps = (0, 50, 200, 500, 1000) if IS_THOROUGH else (200, 500)
    for step in range(steps[-1] + 1):
        if step in steps:
            previous, truth_before = record, truth
            record = measure_subspace(module, batches, k=10, loss_fn=classify, previous=previous)
            assert record.subspace.trusted, f"step {step}: {record.subspace.verdict}"
            exact = copy.deepcopy(module).double()

            def objective(m):
                return F.cross_entropy(m(inputs.double()), labels)

            matrix, gradient = dense_hessian(exact, objective), dense_gradient(exact, objective)
            values, truth = top_eigenspace(matrix, 10)
            metrics = record.metrics
            assert metrics["sharpness"] == pytest.approx(float(values[0]), rel=1e-4), step
            assert metrics["gradient_fraction"] == pytest.approx(projected_share(truth, gradient), abs=0.01), step
            expected = cosine(gradient, matrix @ gradient)
            assert metrics["gradient_hessian_cosine"] == pytest.approx(expected, abs=0.01), step
            if previous is not None:
                expected = mean_square_cosine(truth_before, truth)
                assert metrics["overlap_previous"] == pytest.approx(expected, abs=0.01), step
        chosen = torch.randint(len(inputs), (64,), generator=generator)
        optimizer.zero_grad()
        classify(module, (inputs[chosen], labels[chosen]), 0).backward()
        optimizer.step()
    assert metrics["gap_index"] == 9  # one below the number of classes


@pytest.mark.parametrize("k", [41, 43])
def test_as_many_basis_vectors_as_parameters_are_enough_for_any_k(module, k):
    assert measure(module, k=k, ncv=43).subspace.outcome.name == "EXACT"


def test_numbers_of_numpy_and_any_collection_of_patterns_are_taken(module):
    record = measure(module, k=2, tol=np.float32(1e-3), params={"0.weight"}, measurements=iter(()))
    assert record.subspace.eigenvectors.shape == (2, 20)
