"""Tally of the gradients of micro-batches, made as they pass by.

A mean gradient needs one vector, however many micro-batches there are; their lengths and, roughly, their inner products
say how far it may be off. Both are taken while each gradient is there:

- |g_j|^2 of each micro-batch j, in float64;
- sum_j b_j g_j of each of at most 32 groups of them, at 16,384 coordinates: all, or blocks at even distances. Where all
  are there the inner products are exact.

That is one more pass over a vector that is in use anyway, without an evaluation, and at most 4 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.parallel.ranks import Ranks

GROUPS = 32  # as many as give a standard error that is itself right to 13 %
# Coordinates of a vector that are kept, in blocks of one cache line. A variance along a vector comes out too large by
# about 1/16,384 of the whole variance, times how unevenly both are spread over coordinates.
KEPT, BLOCK = 1 << 14, 16
ROW = 1024  # entries of a long vector whose squares are added in its own precision, before the rest in float64
SHORT = 1 << 16  # entries that are copied to float64 in no time


@dataclass(frozen=True)
class Tallied:
    """The tally of all ranks.

    Attributes:
        squares: (m,), |g_j|^2 of each micro-batch.
        groups: of each micro-batch, in 0..M-1.
        images: (M, c), sum_j b_j g_j of each group, at the coordinates that were kept.
        scale: n / c, what inner products of images are multiplied by.
    """

    squares: Tensor
    groups: Tensor
    images: Tensor
    scale: float


class GradientTally:
    """Norms and a few coordinates of the gradients of a sample.

    Args:
        places: keys of the micro-batches, in the order of the sample.
        sizes: b_j, the weight of each in the sums of its group.
        n: length of the gradients.
        device: of the gradients.

    Example:
        >>> tally = GradientTally([0, 1], [2.0, 2.0], n=3, device=torch.device("cpu"))
        >>> tally.see(0, torch.tensor([1.0, 2.0, 2.0]))
        >>> tally.see(1, torch.tensor([0.0, 3.0, 4.0]))
        >>> tallied = tally.gathered(Ranks())
        >>> tallied.squares.tolist(), (tallied.images @ tallied.images.T)[0].tolist()
        ([9.0, 25.0], [36.0, 56.0])
    """

    def __init__(self, places: Sequence[object], sizes: Sequence[float], n: int, device: torch.device) -> None:
        count, num_groups = len(places), min(len(places), GROUPS)
        self._positions = {place: position for position, place in enumerate(places)}
        self._sizes = sizes
        self._groups = [position * num_groups // count for position in range(count)]
        self._stride = -(-n // KEPT) | 1  # odd, so that no column of a matrix is always met
        self._num_kept = n if self._stride == 1 else len(range(0, n // BLOCK, self._stride)) * BLOCK
        self._n = n
        self._images = torch.zeros(num_groups, self._num_kept, dtype=torch.float64, device=device)
        self._rows = self._images.unbind()  # views
        self._squares: dict[int, Tensor] = {}  # by position, on the device: reading them would wait for it

    def see(self, place: object, gradient: Tensor) -> None:  # (n,)
        """Take note of a micro-batch's gradient, the first time it comes."""
        position = self._positions.get(place)
        if position is None or position in self._squares:  # one of several joined, or of a part of the sample
            return
        self._squares[position] = square_norm(gradient)
        self._rows[self._groups[position]].add_(self._kept(gradient), alpha=self._sizes[position])

    def gathered(self, ranks: Ranks) -> Tallied | None:
        """The tally of all ranks, by one sum. A collective.

        None where a gradient is missing.
        """
        count = len(self._positions)
        own = torch.zeros(2, count, dtype=torch.float64, device=self._images.device)
        if self._squares:
            places = torch.tensor(list(self._squares), device=own.device)
            own[0, places], own[1, places] = torch.stack(list(self._squares.values())), 1.0
        found = ranks.all_reduce(torch.cat([own.view(-1), self._images.view(-1)])).cpu()
        squares, seen, images = torch.split(found, [count, count, len(found) - 2 * count])
        if not bool((seen == 1.0).all()):
            return None
        groups = torch.tensor(self._groups)
        return Tallied(squares, groups, images.view(self._images.shape), self._n / self._num_kept)

    def _kept(self, gradient: Tensor) -> Tensor:
        if self._stride == 1:
            return gradient
        return gradient[: len(gradient) // BLOCK * BLOCK].view(-1, BLOCK)[:: self._stride].reshape(-1)


def square_norm(vector: Tensor) -> Tensor:  # (n,) -> ()
    """|v|^2 in float64, nearly as fast as in its own precision.

    Example:
        >>> square_norm(torch.ones(70_000)).item()
        70000.0
    """
    whole = len(vector) // ROW * ROW if len(vector) > SHORT else 0
    tail = vector[whole:].double()
    square = torch.dot(tail, tail)
    if not whole:
        return square
    rows = torch.linalg.vector_norm(vector[:whole].view(-1, ROW), dim=1).double()
    return torch.dot(rows, rows) + square
