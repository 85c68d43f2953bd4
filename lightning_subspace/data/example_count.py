"""Number of examples in a batch, told from its structure.

Every place in a batch gives a reading: a tensor its first dimension, a list of like things its length and what the
things agree in, a graph batch its `num_graphs`. Where readings differ, the loader's batch size decides, and the places
that matched are remembered: a shorter last batch is read there too. Of a list of batches all are known, and a place
that has 32, 32, 8 beats one that has 2, 2, 2. Without any of these the majority decides. A tie stays unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_subspace.state.fields import fields, is_named_tuple

Key = TypeVar("Key")

TRUSTED = ("num_graphs", "batch_size")  # of the batches of torch_geometric, DGL and tensordict
LENGTH, EACH = "len()", "[*]"  # places: the length of a list, and what all its items agree in
MOST_DEPTH = 6
BUILT_IN = (type(None), str, bytes, int, float, bool, complex, dict, list, tuple, set)
MOST_SINGLE = 8  # items of a list that are read one by one where they do not agree
# A list of two or three like tensors is rather (x, y) or two views than two examples; of more, nobody can say.
FEW_FIELDS = 3


class Reading(NamedTuple):
    """What one place in a batch says about the number of examples.

    Attributes:
        length: the number.
        votes: 2 for a tensor or a list of containers, 1 for a list of plain values, 3 for like tensors that agree.
        is_square: whether it is of a square matrix, which often belongs to the whole.
        is_trusted: whether an attribute says so.
    """

    length: int
    votes: int = 2
    is_square: bool = False
    is_trusted: bool = False


class ExampleCounter:
    """Counter of examples that remembers where they are counted.

    Args:
        batch_size: what the loader puts into a batch, if it is known.

    Attributes:
        learned: places where the number is read, with what they said first; set the same on all ranks.

    Example:
        >>> counter = ExampleCounter(batch_size=3)
        >>> counter.count({"x": torch.zeros(3, 5), "edges": torch.zeros(7, 2)})
        3
        >>> counter.count({"x": torch.zeros(1, 5), "edges": torch.zeros(4, 2)})
        1
        >>> ExampleCounter().count({"x": torch.zeros(3, 5), "edges": torch.zeros(7, 2)}) is None
        True
    """

    def __init__(self, batch_size: int | None = None) -> None:
        self.batch_size = batch_size
        self.learned: dict[str, int] = {}

    def count(self, batch: Any) -> int | None:
        """The number of examples; None if it is not known."""
        return self.count_of(readings(batch))

    def count_of(self, found: Mapping[str, Reading]) -> int | None:
        """The number of examples in a batch with these readings."""
        most = float("inf") if self.batch_size is None else self.batch_size
        if known := {place: found[place] for place in self.learned if place in found and found[place].length <= most}:
            return self._narrow(known)
        trusted = {place: reading for place, reading in found.items() if reading.is_trusted}
        matched = {place: reading for place, reading in found.items() if reading.length == self.batch_size}
        for candidates in (trusted, matched):
            lengths = {reading.length for reading in candidates.values()}
            if len(lengths) == 1:
                self.learned = dict.fromkeys(candidates, *lengths)
                return lengths.pop()
        length = majority(found)
        if length is not None and self.batch_size is None:
            self.learned = {place: length for place, reading in found.items() if reading.length == length}
        return length

    def learn(self, batches: Sequence[Mapping[str, Reading]]) -> bool:
        """Find the places from the readings of all batches.

        Returns:
            Whether they are found. Where no place varies any will do: weights are equal then.
        """
        common = [place for place in batches[0] if all(place in found for found in batches)] if batches else []
        columns = _unambiguous({place: tuple(found[place].length for found in batches) for place in common})
        votes: Counter[tuple[int, ...]] = Counter()
        for place, column in columns.items():
            votes[column] += sum(found[place].votes for found in batches)
        trusted = [column for place, column in columns.items() if batches[0][place].is_trusted]
        matched = [column for column in votes if max(column) == self.batch_size]
        varying = [column for column in votes if len(set(column)) > 1]
        regular = [column for column in varying if len(set(column[:-1])) == 1 and column[-1] < column[0]]
        squares = {columns[place] for place in columns if all(found[place].is_square for found in batches)}
        other = [column for column in votes if set(column) != {1}] or list(votes)
        plain = [column for column in other if column not in squares]
        if not varying:
            chosen = max(votes, key=votes.__getitem__, default=None)
        else:
            matched = [column for column in matched if column in varying] or matched
            found = (_winner(votes, columns_) for columns_ in (trusted, matched, regular, other, plain))
            chosen = next((column for column in found if column is not None), None)
        if chosen is not None:
            self.learned = {place: column[0] for place, column in columns.items() if column == chosen}
        return chosen is not None

    def _narrow(self, known: Mapping[str, Reading]) -> int:
        """Read the known places, and keep those that agree.

        Where they differ, what most say counts, and in a tie what has changed.
        """
        clear = _unambiguous({place: (self.learned[place], reading.length) for place, reading in known.items()})
        known = {place: known[place] for place in clear}
        votes: Counter[int] = Counter()
        for reading in known.values():
            votes[reading.length] += reading.votes
        best = [length for length in votes if votes[length] == max(votes.values())]
        changed = [known[place].length for place in known if known[place].length != self.learned[place]]
        length = next((length for length in best if length in changed), best[0])
        if len(votes) > 1:
            self.learned = {place: self.learned[place] for place in known if known[place].length == length}
        return length


def majority(found: Mapping[str, Reading]) -> int | None:
    """The number of examples that most places say, or None.

    In a tie, what is 1 (it is broadcast) and then square matrices (they belong to the whole) do not count.
    """
    everything = list(found.values())
    trusted = [reading for reading in everything if reading.is_trusted]
    several = [reading for reading in everything if reading.length != 1]
    plain = [reading for reading in several if not reading.is_square]
    for readings_ in (trusted, everything, several, plain):
        votes: Counter[int] = Counter()
        for reading in readings_:
            votes[reading.length] += reading.votes
        if (length := _winner(votes, votes)) is not None:
            return length
    return None


def readings(value: Any, place: str = "", depth: int = 0) -> dict[str, Reading]:
    """What each place in a batch says about the number of examples.

    Example:
        >>> {place: reading.length for place, reading in readings({"x": torch.zeros(4, 2), "names": ["a"] * 4}).items()}
        {"['x']": 4, "['names']len()": 4}
    """
    if isinstance(value, PackedSequence):
        return {place: Reading(int(value.batch_sizes[0]))} if len(value.batch_sizes) else {}
    if isinstance(value, Tensor | np.ndarray):
        return _of_tensor(value, place)
    items = fields(value)
    if depth > MOST_DEPTH:
        return {}
    if isinstance(value, list | tuple) and not is_named_tuple(value):
        return _of_list(list(value), place, depth)
    found: dict[str, Reading] = {}
    for name in TRUSTED:
        if (number := _trusted(value, items, name)) is not None:
            found[f"{place}.{name}"] = Reading(number, is_trusted=True)
    for key, item in items.items():
        found.update(readings(item, f"{place}[{key!r}]", depth + 1))
    return found


def _of_tensor(value: Any, place: str) -> dict[str, Reading]:
    if isinstance(value, Tensor) and value.is_nested:
        return {place: Reading(int(value.size(0)))}
    if value.ndim == 0:
        return {}
    is_square = value.ndim == 2 and value.shape[0] == value.shape[1] and value.shape[0] > 1
    return {place: Reading(int(value.shape[0]), is_square=is_square)}


def _of_list(items: list[Any], place: str, depth: int) -> dict[str, Reading]:
    if not items:
        return {}
    if len({_kind(item) for item in items}) > 1:
        nested = (readings(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(items))
        return {key: reading for found in nested for key, reading in found.items()}
    own = {place + LENGTH: Reading(len(items), votes=1)}
    inside = [readings(item, "", depth + 1) for item in items]
    if not inside[0]:
        return own
    are_few, agreed = len(items) <= FEW_FIELDS, dict[str, Reading]()
    for key, first in inside[0].items():
        if all(key in found and found[key].length == first.length for found in inside):
            votes = 3 if are_few and not _is_image(items[0]) else first.votes
            agreed[place + EACH + key] = first._replace(votes=votes, is_trusted=False)
    if agreed:
        # many containers are examples, and what they agree in is of one example; many tensors may be either
        is_of_examples = not are_few and not isinstance(items[0], Tensor | np.ndarray)
        votes = 1 + sum(reading.votes for reading in agreed.values()) if is_of_examples else 2
        return {place + LENGTH: Reading(len(items), votes), **agreed}
    own = {place + LENGTH: Reading(len(items), 0 if are_few else 2)}
    if len(items) <= MOST_SINGLE:  # (x, adjacency), or texts of different lengths
        for i, found in enumerate(inside):
            own.update({f"{place}[{i}]{key}": reading._replace(votes=1) for key, reading in found.items()})
    return own


def _is_image(value: Any) -> bool:
    """Whether a value has the shape of one image, channels first."""
    return isinstance(value, Tensor) and not value.is_nested and value.ndim == 3 and value.shape[0] in (1, 3, 4)


def _kind(value: Any) -> Any:
    """What things in a list have in common if they are alike."""
    if isinstance(value, Tensor) and not value.is_nested:
        return Tensor, value.ndim, value.dtype.is_floating_point or value.dtype.is_complex
    if isinstance(value, np.ndarray):
        return np.ndarray, value.ndim, value.dtype.kind
    if isinstance(value, Mapping):
        return Mapping, frozenset(map(repr, value))
    return (int | float) if isinstance(value, int | float) else type(value)


def _trusted(value: Any, items: Mapping[Any, Any], name: str) -> int | None:
    number = items.get(name)
    if number is None and type(value) not in BUILT_IN:
        try:
            number = getattr(value, name, None)
        except Exception:  # a property of the user's
            return None
    if isinstance(number, torch.Size) and number:
        number = number[0]
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else None


def _unambiguous(columns: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Leave out what stays the same beside what varies, in one list."""
    dropped: set[str] = set()
    for place, column in columns.items():
        if not place.endswith(LENGTH):
            continue
        inside = [other for other in columns if other.startswith(place.removesuffix(LENGTH) + "[")]
        if len(set(column)) == 1 and any(len(set(columns[other])) > 1 for other in inside):
            dropped.add(place)
        elif len(set(column)) > 1:
            dropped.update(other for other in inside if len(set(columns[other])) == 1)
    return {place: column for place, column in columns.items() if place not in dropped}


def _winner(votes: Mapping[Key, int], candidates: Iterable[Key]) -> Key | None:
    """The candidate with most votes, None in a tie."""
    ranked = sorted(set(candidates), key=lambda candidate: -votes[candidate])
    if not ranked or (len(ranked) > 1 and votes[ranked[0]] == votes[ranked[1]]):
        return None
    return ranked[0]
