"""Arguments of the eigensolver and the quadrature: checks and defaults."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_subspace._arguments import (
    described,
    is_integer,
    require_function,
    require_instances,
    require_number,
    require_seed,
    require_word,
    wrong,
)
from lightning_subspace.linalg.agreement import Agreement, AllSum
from lightning_subspace.linalg.normals import normals
from lightning_subspace.linalg.selection import WHICH

RandomVector = Callable[[int, int], Tensor]

# Below these the residual estimates go on falling, but the true residuals do not.
SMALLEST_TOL = {torch.float32: 1e-5, torch.float64: 1e-12}


def check_functions(matvec: object, all_sum: object, random: object, on_matvec: object = None) -> None:
    """Refuse what cannot be called as it will be."""
    if isinstance(matvec, Tensor):
        raise TypeError(str(wrong("matvec", "a function v -> A v", matvec, "pass lambda v: A @ v")))
    require_function("matvec", matvec, ("v",), optional=False)
    require_function("all_sum", all_sum, ("tensor",))
    require_function("random", random, ("seed", "i"))
    require_function("on_matvec", on_matvec, ("number", "residual"))


def usable_device(device: torch.device | str) -> torch.device:
    """A device that this process can put tensors on."""
    try:
        torch.empty(0, device=device).cpu()
        return torch.device(device)
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise wrong("device", "a device that tensors can be put on, such as 'cpu'", device, reason) from error


def random_vectors(
    all_sum: AllSum | None, random: RandomVector | None, n: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], Tensor]:
    """A function i -> this rank's slice of the i-th random vector."""
    if all_sum is not None and random is None:
        raise ValueError(
            "random: expected a function along with all_sum, got None, with which all ranks draw the same slice; pass "
            "(seed, i) -> this rank's slice of the i-th global random vector."
        )

    seed = require_seed("seed", seed)

    def own(seed: int, i: int) -> Tensor:
        return normals(seed, i, [range(n)], dtype, device)

    source = own if random is None else random
    return lambda i: vector("random", source(seed, i), n, dtype)


def global_dimension(dimension: int | None, n: int, agreement: Agreement, device: torch.device) -> int:
    """Dimension of the whole space; `n` may be wrong on one rank."""
    local = torch.zeros(1, dtype=torch.int64, device=device)
    with agreement.local():
        local += count("n", n, 0)
    if dimension is not None:
        return count("dimension", dimension, 1)
    # Every rank takes part in this sum, whatever its own n.
    total = float(agreement.sum(local))
    if not agreement.finite:
        agreement.settle()
        raise ValueError("n: expected the length of a vector on all ranks, got none on another; see its error.")
    return int(total)


def check(
    k: int,
    which: str,
    dimension: int,
    max_matvecs: int,
    verify: str,
    delta: float,
    dtype: torch.dtype,
    max_asymmetry: float,
) -> None:
    """Refuse what is out of range."""
    count("k", k, 1)
    count("max_matvecs", max_matvecs, 1)
    if k > dimension:
        raise ValueError(f"k: expected at most the dimension of the space, {dimension}, got {k}; lower k.")
    require_word("which", which, WHICH)
    require_word("verify", verify, ("always", "never"))
    require_number("delta", delta, "a number in (0, 1)", lambda x: 0.0 < x < 1.0, "it is a probability")
    check_dtype(dtype)
    require_number("max_asymmetry", max_asymmetry, "a number of at least 0", lambda x: x >= 0.0)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse another type than those that Lanczos vectors stay orthogonal in."""
    if not isinstance(dtype, torch.dtype) or dtype not in SMALLEST_TOL:
        raise wrong("dtype", "torch.float32 or torch.float64", dtype, "convert inside matvec")


def tolerances(tol: float, subspace_tol: float | None, dtype: torch.dtype) -> tuple[float, float]:
    """`tol` as the dtype allows, and the tightest residual for `subspace_tol`."""
    expected, of_what = "a positive finite number", "it is relative to"
    tol = require_number("tol", tol, expected, lambda x: 0.0 < x < math.inf, f"{of_what} the largest |value|")
    if subspace_tol is not None:
        or_none = f"{expected}, or None"
        require_number("subspace_tol", subspace_tol, or_none, lambda x: 0.0 < x < math.inf, f"{of_what} the gap")
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
    return min(count("ncv", ncv, min(dimension, k + 3), "min(dimension, k + 3) = "), dimension)


def known_pairs(known: object, n: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (k,), residuals (k,) and eigenvectors (k, n), as given or none."""
    if known is None:
        empty = torch.zeros(0, dtype=torch.float64)
        return empty, empty, torch.zeros(0, n)
    expected = f"eigenvalues (k,), their residuals (k,) and eigenvectors (k, {n}), k at most {dimension}, or None"
    pairs = require_instances("known", known, Tensor, expected)
    shapes = [tuple(tensor.shape) for tensor in pairs]
    k = shapes[0][:1] if shapes else ()
    if len(k) != 1 or shapes != [k, k, (*k, n)] or k[0] > dimension:
        raise ValueError(f"known: expected {expected}, got tensors of shapes {shapes}.")
    return pairs[0], pairs[1], pairs[2]


def vector(name: str, given: Tensor, n: int, dtype: torch.dtype) -> Tensor:  # (n,)
    """A vector of the user's in that dtype, or an error."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got an object of type {type(given).__name__}.")
    if tuple(given.shape) != (n,) or given.is_complex():
        raise ValueError(
            f"{name}: expected real numbers of shape {(n,)}, got {described(given)}; flatten it, or check n."
        )
    converted = given.detach().to(dtype)
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(f"{name}: expected a finite vector, got NaN or infinity.")
    return converted


def count(name: str, value: int, smallest: int, meaning: str = "") -> int:
    """A number of things."""
    if not is_integer(value):
        raise TypeError(str(wrong(name, "an int", value)))
    if value < smallest:
        raise ValueError(f"{name}: expected at least {meaning}{smallest}, got {value}.")
    return int(value)
