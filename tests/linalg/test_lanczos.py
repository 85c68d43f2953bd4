"""The factorisation keeps its identities, whatever is done to it."""

import math

import pytest
import torch
from torch import Tensor

from lightning_subspace.linalg import blocked as blockwise
from lightning_subspace.linalg.agreement import Agreement
from lightning_subspace.linalg.lanczos import Lanczos

from .spectra import Operator, normal, spectra

N = 300
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


def factorisation(
    operator: Operator,
    max_size: int = 20,
    dtype: torch.dtype = torch.float64,
    seed: int = 7,
    agreement: Agreement | None = None,
) -> Lanczos:
    lanczos = Lanczos(
        operator,
        operator.n,
        max_size,
        dimension=operator.n,
        dtype=dtype,
        device=torch.device("cpu"),
        agreement=agreement or Agreement(),
    )
    assert inject(lanczos, normal(operator.n, seed))
    return lanczos


def inject(lanczos: Lanczos, vector: Tensor) -> bool:
    return lanczos.inject(lambda: vector)


def expand(lanczos: Lanczos, count: int) -> None:
    for _ in range(count):
        assert lanczos.expand() is not None


def best_ritz_vectors(lanczos: Lanczos, count: int) -> Tensor:
    return lanczos.ritz()[1].flip(1)[:, :count]


def defect(operator: Operator, lanczos: Lanczos) -> float:
    """|A V - T V - b q|, relative to the norm of A."""
    rows = lanczos.vectors.double()
    image = operator.reflect(operator.reflect(rows) * operator.eigenvalues)
    rest = image - lanczos.projected @ rows
    if not lanczos.invariant:
        rest -= lanczos.coupling[:, None] * lanczos.pending.double()
    return float(rest.norm()) / operator.norm


def orthogonality(lanczos: Lanczos) -> float:
    """max |V V^T - I|, the pending vector included."""
    rows = lanczos.basis.whole(lanczos.size + (not lanczos.invariant)).double()
    return float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["power law", "indefinite", "ten equal, all negative", "heavy tail"])
def test_identities_hold_through_expansions_and_restarts(name: str, dtype: torch.dtype) -> None:
    operator = Operator(spectra(N)[name])
    lanczos = factorisation(operator, dtype=dtype)
    tolerance = 100 * EPS[dtype]
    for _ in range(6):
        expand(lanczos, 20 - lanczos.size)
        assert defect(operator, lanczos) < tolerance
        assert orthogonality(lanczos) < tolerance
        lanczos.contract(best_ritz_vectors(lanczos, 12))
        assert defect(operator, lanczos) < tolerance
        assert orthogonality(lanczos) < tolerance
    assert lanczos.asymmetry < tolerance * operator.norm


def test_projected_matrix_is_the_rayleigh_quotient_also_where_something_was_dropped() -> None:
    operator = Operator(spectra(N)["power law"])
    lanczos = factorisation(operator)
    expand(lanczos, 12)
    lanczos.contract(best_ritz_vectors(lanczos, 5))
    assert inject(lanczos, normal(N, 8))
    expand(lanczos, 10)
    lanczos.contract(best_ritz_vectors(lanczos, 9))
    expand(lanczos, 5)
    rows = lanczos.vectors
    expected = rows @ operator.dense() @ rows.T
    torch.testing.assert_close(lanczos.projected, expected, rtol=0, atol=1e-13 * operator.norm)


def test_dropped_residuals_are_the_only_defect_and_stay_in_the_estimates() -> None:
    operator = Operator(spectra(N)["power law"])
    lanczos = factorisation(operator)
    expand(lanczos, 12)
    lanczos.contract(best_ritz_vectors(lanczos, 5))
    dropped = float(lanczos.coupling.norm())
    assert inject(lanczos, normal(N, 8))
    expand(lanczos, 10)
    assert 1e-6 < defect(operator, lanczos) <= 1.0001 * dropped / operator.norm
    values, rotation = lanczos.ritz()
    reducible, estimates = lanczos.residuals(rotation)
    vectors = rotation.T @ lanczos.vectors
    true = (vectors @ operator.dense() - values[:, None] * vectors).norm(dim=1)
    assert (estimates >= reducible).all()
    # The directions of the two parts are not orthogonal; and what later vectors recovered makes the residual smaller.
    assert (true <= 2**0.5 * estimates + 1e-12).all()
    assert lanczos.asymmetry < 1e-12  # and is no asymmetry


