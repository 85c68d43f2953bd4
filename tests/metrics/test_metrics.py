"""The torchmetrics against scipy, closed forms and two processes."""

import math
import pickle
import re

import matplotlib.figure
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from torchmetrics import MetricCollection

from lightning_subspace import measurements
from lightning_subspace.metrics import (
    GradientFraction,
    PrincipalAngles,
    SubspaceOverlap,
    gradient_fraction,
    principal_angles,
    subspace_overlap,
)
from tests.oracles import mean_square_cosine, projected_share
from tests.processes import run

N = 30
FUNCTIONS = {SubspaceOverlap: subspace_overlap, PrincipalAngles: principal_angles, GradientFraction: gradient_fraction}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(k, seed, n=N):
    return torch.linalg.qr(normal(n, k, seed=seed))[0].T.contiguous()


def make(kind, **arguments):
    return kind(3, **arguments) if kind is PrincipalAngles else kind(**arguments)


def pair(kind, seed):
    """What an update takes."""
    other = normal(N, seed=seed + 100) if kind is GradientFraction else orthonormal(4, seed + 100)
    return orthonormal(3, seed), other


kinds = pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.__name__)


# Values


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 3), (3, 5), (5, 2), (N, N)])
def test_the_functions_are_those_of_scipy_and_of_the_dense_projectors(k, m):
    basis, other, vector = orthonormal(k, 0), orthonormal(m, 1), normal(N, seed=2)
    expected = np.sort(scipy.linalg.subspace_angles(basis.T.numpy(), other.T.numpy()))
    np.testing.assert_allclose(principal_angles(basis, other).numpy(), expected, atol=1e-12)
    by_angles = np.mean(np.cos(expected) ** 2)
    assert float(subspace_overlap(basis, other)) == pytest.approx(by_angles, abs=1e-12)
    assert float(subspace_overlap(basis, other)) * min(k, m) == pytest.approx(
        mean_square_cosine(basis, other) * k, abs=1e-12
    )
    assert float(gradient_fraction(basis, vector)) == pytest.approx(projected_share(basis, vector), abs=1e-12)


def test_closed_forms():
    eye = torch.eye(4, dtype=torch.float64)
    turned = torch.stack([eye[0], math.cos(0.3) * eye[1] + math.sin(0.3) * eye[2]])
    assert principal_angles(eye[:2], turned).tolist() == pytest.approx([0.0, 0.3], abs=1e-15)
    assert float(subspace_overlap(eye[:2], turned)) == pytest.approx((1 + math.cos(0.3) ** 2) / 2, abs=1e-15)
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert float(gradient_fraction(turned, vector)) == pytest.approx(
        (1 + (2 * math.cos(0.3) + 3 * math.sin(0.3)) ** 2) / 30, abs=1e-15
    )
    assert math.isnan(gradient_fraction(eye[:2], torch.zeros(4, dtype=torch.float64)))


@kinds
def test_the_class_is_the_mean_of_the_function_over_updates(kind):
    metric, function = make(kind), FUNCTIONS[kind]
    values = [metric(*pair(kind, seed)) for seed in range(4)]  # forward
    for seed, value in enumerate(values):
        torch.testing.assert_close(value, function(*pair(kind, seed)), rtol=0.0, atol=0.0)
    torch.testing.assert_close(metric.compute(), torch.stack(values).mean(0), rtol=1e-14, atol=0.0)
    metric.reset()
    metric.update(*pair(kind, 7))
    torch.testing.assert_close(metric.compute(), function(*pair(kind, 7)), rtol=0.0, atol=0.0)


@kinds
def test_sums_are_held_in_float64_whatever_comes(kind):
    metric, wide = make(kind), make(kind)
    for seed in range(50):
        basis, other = pair(kind, seed)
        metric.half().float().update(basis.float(), other.float())  # torchmetrics ignores changes of type
        wide.update(basis.float().double(), other.float().double())
    assert metric.compute().dtype is metric.total.dtype is torch.float64
    torch.testing.assert_close(metric.compute(), wide.compute(), rtol=1e-14, atol=1e-14)


def test_a_vector_without_a_direction_does_not_count():
    metric = GradientFraction()
    metric.update(torch.eye(4)[:2], torch.zeros(4))
    metric.update(torch.eye(4)[:2], torch.tensor([math.nan, 0.0, 0.0, 1.0]))
    assert math.isnan(metric.compute())
    metric.update(torch.eye(4)[:2], torch.ones(4))
    assert float(metric.compute()) == 0.5


@kinds
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # torchmetrics' own word about it
def test_nothing_seen_is_nan(kind):
    assert make(kind).compute().isnan().all()


# torchmetrics' conventions


