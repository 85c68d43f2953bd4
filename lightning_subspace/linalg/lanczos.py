"""Lanczos factorisation of a symmetric operator, growing and shrinking.

With the m vectors of the basis as *rows* of V (and A applied to each row) the factorisation reads

    A V = T V + b q,        V V^T = I,    V q = 0,    |q| = 1

with the symmetric projected matrix T = V A V^T, shape (m, m), the pending vector q that the next matvec is spent on,
and the coupling b, shape (m,). After an expansion b is zero but for its last entry (the usual r e^T); after a restart
it is full, and so is the next row of T. Where the pending vector was replaced by a fresh direction, b q was *dropped*:
the identity then holds up to the dropped residuals, whose coefficients enter every residual estimate.

Source: Wu and Simon 2000 (see `eigsh.py`). Differences: an image is orthogonalised at least twice, first against what
it is coupled to and then against the whole basis; T is kept as a dense matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_subspace.linalg import blocked
from lightning_subspace.linalg.agreement import Agreement
from lightning_subspace.linalg.tiles import BasisPlace, Tiles

MatVec = Callable[[Tensor], Tensor]

_MIN_PASSES, _MAX_PASSES = 2, 4
_SHRINKAGE = 0.7  # a vector that loses more than this in a pass has lost digits too: orthogonalise it again
_BREAKDOWN = 20  # in units of eps * scale: what is left of a vector after cancellation is rounding


class Expansion(NamedTuple):
    """Result of a matvec: A q = V column + norm q'."""

    column: Tensor  # (m,) float64, m counts q
    norm: float  # 0.0 if the basis became invariant


