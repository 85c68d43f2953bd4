"""What eigsh promises, against dense oracles."""

import math
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_subspace.linalg import EigshResult, Outcome, Which, eigsh
from lightning_subspace.linalg.selection import WHICH, report_order
from tests.thorough import how_many

from .spectra import Operator, generator, mirrored, normal, num_missed, shortfall, spectra, uniform

N = 300


@st.composite
def operators(draw: st.DrawFn) -> Operator:
    """Equal, clustered, negative and zero eigenvalues in front of a bulk that may be wide, narrow or missing."""
    values = st.sampled_from([-3.0, -1.0, -0.5, -1e-3, 0.0, 1e-6, 0.2, 0.5, 0.51, 1.0, 1.0 + 1e-7, 2.0])
    groups = draw(st.lists(st.tuples(values, st.integers(1, 7)), max_size=6))
    top = [value for value, count in groups for _ in range(count)]
    bulk_size = draw(st.integers(0 if top else 1, 60))
    width = draw(st.sampled_from([0.0, 1e-4, 0.05, 1.0]))
    seed = draw(st.integers(0, 99))
    bulk = width * normal(bulk_size, seed)
    scale = draw(st.sampled_from([1.0, 1e-8, 1e6]))
    return Operator(scale * torch.cat([torch.tensor(top, dtype=torch.float64), bulk]), seed=seed)


def overlap(result: EigshResult, operator: Operator, which: Which) -> float:
    """Tr(P P') / k with the dense eigenspace."""
    _, vectors = operator.wanted(len(result.eigenvalues), which)
    return float((vectors @ result.eigenvectors.double().T).square().sum()) / len(vectors)


def check(operator: Operator, result: EigshResult, which: Which, tol: float = 1e-3) -> None:
    """Everything that an answer which says converged, and perhaps verified and trusted, has to be."""
    assert result.converged, result.outcome
    k = len(result.eigenvalues)
    assert result.eigenvectors.shape == (k, operator.n)
    assert float(operator.residuals(result).max()) <= 2 * tol * operator.norm
    assert num_missed(operator, result, which) == 0
    lack = shortfall(operator, result, which)
    assert float(lack.min()) >= -tol  # no Ritz value is better than the eigenvalue in its place
    assert result.orthogonality < 1e-10
    right = float(lack.max()) <= tol  # nothing within the margin was passed over
    if result.verified:  # each is right to 5 % of itself, or to the tolerance
        true = operator.wanted(k, which)[0].abs()
        assert bool((lack * operator.norm <= (0.05 * true).clamp(min=1.1 * tol * operator.norm)).all())
    if result.subspace_error <= 0.1 and result.gap < math.inf:
        assert operator.true_gap(k, which) >= 9.9 * float(result.residuals.max())
        assert overlap(result, operator, which) >= 0.99
    if right and operator.true_gap(k, which) > 10 * tol * operator.norm:
        assert overlap(result, operator, which) >= 0.999


@settings(max_examples=how_many(25, thorough=250), derandomize=True, deadline=None, database=None)
@given(operator=operators(), which=st.sampled_from(WHICH), data=st.data())
def test_answers_are_right(operator: Operator, which: Which, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, operator.n), label="k")
    seed = data.draw(st.integers(0, 99), label="seed")
    arguments = {"which": which, "dtype": torch.float64, "delta": 1e-3, "seed": seed, "max_matvecs": 2000}
    result = eigsh(operator, operator.n, k, **arguments)  # type: ignore[arg-type]
    check(operator, result, which)
    restarted = eigsh(operator, operator.n, k, ncv=k + 5, **arguments)  # type: ignore[arg-type]
    check(operator, restarted, which)


