"""Equal eigenvalues are found as often as they occur, and looking for them costs little where there are none."""

import pytest
import torch

from lightning_subspace.linalg import EigshResult, Outcome, Which, eigsh
from tests.thorough import covering, how_many

from .few_copies import Solved
from .spectra import Operator, copies_behind_an_outlier, mirrored, normal, num_missed, shortfall, spectra

N = 450
K = 10
DEGENERATE = [
    "ten equal",
    "six and six equal",
    "softmax model",
    "clusters",
    "ninefold",
    "doubled",
    "ten equal, all negative",
    "zero",
    "identity",
    "minus identity",
    "rank five",
    "four equal",
]
ORDINARY = ["power law", "outliers", "indefinite", "heavy tail"]
SEEDS = range(how_many(1, thorough=3))


def solve(operator: Operator, seed: int, **arguments: object) -> EigshResult:
    defaults = {"dtype": torch.float64, "delta": 1e-3, "max_matvecs": 1000, "seed": seed}
    return eigsh(operator, operator.n, K, **(defaults | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "ncv", "precision"), covering(list(DEGENERATE), [None, K + 5], ["float64", "float32"])
)
def test_no_copy_is_missed(name: str, precision: str, ncv: int | None) -> None:
    for seed in SEEDS:
        operator = Operator(spectra(N)[name], noise=1e-7 if precision == "float32" else 0.0, seed=seed)
        result = solve(operator, seed, dtype=getattr(torch, precision), ncv=ncv)
        assert result.outcome is Outcome.CONVERGED
        assert result.verified
        assert num_missed(operator, result, "LA") == 0
        assert float(operator.residuals(result).max()) <= 2e-3 * operator.norm
        assert result.orthogonality < (1e-5 if precision == "float32" else 1e-12)


@pytest.mark.parametrize(("name", "which"), covering(list(DEGENERATE), ["SA", "LM", "BE"]))
def test_no_copy_is_missed_at_other_ends(name: str, which: Which) -> None:
    # Magnitudes with no outlier make a hard problem, not a degenerate one.
    if name == "ten equal, all negative" and which != "SA":
        name = "ten equal"
    for seed in SEEDS:
        operator = Operator(mirrored(spectra(N)[name], which), seed=seed)
        result = solve(operator, seed, which=which)
        assert result.converged
        assert result.verified
        assert num_missed(operator, result, which) == 0
        assert float(operator.residuals(result).max()) <= 2e-3 * operator.norm


def test_without_verification_copies_are_missed() -> None:
    """Or else the tests above would prove nothing."""
    for name in ["ninefold", "doubled", "softmax model"]:
        operator = Operator(spectra(N)[name])
        result = solve(operator, 0, verify="never")
        assert result.outcome is Outcome.CONVERGED
        assert not result.verified
        assert num_missed(operator, result, "LA", margin=0.0) > 0


@pytest.mark.parametrize("name", ["zero", "identity", "minus identity"])
def test_a_multiple_of_the_identity_costs_a_product_more_than_k(name: str) -> None:
    """The one that shows that there is no gap."""
    result = solve(Operator(spectra(N)[name]), 0)
    assert result.num_matvecs == K + 1
    assert abs(result.gap) < 1e-14
    assert result.subspace_error == float("inf")
    assert not result.gap_given_up
    assert solve(Operator(spectra(N)[name]), 0, subspace_tol=None).num_matvecs == K


@pytest.mark.parametrize(("name", "ncv"), covering(list(ORDINARY), [None, K + 5]))
def test_verifying_an_ordinary_spectrum_is_cheap(name: str, ncv: int | None) -> None:
    operator = Operator(spectra(2000)[name])
    for seed in SEEDS:
        plain = solve(operator, seed, verify="never", ncv=ncv)
        verified = solve(operator, seed, delta=0.01, ncv=ncv)
        assert verified.verified
        expected, _ = operator.wanted(K, "LA")
        # One of the heavy tail's chains passes over an eigenvalue, which the second chain finds.
        is_complete = bool((plain.eigenvalues - expected).abs().max() < 1e-3 * operator.norm)
        assert verified.num_matvecs - plain.num_matvecs <= (13 if is_complete else 25)
        torch.testing.assert_close(verified.eigenvalues, expected, rtol=0, atol=1e-5 * operator.norm)


def test_a_cluster_that_is_split_has_no_trusted_subspace() -> None:
    """Four of six equal eigenvalues are wanted: any four-dimensional part of their space is as right as any other."""
    for seed in SEEDS:
        result = solve(Operator(spectra(N)["six and six equal"], seed=seed), seed)
        assert result.subspace_error > 1