class Lanczos:
    """A factorisation that grows by one vector a matvec.

    Its memory, `(max_size + 1) * n` numbers, is taken at the start. Every number that leaves this class was summed
    over ranks, or follows from such sums by small matrices, so all ranks see the same, if `torch.linalg.eigh` has the
    same bits on all of them: one build of torch, one kind of processor, one number of threads.

    Args:
        matvec: maps this rank's slice of a vector, shape (n,), to the slice of its image. Must not write to it.
        n: length of this rank's slice.
        max_size: vectors the factorisation can hold besides the pending one.
        dimension: N, of the whole space.
        dtype: float32 or float64, of the basis.
        device: of the vectors. The small matrices are float64 on the CPU.
        agreement: sums over ranks, and the failure of one.
        place: where the basis lies.
    """

    def __init__(
        self,
        matvec: MatVec,
        n: int,
        max_size: int,
        *,
        dimension: int,
        dtype: torch.dtype,
        device: torch.device,
        agreement: Agreement,
        place: BasisPlace = "device",
    ) -> None:
        # (max_size + 1, n): the first `size` rows are V, the next one is the pending vector.
        self.basis = Tiles(max_size + 1, 0, dtype=dtype, device=device)
        with agreement.local():
            self.basis = Tiles(max_size + 1, n, dtype=dtype, device=device, place=place)
        self.agreement = agreement
        self.size = 0  # m
        self.coupling = _zeros(0)  # b, (m,)
        self.invariant = True  # there is no pending vector: V spans an invariant subspace
        self.scale = 0.0  # largest absolute Ritz value so far, a lower bound of the norm of A
        # Largest difference seen between the two sides of T, in units of A: every entry off the diagonal is measured
        # twice, once with either of its vectors. Only rounding, for a symmetric deterministic operator.
        self.asymmetry = 0.0
        self._matvec = matvec
        self._dimension = dimension
        self._projected = _zeros(max_size, max_size)
        self._dropped = _zeros(0, 0)  # (drops, m) coefficients of the residuals given up

    @property
    def vectors(self) -> Tensor:
        """V, shape (m, n): a view, or a copy of several tiles."""
        return self.basis.whole(self.size)

    @property
    def pending(self) -> Tensor:
        """q, shape (n,), as `vectors`. Meaningless while the basis is `invariant`."""
        return self.basis.read(self.size)

    @property
    def projected(self) -> Tensor:
        """T, shape (m, m), float64: a view."""
        return self._projected[: self.size, : self.size]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T, (m,) ascending, and eigenvectors as columns, (m, m)."""
        values, rotation = torch.linalg.eigh(self.projected)
        self.scale = max(self.scale, float(values.abs().max())) if self.size else self.scale
        return values, rotation

    def residuals(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Residual norms |A x - theta x|, (c,), of Ritz vectors.

        Returns the part along the pending vector, which further expansions reduce, and all of it.
        """
        reducible = (self.coupling @ rotation).abs()
        dropped = torch.linalg.vector_norm(self._dropped @ rotation, dim=0)
        return reducible, torch.hypot(reducible, dropped)

    def lock(self, vectors: Tensor, values: Tensor, residuals: Tensor) -> None:  # (k, n) orthonormal rows, (k,), (k,)
        """Begin with Ritz pairs of an earlier run; what follows is orthogonal.

        The block of T behind them is that of (I - P) A (I - P), with the projector P on them.
        """
        k = len(values)
        with self.agreement.local():
            for row, vector in enumerate(vectors):
                self.basis.write(row, vector)
        self._projected[:k, :k] = torch.diag(values.to(self._projected))
        self.coupling = _zeros(k)
        self._dropped = torch.diag(residuals.to(self._projected))
        self.scale = max(self.scale, float(values.abs().max())) if k else self.scale
        self.size = k

    def inject(self, source: Callable[[], Tensor]) -> bool:
        """Replace the pending vector by the part outside V of another, (n,).

        Returns:
            False if there was no such part. True also if that is unknown, because the vector is not finite.
        """
        if self.coupling.any():
            self._dropped = torch.cat([self._dropped, self.coupling[None]])
        self.coupling = _zeros(self.size)
        with self.agreement.local():
            self.basis.write(self.size, source())
        before, _, after = self._orthogonalise(self.size)
        self.invariant = not after > _BREAKDOWN * torch.finfo(self.basis.dtype).eps * before
        if not self.invariant:
            self._divide(self.size, after)
        return not (self.invariant and self.agreement.finite)

    def expand(self) -> Expansion | None:
        """Spend one matvec on the pending vector.

        Returns:
            What was added; None, and the factorisation is as before, if the image of the vector was not finite.
        """
        m = self.size
        with self.agreement.local():
            vector = self.basis.read(m)
            self.basis.write(m + 1, _checked(self._matvec(vector), vector))
            del vector
        # All that is large of A q lies along q and what is coupled to it: one vector, but all of them after a restart.
        near = m + 1 if self.coupling[:-1].any() else min(m + 1, 2)
        _, column, norm = self._orthogonalise(m + 1, near)
        if not self.agreement.finite:
            return None
        # b predicted v_i . A q when v_i was expanded, up to what has been dropped since.
        surprise = (column[:m] - self.coupling).abs() - self._dropped.abs().sum(dim=0)
        self.asymmetry = max(self.asymmetry, float(surprise.max())) if m else self.asymmetry
        self.scale = max(self.scale, float(column.abs().max()))
        # The measured entries, not the predicted ones: then T = V A V^T holds also where something was dropped.
        self._projected[m, : m + 1] = column
        self._projected[: m + 1, m] = column
        self.invariant = m + 1 == self._dimension or norm <= _BREAKDOWN * torch.finfo(self.basis.dtype).eps * self.scale
        norm = 0.0 if self.invariant else norm
        if not self.invariant:
            self._divide(m + 1, norm)
        self.size = m + 1
        self.coupling = _zeros(m + 1)
        self.coupling[m] = norm
        self._dropped = torch.nn.functional.pad(self._dropped, (0, 1))
        return Expansion(column, norm)

    def variation(self, factor: float) -> float:
        """Length of A (c v) / c - A v.

        For a vector v of the basis and a factor c; two products. With c = 1, it is what differs between two calls; with
        another one, that and what is rounded otherwise.
        """
        square = _zeros(1)
        with self.agreement.local():
            v = self.basis.read(0)
            difference = _checked(self._matvec(v), v).clone()
            difference -= _checked(self._matvec(v * factor), v) / factor
            square += torch.linalg.vector_norm(difference, dtype=blocked.exact(difference)).square().cpu()
        return math.sqrt(float(self.agreement.sum(square)))

    def contract(self, rotation: Tensor) -> None:
        """Replace V by rotation^T V, of orthonormal columns, (m, kept).

        The identity holds on if the columns span an invariant subspace of T: with Ritz vectors, a thick restart.
        """
        kept = rotation.shape[1]
        with self.agreement.local():
            self.basis.contract(rotation)
        self._projected[:kept, :kept] = rotation.T @ self.projected @ rotation
        self.coupling = self.coupling @ rotation
        self._dropped = self._dropped @ rotation
        self.size = kept

    def rotated(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of rotation^T V, (c, n), and its Gram matrix."""
        count = rotation.shape[1]
        vectors = _zeros(count, 0)  # in their place, where there is no memory for them
        gram = _zeros(count, count)
        with self.agreement.local():
            vectors = self.basis.rotated(rotation)
            gram = blocked.gram(vectors)
        return vectors, self.agreement.sum(gram)

    def _orthogonalise(self, last: int, near: int | None = None) -> tuple[float, Tensor, float]:
        """Subtract from a row its part along those before it.

        In the first pass that along the `near` rows before it only, if that is not None. One sum over ranks a pass.
        Returns the norm before (zero with `near`), the coefficients of the part subtracted, (last,), and the norm
        after; they mean nothing if a sum was not finite.
        """
        # Two passes are always made: a device is waited for after both of them.
        count = last if near is None else near
        first = self._subtract(last, count, normed=near is None)
        sums = self.agreement.read(first, self._subtract(last, last))
        first, sums = sums[: len(first)], sums[len(first) :]
        initial = float(first[-1]) ** 0.5 if near is None else 0.0
        coefficients = torch.nn.functional.pad(first[:count], (last - count, 0))
        for num_pass in range(_MIN_PASSES, _MAX_PASSES + 1):
            part, square = sums[:-1], float(sums[-1])
            coefficients += part
            # By Pythagoras: accurate in the last pass, which takes away little.
            remaining = max(0.0, square - float(part.square().sum())) ** 0.5
            if not self.agreement.finite or remaining >= _SHRINKAGE * square**0.5 or num_pass == _MAX_PASSES:
                break
            sums = self.agreement.read(self._subtract(last, last))
        return initial, coefficients, remaining

    def _subtract(self, last: int, count: int, *, normed: bool = True) -> Tensor:
        """One pass over the `count` rows before row `last`.

        Returns the coefficients subtracted, and |row|^2 before if `normed`: summed over ranks, and not yet read.
        """
        products = _zeros(count + normed)
        with self.agreement.local():
            products = self.basis.products(last - count, last, normed=normed)
        products = self.agreement.reduce(products)
        with self.agreement.local():  # if a sum is not finite, the row becomes so, too, and nobody uses it
            self.basis.subtract(last - count, last, products[:count])
        return products

    def _divide(self, row: int, norm: float) -> None:
        with self.agreement.local():
            self.basis.divide(row, norm)


def _zeros(*shape: int) -> Tensor:
    """A small tensor on the CPU, also under another default device."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def _checked(image: Tensor, expected: Tensor) -> Tensor:
    """The image given by the user's operator, refused if malformed."""
    if not isinstance(image, Tensor):
        raise TypeError(f"matvec: expected it to return a Tensor, got an object of type {type(image).__name__}.")
    if image.shape != expected.shape:
        shapes = f"an image of shape {tuple(expected.shape)}, got {tuple(image.shape)}"
        raise ValueError(f"matvec: expected {shapes}; flatten the result, or check n.")
    return image.detach()