@pytest.mark.parametrize(
    ("name", "which"),
    [("power law", "LA"), ("heavy tail", "LA"), *(("indefinite", which) for which in WHICH)],
)
def test_restarts_do_not_change_the_answer(name: str, which: Which) -> None:
    operator = Operator(spectra(N)[name])
    wide = eigsh(operator, N, 6, which=which, ncv=N, dtype=torch.float64, max_matvecs=1000)
    narrow = eigsh(operator, N, 6, which=which, ncv=11, dtype=torch.float64, max_matvecs=1000)
    assert wide.num_restarts == 0
    assert narrow.num_restarts > 0
    torch.testing.assert_close(narrow.eigenvalues, wide.eigenvalues, rtol=0, atol=1e-5 * operator.norm)


@pytest.mark.parametrize("k", [4, 5])
@pytest.mark.parametrize("which", WHICH)
def test_same_eigenvalues_as_scipy(which: Which, k: int) -> None:
    operator = Operator(spectra(N)["indefinite"])
    expected = scipy.sparse.linalg.eigsh(operator.dense().numpy(), k, which=which, return_eigenvectors=False)
    result = eigsh(operator, N, k, which=which, tol=1e-8, dtype=torch.float64)
    torch.testing.assert_close(result.eigenvalues.sort()[0], torch.from_numpy(expected).sort()[0])
    torch.testing.assert_close(result.eigenvalues, operator.wanted(k, which)[0][report_order(k, which)])


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("which", WHICH)
def test_whole_space_is_exact(which: Which, n: int) -> None:
    operator = Operator(normal(n, n))
    result = eigsh(operator, n, n, which=which, dtype=torch.float64)
    assert result.outcome is Outcome.EXACT
    assert result.verified
    assert result.num_matvecs == n
    assert result.gap == math.inf
    assert result.subspace_error == 0.0
    assert math.isnan(result.next_eigenvalue)
    torch.testing.assert_close(result.eigenvalues.sort()[0], operator.eigenvalues.sort()[0])
    assert float(operator.residuals(result).max()) < 1e-12


def test_record_describes_the_answer() -> None:
    operator = Operator(spectra(N)["power law"])
    result = eigsh(operator, N, 5)
    assert result.eigenvalues.dtype == result.residuals.dtype == torch.float64
    assert result.eigenvectors.dtype == torch.float32
    assert result.scale == pytest.approx(operator.norm, rel=1e-5)
    assert result.asymmetry < 1e-6
    assert result.orthogonality < 1e-6
    assert result.gap == pytest.approx(float(operator.eigenvalues[4] - operator.eigenvalues[5]), rel=0.05)
    true = operator.residuals(result)
    assert (true <= 1.05 * result.residuals + 2e-7 * operator.norm).all()
    # The verification improves them a little, unnoticed; and rounding is the floor of what is reported.
    assert (true >= 0.5 * result.residuals - 2e-6 * operator.norm).all()
    sine = float(torch.linalg.matrix_norm(result.eigenvectors.double() @ operator.wanted(N, "LA")[1][5:].T, ord=2))
    assert sine <= result.subspace_error


def test_space_is_accurate_where_the_gap_is_small() -> None:
    eigenvalues = torch.cat([torch.tensor([1.0, 0.5, 0.3, 0.29]), 0.2 * uniform(N, 0).float()]).double()
    operator = Operator(eigenvalues)
    loose = eigsh(operator, operator.n, 3, subspace_tol=None, seed=1, dtype=torch.float64)
    tight = eigsh(operator, operator.n, 3, seed=1, dtype=torch.float64)
    assert tight.subspace_error <= 0.035
    assert tight.subspace_error < loose.subspace_error
    assert tight.num_matvecs <= loose.num_matvecs + 5


