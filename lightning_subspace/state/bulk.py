"""Large containers of plain data, looked through level by level.

A vocabulary of a million pairs, a table of lists, a replay memory: nothing in it but numbers, text, tensors, arrays and
further containers. Each level is taken as a whole, by functions that loop in C: its types, its contents, and whether
they are what they were. Comparing a million entries takes milliseconds, walking them one by one seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_subspace.state.containers import fill_dict, fill_list, fill_set, read_dict

SMALLEST = 128  # items; walking fewer takes well below a millisecond
DEEPEST = 8  # levels
MOST = 1 << 26  # items in all; references to these alone take half a gigabyte
ATOMS = frozenset({str, bytes, int, float, bool, complex, type(None), np.float32, np.float64, np.int32, np.int64})
# Between two values of these that are equal nothing can tell apart, but for their identity and 1 from True.
COMPARED = frozenset({str, bytes, int, type(None)})
READ: dict[type, tuple[Callable[[Any], list[Any]], Callable[[Any, list[Any]], None]]] = {
    list: (list, fill_list),
    deque: (list, fill_list),
    set: (list, fill_set),
    dict: (read_dict, fill_dict),
    defaultdict: (read_dict, fill_dict),
    Counter: (read_dict, fill_dict),
}


@dataclass
class Bulk:
    """A large container, with its contents when it was looked through.

    Attributes:
        root: the container.
        tensors, arrays: all of them in it.
        dtypes: of the tensors.
        levels: containers of one type in one level, and their contents.
    """

    root: Any
    tensors: list[Tensor] = field(default_factory=list)
    arrays: list[np.ndarray[Any, Any]] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    levels: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    _is_exact: bool = True  # whether contents are compared by identity, beyond equality

    @classmethod
    def of(cls, root: Any, smallest: int = SMALLEST) -> Bulk | None:
        """A large container; None if it is small, or not plain.

        Example:
            >>> pairs = [(str(i), [i]) for i in range(1000)]
            >>> bulk = Bulk.of(pairs)
            >>> pairs[7][1].append("new"); bulk.has_changed()
            True
            >>> bulk.restore(); pairs[7], Bulk.of([object()] * 1000), Bulk.of([1])
            (('7', [7]), None, None)
        """
        if (type(root) not in READ and not _is_tuple(type(root))) or len(root) < smallest:
            return None
        found, level = cls(root), [root]
        types: set[type] = set()
        for _ in range(DEEPEST):
            kinds = set(map(type, level))
            types |= kinds
            below: list[Any] = []
            for kind in kinds - ATOMS:
                members = level if len(kinds) == 1 else [value for value in level if type(value) is kind]
                inside = found._enter(kind, members)
                if inside is None:
                    return None
                below.extend(inside)
            if not below:
                found._is_exact = bool(types & ATOMS - COMPARED) or bool(found.tensors or found.arrays)
                return found
            level = below
        return None

    def _enter(self, kind: type, members: list[Any]) -> Iterable[Any] | None:
        """What objects of one type hold; None if they are not plain."""
        if kind is Tensor:
            self.tensors.extend(members)
            self.dtypes.update(tensor.dtype for tensor in members)
            return None if any(tensor.requires_grad for tensor in members) else ()
        if kind is np.ndarray:
            self.arrays.extend(members)
            return None if any(array.dtype.hasobject for array in members) else ()
        if kind in READ:  # several references to one container are one
            members = list(dict(zip(map(id, members), members, strict=True)).values())
        elif not _is_tuple(kind) and kind is not frozenset:
            return None
        if sum(map(len, members)) > MOST:
            return None
        if kind not in READ:
            return chain.from_iterable(members)
        contents = list(map(READ[kind][0], members))
        self.levels.append((members, contents))
        return chain.from_iterable(contents)

    @property
    def length(self) -> int:
        """The number of items of the container itself, at first."""
        return len(self.levels[0][1][0]) if self.levels else len(self.root)

    def has_grown(self) -> bool:
        """Whether the container has another length, which takes no time to see."""
        if not self.levels:
            return False
        return len(self.root) * (2 if isinstance(self.root, dict) else 1) != self.length

    def has_changed(self) -> bool:
        """Whether any container in it holds anything else than it did."""
        return any(not self._is_as_before(*level) for level in self.levels)

    def restore(self) -> None:
        """Put back the contents of all containers in it."""
        for members, contents in self.levels:
            if not self._is_as_before(members, contents):
                fill = READ[type(members[0])][1]
                for member, items in zip(members, contents, strict=True):
                    fill(member, items)

    def _is_as_before(self, members: list[Any], contents: list[Any]) -> bool:
        kind = type(members[0])
        now = members if kind is list else list(map(READ[kind][0], members))
        if not self._is_exact:
            try:
                return bool(now == contents)
            except Exception:  # something came in that cannot be compared
                return False
        if list(map(len, now)) != list(map(len, contents)):
            return False
        return all(map(is_, chain.from_iterable(now), chain.from_iterable(contents)))


def _is_tuple(kind: type) -> bool:
    return kind is tuple or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
