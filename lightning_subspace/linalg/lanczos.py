"""Lanczos factorisations of a symmetric operator: how they grow and how they shrink. Nothing here decides when.

With the m vectors of the basis as *rows* of V (and A applied to each row) the factorisation reads

    A V = T V + b q,        V V^T = I,    V q = 0,    |q| = 1

with the symmetric projected matrix T = V A V^T, shape (m, m), the pending vector q that the next matvec is spent on,
and the coupling b, shape (m,). After an expansion b is zero but for its last entry (the usual r e^T); after a restart
it is full, and so will be the next row of T. Where the pending vector was replaced by a fresh direction, b q was
*dropped*: the identity then holds up to the dropped residuals, whose coefficients are kept and enter every residual
estimate.

Source: K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J. Matrix Anal.
Appl. 22 (2000), 602-616. Differences: full reorthogonalisation, at least twice; T is kept as a dense matrix.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]
AllSum = Callable[[Tensor], Tensor]

_CHUNK = 1 << 16  # columns of the basis rotated at a time: bounds the extra memory of a restart
_MIN_PASSES, _MAX_PASSES = 2, 4
_SHRINKAGE = 0.7  # a vector that loses more than this in a pass has lost digits too: orthogonalise it again
_BREAKDOWN = 20  # in units of eps * scale: what is left of a vector after cancellation is rounding


class Expansion(NamedTuple):
    """What one matvec added, A q = V column + norm q', where V already contains q."""

    column: Tensor  # (m,) float64
    norm: float  # 0.0 if the basis became invariant