def test_what_was_seen_behind_the_wanted_values_survives_the_verification() -> None:
    operator = Operator(spectra(N)["power law"])
    plain, verified = solve(operator, 0, verify="never"), solve(operator, 0)
    assert verified.next_eigenvalue >= plain.next_eigenvalue
    assert abs(verified.next_eigenvalue - float(operator.eigenvalues[K])) <= verified.next_residual


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", ["ten equal", "doubled", "ninefold"])
def test_one_of_equal_top_eigenvectors_has_no_trusted_direction(name: str, which: Which) -> None:
    """The eigenvalue is right at once; that its eigenvector is one of many is found by looking further."""
    for seed in SEEDS:
        operator = Operator(mirrored(spectra(N)[name], "LA" if which == "LM" else which), seed=seed)
        result = eigsh(operator, N, 1, which=which, dtype=torch.float64, seed=seed)
        assert result.subspace_error > 0.5
        assert float(shortfall(operator, result, which).max()) < 1e-5
        cheap = eigsh(operator, N, 1, which=which, dtype=torch.float64, seed=seed, subspace_tol=None)
        assert cheap.verified
        assert cheap.num_matvecs < result.num_matvecs


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_two_fold_top_in_a_small_space(k: int) -> None:
    operator = Operator(torch.tensor([2.0, 2.0, 1.0, 0.5, -1.0, -3.0], dtype=torch.float64))
    result = eigsh(operator, 6, k, dtype=torch.float64)
    assert result.converged
    torch.testing.assert_close(result.eigenvalues, operator.eigenvalues[:k], rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_copy_in_a_dense_list_is_not_passed_over(seed: int) -> None:
    """Nearly all of a small space is wanted: a copy that appears moves every value by less than the margin."""
    dense = torch.linspace(1, 0.3, 30, dtype=torch.float64)
    operator = Operator(torch.cat([dense, dense.new_full((6,), 0.62), 0.01 * dense]), seed=seed)
    result = eigsh(operator, operator.n, 38, dtype=torch.float64, delta=1e-3, seed=seed)
    assert result.converged
    assert result.verified
    assert num_missed(operator, result, "LA") == 0


def test_no_trusted_space_is_undetermined_and_no_verified_value_is_wrong_below_three_per_cent() -> None:
    """But for the risk; how many are without these certificates: `lightning_subspace/linalg/README.md`."""
    seeds, delta = 200, 0.01
    found = [Solved.of(seed, delta) for seed in range(seeds)]
    undetermined, wrong, misled = (
        sum(getattr(one, name) for one in found) for name in ("undetermined", "wrong", "misled")
    )
    assert undetermined <= 2 * delta * seeds
    assert wrong <= 2 * delta * seeds
    assert misled <= 2 * delta * seeds
    trusted, possible = sum(one.is_trusted for one in found), sum(one.has_gap for one in found)
    assert trusted >= 0.9 * possible > 0.3 * seeds  # the gaps that there are


@pytest.mark.parametrize("seed", range(4))
def test_copies_far_below_the_largest_eigenvalue_are_found(seed: int) -> None:
    """Four times 89.5, four times 1.87, four times .5: there is a space of the first 8, and none of the first 6."""
    operator = Operator(copies_behind_an_outlier(N), seed=seed)
    right = eigsh(operator, operator.n, 8, dtype=torch.float64, seed=seed, delta=1e-3)
    torch.testing.assert_close(right.eigenvalues, operator.wanted(8, "LA")[0], rtol=0.01, atol=0.0)
    assert right.verified
    assert right.subspace_error <= 0.1
    split = eigsh(operator, operator.n, 6, dtype=torch.float64, seed=seed, delta=1e-3)
    assert split.subspace_error > 0.1
    assert abs(split.next_eigenvalue - 1.87) <= split.next_residual + 0.05


def test_a_gap_that_costs_too_much_to_certify_is_given_up() -> None:
    """Behind the first three values of this dense spectrum lies a gap of .2 % of the width of the rest."""
    rest = torch.linspace(1.0, -1.0, 3000, dtype=torch.float64)
    operator = Operator(torch.cat([rest.new_tensor([1.3, 1.2, 1.004]), rest]))
    # From a nearby space, as in a chain of probes: it takes few products to find the pairs.
    start = operator.wanted(3, "LA")[1].sum(0) + 1e-3 * normal(operator.n, 1)
    result, plain = (
        eigsh(operator, operator.n, 3, v0=start, dtype=torch.float64, max_matvecs=1000, verify=verify)
        for verify in ("always", "never")
    )
    assert plain.subspace_error <= 0.1
    assert not plain.gap_given_up
    assert result.gap_given_up
    assert result.subspace_error == float("inf")
    assert result.next_residual >= result.gap
    assert result.verified  # the values are right all the same: a copy of 1.2 would have shown at once
    assert result.num_matvecs <= max(2 * plain.num_matvecs, plain.num_matvecs + 20)


@pytest.mark.parametrize("outlier", [10.0, 300.0, 1e3, 1e4, 1e6])
def test_copies_far_below_an_outlier_make_no_value_wrong_that_is_known(outlier):
    """Closer together than tol * scale, and still 40 % apart: known and verified means right to 5 %."""
    for seed in range(6):
        bulk = 0.3 * torch.rand(287, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values = torch.cat([torch.tensor([outlier, *[1.0] * 4, *[0.6] * 4, *[0.4] * 4], dtype=torch.float64), bulk])
        result = eigsh(lambda v, values=values: values * v, len(values), 10, seed=seed, dtype=torch.float64)
        true = values.sort(descending=True).values[:10]
        known = result.residuals <= 0.05 * result.eigenvalues
        wrong = (result.eigenvalues - true).abs() > 0.05 * true
        assert not (result.verified and bool((known & wrong).any()))
