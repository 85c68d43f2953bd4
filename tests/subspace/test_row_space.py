"""Orthonormal rows of a given space, against the singular value decomposition, on one rank and on three."""

import re

import pytest
import torch

from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks, world
from lightning_subspace.subspace.row_space import RANK_TOLERANCE, orthonormal_rows
from tests.processes import run

F64 = torch.float64


def rows_of(singular_values, n=40, seed=0):
    """Rows with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    m = len(singular_values)
    left = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=F64)).Q
    right = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=F64)).Q
    return left @ torch.diag(torch.tensor(singular_values, dtype=F64)) @ right.T, right.T


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 2e-6])
def test_it_is_the_space_of_the_singular_value_decomposition(smallest):
    rows, right = rows_of([3.0, 1.0, 10 * smallest, 3 * smallest])
    found = orthonormal_rows(rows)
    assert float((found @ found.T - torch.eye(4, dtype=F64)).abs().max()) < 1e-14
    # as exact as any method: rounding of the rows, over the smallest singular value
    assert float((found.T @ found - right.T @ right).abs().max()) < 1e-15 / smallest


def test_what_is_shorter_than_the_tolerance_is_left_out():
    rows, right = rows_of([5.0, 1.0, 5 * 0.5 * RANK_TOLERANCE])
    found = orthonormal_rows(rows)
    assert found.shape == (2, 40)
    assert float((found.T @ found - right[:2].T @ right[:2]).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_equal_rows_count_once(dtype):
    rows = rows_of([3.0, 2.0, 1.0])[0].to(dtype)
    once, twice = orthonormal_rows(rows), orthonormal_rows(torch.cat([rows, rows * 7.0, rows[:1] + rows[1:2]]))
    assert once.dtype == twice.dtype == dtype
    assert once.shape == twice.shape
    tolerance = 1e-12 if dtype == F64 else 1e-5
    assert float((once.T @ once - twice.T @ twice).abs().max()) < tolerance


@pytest.mark.parametrize("rows", [torch.zeros(3, 8), torch.zeros(0, 8)])
def test_rows_of_nothing_span_nothing(rows):
    assert orthonormal_rows(rows).shape == (0, 8)


WRONG = {
    "all": (torch.eye(8), "basis: expected fewer rows than the 8 parameters, got 8;"),
    "more": (torch.ones(9, 8), "basis: expected fewer rows than the 8 parameters, got 9;"),
    "nan": (torch.full((1, 8), torch.nan), "basis: expected finite numbers, got nan or infinity."),
    "infinite": (torch.full((1, 8), torch.inf), "basis: expected finite numbers"),
    "flat": (torch.ones(8), "basis: expected a real tensor of shape (m, n), got torch.float32 of shape (8,)"),
    "complex": (torch.ones(2, 8, dtype=torch.complex64), "basis: expected a real tensor of shape (m, n)"),
}


@pytest.mark.parametrize(("rows", "words"), WRONG.values(), ids=WRONG)
def test_what_spans_no_part_of_the_space_is_refused(rows, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        orthonormal_rows(rows, name="basis")


def test_three_ranks_find_the_parts_of_one():
    whole, _ = rows_of([3.0, 1.0, 1e-4, 3.0, 1e-9], n=41)
    alone = orthonormal_rows(whole)

    def ranked():
        ranks = Ranks(world())
        partition = Partition.even(ParameterSpace.of(torch.nn.Linear(40, 1)), ranks)
        found = orthonormal_rows(partition.cut(whole), 41, ranks)
        with pytest.raises(ValueError, match="expected finite numbers"):
            orthonormal_rows(partition.cut(whole) * (torch.nan if ranks.index == 1 else 1.0), 41, ranks)
        return torch.stack([partition.gather(row) for row in found]).numpy()

    for found in map(torch.from_numpy, run(ranked, 3)):
        assert found.shape == alone.shape
        # signs are those of the Gram matrix, which is summed in another order
        assert float((found.T @ found - alone.T @ alone).abs().max()) < 1e-11
