"""Fractions, overlaps and angles against dense projectors and scipy; what is refused, and when a space is trusted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_subspace.linalg import EigshResult, Outcome, eigsh
from lightning_subspace.subspace import subspace as subspace_module
from lightning_subspace.subspace.subspace import (
    Subspace,
    SubspaceIntegrityError,
    fraction,
    inner_products,
    orthonormality_defect,
    overlap,
    principal_angles,
)
from tests.thorough import how_many

EPS = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps

seeded = settings(max_examples=how_many(15, thorough=40), deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 6), st.integers(0, 24)).map(lambda t: (t[0], t[0] + t[1]))  # k <= n


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthonormal(k, n, seed=0):
    """(k, n) orthonormal rows, uniformly random."""
    return torch.linalg.qr(normal(n, k, seed=seed))[0].T.contiguous()


def rotation(k, seed=0):
    return orthonormal(k, k, seed=seed)


def projector(basis):
    return basis.T @ basis


def at_angles(angles, n, seed=0):
    """Two bases of spaces with these principal angles, each in a random basis of its space."""
    angles = torch.as_tensor(angles, dtype=torch.float64)
    k = len(angles)
    frame = orthonormal(2 * k, n, seed)
    other = angles.cos()[:, None] * frame[:k] + angles.sin()[:, None] * frame[k:]
    return rotation(k, seed + 1) @ frame[:k], rotation(k, seed + 2) @ other


def subspace(basis, **changes):
    k = len(basis)
    values = {
        "eigenvalues": torch.arange(k, 0, -1, dtype=torch.float64),
        "eigenvectors": basis,
        "residuals": torch.zeros(k, dtype=torch.float64),
        "next_eigenvalue": 0.5,
        "error": 0.0,
        "outcome": Outcome.CONVERGED,
        "verified": True,
        "num_matvecs": 20,
    }
    return Subspace(**(values | changes))


def taken_over(basis):
    """The subspace of what an eigensolver returned."""
    k = len(basis)
    values, residuals = torch.arange(k, 0, -1, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    return Subspace.of(
        EigshResult(
            eigenvalues=values,
            eigenvectors=basis,
            residuals=residuals,
            outcome=Outcome.CONVERGED,
            verified=True,
            num_matvecs=20,
            num_restarts=0,
            orthogonality=0.0,
            asymmetry=0.0,
            scale=float(k),
            next_eigenvalue=0.5,
            next_residual=0.0,
            gap=0.5,
        )
    )


# fraction


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 7), (3, 7), (7, 7), (10, 500)])
def test_fraction_is_the_dense_projection(k, n):
    basis, v = orthonormal(k, n), normal(n, seed=1)
    dense = (projector(basis) @ v).square().sum() / v.square().sum()
    assert fraction(basis, v) == pytest.approx(float(dense), abs=8 * n * EPS)


@seeded
@given(shape=shapes, seed=seeds, scale=st.floats(-100, 100))
def test_fraction_depends_on_the_space_and_the_direction_alone(shape, seed, scale):
    k, n = shape
    basis, v = orthonormal(k, n, seed), normal(n, seed=seed + 1)
    expected = fraction(basis, v)
    assert 0.0 <= expected <= 1.0
    assert fraction(rotation(k, seed + 2) @ basis, -(10.0**scale) * v) == pytest.approx(expected, abs=32 * n * EPS)


@seeded
@given(shape=shapes, seed=seeds)
def test_fractions_of_complementary_spaces_add_to_one(shape, seed):
    k, n = shape
    frame, v = orthonormal(n, n, seed), normal(n, seed=seed + 1)
    assert fraction(frame[:k], v) + fraction(frame[k:], v) == pytest.approx(1.0, abs=32 * n * EPS)


def test_fraction_is_one_inside_and_zero_outside():
    frame = torch.eye(6, dtype=torch.float64)
    inside = torch.tensor([3.0, -2.0, 0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert fraction(frame[:3], inside) == pytest.approx(1.0, abs=4 * EPS)
    assert fraction(frame[3:], inside) == 0.0
    assert fraction(frame[:1], 1e-3 * frame[0]) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_fraction_of_a_vector_inside_never_exceeds_one(seed):
    basis = orthonormal(10, 3000, seed).float()
    inside = normal(10, seed=seed).float() @ basis
    assert 1.0 - 64 * EPS32 < fraction(basis, inside) <= 1.0


def test_fraction_of_random_vectors_is_k_over_n_on_average():
    """It is Beta(k/2, (n-k)/2) distributed."""
    k, n, draws = 5, 40, 400
    basis = orthonormal(k, n)
    values = torch.tensor([fraction(basis, v) for v in normal(draws, n, seed=1)])
    deviation = math.sqrt(2 * k * (n - k) / (n * n * (n + 2)))
    assert float(values.mean()) == pytest.approx(k / n, abs=4 * deviation / math.sqrt(draws))
    assert float(values.std()) == pytest.approx(deviation, rel=0.2)


def test_fraction_of_zero_is_nan():
    assert math.isnan(fraction(orthonormal(2, 5), torch.zeros(5, dtype=torch.float64)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_fraction_of_a_vector_that_is_not_finite_is_nan(bad):
    """A diverged gradient is no sign of a bad basis."""
    assert math.isnan(fraction(orthonormal(2, 5), torch.tensor([bad, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1.0, 1e25])
def test_fraction_of_tiny_and_huge_gradients_in_float32(scale):
    """Squares of 1e-25 underflow in float32, of 1e25 overflow; 1e-40 is subnormal and has 17 bits left."""
    basis, v = orthonormal(4, 1000).float(), normal(1000, seed=1).float()
    rounding = 2.0**-14 if scale < 1e-38 else 16 * EPS32
    assert fraction(basis, v * scale) == pytest.approx(fraction(basis, v), rel=rounding)


def test_fraction_is_stable_under_a_small_error_of_the_space():
    """|v^T (P - P') v| <= sin(largest angle) |v|^2: what `TRUSTED_ERROR` relies on."""
    for seed in range(20):
        basis, other = at_angles([0.01, 0.03, 0.1], 30, seed)
        v = normal(30, seed=seed + 100) + 3 * normal(3, seed=seed + 200) @ basis
        assert abs(fraction(basis, v) - fraction(other, v)) <= math.sin(0.1)
        third = orthonormal(3, 30, seed + 300)
        assert abs(overlap(basis, third) - overlap(other, third)) <= math.sin(0.1)


def test_autocast_and_matmul_precision_do_not_reach_the_numbers():
    basis, v = orthonormal(4, 2000).float(), normal(2000, seed=1).float()
    expected = fraction(basis, v), overlap(basis, basis.flip(1)), orthonormality_defect(basis)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (basis @ basis.T).dtype == torch.bfloat16
            assert (fraction(basis, v), overlap(basis, basis.flip(1)), orthonormality_defect(basis)) == expected
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("block", [1, 7, 64, 100])
def test_blocks_do_not_change_inner_products(monkeypatch, block):
    a, b = normal(3, 64), normal(5, 64, seed=1)
    monkeypatch.setattr(subspace_module, "WIDENED_AT_ONCE", block)
    torch.testing.assert_close(inner_products(a, b), a @ b.T, rtol=0, atol=256 * EPS)


# overlap


@pytest.mark.parametrize(("k", "n"), [(1, 4), (3, 9), (9, 9)])
def test_overlap_is_the_trace_of_the_product_of_projectors(k, n):
    a, b = orthonormal(k, n), orthonormal(k, n, seed=1)
    dense = float(torch.trace(projector(a) @ projector(b))) / k
    assert overlap(a, b) == pytest.approx(dense, abs=8 * n * EPS)


@seeded
@given(shape=shapes, seed=seeds)
def test_overlap_is_symmetric_invariant_and_the_mean_squared_cosine(shape, seed):
    k, n = shape
    a, b = orthonormal(k, n, seed), orthonormal(k, n, seed + 1)
    value = overlap(a, b)
    assert 0.0 <= value <= 1.0
    assert overlap(b, a) == pytest.approx(value, abs=8 * n * EPS)
    assert overlap(rotation(k, seed + 2) @ a, rotation(k, seed + 3) @ b) == pytest.approx(value, abs=32 * n * EPS)
    cosines = principal_angles(a, b).cos()
    assert value == pytest.approx(float(cosines.square().mean()), abs=32 * n * EPS)


def test_overlap_is_one_for_equal_and_zero_for_orthogonal_spaces():
    frame = orthonormal(8, 20)
    assert overlap(frame[:4], rotation(4) @ frame[:4]) == pytest.approx(1.0, abs=64 * EPS)
    assert overlap(frame[:4], frame[4:]) == pytest.approx(0.0, abs=64 * EPS)


def test_overlap_is_the_mean_fraction_of_one_basis_in_the_other_space():
    """The middle form of equation 4 of the paper."""
    a, b = orthonormal(3, 12), orthonormal(3, 12, seed=1)
    assert overlap(a, b) == pytest.approx(sum(fraction(a, v) for v in b) / 3, abs=64 * EPS)


def test_overlap_of_random_spaces_is_k_over_n_on_average():
    k, n, draws = 4, 30, 300
    values = torch.tensor([overlap(orthonormal(k, n, 2 * s), orthonormal(k, n, 2 * s + 1)) for s in range(draws)])
    assert float(values.mean()) == pytest.approx(k / n, abs=4 * float(values.std()) / math.sqrt(draws))


def test_overlap_of_different_dimensions_divides_by_the_smaller_one():
    frame = orthonormal(6, 15)
    assert overlap(frame[:2], frame) == pytest.approx(1.0, abs=64 * EPS)
    assert overlap(frame, frame[:2]) == pytest.approx(1.0, abs=64 * EPS)
    assert overlap(frame[:4], frame[3:]) == pytest.approx(1 / 3, abs=64 * EPS)


def test_overlap_takes_bases_of_different_dtypes():
    a, b = orthonormal(3, 50), orthonormal(3, 50, seed=1)
    assert overlap(a.float(), b) == pytest.approx(overlap(a, b), abs=16 * EPS32)
    assert overlap(a, b.float()) == pytest.approx(overlap(a, b), abs=16 * EPS32)


# principal angles


@seeded
@given(shape=shapes, seed=seeds, data=st.data())
def test_principal_angles_are_those_of_scipy(shape, seed, data):
    k, n = shape
    m = data.draw(st.integers(1, n))
    a, b = orthonormal(k, n, seed), orthonormal(m, n, seed + 1)
    angles = principal_angles(a, b)
    expected = np.sort(scipy.linalg.subspace_angles(a.T.numpy(), b.T.numpy()))
    assert angles.dtype == torch.float64
    assert angles.shape == (min(k, m),)
    assert bool((angles.diff() >= -32 * n * EPS).all())
    assert bool(((angles >= 0) & (angles <= math.pi / 2)).all())
    # scipy chooses sine or cosine by the cosine of the opposite angle (its mask is not reversed), so where large and
    # small angles meet it has the rounding of an arccosine near 0. Accuracy itself is tested below.
    condition = torch.minimum(angles.sin(), angles.cos()).clamp(min=math.sqrt(EPS)).numpy()
    assert bool((np.abs(angles.numpy() - expected) <= 64 * n * EPS / condition).all())


@pytest.mark.parametrize(
    "angles",
    [
        [1e-9],
        [0.0, 1e-12, 1e-9, 1e-3, 0.7, math.pi / 4, 0.9, 1.5, math.pi / 2],
        [math.pi / 2 - 1e-9, math.pi / 2],
        [math.pi / 4 - 1e-12, math.pi / 4, math.pi / 4 + 1e-12],
        [0.3, 0.3, 0.3],
    ],
)
def test_principal_angles_are_accurate_from_zero_to_a_right_angle(angles):
    a, b = at_angles(angles, 40)
    expected = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(principal_angles(a, b), expected, rtol=0, atol=128 * EPS)
    torch.testing.assert_close(principal_angles(b, a), expected, rtol=0, atol=128 * EPS)


def test_tiny_angles_of_different_dimensions():
    """Two tiny angles and a right one, next to directions of the larger space that have no partner."""
    frame = orthonormal(9, 25)
    tiny = torch.tensor([1e-9, 1e-7], dtype=torch.float64)
    small = torch.cat([tiny.cos()[:, None] * frame[:2] + tiny.sin()[:, None] * frame[6:8], frame[8:]])
    large = rotation(6) @ frame[:6]
    expected = torch.tensor([1e-9, 1e-7, math.pi / 2], dtype=torch.float64)
    for angles in (principal_angles(small, large), principal_angles(large, rotation(3) @ small)):
        torch.testing.assert_close(angles, expected, rtol=0, atol=128 * EPS)
        torch.testing.assert_close(angles[:2], tiny, rtol=1e-5, atol=0)


def test_angles_to_the_whole_space_are_zero():
    """No room for sines: more rows than columns in what is left outside."""
    angles = principal_angles(orthonormal(3, 3), orthonormal(2, 3, seed=1))
    torch.testing.assert_close(angles, torch.zeros(2, dtype=torch.float64), rtol=0, atol=16 * EPS)


def test_spaces_that_must_intersect_do():
    """As many as k + m - n angles are zero."""
    angles = principal_angles(orthonormal(4, 5), orthonormal(3, 5, seed=1))
    torch.testing.assert_close(angles[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=32 * EPS)
    assert float(angles[2]) > 0.01


def test_principal_angles_do_not_depend_on_the_bases():
    a, b = at_angles([0.1, 0.5, 1.2], 20)
    rotated = principal_angles(rotation(3, 7) @ a, rotation(3, 8) @ b)
    torch.testing.assert_close(rotated, principal_angles(a, b), rtol=0, atol=64 * EPS)


# integrity


@pytest.mark.parametrize("k", [1, 3])
def test_a_basis_that_is_not_orthonormal_is_refused(k):
    basis = orthonormal(k, 8)
    for bad in (1.001 * basis, 0.999 * basis, torch.full_like(basis, math.nan), torch.zeros_like(basis)):
        with pytest.raises(SubspaceIntegrityError, match="orthonormal"):
            taken_over(bad)


def test_parallel_rows_are_refused():
    basis = orthonormal(1, 8)
    with pytest.raises(SubspaceIntegrityError, match=r"max\|V V\^T - I\| = 1\.0e\+00, at most 1e-04"):
        taken_over(basis.expand(2, 8))


@pytest.mark.parametrize(("defect", "accepted"), [(0.0, True), (0.9e-4, True), (1.1e-4, False)])
def test_the_limit_of_orthonormality(defect, accepted):
    basis = orthonormal(3, 8) * math.sqrt(1.0 + defect)
    assert orthonormality_defect(basis) == pytest.approx(defect, abs=16 * EPS)
    if accepted:
        assert taken_over(basis).basis is basis
    else:
        with pytest.raises(SubspaceIntegrityError):
            taken_over(basis)


def test_rounding_of_a_float32_basis_is_far_from_the_limit():
    basis = orthonormal(10, 100_000).float()
    assert orthonormality_defect(basis) < 4 * EPS32


def test_a_fraction_above_one_raises_and_rounding_is_clamped():
    basis = orthonormal(2, 8)
    inside = basis.sum(0)
    with pytest.raises(SubspaceIntegrityError, match=r"fraction: expected a number in \[0, 1\]"):
        fraction(1.01 * basis, inside)
    with pytest.raises(SubspaceIntegrityError, match=r"fraction: expected a number in \[0, 1\]"):
        fraction(math.sqrt(1 + 1.1e-5) * basis, inside)
    assert fraction(math.sqrt(1 + 0.9e-5) * basis, inside) == 1.0


def test_an_overlap_above_one_raises_and_rounding_is_clamped():
    basis = orthonormal(2, 8)
    with pytest.raises(SubspaceIntegrityError, match=r"overlap: expected a number in \[0, 1\]"):
        overlap(1.01 * basis, basis)
    assert overlap(math.sqrt(1 + 0.9e-5) * basis, basis) == 1.0


def test_a_basis_with_nan_raises():
    basis = orthonormal(2, 8)
    bad = basis.clone()
    bad[0, 0] = math.nan
    with pytest.raises(SubspaceIntegrityError):
        fraction(bad, basis[0])
    with pytest.raises(SubspaceIntegrityError):
        overlap(basis, bad)


# Subspace


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize(
    ("error", "small"), [(0.0, True), (0.1, True), (0.1001, False), (math.inf, False), (math.nan, False)]
)
def test_a_space_is_trusted_when_the_solver_converged_and_the_error_is_small(outcome, error, small):
    space = subspace(orthonormal(2, 8), outcome=outcome, error=error)
    assert space.converged == (outcome.name in {"CONVERGED", "EXACT"})
    assert space.trusted == (space.converged and small)
    assert ("left out" in space.verdict) == (not space.trusted)
    assert (outcome.value in space.verdict) == (space.trusted or not space.converged)


def test_of_takes_over_what_the_solver_found():
    values = torch.tensor([9.0, 7.0, 5.0, 1.0, *[0.5] * 8, -3.0], dtype=torch.float64)
    frame = orthonormal(13, 13)
    matrix = frame.T @ (values[:, None] * frame)
    result = eigsh(lambda v: matrix @ v, 13, 3, dtype=torch.float64)
    space = Subspace.of(result)
    assert space.k == 3
    assert space.trusted
    assert space.verified
    assert space.num_matvecs == result.num_matvecs
    assert space.error == result.subspace_error
    assert space.next_eigenvalue == result.next_eigenvalue
    assert overlap(space.basis, frame[:3]) > 1 - space.error**2 - 64 * EPS
    residuals = (space.basis @ matrix - space.eigenvalues[:, None] * space.basis).norm(dim=1)
    torch.testing.assert_close(space.residuals, residuals, rtol=1e-3, atol=256 * EPS)
    torch.testing.assert_close(space.eigenvalues, values[:3], rtol=0, atol=float(residuals.max()) + 64 * EPS)


def test_without_eigenvectors_keeps_the_numbers():
    space = subspace(orthonormal(2, 8), error=0.02)
    bare = space.without_eigenvectors()
    assert bare.eigenvectors is None
    assert (bare.k, bare.trusted, bare.error) == (2, True, 0.02)
    assert bare.eigenvalues is space.eigenvalues
    assert space.eigenvectors is not None
    with pytest.raises(ValueError, match=r"eigenvectors: expected .* they were dropped"):
        _ = bare.basis


def test_subspaces_are_compared_by_identity():
    """Comparing tensors has no truth value."""
    space = subspace(orthonormal(2, 8))
    assert space == space
    assert space != replace(space)
    assert len({space, replace(space)}) == 2


# what a terminal shows


def test_a_result_of_the_eigensolver_is_one_line_without_eigenvectors():
    found = eigsh(lambda v: torch.arange(100.0) * v, 100, k=2)
    line = repr(found)
    assert line.startswith("EigshResult(eigenvalues=[99, 98], eigenvectors=float32 of shape (2, 100), residuals=[")
    assert ", outcome=CONVERGED, " in line
    assert "\n" not in line
