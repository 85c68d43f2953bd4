"""Which end of the spectrum is wanted, and what that makes of a list of Ritz values.

All four choices become one rule. Values are listed *best first*: the first ``c`` of the list are the best choice of
``c`` values, for every ``c``. Each has a *merit*, larger is better. For ``"BE"`` the places of the list alternate:
highest, lowest, second highest, second lowest, ...
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Which = Literal["LA", "SA", "LM", "BE"]
WHICH: tuple[str, ...] = get_args(Which)


def best_first(values: Tensor, which: Which) -> Tensor:
    """Indices that list ``values`` best first.

    Args:
        values: Eigenvalues or Ritz values in any order, shape ``(m,)``.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest magnitude, ``"BE"`` both ends, alternating.

    Returns:
        A permutation of ``range(m)``.

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
    if which == "SA":
        return ascending
    descending = ascending.flip(0)
    if which == "LA":
        return descending
    return torch.stack([descending, ascending], dim=1).flatten()[: values.numel()]


def merit(values: Tensor, which: Which) -> Tensor:
    """The merit of values that are listed best first, shape ``(m,)``: it falls along the list ("BE": at each end)."""
    return values.abs() if which == "LM" else _signs(values.numel(), which) * values


def ends(k: int, which: Which) -> list[slice]:
    """The places of each end in a list of ``k`` values."""
    return [slice(0, None, 2), slice(1, None, 2)][: min(k, 2)] if which == "BE" else [slice(None)]


def last_places(k: int, which: Which) -> list[int]:
    """The last wanted place at each end: behind it lies a gap."""
    return [k - 1, k - 2] if which == "BE" and k > 1 else [k - 1]


def outward(values: Tensor, place: int, which: Which) -> Tensor:
    """The merit that ``values`` would have in one and the same ``place``, shape ``(m,)``."""
    return values.abs() if which == "LM" else _sign(place, which) * values


def decisive_values(wanted: Tensor, which: Which, margin: float) -> list[float]:
    """The found eigenvalues whose missed copies would matter, one for each end that has any.

    A copy matters if its merit exceeds that of the last wanted value by more than ``margin``. Of all such values of an
    end the innermost is returned: it is the hardest to exclude (see `Certificate`), so it speaks for those beyond it.

    Args:
        wanted: The found eigenvalues, best first, shape ``(k,)``.
        which: Which ends are wanted.
        margin: How much a copy has to improve on the last wanted value, in units of the eigenvalues.

    Returns:
        None, one or (``"LM"``, ``"BE"``) up to two eigenvalues.
    """
    decisive = []
    for sign, merits, last in _by_end(wanted, which):
        beyond = merits[merits > last + margin]
        if beyond.numel() > 0:
            decisive.append(sign * float(beyond.min()))
    return decisive


def edge_values(wanted: Tensor, which: Which, margin: float) -> list[float]:
    """Just beyond the last wanted value of each end that has any, by ``margin``; arguments as in `decisive_values`."""
    return [sign * (last + margin) for sign, _, last in _by_end(wanted, which)]


def report_order(k: int, which: Which) -> list[int]:
    """Places in the order they are reported: as they are, but with ``"BE"`` the high end first, then the low end."""
    return [*range(0, k, 2), *range(1, k, 2)] if which == "BE" else list(range(k))


def _sign(place: int, which: Which) -> float:
    """+1 if a larger value is better in this place of a best-first list, -1 if a smaller one is."""
    return -1.0 if which == "SA" or (which == "BE" and place % 2 == 1) else 1.0


def _signs(size: int, which: Which) -> Tensor:
    return torch.tensor([_sign(place, which) for place in range(size)], dtype=torch.float64, device="cpu")


def _by_end(wanted: Tensor, which: Which) -> list[tuple[float, Tensor, float]]:
    """For each end of the spectrum with wanted values: its sign, their merits, and the merit of the last one."""
    signs = torch.sign(wanted) if which == "LM" else _signs(wanted.numel(), which)
    merits = wanted.abs() if which == "LM" else signs * wanted
    parts = [(sign, merits[signs == sign]) for sign in (1.0, -1.0)]
    return [(sign, part, float((merits if which == "LM" else part).min())) for sign, part in parts if part.numel() > 0]
