"""Orthonormal basis of the space that rows span, dealt to ranks.

The right singular vectors of A (m, n) by its Gram matrix: A A^T = U S^2 U^T, V = S^-1 U^T A. Only m x m numbers are
summed over ranks, each of which has its own columns of A and of V. One pass leaves V V^T - I as large as eps (s_1/s)^2,
with s the smallest singular value kept, so a second one follows; two are as good as a singular value decomposition
(Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015, on CholeskyQR2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace._arguments import require_shape, wrong
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.subspace.subspace import WIDENED_AT_ONCE, inner_products

# Singular values below this share of the largest are none. Two equal rows in float32 leave 6e-8, and the square, 1e-12,
# is still far above the rounding of a Gram matrix in float64.
RANK_TOLERANCE = 1e-6


def orthonormal_rows(
    rows: Tensor,  # (m, n)
    n: int | None = None,
    ranks: Ranks | None = None,
    *,
    name: str = "rows",
) -> Tensor:  # (r, n)
    """Orthonormal rows that span the same space, r <= m of them.

    A collective. Rows of zeros give none, equal ones give one. The space is that of the rows as they are: one that is
    shorter than 1e-6 of the largest singular value counts for nothing.

    Args:
        rows: m vectors; under ranks this rank's columns of them.
        n: number of columns of all ranks together; None: there are no others.
        ranks: the process group; None: this process alone.
        name: of the user's argument, for errors.

    Returns:
        In the type of the rows, by falling singular value.

    Raises:
        ValueError: for m >= n, where everything may lie in the space, and for a number that is not finite.

    Example:
        >>> orthonormal_rows(torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])).abs()
        tensor([[1., 0., 0.]])
    """  # noqa: DOC501  # `wrong` makes one
    ranks = Ranks() if ranks is None else ranks
    require_shape(name, rows, ["m", "n"], "basis vectors are rows")
    m, n = len(rows), rows.shape[1] if n is None else n
    if m >= n:
        raise wrong(name, f"fewer rows than the {n} parameters", m, "that many may span the whole space")
    if not all(ranks.all_gather_object(bool(rows.isfinite().all()))):
        raise ValueError(f"{name}: expected finite numbers, got nan or infinity.")
    for _ in range(2):
        rows = _combined(_whitening(inner_products(rows, rows, ranks), ranks), rows)
    return rows


def _whitening(gram: Tensor, ranks: Ranks) -> Tensor:  # (m, m) -> (r, m)
    """S^-1 U^T of the singular values that count; the first rank's."""
    squares, vectors = torch.linalg.eigh(gram.cpu())  # ascending
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > RANK_TOLERANCE**2 * squares[:1].clamp(min=0.0)
    found: Tensor = (vectors[:, kept] / squares[kept].sqrt()).T.contiguous()
    return ranks.broadcast_object(found)  # processors differ in signs, and in what is just above the tolerance


def _combined(coefficients: Tensor, rows: Tensor) -> Tensor:  # (r, m), (m, n) -> (r, n)
    """Linear combinations of rows, summed in float64, a block at a time."""
    out = rows.new_empty(len(coefficients), rows.shape[1])
    wide = coefficients.to(rows.device)
    for start in range(0, rows.shape[1], WIDENED_AT_ONCE):
        block = slice(start, start + WIDENED_AT_ONCE)
        out[:, block] = wide @ rows[:, block].double()
    return out
