"""Norm of Muon's steps: the largest singular value over all matrices.

|d| = max_l |d_l|_op / s_l for the weight matrices l with scales s_l. Its dual is |v|_* = sum_l s_l |v_l|_nuc, and the
vector of unit length with the largest inner product with v is lmo(v)_l = s_l polar(v_l) (Crawshaw et al., "An
Exploration of Non-Euclidean Gradient Descent"). Other parameters are not moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Adjustment = Literal["original", "match_rms_adamw", "spectral_unclamped"]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix among the coordinates.

    Attributes:
        start: its first coordinate.
        shape: rows and columns.
        scale: s_l; a matrix of scale 0 is not moved.
    """

    start: int
    shape: tuple[int, int]
    scale: float

    def of(self, whole: Tensor) -> Tensor:  # (n,) to (rows, columns), a view
        """Its entries of a whole vector."""
        return whole[self.start : self.start + self.shape[0] * self.shape[1]].view(self.shape)


@dataclass(frozen=True)
class SpectralNorm:
    """max_l |d_l|_op / s_l over some matrices, on whole vectors (n,).

    Example:
        >>> norm = SpectralNorm((Matrix(0, (2, 2), 1.0),))
        >>> vector = torch.tensor([3.0, 0.0, 0.0, -4.0, 9.0])
        >>> norm.dual(vector), norm.best(vector).tolist()
        (7.0, [1.0, 0.0, 0.0, -1.0, 0.0])
    """

    matrices: tuple[Matrix, ...]

    def dual(self, whole: Tensor) -> float:
        """The dual norm: the sum of all singular values, times the scales."""
        return sum(matrix.scale * float(s.sum()) for matrix, (_, s, _) in self._decomposed(whole))

    def best(self, whole: Tensor) -> Tensor:  # (n,)
        """The vector of unit length with the largest inner product."""
        found = torch.zeros_like(whole)
        for matrix, (u, s, vh) in self._decomposed(whole):
            # Directions of singular value 0 have no sign: they are left out, as in the limit of the gradient.
            kept = s > s[:1] * max(matrix.shape) * torch.finfo(s.dtype).eps
            matrix.of(found).copy_((u[:, kept] @ vh[kept]) * matrix.scale)
        return found

    def length(self, whole: Tensor) -> float:
        """The norm itself, over the matrices that are moved."""
        return max(
            (float(s[0]) / matrix.scale for matrix, (_, s, _) in self._decomposed(whole) if matrix.scale > 0.0),
            default=0.0,
        )

    def _decomposed(self, whole: Tensor) -> Iterator[tuple[Matrix, tuple[Tensor, Tensor, Tensor]]]:
        for matrix in self.matrices:
            yield matrix, torch.linalg.svd(matrix.of(whole), full_matrices=False)


def muon_scale(shape: tuple[int, int], adjustment: str | None) -> float:
    """Length of a step of torch.optim.Muon over its learning rate.

    Example:
        >>> [muon_scale((8, 2), name) for name in ("original", "spectral_unclamped")], muon_scale((2, 8), None)
        ([2.0, 2.0], 1.0)
    """
    rows, columns = shape
    if adjustment == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    ratio = rows / columns
    return float((ratio if adjustment == "spectral_unclamped" else max(1.0, ratio)) ** 0.5)
