"""Fractions, overlaps and angles of subspaces: argument checks around `subspace`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace._arguments import described, require_flag
from lightning_subspace.subspace import subspace


def gradient_fraction(
    basis: Tensor,  # (k, n) orthonormal rows
    vector: Tensor,  # (n,)
    *,
    validate_args: bool = True,
) -> Tensor:  # () float64
    """Share of a vector's squared length that lies in a subspace.

    f = |P v|^2 / |v|^2 with P = V^T V, in [0, 1]. With V the top eigenvectors of the Hessian and v the gradient it is
    f_top (Gur-Ari, Roberts and Dyer 2018, arXiv 1812.04754, section 2). A random vector gives k/n on average. Its
    square root is chi_k (Song, Ahn and Yun, arXiv 2405.16002).

    Args:
        basis: orthonormal rows.
        vector: any vector of that length.
        validate_args: check the arguments; without it, rows that are not orthonormal give a wrong number.

    Returns:
        The fraction; nan for a vector that is zero or not finite.

    Raises:
        ValueError: for a basis whose rows are not orthonormal to 1e-4, or shapes that do not fit.

    Example:
        >>> gradient_fraction(torch.eye(4)[:2], torch.tensor([3.0, 0.0, 4.0, 0.0]))
        tensor(0.3600, dtype=torch.float64)
    """
    require_flag("validate_args", validate_args)
    if validate_args:
        _check_basis("basis", basis)
        n = basis.shape[1]
        if not isinstance(vector, Tensor) or vector.shape != (n,) or not vector.is_floating_point():
            raise ValueError(
                f"vector: expected a real floating-point tensor of shape ({n},), as the rows of the basis, got "
                f"{described(vector)}; flatten gradients in the order of the basis and concatenate them."
            )
    return _scalar(subspace.fraction(basis.detach(), vector.detach().to(basis.device)), basis)


def subspace_overlap(
    basis: Tensor,  # (k, n) orthonormal rows
    other: Tensor,  # (m, n) orthonormal rows
    *,
    validate_args: bool = True,
) -> Tensor:  # () float64
    """Overlap of two subspaces: the mean squared cosine of their principal angles.

    Tr(P P') / min(k, m), in [0, 1]. Equation 4 of Gur-Ari, Roberts and Dyer (2018, arXiv 1812.04754) for k = m. 1 for
    equal spaces or one inside the other, 0 for orthogonal ones, max(k, m)/n on average for random ones.

    Args:
        basis: orthonormal rows.
        other: orthonormal rows of the same length.
        validate_args: check the arguments; without it, rows that are not orthonormal give a wrong number.

    Returns:
        The overlap.

    Raises:
        ValueError: for a basis whose rows are not orthonormal to 1e-4, or shapes that do not fit.

    Example:
        >>> subspace_overlap(torch.eye(4)[:2], torch.eye(4)[1:3])
        tensor(0.5000, dtype=torch.float64)
    """
    require_flag("validate_args", validate_args)
    if validate_args:
        _check_pair(basis, other)
    return _scalar(subspace.overlap(basis.detach(), other.detach()), basis)


def principal_angles(
    basis: Tensor,  # (k, n) orthonormal rows
    other: Tensor,  # (m, n) orthonormal rows
    *,
    validate_args: bool = True,
) -> Tensor:  # (min(k, m),) float64
    """Principal angles between two subspaces in radians, ascending, in [0, pi/2].

    Bjorck and Golub (1973, Numerical Methods for Computing Angles Between Linear Subspaces). Their mean squared cosine
    is `subspace_overlap`. Small angles keep their accuracy: 1e-15 for float64 bases, 1e-7 for float32 ones.

    Args:
        basis: orthonormal rows.
        other: orthonormal rows of the same length.
        validate_args: check the arguments; without it, rows that are not orthonormal give a wrong number.

    Returns:
        The angles.

    Raises:
        ValueError: for a basis whose rows are not orthonormal to 1e-4, or shapes that do not fit.

    Example:
        >>> principal_angles(torch.eye(4)[:2], torch.eye(4)[1:3])
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """
    require_flag("validate_args", validate_args)
    if validate_args:
        _check_pair(basis, other)
    return subspace.principal_angles(basis.detach(), other.detach()).to(basis.device)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=like.device)


def _check_pair(basis: Tensor, other: Tensor) -> None:
    _check_basis("basis", basis)
    _check_basis("other", other)
    if basis.shape[1] != other.shape[1]:
        raise ValueError(
            f"other: expected rows of length {basis.shape[1]}, as those of basis, got shape {tuple(other.shape)}; both "
            "are spaces of the same parameters, basis vectors as rows."
        )


def _check_basis(name: str, basis: Tensor) -> None:
    if not isinstance(basis, Tensor) or basis.ndim != 2 or not 0 < basis.shape[0] <= basis.shape[1]:
        raise ValueError(
            f"{name}: expected a tensor of shape (k, n) with 0 < k <= n, basis vectors as rows, got "
            f"{described(basis)}; transpose a basis in columns."
        )
    if not basis.is_floating_point():
        raise ValueError(
            f"{name}: expected a real floating-point type, got {described(basis)}; complex parameters have two real "
            "coordinates an entry, as in torch.view_as_real."
        )
    defect = subspace.orthonormality_defect(basis.detach())
    if not defect < subspace.ORTHONORMALITY:
        raise ValueError(
            f"{name}: expected orthonormal rows, max|V V^T - I| < {subspace.ORTHONORMALITY:.0e}, got {defect:.1e}; "
            f"torch.linalg.qr({name}.T)[0].T of float32 or wider gives orthonormal ones."
        )
