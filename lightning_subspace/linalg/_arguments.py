"""Arguments of the eigensolver and the quadrature: checks and defaults."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_subspace.linalg.agreement import Agreement, AllSum
from lightning_subspace.linalg.selection import WHICH

RandomVector = Callable[[int, int], Tensor]

# Below these the residual estimates go on falling, but the true residuals do not.
SMALLEST_TOL = {torch.float32: 1e-5, torch.float64: 1e-12}
_SEED_STRIDE = 1_000_003  # so that neighbouring seeds share no vectors


def random_vectors(
    all_sum: AllSum | None, random: RandomVector | None, n: int, seed: int, dtype: torch.dtype
) -> Callable[[int], Tensor]:
    """A function i -> this rank's slice of the i-th random vector."""
    if all_sum is not None and random is None:
        raise ValueError(
            "random: expected a function along with all_sum, got None, with which all ranks draw the same slice; pass "
            "(seed, i) -> this rank's slice of the i-th global random vector."
        )

    def own(seed: int, i: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed((seed * _SEED_STRIDE + i) % 2**63)
        return torch.randn(n, generator=generator, dtype=dtype, device="cpu")

    source = own if random is None else random
    return lambda i: vector("random", source(seed, i), n, dtype)


def global_dimension(dimension: int | None, n: int, agreement: Agreement, device: torch.device) -> int:
    """Dimension of the whole space; `n` may be wrong on one rank."""
    local = torch.zeros(1, dtype=torch.int64, device=device)
    with agreement.local():
        _check_count("n", n, 0)
        local += n
    if dimension is not None:
        _check_count("dimension", dimension, 1)
        return dimension
    # Every rank takes part in this sum, whatever its own n.
    total = float(agreement.sum(local))
    if not agreement.finite:
        agreement.settle()
        raise ValueError("n: expected the length of a vector on all ranks, got none on another; see its error.")
    return int(total)


def check(k: int, which: str, dimension: int, max_matvecs: int, verify: str, delta: float, dtype: torch.dtype) -> None:
    """Refuse what is out of range."""
    _check_count("k", k, 1)
    _check_count("max_matvecs", max_matvecs, 1)
    if k > dimension:
        raise ValueError(f"k: expected at most the dimension of the space, {dimension}, got {k}; lower k.")
    for name, value, choices in (("which", which, WHICH), ("verify", verify, ("always", "never"))):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a number in (0, 1), got {delta}; it is a probability.")
    if dtype not in SMALLEST_TOL:
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}; convert inside matvec.")


def tolerances(tol: float, subspace_tol: float | None, dtype: torch.dtype) -> tuple[float, float]:
    """`tol` as the dtype allows, and the tightest residual for `subspace_tol`."""
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol: expected a positive finite number, got {tol}; it is relative to the largest |value|.")
    if subspace_tol is not None and not (math.isfinite(subspace_tol) and subspace_tol > 0):
        raise ValueError(f"subspace_tol: expected a positive finite number, or None, got {subspace_tol}.")
    smallest = SMALLEST_TOL[dtype]
    if tol < smallest:
        message = f"tol: expected at least {smallest} in {dtype}, got {tol}; it was raised to that"
        message += ". float64 reaches 1e-12."
        try:
            warnings.warn(message, UserWarning, stacklevel=3)
        except Exception:  # where warnings are errors: what is asked for is there all the same
            logging.getLogger("lightning_subspace").warning(message)
    return max(tol, smallest), max(tol / 10, smallest)


def basis_size(ncv: int | None, k: int, dimension: int) -> int:
    """The largest size of the basis."""
    if ncv is None:
        return min(dimension, 2 * k + 10)
    _check_count("ncv", ncv, min(dimension, k + 3), "min(dimension, k + 3) = ")
    return min(ncv, dimension)


def vector(name: str, given: Tensor, n: int, dtype: torch.dtype) -> Tensor:  # (n,)
    """A vector of the user's in that dtype, or an error."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got an object of type {type(given).__name__}.")
    if tuple(given.shape) != (n,):
        raise ValueError(f"{name}: expected shape {(n,)}, got {tuple(given.shape)}; flatten it, or check n.")
    converted = given.detach().to(dtype)
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(f"{name}: expected a finite vector, got NaN or infinity.")
    return converted


def _check_count(name: str, value: int, smallest: int, meaning: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}.")
    if value < smallest:
        raise ValueError(f"{name}: expected at least {meaning}{smallest}, got {value}.")