@kinds
def test_two_processes_are_one_that_saw_all(kind):
    def share(same):
        rank = dist.get_rank()
        metric = make(kind)
        for seed in (0, 1, 2) if same else ((0, 1), (2,))[rank]:
            metric.update(*pair(kind, seed))
        synced = metric.compute()
        metric.unsync() if metric._is_synced else None
        own = (metric.total / metric.count).clone()
        return synced, own

    alone = make(kind)
    for seed in (0, 1, 2):
        alone.update(*pair(kind, seed))
    for same in (True, False):
        for synced, own in run(share, 2, same):
            torch.testing.assert_close(synced, alone.compute(), rtol=1e-14, atol=0.0)
            assert torch.allclose(own, synced, rtol=1e-14, atol=0.0) == same  # what each has seen is its own again


@kinds
def test_a_process_that_saw_nothing_changes_nothing(kind):
    def share():
        metric = make(kind)
        if dist.get_rank() == 1:
            metric.update(*pair(kind, 0))
        else:
            metric._update_count = 1  # else torchmetrics warns, as it should
        return metric.compute()

    for synced in run(share, 2):
        torch.testing.assert_close(synced, FUNCTIONS[kind](*pair(kind, 0)), rtol=0.0, atol=0.0)


@kinds
def test_it_plots_pickles_and_says_what_it_is(kind):
    metric = make(kind)
    values = [metric(*pair(kind, seed)) for seed in range(3)]
    for drawn in (None, values[0], values):
        figure, axis = metric.plot(drawn)
        assert isinstance(figure, matplotlib.figure.Figure)
        low, high = axis.get_ylim()
        assert low < 0.0
        assert high > kind.plot_upper_bound
        matplotlib.pyplot.close(figure)
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())
    assert kind.plot_lower_bound == 0.0
    assert kind.full_state_update is False
    assert kind.is_differentiable is False
    assert {SubspaceOverlap: True, PrincipalAngles: False, GradientFraction: None}[kind] is kind.higher_is_better


def test_those_of_a_pair_go_into_a_collection():
    collection = MetricCollection([SubspaceOverlap(), PrincipalAngles(3)])
    collection.update(*pair(SubspaceOverlap, 0))
    found = collection.compute()
    assert float(found["SubspaceOverlap"]) == pytest.approx(float(found["PrincipalAngles"].cos().square().mean()))


def test_gradients_do_not_flow_into_a_metric():
    basis, vector = orthonormal(2, 0).requires_grad_(), normal(N, seed=1).requires_grad_()
    assert not gradient_fraction(basis, vector).requires_grad
    assert not principal_angles(basis, orthonormal(2, 1)).requires_grad


def test_the_measurements_of_a_monitor_keep_their_names():
    assert measurements.SubspaceOverlap is not SubspaceOverlap
    assert measurements.GradientFraction is not GradientFraction


# Arguments


ROWS = orthonormal(3, 0)
REFUSED = {
    "columns": (SubspaceOverlap, (ROWS.T, ROWS), "basis: expected a tensor of shape (k, n) with 0 < k <= n"),
    "vector as basis": (GradientFraction, (ROWS[0], ROWS[0]), "got torch.float64 of shape (30,); transpose"),
    "empty": (SubspaceOverlap, (ROWS[:0], ROWS), "0 < k <= n"),
    "list": (SubspaceOverlap, ([1.0], ROWS), "got [1.0];"),
    "integers": (SubspaceOverlap, (torch.eye(30, dtype=torch.int64)[:3], ROWS), "real floating-point type"),
    "complex": (SubspaceOverlap, (ROWS, ROWS * 1j), "other: expected a real floating-point type"),
    "scaled": (PrincipalAngles, (ROWS, 2 * ROWS), "other: expected orthonormal rows"),
    "nan": (PrincipalAngles, (ROWS * math.nan, ROWS), "basis: expected orthonormal rows"),
    "narrow": (SubspaceOverlap, (ROWS.bfloat16(), ROWS), "float32 or wider"),
    "lengths": (SubspaceOverlap, (ROWS, orthonormal(3, 0, n=20)), "other: expected rows of length 30"),
    "number of angles": (PrincipalAngles, (ROWS[:2], ROWS), "pass num_angles=2"),
    "vector length": (
        GradientFraction,
        (ROWS, torch.ones(29)),
        "vector: expected a real floating-point tensor of shape",
    ),
    "matrix as vector": (GradientFraction, (ROWS, ROWS), "shape (30,)"),
}


@pytest.mark.parametrize(("kind", "given", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused_and_does_not_count(kind, given, words):
    metric = make(kind)
    with pytest.raises(ValueError, match=re.escape(words)):
        metric.update(*given)
    assert int(metric.count) == 0


@pytest.mark.parametrize("given", [0, -1, True, 2.0, None])
def test_the_number_of_angles_is_a_positive_integer(given):
    with pytest.raises(ValueError, match=f"num_angles: expected a positive integer, got {given!r}"):
        PrincipalAngles(given)


@kinds
def test_the_checks_can_be_left_out(kind):
    with pytest.raises(ValueError, match="validate_args: expected True or False, got 'no'"):
        make(kind, validate_args="no")
    metric = make(kind, validate_args=False)
    metric.update(*pair(kind, 0))
    torch.testing.assert_close(metric.compute(), FUNCTIONS[kind](*pair(kind, 0)), rtol=0.0, atol=0.0)