def test_residual_estimates_are_the_residuals() -> None:
    operator = Operator(spectra(N)["indefinite"])
    lanczos = factorisation(operator)
    expand(lanczos, 20)
    lanczos.contract(best_ritz_vectors(lanczos, 10))
    expand(lanczos, 6)
    values, rotation = lanczos.ritz()
    vectors = rotation.T @ lanczos.vectors
    true = (vectors @ operator.dense() - values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(lanczos.residuals(rotation)[1], true, rtol=1e-6, atol=1e-13 * operator.norm)


def test_basis_closes_on_an_invariant_subspace() -> None:
    lanczos = factorisation(Operator(spectra(N)["rank five"]))
    expand(lanczos, 6)  # five eigenvectors and the component in the null space
    assert lanczos.invariant
    torch.testing.assert_close(lanczos.ritz()[0][1:], torch.arange(1.0, 6.0, dtype=torch.float64))
    assert not lanczos.coupling.any()


def test_whole_space_is_invariant() -> None:
    operator = Operator(normal(6, 0))
    lanczos = factorisation(operator, max_size=6)
    expand(lanczos, 6)
    assert lanczos.invariant
    torch.testing.assert_close(lanczos.ritz()[0], operator.eigenvalues.sort()[0])


def test_image_that_is_not_finite_leaves_the_factorisation_as_it_was() -> None:
    operator = Operator(spectra(N)["power law"])
    lanczos = factorisation(operator)
    expand(lanczos, 5)
    before = lanczos.projected.clone(), lanczos.coupling.clone()
    lanczos._matvec = lambda vector: vector / 0
    assert lanczos.expand() is None
    torch.testing.assert_close((lanczos.projected, lanczos.coupling), before, rtol=0, atol=0)
    assert defect(operator, lanczos) < 1e-13


def test_vectors_in_the_span_of_the_basis_are_refused() -> None:
    lanczos = factorisation(Operator(spectra(N)["power law"]))
    expand(lanczos, 5)
    assert not inject(lanczos, lanczos.vectors.sum(0))
    assert not inject(lanczos, torch.zeros(N))
    assert inject(lanczos, lanczos.vectors.sum(0) + 1e-8 * normal(N, 3))
    assert orthogonality(lanczos) < 1e-13


def test_vector_that_is_not_finite_is_the_end() -> None:
    lanczos = factorisation(Operator(spectra(N)["power law"]))
    assert lanczos.agreement.finite
    assert inject(lanczos, torch.full((N,), math.nan))  # as far as is known
    assert not lanczos.agreement.finite


def test_asymmetry_is_measured() -> None:
    operator = Operator(spectra(N)["power law"])
    skew = torch.zeros(N, N, dtype=torch.float64)
    skew[0, 1], skew[1, 0] = 0.1, -0.1
    lanczos = factorisation(operator)
    lanczos._matvec = lambda vector: operator(vector) + skew @ vector
    expand(lanczos, 10)
    assert 1e-4 < lanczos.asymmetry <= 0.2


def test_basis_is_rotated_in_place_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(spectra(N)["power law"])
    whole, blocked = factorisation(operator), factorisation(operator)
    expand(whole, 15)
    expand(blocked, 15)
    rotation = best_ritz_vectors(whole, 8)
    address = blocked.vectors.data_ptr()
    whole.contract(rotation)
    monkeypatch.setattr(blockwise, "_CHUNK", 7)
    blocked.contract(rotation)
    assert blocked.vectors.data_ptr() == address
    torch.testing.assert_close(blocked.vectors, whole.vectors, rtol=0, atol=1e-15)


def test_rotated_vectors_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lanczos = factorisation(Operator(spectra(N)["power law"]))
    expand(lanczos, 15)
    rotation = best_ritz_vectors(lanczos, 8)
    rotation[:, 0] *= 2.0
    before = lanczos.vectors.clone()
    expected = rotation.T @ lanczos.vectors
    for chunk in (7, N):
        monkeypatch.setattr(blockwise, "_CHUNK", chunk)
        vectors, gram = lanczos.rotated(rotation)
        torch.testing.assert_close(lanczos.vectors, before, rtol=0, atol=0)
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-15)
        torch.testing.assert_close(gram, expected @ expected.T, rtol=0, atol=1e-14)


def test_one_reduction_for_each_pass() -> None:
    operator = Operator(spectra(N)["power law"])
    sizes: list[int] = []

    def all_sum(local: Tensor) -> Tensor:
        assert local.dtype == torch.float64
        sizes.append(local.numel())
        return local

    lanczos = factorisation(operator, max_size=10, agreement=Agreement(all_sum))
    sizes.clear()
    for m in range(1, 9):
        lanczos.expand()
        assert sizes == [min(m, 2), m + 1]  # first the vectors that the image is coupled to, then all
        sizes.clear()


def test_autocast_and_low_matmul_precision_do_not_reach_the_basis() -> None:
    operator = Operator(spectra(N)["power law"])
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lanczos = factorisation(operator, dtype=torch.float32)
            expand(lanczos, 20)
            lanczos.contract(best_ritz_vectors(lanczos, 12))
            expand(lanczos, 8)
            deviation = lanczos.rotated(torch.eye(20, dtype=torch.float64))[1] - torch.eye(20)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert float(deviation.abs().max()) < 1e-6
    assert orthogonality(lanczos) < 1e-6
