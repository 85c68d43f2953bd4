"""Left singular space of one matrix, and numbers of its spectrum.

The space is that of the shorter side. Where this is at most `EXACT_SIDE` long, it comes from the eigenvectors of G G^T
in float64; otherwise from randomised block Krylov iteration (Musco and Musco 2015, arXiv 1504.05477, algorithm 2) that
starts at an earlier space of the same matrix where there is one: it moves slowly, so that few passes are enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 1024  # up to here eigh takes a second at most on one core
OVERSAMPLING = 8  # columns beside the r that are wanted
COLD_PASSES = 6  # from a random start; sigma_1 of a Gaussian matrix, which has no gap, is then right to 1 %
WARM_PASSES = 2


@dataclass(frozen=True, eq=False)
class LeftSpace:
    """First r left singular vectors of a matrix, with its spectrum.

    Attributes:
        basis: (m, r), orthonormal columns; zeros for a matrix of zeros or one that is not finite.
        energy: sum_{i<=r} s_i^2 / sum s_i^2, in [0, 1].
        stable_rank: |G|_F^2 / s_1^2, from 1 to m.
        effective_rank: exp of the entropy of s_i^2 / sum s^2, from 1 to m; nan for a large matrix, whose singular
            values are not all known.
        norm: s_1.
    """

    basis: Tensor
    energy: float
    stable_rank: float
    effective_rank: float
    norm: float

    @classmethod
    def of(cls, matrix: Tensor, rank: int, start: Tensor | None = None, exact_side: int = EXACT_SIDE) -> LeftSpace:
        """The space of a matrix, (m, c) with m <= c.

        Args:
            matrix: any; it is taken in float64.
            rank: r; m where that is smaller.
            start: (m, any), a space that may be near, for a large matrix.
            exact_side: the largest m of a matrix that is decomposed wholly.

        Example:
            >>> found = LeftSpace.of(torch.outer(torch.ones(3), torch.arange(4.0)), rank=2)
            >>> round(found.energy, 9), round(found.stable_rank, 9), round(found.effective_rank, 6)
            (1.0, 1.0, 1.0)
        """
        device = "cpu" if matrix.device.type == "mps" else matrix.device  # which has no float64
        wide = matrix.to(device, torch.float64)
        m, r = len(wide), min(rank, len(wide))
        total = float(wide.square().sum())
        if not 0.0 < total < math.inf:
            return cls(wide.new_zeros(m, r), math.nan, math.nan, math.nan, 0.0 if total == 0.0 else math.nan)
        if m <= exact_side:
            squares, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending
            squares = squares.clamp(min=0.0).flip(0)
            shares = squares / squares.sum()
            effective = float(torch.special.entr(shares).sum().exp())
            basis = vectors.flip(1)[:, :r].contiguous()
        else:
            squares, basis = _leading(wide, r, start)
            effective = math.nan
        energy = min(float(squares[:r].sum()) / total, 1.0)
        return cls(basis, energy, max(total / float(squares[0]), 1.0), effective, math.sqrt(float(squares[0])))


def space_overlap(one: Tensor, other: Tensor) -> float:  # (m, r), (m, r)
    """|U^T U'|_F^2 / r of orthonormal columns, in [0, 1].

    r/m for random spaces; nan where one of them is zeros.

    Example:
        >>> space_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        0.5
    """
    first, second = one.double(), other.to(one.device).double()
    if not first.any() or not second.any():
        return math.nan
    return min(float((first.T @ second).square().sum()) / first.shape[1], 1.0)


def _leading(matrix: Tensor, r: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The r largest squared singular values, and their left vectors (m, r)."""
    m = len(matrix)
    columns = min(m, r + OVERSAMPLING)
    generator = torch.Generator().manual_seed(0)  # the same at each probe, and on any rank
    fresh = torch.randn(m, columns, generator=generator, dtype=torch.float64).to(matrix.device)
    is_warm = start is not None and bool(start.any())
    if is_warm and start is not None:
        fresh[:, : start.shape[1]] = start.to(fresh)[:, :columns]
    blocks = [torch.linalg.qr(fresh)[0]]
    for _ in range(WARM_PASSES if is_warm else COLD_PASSES):
        blocks.append(torch.linalg.qr(matrix @ (matrix.T @ blocks[-1]))[0])
    basis = torch.linalg.qr(torch.cat(blocks, dim=1))[0]
    inside = basis.T @ matrix
    squares, vectors = torch.linalg.eigh(inside @ inside.T)
    return squares.flip(0)[:r].clamp(min=0.0), (basis @ vectors.flip(1)[:, :r]).contiguous()
