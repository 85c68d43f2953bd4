"""Grouping of parameters: by tensor, module, its type, or patterns."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_subspace._arguments import is_list_like, wrong
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.subspace import WIDENED_AT_ONCE

REST = "other"
SHOWN = 40  # names in a message
WORDS = ("tensors", "modules", "types")
Groups: TypeAlias = Literal["tensors", "modules", "types"] | Mapping[str, str | Iterable[str]]
Patterns = dict[str, tuple[str, ...]]  # by group


@dataclass(frozen=True)
class Grouping:
    """Groups of the parameters of a space; each parameter is in one.

    Attributes:
        names: of the groups.
        of: the number of its group, for each parameter, in the order of the space.
        space: the parameters.

    Example:
        >>> from torch import nn
        >>> space = ParameterSpace.of(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
        >>> grouping = Grouping.by(space, "modules")
        >>> grouping.names, grouping.of, grouping.shares
        (('0', '1'), (0, 0, 1, 1), [0.7272727272727273, 0.2727272727272727])
    """

    names: tuple[str, ...]
    of: tuple[int, ...]
    space: ParameterSpace

    @classmethod
    def by(cls, space: ParameterSpace, groups: Groups) -> Grouping:
        """The groups that a user has asked for.

        Args:
            space: the parameters.
            groups: as `checked_groups` returns them.

        Raises:
            ValueError: for a pattern that matches no name, or that leaves its group empty.
        """
        if isinstance(groups, Mapping):
            return cls._labelled(space, _by_patterns(space, {name: tuple(found) for name, found in groups.items()}))
        if groups == "types":
            return cls._labelled(space, space.types)
        return cls._labelled(space, [name if groups == "tensors" else ".".join(_path(name)) for name in space.names])

    @classmethod
    def coarse(cls, space: ParameterSpace, most: int) -> Grouping:
        """By module, as deep as there are few enough groups.

        Neighbours among numbered modules are joined where that is enough: "h.0-1". Where even the outermost modules are
        more, the smaller ones are one. Names are as short as tells them apart.
        """
        paths = [_path(name) for name in space.names]
        depths = range(max(map(len, paths)), 0, -1)
        cuts = (_joined([path[:depth] for path in paths], count) for depth in depths for count in range(1, most))
        cut = next((cut for cut in cuts if len(set(cut)) <= most), [path[:1] for path in paths])
        short = _short_names(set(cut))
        return cls._labelled(space, [short[path] for path in cut]).at_most(most)

    @property
    def sizes(self) -> list[int]:
        """Coordinates of each group."""
        sizes = [0] * len(self.names)
        for group, numel in zip(self.of, self.space.numels, strict=True):
            sizes[group] += numel
        return sizes

    @property
    def shares(self) -> list[float]:
        """n_l / n of each group: its share of a random direction."""
        return [size / self.space.n for size in self.sizes]

    def at_most(self, most: int) -> Grouping:
        """The same with no more groups: the smaller ones are `other`."""
        if len(self.names) <= most:
            return self
        largest = sorted(range(len(self.names)), key=lambda group: -self.sizes[group])[: most - 1]
        kept = [name if group in largest else REST for group, name in enumerate(self.names)]
        return self._labelled(self.space, [kept[group] for group in self.of])

    def members(self, group: int) -> set[str]:
        """Names of the parameters of a group."""
        return {name for name, own in zip(self.space.names, self.of, strict=True) if own == group}

    def sums(self, partition: Partition, values: Callable[[slice], Tensor]) -> Tensor:  # (groups, q) float64
        """Sums over the coordinates of each group, by one all-reduce.

        Args:
            partition: of the coordinates over ranks.
            values: the sums over a slice of local coordinates, perhaps an empty one, (q,) float64.
        """
        return partition.ranks.all_reduce(self.local_sums(partition, values)).cpu()

    def local_sums(self, partition: Partition, values: Callable[[slice], Tensor]) -> Tensor:  # (groups, q) float64
        """The same over the coordinates of this rank."""
        number = dict(zip(self.space.names, self.of, strict=True))
        nothing = values(slice(0, 0))
        total = nothing.new_zeros(len(self.names), len(nothing))
        for name, _, place in partition.locate():
            for start in range(place.start, place.stop, WIDENED_AT_ONCE):
                total[number[name]] += values(slice(start, min(start + WIDENED_AT_ONCE, place.stop)))
        return total

    @classmethod
    def _labelled(cls, space: ParameterSpace, labels: Iterable[str]) -> Grouping:
        labels = list(labels)
        names = [name for name in dict.fromkeys(labels) if name != REST]
        names += [REST] if REST in labels else []
        return cls(tuple(names), tuple(map(names.index, labels)), space)


def checked_groups(groups: Any) -> Groups:
    """The argument `groups` of a measurement, with tuples of patterns.

    Raises:
        ValueError: for another word, or a mapping without names or patterns.

    Example:
        >>> checked_groups({"attention": "*.attn.*", "mlp": ["*.up.*", "*.down.*"]})
        {'attention': ('*.attn.*',), 'mlp': ('*.up.*', '*.down.*')}
    """  # noqa: DOC501  # `wrong` makes one
    expected = '"tensors", "modules", "types" or a mapping from names to patterns'
    if isinstance(groups, str) and groups in WORDS:
        return groups  # type: ignore[return-value]  # it is one of them
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(name, str) and name for name in groups):
        raise wrong("groups", expected, groups, 'as {"attention": "*.attn.*"}')
    return {name: checked_patterns("groups", given) for name, given in groups.items()}


def checked_patterns(name: str, patterns: Any) -> tuple[str, ...]:
    """A pattern, or several, as a tuple.

    Raises:
        ValueError: for anything else, or none.
    """  # noqa: DOC501  # `wrong` makes one
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns) if is_list_like(patterns) else ()
    if not found or not all(isinstance(pattern, str) and pattern for pattern in found):
        raise wrong(name, "a pattern or a list of patterns", patterns, 'as "*.attn.*"')
    return found


def _by_patterns(space: ParameterSpace, groups: Patterns) -> list[str]:
    """The group of each parameter: the first that fits a name."""
    aliases = space.aliases or tuple((name,) for name in space.names)
    for patterns in groups.values():
        for pattern in patterns:
            if not any(_matches(own, [pattern]) for own in aliases):
                names = [name for own in aliases for name in own]
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                raise ValueError(
                    f"groups: expected patterns of parameter names, got {pattern!r}, which matches none of them; "
                    f"the names are {', '.join(names[:SHOWN])}{more}."
                )
    labels = [next((name for name, found in groups.items() if _matches(own, found)), REST) for own in aliases]
    for name in groups:
        if name not in labels:
            raise ValueError(
                f"groups: expected a parameter in each group, got none in {name!r}, as those that it matches are in "
                "groups before it; put it in front of them."
            )
    return labels


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _path(name: str) -> tuple[str, ...]:
    """The modules above a parameter; of one without, its own name."""
    return tuple(name.split(".")[:-1]) or (name,)


def _joined(paths: Sequence[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """The same with so many numbered neighbours under one name.

    Example:
        >>> _joined([("h", "0"), ("h", "1"), ("h", "2"), ("head",)], count=2)
        [('h', '0-1'), ('h', '0-1'), ('h', '2'), ('head',)]
    """
    if count == 1:
        return list(paths)
    kept = set(paths)

    def name(path: tuple[str, ...]) -> tuple[str, ...]:
        *above, last = path
        if not last.isdigit():
            return path
        first = int(last) // count * count
        there = [str(number) for number in range(first, first + count) if (*above, str(number)) in kept]
        return (*above, there[0] if len(there) == 1 else f"{there[0]}-{there[-1]}")

    return list(map(name, paths))


def _short_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The end of each path that no other has: no lone number.

    Example:
        >>> sorted(_short_names([("gpt", "head"), ("gpt", "h", "0"), ("gpt", "h", "1")]).values())
        ['h.0', 'h.1', 'head']
    """
    ends = Counter(path[-length:] for path in paths for length in range(1, len(path) + 1))
    found = {}
    for path in paths:
        lengths = range(1, len(path) + 1)
        told_apart = (k for k in lengths if ends[path[-k:]] == 1 and path[-k].strip("0123456789-"))
        found[path] = ".".join(path[-next(told_apart, len(path)) :])
    return found
