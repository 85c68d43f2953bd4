"""Sums over a whole spectrum, against spectra that are prescribed."""

import math

import pytest
import torch
from torch import Tensor

from lightning_subspace.linalg import Quadrature, eigsh, quadrature
from tests.thorough import covering, how_many

from .fake_ranks import FakeRanks
from .spectra import Operator, normal, spectra

N = 301
F64 = {"dtype": torch.float64}
SEEDS = range(how_many(30, thorough=60))


def identity(x: Tensor) -> Tensor:
    return x


def known_of(operator: Operator, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = operator.wanted(k, "LA")
    return values, torch.zeros(k), vectors


@pytest.mark.parametrize("k", [0, 10])
@pytest.mark.parametrize("name", sorted(spectra(N)))
def test_it_is_exact_for_polynomials_in_the_start_vector(name: str, k: int) -> None:
    """N u.A^p u for p < 2 m, with u drawn, freed of the known directions and normalised by hand."""
    operator = Operator(spectra(N)[name])
    known, n = known_of(operator, k), operator.n
    found = quadrature(operator, n, steps=4, vectors=1, known=known, random=lambda seed, i: normal(n, i), **F64)
    u = normal(n, 0)
    u = u - known[2].T @ (known[2] @ u)
    u = u / u.norm()
    scale = operator.norm or 1.0
    image = u
    for power in range(8):
        expected = (n - k) * float(u @ image) + float((known[0] / scale).pow(power).sum())
        measured = found.sum(lambda x, power=power: (x / scale).pow(power)).value  # type: ignore[misc]
        assert measured == pytest.approx(expected, rel=1e-9, abs=1e-9 * N)
        image = operator(image) / scale
        image = image - known[2].T @ (known[2] @ image)


@pytest.mark.parametrize(
    ("name", "function"),
    covering(
        ["power law", "outliers", "indefinite", "heavy tail"], [identity, torch.square, lambda x: x.clamp(max=0.0)]
    ),
)
def test_the_standard_error_is_that_of_many_runs(name: str, function: object) -> None:
    operator = Operator(spectra(N)[name])
    runs = [quadrature(operator, N, steps=20, vectors=2, seed=seed, **F64).sum(function) for seed in SEEDS]
    values = torch.tensor([run.value for run in runs])
    truth = float(function(operator.eigenvalues).sum())
    stated = math.sqrt(sum(run.error**2 for run in runs) / len(runs))
    assert float(values.std()) == pytest.approx(stated, rel=0.35)
    assert abs(float(values.mean()) - truth) < 3.5 * stated / math.sqrt(len(runs)) + 1e-9


def test_known_pairs_make_sums_more_exact() -> None:
    operator = Operator(spectra(N)["outliers"])
    result = eigsh(operator, N, 10, **F64)
    pairs = (result.eigenvalues, result.residuals, result.eigenvectors)
    plain, deflated = (quadrature(operator, N, steps=20, known=known, **F64) for known in (None, pairs))
    truth = float(operator.eigenvalues.sum())
    assert deflated.sum(identity).error < plain.sum(identity).error / 50
    assert abs(deflated.sum(identity).value - truth) < 4 * deflated.sum(identity).error
    assert float(deflated.nodes.max()) < 0.05  # no copy of an outlier, of which there are ten above .6


def test_float32_keeps_to_the_rest_of_the_spectrum() -> None:
    operator = Operator(spectra(N)["outliers"])
    result = eigsh(operator, N, 10)
    pairs = (result.eigenvalues, result.residuals, result.eigenvectors)
    narrow = quadrature(operator, N, steps=40, known=pairs)
    assert float(narrow.nodes.max()) < 0.05
    found = narrow.sum(identity)
    assert abs(found.value - float(operator.eigenvalues.sum())) < 4 * found.error < 1.0


def test_the_whole_spectrum_is_found_by_as_many_steps() -> None:
    eigenvalues = torch.tensor([5.0, 3.0, 1.0, 0.5, -1.0, -2.0], dtype=torch.float64)
    operator = Operator(eigenvalues)
    found = quadrature(operator, 6, steps=10, vectors=1, known=known_of(operator, 2), **F64)
    torch.testing.assert_close(found.nodes[0], eigenvalues[2:].flip(0))
    assert found.weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("k", [0, 2, 6])
def test_small_and_degenerate_spaces(k: int) -> None:
    for eigenvalues in (torch.zeros(6), torch.ones(6), -torch.ones(6)):
        operator = Operator(eigenvalues.double())
        found = quadrature(operator, 6, steps=5, vectors=3, known=known_of(operator, k), **F64)
        assert found.sum(identity).value == pytest.approx(float(eigenvalues.sum()))
        assert found.sum(identity).error == pytest.approx(0.0, abs=1e-6)
        assert found.sum(torch.square).value == pytest.approx(float(eigenvalues.square().sum()))
        assert found.ends == pytest.approx((float(eigenvalues[0]),) * 2)


@pytest.mark.parametrize("name", ["indefinite", "heavy tail", "ten equal, all negative", "softmax model"])
@pytest.mark.parametrize("threshold", [-0.02, 0.01, 0.3])
def test_the_bounds_hold_for_the_distribution_of_the_vector(name: str, threshold: float) -> None:
    operator = Operator(spectra(N)[name])
    found = quadrature(operator, N, steps=15, vectors=1, random=lambda seed, i: normal(N, i), **F64)
    parts = operator.reflect(normal(N, 0)).square()
    truth = float(parts[operator.eigenvalues < threshold].sum() / parts.sum())
    low, high = found.below(threshold)
    assert 0.0 <= low <= truth + 1e-9
    assert truth <= high + 1e-9
    assert high <= 1.0


def test_the_density_integrates_to_one_and_to_the_shares() -> None:
    operator = Operator(spectra(N)["indefinite"])
    found = quadrature(operator, N, steps=20, vectors=2, known=known_of(operator, 5), **F64)
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    density = found.density(grid, 0.05)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-6)
    assert float(torch.trapezoid(density * grid, grid)) == pytest.approx(found.sum(identity).value / N, abs=1e-6)