def test_loose_tolerance_is_relative_to_each_eigenvalue() -> None:
    operator = Operator(spectra(N)["power law"])
    result = eigsh(operator, N, 8, tol=0.05, subspace_tol=None, dtype=torch.float64)
    assert result.converged
    assert (operator.residuals(result) <= 0.05 * result.eigenvalues).all()
    assert float(shortfall(operator, result, "LA").max()) < 1e-3


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_tolerance_below_the_precision_is_raised(dtype: torch.dtype, smallest: float) -> None:
    operator = Operator(spectra(N)["power law"])
    with pytest.warns(UserWarning, match="^tol: expected at least .*, got .*; it was raised to that"):
        result = eigsh(operator, N, 3, tol=1e-15, dtype=dtype)
    assert result.converged
    assert float(result.residuals.max()) <= smallest * result.scale


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("overlap", [0.98, 0.5])
def test_operator_that_changes_between_calls_is_flagged(k: int, overlap: float) -> None:
    """The Hessian of a minibatch that is drawn anew on every call."""
    examples = normal(400 * 60, 0).view(400, 60) * torch.logspace(0, -2, 60, dtype=torch.float64)
    source = generator(1)

    def resampled(vector: Tensor) -> Tensor:
        kept = examples[torch.rand(400, generator=source) < overlap]
        return (kept.T @ (kept @ vector.double()) / len(kept)).to(vector.dtype)

    for dtype in (torch.float32, torch.float64):
        result = eigsh(resampled, 60, k, dtype=dtype)
        assert result.outcome is Outcome.ASYMMETRIC
        assert not result.converged
        assert not result.verified
        assert result.asymmetry > 1e-4
        assert result.num_matvecs <= 12
        assert (result.residuals >= result.asymmetry * result.scale * 0.999).all()


def test_operator_that_is_not_symmetric_is_flagged() -> None:
    matrix = normal(50 * 50, 0).view(50, 50)
    result = eigsh(lambda vector: matrix @ vector, 50, 3, dtype=torch.float64)
    assert result.outcome is Outcome.ASYMMETRIC


def test_rounding_that_looks_like_asymmetry_is_told_apart() -> None:
    """A small matrix behind terms that cancel: what float32 loses is much of it, and the same at every call."""
    n = 60
    large = 1e4 * normal(n * n, 0).view(n, n).float()
    small = torch.diag(torch.linspace(1.0, 2.0, n))
    generator_of_noise = generator(3)

    def cancelling(vector: Tensor) -> Tensor:
        terms = large.to(vector.dtype) @ vector
        return (terms + small.to(vector.dtype) @ vector) - terms

    def noisy(vector: Tensor) -> Tensor:
        return cancelling(vector) + 1e-3 * torch.randn(n, generator=generator_of_noise).to(vector)

    def crooked(vector: Tensor) -> Tensor:
        return (small.to(vector.dtype) + large.to(vector.dtype).triu() / 1e4) @ vector

    assert eigsh(cancelling, n, 3).outcome is Outcome.ROUNDING
    assert eigsh(cancelling, n, 3, dtype=torch.float64).outcome is Outcome.CONVERGED
    assert eigsh(noisy, n, 3).outcome is Outcome.ASYMMETRIC
    assert eigsh(crooked, n, 3).outcome is Outcome.ASYMMETRIC
    assert eigsh(crooked, n, 3, dtype=torch.float64).outcome is Outcome.ASYMMETRIC


def test_rounding_in_a_large_space_is_no_asymmetry() -> None:
    """A random vector of a large space is almost orthogonal to the few large eigenvectors: scale starts far too low."""
    n = 200_000
    eigenvalues = 1e-6 * normal(n, 0)
    eigenvalues[:3] = torch.tensor([3.0, 2.0, 1.0])
    result = eigsh(Operator(eigenvalues, noise=1e-6), n, 3)
    assert result.outcome is Outcome.CONVERGED
    assert result.asymmetry < 1e-5


def test_inner_products_are_accurate_in_a_large_space() -> None:
    """Added up one by one in float32, a million small terms behind a few large ones would lose four digits."""
    n = 500_000
    eigenvalues = torch.linspace(0.0, 0.5, n, dtype=torch.float64)
    eigenvalues[:40] = torch.linspace(1.2, 0.55, 40)
    diagonal = eigenvalues.float()
    result = eigsh(lambda vector: diagonal * vector, n, 3, ncv=10)
    assert result.converged
    assert result.asymmetry < 5e-6
    assert result.orthogonality < 5e-6


