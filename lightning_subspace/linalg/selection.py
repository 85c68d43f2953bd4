"""Selection of the wanted Ritz pairs, from any end of the spectrum.

Values are listed *best first*: the first c of the list are the best choice of c values, for every c. Each has a
*merit*, larger is better. For "BE" the places alternate: highest, lowest, second highest, second lowest, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_subspace.linalg.lanczos import Lanczos

Which = Literal["LA", "SA", "LM", "BE"]
WHICH: tuple[str, ...] = get_args(Which)


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs, best first; all float64 on the CPU."""

    values: Tensor  # (m,)
    rotation: Tensor  # (m, m) columns: Ritz vectors in terms of the basis
    reducible: Tensor  # (m,) the part of the residual estimates that further matvecs reduce
    residuals: Tensor  # (m,) the residual estimates


class Neighbour(NamedTuple):
    """The unwanted Ritz value closest to the wanted ones at one end."""

    gap: float  # its distance, in merit
    value: float
    residual: float


def ritz_pairs(lanczos: Lanczos, which: Which, num_locked: int = 0) -> Ritz:
    """Ritz pairs of a factorisation, best first, behind the locked rows."""
    if num_locked == 0:
        values, rotation = lanczos.ritz()
    else:
        values, rotation = torch.linalg.eigh(lanczos.projected[num_locked:, num_locked:])
    order = best_first(values, which)
    values, rotation = values[order], rotation[:, order]
    if num_locked > 0:
        values = torch.cat([lanczos.projected.diagonal()[:num_locked], values])
        rotation = torch.block_diag(torch.eye(num_locked, dtype=torch.float64, device="cpu"), rotation)
    return Ritz(values, rotation, *lanczos.residuals(rotation))


def neighbours(ritz: Ritz, k: int, which: Which, remembered: Sequence[Neighbour]) -> list[Neighbour]:
    """The closest unwanted value at each end, seen now or remembered."""
    closest = []
    for end, place in enumerate(last_places(k, which) if len(ritz.values) >= k else []):
        merits = merit_in_place(ritz.values, place, which)
        candidates = []
        if merits.numel() > k:
            i = k + int(merits[k:].argmax())
            gap = float(merits[place] - merits[i])
            candidates.append(Neighbour(gap, float(ritz.values[i]), float(ritz.residuals[i])))
        for before in remembered[end : end + 1]:
            merit_then = merit_in_place(ritz.values.new_tensor(before.value), place, which)
            candidates.append(before._replace(gap=float(merits[place] - merit_then)))
        closest += [min(candidates)] if candidates else []
    return closest


def closest_of(behind: Sequence[Neighbour], default_gap: float = math.nan) -> Neighbour:
    """The neighbour with the smallest gap, or one with `default_gap`."""
    return min(behind, default=Neighbour(default_gap, value=math.nan, residual=math.nan))


def best_first(values: Tensor, which: Which) -> Tensor:
    """Indices, a permutation of `range(m)`, that list values, (m,), best first.

    Example:
        >>> values = torch.tensor([1.0, -5.0, 3.0, 2.0])
        >>> for which in WHICH:
        ...     print(which, values[best_first(values, which)].tolist())
        LA [3.0, 2.0, 1.0, -5.0]
        SA [-5.0, 1.0, 2.0, 3.0]
        LM [-5.0, 3.0, 2.0, 1.0]
        BE [3.0, -5.0, 2.0, 1.0]
    """
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)
    ascending = values.argsort(stable=True)
    descending = ascending.flip(0)
    if which in ("SA", "LA"):
        return ascending if which == "SA" else descending
    return torch.stack([descending, ascending], dim=1).flatten()[: values.numel()]


def merit(values: Tensor, which: Which) -> Tensor:
    """Merits, (m,), of values listed best first: they fall at each end."""
    return values.abs() if which == "LM" else _signs(values.numel(), which) * values


def ends(k: int, which: Which) -> list[slice]:
    """The places of each end in a list of k values."""
    return [slice(0, None, 2), slice(1, None, 2)][: min(k, 2)] if which == "BE" else [slice(None)]


def last_places(k: int, which: Which) -> list[int]:
    """The last wanted place at each end: behind it lies a gap."""
    return [k - 1, k - 2] if which == "BE" and k > 1 else [k - 1]


def merit_in_place(values: Tensor, place: int, which: Which) -> Tensor:
    """Merits, (m,), of values as if all stood in one place."""
    return values.abs() if which == "LM" else _sign(place, which) * values


def decisive_values(wanted: Tensor, which: Which, margin: Callable[[float], float]) -> list[float]:  # (k,) best first
    """The found eigenvalues whose missed copies would matter, one an end.

    A copy matters if its merit is better than the last wanted one by more than the `margin` of that one. Of these
    values of an end the innermost is the hardest to exclude (see `Certificate`), so it stands for those beyond it.
    """
    beyond = [(sign, merits[merits > last + margin(last)]) for sign, merits, last in _by_end(wanted, which)]
    return [sign * float(merits.min()) for sign, merits in beyond if merits.numel() > 0]


def gap_values(wanted: Tensor, which: Which, width: float) -> list[float]:  # (k,) best first
    """The places that lie `width` behind the last wanted value."""
    return [sign * (last - width) for sign, _, last in _by_end(wanted, which)]


def report_order(k: int, which: Which) -> list[int]:
    """Places in the order of the report: for "BE" end by end."""
    return [*range(0, k, 2), *range(1, k, 2)] if which == "BE" else list(range(k))


def _sign(place: int, which: Which) -> float:
    # +1 if larger is better in this place, -1 if smaller is.
    return -1.0 if which == "SA" or (which == "BE" and place % 2 == 1) else 1.0


def _signs(size: int, which: Which) -> Tensor:
    return torch.tensor([_sign(place, which) for place in range(size)], dtype=torch.float64, device="cpu")


def _by_end(wanted: Tensor, which: Which) -> list[tuple[float, Tensor, float]]:
    """Sign, merits and last merit of each end that has wanted values."""
    signs = torch.sign(wanted) if which == "LM" else _signs(wanted.numel(), which)
    merits = merit(wanted, which)
    parts = [(sign, merits[signs == sign]) for sign in (1.0, -1.0)]
    return [(sign, part, float((merits if which == "LM" else part).min())) for sign, part in parts if part.numel() > 0]