def test_arguments_are_refused_by_name() -> None:
    for name in ("steps", "vectors"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            quadrature(identity, 3, **{name: 0})


def test_an_operator_that_is_not_finite_gives_nan() -> None:
    found = quadrature(lambda v: v * math.nan, 5)
    assert not found.finite
    assert math.isnan(found.sum(identity).value)


def on_ranks(operator: Operator, size: int, **arguments: object) -> list[Quadrature]:
    ranks = FakeRanks(size, operator.n)
    values, vectors = operator.wanted(5, "LA")

    def program(rank: int) -> Quadrature:
        def matvec(local: Tensor) -> Tensor:
            return ranks.cut(operator(torch.cat(ranks.gather(local, rank))[: operator.n]), rank)

        own = torch.stack([ranks.cut(row, rank) for row in vectors])
        return quadrature(
            matvec,
            ranks.length,
            known=(values, torch.zeros(5), own),
            all_sum=lambda local: torch.stack(ranks.gather(local, rank)).sum(0),
            random=lambda seed, i: ranks.cut(normal(operator.n, 1000 * seed + i), rank),
            dimension=operator.n,
            **arguments,  # type: ignore[arg-type]
        )

    results = ranks.run(program)  # type: ignore[arg-type]
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_one(size: int) -> None:
    operator = Operator(spectra(N)["indefinite"])
    (single,) = on_ranks(operator, 1, steps=12, vectors=2, **F64)
    for result in on_ranks(operator, size, steps=12, vectors=2, **F64):
        torch.testing.assert_close(result.nodes, single.nodes, rtol=0, atol=1e-9)
        torch.testing.assert_close(result.weights, single.weights, rtol=0, atol=1e-9)


def test_a_rank_that_fails_ends_all() -> None:
    class Failing(Operator):
        def __call__(self, vector: Tensor) -> Tensor:
            image = super().__call__(vector)
            image[-1] = math.nan  # in the slice of the last rank
            return image

    for result in on_ranks(Failing(spectra(N)["power law"]), 3, steps=5):
        assert not result.finite
