"""Weight matrices among coordinates that are dealt to ranks.

A flat vector is dealt to ranks by coordinates, a matrix belongs to one owner. `Round`s of W matrices are collected one
at a time, by a sum of vectors that are zero elsewhere, and only the owner keeps the sum; then all W owners decompose
theirs at once. At any time a rank holds one matrix in transfer and one of its own.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.parallel.partition import Partition


@dataclass(frozen=True)
class WeightMatrix:
    """A parameter as a matrix; of convolutions (out, in k k).

    Attributes:
        name: of the parameter.
        rows, columns: its shape.
        pieces: what this rank has of its flat entries: where they begin, and the coordinates in a local vector.

    Example:
        >>> WeightMatrix("conv.weight", 16, 27).side, WeightMatrix("head.weight", 100, 10).side
        (16, 10)
    """

    name: str
    rows: int
    columns: int
    pieces: tuple[tuple[int, range], ...] = ()

    @property
    def side(self) -> int:
        """m, the length of its shorter side."""
        return min(self.rows, self.columns)

    @property
    def numel(self) -> int:
        """Number of its entries."""
        return self.rows * self.columns

    def laid(self, flat: Tensor) -> Tensor:  # (..., rows * columns) to (..., m, c)
        """Flat entries as matrices whose rows are the shorter side."""
        matrix = flat.view(*flat.shape[:-1], self.rows, self.columns)
        return matrix if self.rows <= self.columns else matrix.mT

    def placed(self, vector: Tensor) -> Tensor:  # (local n,) to (rows * columns,)
        """This rank's entries of a flat vector's part, zero elsewhere."""
        whole = vector.new_zeros(self.numel)
        for offset, place in self.pieces:
            whole[offset : offset + len(place)] = vector[place.start : place.stop]
        return whole


def chosen_matrices(partition: Partition, patterns: Sequence[str] | None, rank: int) -> list[WeightMatrix]:
    """The real matrices of a parameter space.

    Args:
        partition: of the space.
        patterns: shell-style, of names of parameters or of the modules that they belong to; None: all whose shorter
            side is longer than `rank`, as a rank of all says nothing.
        rank: r.

    Raises:
        ValueError: when a pattern matches no matrix.
    """
    space, found = partition.space, list[WeightMatrix]()
    pieces = dict[str, list[tuple[int, range]]]()
    for name, offset, place in partition.locate():
        pieces.setdefault(name, []).append((offset, place))
    for name, shape in zip(space.names, space.shapes, strict=True):
        if len(shape) >= 2 and name not in space.complex_names and min(shape[0], math.prod(shape[1:])) >= 2:
            found.append(WeightMatrix(name, shape[0], math.prod(shape[1:]), tuple(pieces.get(name, ()))))
    if patterns is None:
        return [matrix for matrix in found if matrix.side > rank]
    for pattern in patterns:
        if not any(_matches(matrix.name, pattern) for matrix in found):
            raise ValueError(
                f"modules: expected patterns of weight matrices or their modules, got {pattern!r}, which matches none; "
                f"matrices: {[matrix.name for matrix in found][:5]}."
            )
    return [matrix for matrix in found if any(_matches(matrix.name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Round:
    """W matrices that are decomposed at once, one on each rank.

    Attributes:
        partition: of the vectors.
        matrices: by the rank that owns them.
    """

    partition: Partition
    matrices: Sequence[WeightMatrix]

    @property
    def own(self) -> WeightMatrix | None:
        """The one of this rank."""
        index = self.partition.ranks.index
        return self.matrices[index] if index < len(self.matrices) else None

    def collect(self, vector: Tensor) -> Tensor | None:  # (n,) to (m, c)
        """This rank's matrix of a flat vector: one sum for each matrix."""
        found = None
        for matrix in self.matrices:
            whole = self.partition.ranks.all_reduce(matrix.placed(vector))
            if matrix is self.own:
                found = matrix.laid(whole)
        return found

    def share(self, value: Tensor | None, sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Every owner's float64 values, of these sizes, on all ranks: one sum."""
        total = torch.zeros(sum(sizes), dtype=torch.float64, device="cpu" if like.device.type == "mps" else like.device)
        pieces = list(total.split(list(sizes)))
        if value is not None:
            pieces[self.partition.ranks.index].copy_(value)
        return list(self.partition.ranks.all_reduce(total).split(list(sizes)))


def rounds(partition: Partition, matrices: Sequence[WeightMatrix]) -> Iterator[Round]:
    """All matrices, W at a time, of similar size: ranks wait little."""
    ordered = sorted(matrices, key=lambda matrix: -matrix.numel * matrix.side)
    for start in range(0, len(ordered), partition.ranks.count):
        yield Round(partition, ordered[start : start + partition.ranks.count])


def shares_inside(
    partition: Partition, matrix: WeightMatrix, basis: Tensor, vectors: Tensor
) -> float:  # (m, r), (k, n)
    """sum_i |U^T V_i|_F^2 / sum_i |V_i|_F^2 for parts V_i of flat vectors.

    One sum over ranks; nan where the vectors have no part in the matrix.
    """
    images, squares = [], 0.0
    for vector in vectors:
        piece = matrix.laid(matrix.placed(vector).to(basis.device).double())
        images.append((basis.double().T @ piece).reshape(-1))
        squares += float(piece.square().sum())
    found = partition.ranks.all_reduce(torch.cat([*images, images[0].new_tensor([squares])]))
    whole = float(found[-1])
    return min(float(found[:-1].square().sum()) / whole, 1.0) if whole > 0.0 else math.nan


def _matches(name: str, pattern: str) -> bool:
    module = name.rpartition(".")[0]
    return fnmatch.fnmatchcase(name, pattern) or (bool(module) and fnmatch.fnmatchcase(module, pattern))
