"""The arguments of `eigsh`: checked, and completed with defaults."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_subspace.linalg.agreement import Agreement, AllSum
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.linalg.selection import WHICH

RandomVector = Callable[[int, int], Tensor]

# Below these the residual estimates go on falling, but the true residuals do not.
SMALLEST_TOL = {torch.float32: 1e-5, torch.float64: 1e-12}

_SEED_STRIDE = 1_000_003  # keeps the vectors of neighbouring seeds apart


def random_vectors(
    all_sum: AllSum | None, random: RandomVector | None, n: int, seed: int, dtype: torch.dtype
) -> Callable[[int], Tensor]:
    """``draw(i)``: this rank's slice of the i-th random vector."""
    if all_sum is not None and random is None:
        raise ValueError(
            "Expected `random` along with `all_sum` but got None: without it every rank would draw the same slice. "
            "Pass a function (seed, i) -> this rank's slice of the i-th global random vector."
        )

    def own(seed: int, i: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed((seed * _SEED_STRIDE + i) % 2**63)
        return torch.randn(n, generator=generator, dtype=dtype, device="cpu")

    source = own if random is None else random

    def draw(i: int) -> Tensor:
        vector = source(seed, i)
        if tuple(vector.shape) != (n,):
            raise ValueError(f"Expected `random` to return shape {(n,)} but got {tuple(vector.shape)}. Check `n`.")
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(f"Expected `random({seed}, {i})` to be finite but it is not.")
        return vector

    return draw


def global_dimension(dimension: int | None, n: int, agreement: Agreement, device: torch.device) -> int:
    """The dimension of the whole space. ``n`` differs between ranks, and may be wrong on one of them."""
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
        raise ValueError("Expected `n` to be the length of a vector, but on another rank it is none.")
    return int(total)


def check(k: int, which: str, dimension: int, max_matvecs: int, verify: str, delta: float, dtype: torch.dtype) -> None:
    """Refuse what is out of range."""
    _check_count("k", k, 1)
    _check_count("max_matvecs", max_matvecs, 1)
    if k > dimension:
        raise ValueError(f"Expected `k` to be at most the dimension of the space, {dimension}, but got {k}. Lower `k`.")
    if which not in WHICH:
        raise ValueError(f"Expected `which` to be one of {WHICH} but got {which!r}.")
    if verify not in ("always", "never"):
        raise ValueError(f"Expected `verify` to be 'always' or 'never' but got {verify!r}.")
    if not 0 < delta < 1:
        raise ValueError(f"Expected `delta`, a probability, to lie in (0, 1) but got {delta}.")
    if dtype not in SMALLEST_TOL:
        raise ValueError(
            f"Expected `dtype` to be torch.float32 or torch.float64 but got {dtype}: in lower precision Lanczos "
            "vectors do not stay orthogonal. Convert inside `matvec` if the operator needs another dtype."
        )


def tolerances(tol: float, subspace_tol: float | None, dtype: torch.dtype) -> tuple[float, float]:
    """``tol``, and the smallest residual ``subspace_tol`` may ask for, both relative to scale and within the dtype."""
    if not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"Expected `tol` to be positive and finite but got {tol}. The default is 1e-3.")
    if subspace_tol is not None and not (math.isfinite(subspace_tol) and subspace_tol > 0):
        raise ValueError(
            f"Expected `subspace_tol` to be positive and finite but got {subspace_tol}. Pass None to turn it off."
        )
    smallest = SMALLEST_TOL[dtype]
    if tol < smallest:
        warnings.warn(
            f"`tol` = {tol} is below what {dtype} can reach and was raised to {smallest}. float64 reaches 1e-12.",
            UserWarning,
            stacklevel=3,
        )
    return max(tol, smallest), max(tol / 10, smallest)


def basis_size(ncv: int | None, k: int, dimension: int) -> int:
    """The largest size of the basis."""
    if ncv is None:
        return min(dimension, 2 * k + 10)
    smallest = min(dimension, k + 3)
    _check_count("ncv", ncv, smallest, f"min(dimension, k + 3) = {smallest}")
    return min(ncv, dimension)


def start(lanczos: Lanczos, v0: Tensor | None, n: int, draw: Callable[[int], Tensor]) -> None:
    """Make ``v0``, or a random vector, the first one of the factorisation."""

    def first() -> Tensor:
        return draw(0) if v0 is None else _vector(v0, n, lanczos.basis.dtype)

    if not lanczos.inject(first):
        raise ValueError("Expected `v0` not to be zero but got such a vector. Pass None for a random starting vector.")


def _vector(v0: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(v0, Tensor):
        raise TypeError(f"Expected `v0` to be a Tensor but got {type(v0).__name__}.")
    if tuple(v0.shape) != (n,):
        raise ValueError(f"Expected `v0` to have shape {(n,)} but got {tuple(v0.shape)}. Flatten it, or check `n`.")
    vector = v0.detach().to(dtype)
    if not bool(torch.isfinite(vector).all()):
        raise ValueError("Expected `v0` to be finite but it is not. Pass None for a random starting vector.")
    return vector


def _check_count(name: str, value: int, smallest: int, meaning: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected `{name}` to be an int but got {value!r}.")
    if value < smallest:
        raise ValueError(f"Expected `{name}` to be at least {meaning or smallest} but got {value}.")
