"""One rule for all four choices of ``which``."""

import pytest
import torch
from torch import Tensor

from lightning_subspace.linalg import Which
from lightning_subspace.linalg.selection import (
    WHICH,
    best_first,
    decisive_values,
    last_places,
    merit,
    merit_in_place,
    report_order,
)

VALUES = torch.tensor([0.5, -4.0, 3.0, 1.0, -2.0, 5.0, 0.0], dtype=torch.float64)


def chosen(values: Tensor, count: int, which: str) -> Tensor:
    """The values wanted, in the order they are reported, straight from the definition."""
    descending = values.sort(descending=True)[0]
    if which == "LA":
        return descending[:count]
    if which == "SA":
        return descending.flip(0)[:count]
    if which == "LM":
        return values[values.abs().sort(descending=True)[1]][:count]
    return torch.cat([descending[: (count + 1) // 2], descending.flip(0)[: count // 2]])


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("which", WHICH)
def test_every_prefix_is_the_best_choice(which: Which, count: int) -> None:
    listed = VALUES[best_first(VALUES, which)][:count]
    assert listed[report_order(count, which)].tolist() == chosen(VALUES, count, which).tolist()


@pytest.mark.parametrize("which", WHICH)
def test_merit_falls_along_the_list(which: Which) -> None:
    merits = merit(VALUES[best_first(VALUES, which)], which)
    for end in [slice(0, 4, 2), slice(1, 4, 2)] if which == "BE" else [slice(None)]:
        assert (merits[end].diff() <= 0).all()


@pytest.mark.parametrize(("which", "places"), [("LA", [3]), ("SA", [3]), ("LM", [3]), ("BE", [3, 2])])
def test_gap_lies_behind_the_last_place_of_each_end(which: Which, places: list[int]) -> None:
    listed = VALUES[best_first(VALUES, which)]
    assert last_places(4, which) == places
    for place in places:
        merits = merit_in_place(listed, place, which)
        assert (merits[place] >= merits[4:]).all()


@pytest.mark.parametrize(
    ("wanted", "which", "expected"),
    [
        ([5.0, 3.0, 1.0], "LA", [3.0]),
        ([5.0, 1.01, 1.0], "LA", [5.0]),
        ([1.02, 1.01, 1.0], "LA", []),
        ([-5.0, -3.0, -1.0], "SA", [-3.0]),
        ([-5.0, 4.0, 3.0, -2.0, 1.0], "LM", [3.0, -2.0]),
        ([5.0, 3.0, -1.0], "LM", [3.0]),
        ([5.0, -5.0], "LM", []),
        ([5.0, -4.0, 3.0, -3.99, 1.0], "BE", [3.0]),
        ([5.0, -4.0, 3.0, -2.0], "BE", [5.0, -4.0]),
        ([5.0], "BE", []),
    ],
)
def test_innermost_value_whose_copy_would_matter(wanted: list[float], which: Which, expected: list[float]) -> None:
    assert decisive_values(torch.tensor(wanted, dtype=torch.float64), which, lambda last: 0.03) == expected