class Lanczos:
    """A factorisation that grows by one vector a matvec, in preallocated memory of ``(max_size + 1) * n`` numbers.

    Every number that leaves this class was summed over ranks, so all ranks see the same.

    Args:
        matvec: Maps this rank's slice of a vector, shape ``(n,)``, to the slice of its image. Must not write to its
            argument.
        n: Length of this rank's slice.
        max_size: Vectors the factorisation can hold besides the pending one.
        dimension: Dimension N of the whole space.
        dtype: float32 or float64.
        device: Where the basis lives. The small matrices are float64 on the CPU.
        all_sum: Sums a small float64 tensor over ranks.

    Attributes:
        basis: Shape ``(max_size + 1, n)``; the first ``size`` rows are V, the next one is the pending vector.
        size: m.
        invariant: Whether there is no pending vector: V spans an invariant subspace.
        scale: Largest absolute Ritz value so far, a lower bound of the norm of A.
        asymmetry: Largest difference seen between the two sides of T, in units of A. Every entry off the diagonal is
            measured twice, when either of its two vectors is expanded. Zero up to rounding for an operator that is
            symmetric and gives the same answer every time.
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
        all_sum: AllSum,
    ) -> None:
        self.basis = torch.zeros(max_size + 1, n, dtype=dtype, device=device)
        self.size = 0
        self.invariant = True
        self.scale = 0.0
        self.asymmetry = 0.0
        self._matvec = matvec
        self._dimension = dimension
        self._all_sum = all_sum
        self._projected = _zeros(max_size, max_size)
        self._coupling = _zeros(0)  # b
        self._dropped = _zeros(0, 0)  # (drops, m) coefficients of the residuals given up

    @property
    def vectors(self) -> Tensor:
        """V, shape ``(m, n)``: a view."""
        return self.basis[: self.size]

    @property
    def pending(self) -> Tensor:
        """q, shape ``(n,)``: a view. Meaningless while the basis is `invariant`."""
        return self.basis[self.size]

    @property
    def projected(self) -> Tensor:
        """T, shape ``(m, m)``, float64: a view."""
        return self._projected[: self.size, : self.size]

    @property
    def coupling(self) -> Tensor:
        """b, shape ``(m,)``, float64."""
        return self._coupling

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T, ascending, shape ``(m,)``, and its eigenvectors as columns, shape ``(m, m)``; float64."""
        values, rotation = torch.linalg.eigh(self.projected)
        self.scale = max(self.scale, float(values.abs().max())) if self.size else self.scale
        return values, rotation

    def residuals(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Residual norms |A x - theta x| of the Ritz vectors x that are the rows of ``rotation^T V``.

        Args:
            rotation: Eigenvectors of T as columns, shape ``(m, c)``, float64.

        Returns:
            The part along the pending vector, which further expansions reduce, and all of it; both of shape ``(c,)``.
        """
        reducible = (self._coupling @ rotation).abs()
        dropped = torch.linalg.vector_norm(self._dropped @ rotation, dim=0)
        return reducible, torch.hypot(reducible, dropped)

    def inject(self, vector: Tensor) -> bool:
        """Make a fresh direction the pending vector; what was pending is dropped.

        Args:
            vector: Shape ``(n,)``. Its part outside V is used.

        Returns:
            Whether there was such a part. If not, nothing can be expanded.
        """
        if self._coupling.any():
            self._dropped = torch.cat([self._dropped, self._coupling[None]])
        self._coupling = _zeros(self.size)
        self.pending.copy_(vector)
        before, _, after = self._orthogonalise(self.pending, self.vectors)
        self.invariant = not (math.isfinite(before) and after > _BREAKDOWN * torch.finfo(self.basis.dtype).eps * before)
        if not self.invariant:
            self.pending.div_(after)
        return not self.invariant

    def expand(self) -> Expansion | None:
        """Spend one matvec on the pending vector.

        Returns:
            What was added; None, and the factorisation is as before, if the image of the vector was not finite.
        """
        m = self.size
        vectors, image = self.basis[: m + 1], self.basis[m + 1]
        image.copy_(_checked(self._matvec(self.basis[m]), image))
        before, column, norm = self._orthogonalise(image, vectors)
        if not math.isfinite(before):
            return None
        # v_i . A q was foretold by b when v_i was expanded, up to what has been dropped since.
        surprise = (column[:m] - self._coupling).abs() - self._dropped.abs().sum(dim=0)
        self.asymmetry = max(self.asymmetry, float(surprise.max())) if m else self.asymmetry
        self.scale = max(self.scale, float(column.abs().max()))
        # The measured entries, not the foretold ones: then T = V A V^T holds also where something was dropped.
        self._projected[m, : m + 1] = column
        self._projected[: m + 1, m] = column
        self.invariant = m + 1 == self._dimension or norm <= _BREAKDOWN * torch.finfo(image.dtype).eps * self.scale
        norm = 0.0 if self.invariant else norm
        if not self.invariant:
            image.div_(norm)
        self.size = m + 1
        self._coupling = _zeros(m + 1)
        self._coupling[m] = norm
        self._dropped = torch.nn.functional.pad(self._dropped, (0, 1))
        return Expansion(column, norm)

    def contract(self, rotation: Tensor) -> None:
        """Replace V by the rows of ``rotation^T V``; the pending vector stays. With Ritz vectors, a thick restart.

        The identity keeps holding if ``rotation`` spans an invariant subspace of T.

        Args:
            rotation: Orthonormal columns, shape ``(m, kept)``, float64.
        """
        m, kept = rotation.shape
        exact = _exact(self.basis)
        weights = rotation.T.to(self.basis.device, exact)
        for columns in _column_blocks(self.basis):
            columns[:kept] = weights @ columns[:m].to(exact)
        if kept < m:
            self.basis[kept].copy_(self.basis[m])
        self._projected[:kept, :kept] = rotation.T @ self.projected @ rotation
        self._coupling = self._coupling @ rotation
        self._dropped = self._dropped @ rotation
        self.size = kept

    def gram(self) -> Tensor:
        """V V^T, shape ``(m, m)``, float64."""
        gram = torch.zeros(self.size, self.size, dtype=_exact(self.basis), device=self.basis.device)
        for columns in _column_blocks(self.vectors):
            gram += columns.to(gram.dtype) @ columns.to(gram.dtype).T
        return self._reduce(gram)

    def _orthogonalise(self, vector: Tensor, rows: Tensor) -> tuple[float, Tensor, float]:
        """Subtract from ``vector``, in place, its part in the span of ``rows``; one host synchronisation a pass.

        Returns:
            The norm before (not finite if ``vector`` was not), the coefficients of the part subtracted, the norm after.
        """
        coefficients = _zeros(rows.shape[0])
        initial = remaining = 0.0
        for num_pass in range(1, _MAX_PASSES + 1):
            products = self._products(rows, vector)
            if not bool(torch.isfinite(products).all()):
                return math.nan, coefficients, math.nan
            part, square = products[:-1], float(products[-1])
            if num_pass == 1:
                initial = math.sqrt(square)
            coefficients += part
            vector.addmv_(rows.T, part.to(vector), alpha=-1)
            # By Pythagoras: accurate in the last pass, which takes away little.
            remaining = math.sqrt(max(0.0, square - float(part.square().sum())))
            if num_pass >= _MIN_PASSES and remaining >= _SHRINKAGE * math.sqrt(square):
                break
        return initial, coefficients, remaining

    def _products(self, rows: Tensor, vector: Tensor) -> Tensor:
        """Inner products of ``vector`` with ``rows`` and, last, with itself; shape ``(rows + 1,)``."""
        # The caller may be in an autocast region, which would round these to half precision.
        with torch.autocast(vector.device.type, enabled=False):
            products = torch.mv(rows, vector)
        square = torch.linalg.vector_norm(vector, dtype=_exact(vector)).square()
        return self._reduce(torch.cat([products.to(square.dtype), square[None]]))

    def _reduce(self, local: Tensor) -> Tensor:
        """Sum a small tensor over ranks, in float64; the result is on the CPU."""
        if local.device.type == "mps":  # has no float64
            local = local.cpu()
        return self._all_sum(local.to(torch.float64)).cpu()


def _exact(tensor: Tensor) -> torch.dtype:
    """float64, which is also out of reach of TF32 and autocast; Apple's devices have none."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def _column_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Views of a few columns at a time."""
    for start in range(0, matrix.shape[1], _CHUNK):
        yield matrix[:, start : start + _CHUNK]


def _zeros(*shape: int) -> Tensor:
    """A small tensor of the projected problem: on the CPU, also where another default device is set."""
    return torch.zeros(shape, dtype=torch.float64, device="cpu")


def _checked(image: Tensor, expected: Tensor) -> Tensor:
    """The image of a vector as the user's operator gave it, refused if it is no vector of the same space."""
    if not isinstance(image, Tensor):
        raise TypeError(f"Expected `matvec` to return a Tensor but got {type(image).__name__}.")
    if image.shape != expected.shape:
        raise ValueError(
            f"Expected `matvec` to return shape {tuple(expected.shape)}, that of its argument, but got "
            f"{tuple(image.shape)}. Flatten the result, or check `n`."
        )
    return image.detach()
