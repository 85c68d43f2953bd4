"""The components of a missed eigenvector along a chain are known from the projected matrix alone."""

import math

import pytest
import torch

from lightning_subspace.linalg.certificate import Certificate

from .spectra import Operator, normal, spectra
from .test_lanczos import best_ritz_vectors, factorisation

N = 300


@pytest.mark.parametrize("restart", [False, True])
def test_components_follow_the_recurrence(restart: bool) -> None:
    operator = Operator(spectra(N)["doubled"])
    missed = operator.wanted(3, "LA")[1][2]  # a copy of the second eigenvalue
    eigenvalue = float(operator.wanted(3, "LA")[0][2])
    lanczos = factorisation(operator, max_size=12)
    start = float(missed @ lanczos.pending)
    certificate = Certificate([eigenvalue], 0, N, 1e-9)
    for _ in range(8):
        expansion = lanczos.expand()
        assert expansion is not None
        certificate.follow(*expansion)
        if restart and lanczos.size == 6:
            rotation = best_ritz_vectors(lanczos, 3)
            lanczos.contract(rotation)
            certificate.contract(rotation)
    predicted = certificate._components[0] * start
    true = lanczos.basis.whole(lanczos.size + 1) @ missed
    torch.testing.assert_close(predicted, true, rtol=1e-8, atol=1e-10)


def test_holds_when_every_eigenvalue_is_excluded() -> None:
    column, norm = torch.tensor([0.0], dtype=torch.float64), 1.0
    required = 2 / math.pi * N / 0.1**2
    certificate = Certificate([2 * math.sqrt(required), 1.0], 0, N, 0.1)
    certificate.follow(column, norm)
    assert not certificate.holds  # the second one is not
    assert Certificate([], 0, N, 0.1).holds
    single = Certificate([1.01 * math.sqrt(required)], 0, N, 0.1)
    single.follow(column, norm)
    assert single.holds


def test_risk_is_shared_between_eigenvalues() -> None:
    growth = 1.01 * math.sqrt(2 / math.pi * N / 0.1**2)
    pair = Certificate([growth, -growth], 0, N, 0.1)
    pair.follow(torch.tensor([0.0], dtype=torch.float64), 1.0)
    assert not pair.holds


def test_an_excluded_eigenvalue_cannot_overflow() -> None:
    certificate = Certificate([1e30, 1.0], 0, N, 0.1)
    for m in range(30):
        certificate.follow(torch.zeros(m + 1, dtype=torch.float64), 1.0)
    assert certificate._growth.isfinite().all()


def test_bound_on_the_components_of_a_random_vector() -> None:
    """The rate at which |u . r|^2 < 1 / G for the G of a risk delta is at most about delta."""
    n, delta = 50, 0.2
    vectors = normal(20_000 * n, 0).view(-1, n)
    smallest = 1 / (2 / math.pi * n / delta**2)
    rate = float((vectors[:, 0].square() / vectors.square().sum(1) < smallest).double().mean())
    assert rate == pytest.approx(delta, rel=0.05)


def test_a_certificate_that_grows_too_slowly_may_not_hold() -> None:
    certificate = Certificate([2.001], 0, N, 0.01)  # just outside of the spectrum of the chain, (-2, 2)
    for m in range(40):
        column = torch.zeros(m + 1, dtype=torch.float64)
        column[m - 1 : m] = 1.0
        certificate.follow(column, 1.0)
        assert certificate.may_hold(1) == (m < 10)  # by ten expansions nothing can be told
    assert not certificate.holds
    assert not certificate.may_hold(5)
    assert certificate.may_hold(1000)
    assert not certificate.may_hold(0)