def test_stagnation_is_an_outcome() -> None:
    """Two dense ends of equal magnitude, and a basis that is too small to tell them apart."""
    operator = Operator(mirrored(spectra(1000)["ten equal, all negative"], "LM"))
    result = eigsh(operator, 1000, 10, which="LM", ncv=15, dtype=torch.float64, max_matvecs=5000)
    assert result.outcome is Outcome.STAGNATED
    assert not result.converged
    assert not result.verified
    assert result.num_matvecs < 1000
    torch.testing.assert_close(result.residuals, operator.residuals(result), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("after", [1, 2, 8, 40])
def test_nan_is_an_outcome(after: int) -> None:
    operator = Operator(spectra(N)["six and six equal"])
    count = 0

    def failing(vector: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return operator(vector) * (math.nan if count == after else 1.0)

    result = eigsh(failing, N, 5, dtype=torch.float64)
    assert result.outcome is Outcome.NONFINITE
    assert result.num_matvecs == after
    assert len(result.eigenvalues) == len(result.eigenvectors) == min(after - 1, 5)
    assert result.eigenvectors.isfinite().all()
    assert result.residuals.isfinite().all()


@pytest.mark.parametrize("budget", [1, 4, 10])
def test_budget_that_is_too_small_is_an_outcome(budget: int) -> None:
    operator = Operator(spectra(N)["ten equal"])
    result = eigsh(operator, N, 5, max_matvecs=budget, dtype=torch.float64)
    assert result.outcome is Outcome.MAX_MATVECS
    assert result.num_matvecs == budget
    assert len(result.eigenvalues) == min(budget, 5)
    torch.testing.assert_close(result.residuals, operator.residuals(result))


@pytest.mark.parametrize("ncv", [None, 15])
def test_budget_that_ends_in_a_verification_leaves_the_converged_pairs(ncv: int | None) -> None:
    operator = Operator(spectra(N)["power law"])
    arguments: dict[str, Any] = {"seed": 4, "ncv": ncv, "dtype": torch.float64}
    plain = eigsh(operator, N, 10, verify="never", **arguments)
    for extra in range(3):
        result = eigsh(operator, N, 10, max_matvecs=plain.num_matvecs + extra, **arguments)
        assert result.outcome is Outcome.CONVERGED
        assert not result.verified
        torch.testing.assert_close(result.eigenvalues, plain.eigenvalues)
        assert (operator.residuals(result) <= 1.01 * operator.residuals(plain) + 1e-12).all()


def test_starting_vector_is_used() -> None:
    operator = Operator(spectra(N)["power law"])
    values, vectors = operator.wanted(5, "LA")
    result = eigsh(operator, N, 5, v0=vectors.sum(0), verify="never", dtype=torch.float64)
    assert result.num_matvecs == 5
    torch.testing.assert_close(result.eigenvalues, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_seed_same_bits_and_the_global_generator_is_left_alone(dtype: torch.dtype) -> None:
    operator = Operator(spectra(N)["ninefold"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = (eigsh(operator, N, 10, seed=seed, dtype=dtype) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert not torch.equal(first.eigenvectors, other.eigenvectors)


def test_default_device_and_dtype_do_not_matter() -> None:
    operator = Operator(spectra(N)["ninefold"])
    expected = eigsh(operator, N, 10)
    matrix = operator.dense()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            result = eigsh(lambda vector: (matrix @ vector.double()).float(), N, 10)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(result.eigenvalues, expected.eigenvalues, rtol=1e-5, atol=1e-5)


def test_progress_is_reported() -> None:
    calls: list[tuple[int, float]] = []
    result = eigsh(
        Operator(spectra(N)["power law"]), N, 5, on_matvec=lambda count, residual: calls.append((count, residual))
    )
    assert [count for count, _ in calls] == list(range(1, result.num_matvecs + 1))
    assert [residual for _, residual in calls[:4]] == [math.inf] * 4
    assert calls[-1][1] <= 1e-3


def test_operator_may_use_autograd() -> None:
    weights = torch.linspace(1, 2, 8)
    point = torch.ones(8, requires_grad=True)

    def hessian(vector: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((weights * point**3).sum() / 6, point, create_graph=True)
        (product,) = torch.autograd.grad(gradient @ vector, point, create_graph=True)
        return product

    result = eigsh(hessian, 8, 2)
    torch.testing.assert_close(result.eigenvalues, weights.flip(0)[:2].double(), rtol=0, atol=1e-3)
    assert not result.eigenvectors.requires_grad


WRONG = [
    ({"k": 0}, ValueError, "^k: expected"),
    ({"k": 9}, ValueError, "^k: expected .*dimension"),
    ({"k": 2.0}, TypeError, "^k: expected"),
    ({"n": -1}, ValueError, "^n: expected"),
    ({"which": "SM"}, ValueError, "^which: expected .*'SM'"),
    ({"tol": 0.0}, ValueError, "^tol: expected"),
    ({"tol": math.nan}, ValueError, "^tol: expected"),
    ({"subspace_tol": -1.0}, ValueError, "^subspace_tol: expected .*None"),
    ({"ncv": 4}, ValueError, "^ncv: expected .*k \\+ 3"),
    ({"max_matvecs": 0}, ValueError, "^max_matvecs: expected"),
    ({"verify": True}, ValueError, "^verify: expected"),
    ({"delta": 1.0}, ValueError, "^delta: expected"),
    ({"dtype": torch.bfloat16}, ValueError, "^dtype: expected .*bfloat16"),
    ({"dtype": torch.float16}, ValueError, "^dtype: expected .*float16"),
    ({"v0": torch.ones(7)}, ValueError, "^v0: expected .*\\(7,\\)"),
    ({"v0": torch.zeros(8)}, ValueError, "^v0: expected .*zero"),
    ({"v0": torch.full((8,), math.inf)}, ValueError, "^v0: expected .*finite"),
    ({"v0": [1.0] * 8}, TypeError, "^v0: expected .*list"),
    ({"all_sum": lambda local: local}, ValueError, "^random: expected"),
    ({"random": lambda seed, i: torch.ones(3)}, ValueError, "^random: expected"),
    ({"random": lambda seed, i: torch.ones(8), "matvec": lambda vector: vector}, ValueError, "^random: expected"),
    ({"dimension": 0}, ValueError, "^dimension: expected"),
    ({"matvec": lambda vector: vector[:3]}, ValueError, "^matvec: expected .*\\(3,\\)"),
    ({"matvec": lambda vector: 1.0}, TypeError, "^matvec: expected .*float"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), WRONG)
def test_wrong_arguments_are_named(arguments: dict[str, object], error: type[Exception], match: str) -> None:
    spectrum = torch.tensor([1.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    valid: dict[str, object] = {"matvec": lambda vector: spectrum * vector, "n": 8, "k": 2}
    with pytest.raises(error, match=match):
        eigsh(**(valid | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", Outcome)
def test_outcomes_are_sentences(outcome: Outcome) -> None:
    assert outcome.value.endswith(".")
    assert len(outcome.value) > 40


PINNED = {
    ("power law", "LA"): [30, 30, 32],
    ("outliers", "LA"): [17, 17, 18],
    ("indefinite", "LA"): [27, 28, 28],
    ("indefinite", "BE"): [34, 33, 32],
    ("indefinite", "LM"): [31, 31, 31],
    ("heavy tail", "LA"): [37, 38, 37],
    ("softmax model", "LA"): [32, 32, 32],
}


@pytest.mark.parametrize(("name", "which"), PINNED)
def test_number_of_products(name: str, which: Which) -> None:
    operator = Operator(spectra(1000)[name])
    results = [eigsh(operator, 1000, 10, which=which, seed=seed, dtype=torch.float64) for seed in range(3)]
    assert [result.num_matvecs for result in results] == PINNED[name, which]
