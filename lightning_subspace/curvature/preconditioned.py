"""A symmetric operator in coordinates that are scaled one by one: S^1/2 (A + D) S^1/2 with diagonal S and D.

With S = P^-1 this has the eigenvalues of P^-1 A, which is not symmetric: the curvature that an optimizer meets which
divides its steps by P (Cohen et al. 2022, arXiv 2207.14484, section 2).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Preconditioned:
    """v -> S^1/2 (A + D) S^1/2 v, on this rank's part of a vector; one product with A.

    Args:
        matvec: v -> A v.
        scale: (n,) or a number: the diagonal of S, at least 0.
        shift: (n,) or a number: the diagonal of D.

    Example:
        >>> import torch
        >>> product = Preconditioned(lambda v: torch.tensor([2.0, 8.0]) * v, torch.tensor([1.0, 0.25]), shift=1.0)
        >>> product.matvec(torch.ones(2))
        tensor([3.0000, 2.2500])
    """

    def __init__(self, matvec: Callable[[Tensor], Tensor], scale: Tensor | float, shift: Tensor | float = 0.0) -> None:
        self._matvec = matvec
        self._root = scale**0.5
        self._shift = shift

    def matvec(
        self,
        v: Tensor,  # (n,)
    ) -> Tensor:  # (n,)
        """The image of a vector."""
        scaled = v * self._root
        return (self._matvec(scaled) + scaled * self._shift) * self._root
