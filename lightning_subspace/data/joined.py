"""Joined micro-batches: several as one, leaf by leaf.

A small batch takes as long to start as a large one. Batches whose data have one structure are concatenated along the
dimension of the examples: tensors of one type and shape but for their length, lists of as many items as there are
examples; what else they hold has to be equal. Whether the loss of the joined batch is the mean of theirs is another
question (`curvature/joining.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_subspace.data.assignment import group_by_round, owner_rank
from lightning_subspace.data.cut import PLAIN, UncuttableError, common_length, cut
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.copies import tensors_of
from lightning_subspace.state.fields import fields, with_fields
from lightning_subspace.state.layouts import bytes_of

Structure = tuple[Any, ...]
NUMBER = 8  # bytes of a number, and of what else has no parts


def grouped(batches: Sequence[MicroBatch], ranks: Ranks, most: int, nbytes: float = math.inf) -> list[tuple[int, ...]]:
    """Positions of the micro-batches that become one, in order. A collective.

    Whole rounds are joined, in which each rank evaluates one, so that any number of ranks has as many evaluations as
    the others. Even and odd positions stay apart: they are the halves that the error bar compares.

    Args:
        batches: the sample, of all ranks.
        ranks: the process group.
        most: how many become one, at most.
        nbytes: what the data of one may have, at most, by `data_bytes`.

    Example:
        >>> sample = [MicroBatch(torch.zeros(2, 3), 2.0, i, size=2) for i in range(6)]
        >>> grouped(sample, Ranks(), most=8), grouped(sample, Ranks(), most=2)
        ([(0, 2, 4), (1, 3, 5)], [(0, 2), (1, 3), (4,), (5,)])
    """
    own = [batch for batch in batches if owner_rank(batch, ranks) == ranks.index]
    kinds: dict[tuple[int, int], str] = {}
    sizes: dict[tuple[int, int], int] = {}
    told = {batch.key: (kind, data_bytes(batch.data)) for batch in own if (kind := _kind(batch)) is not None}
    for found in ranks.all_gather_object(told):
        kinds.update({key: kind for key, (kind, _) in found.items()})
        sizes.update({key: size for key, (_, size) in found.items()})
    positions = {batch.key: position for position, batch in enumerate(batches)}
    open_groups: dict[Any, list[list[int]]] = {}  # one list a rank, of what may still be joined
    groups: list[list[int]] = []
    for together in group_by_round(batches, ranks):
        by_rank = sorted(together, key=lambda batch: owner_rank(batch, ranks))
        places = [positions[batch.key] for batch in by_rank]
        alike = tuple((place % 2, kinds.get(batch.key)) for place, batch in zip(places, by_rank, strict=True))
        can_join = len(together) == ranks.count and all(kind is not None for _, kind in alike)
        group = open_groups.get(alike) if can_join else None
        if (
            group is None
            or len(group[0]) == most
            or any(
                sum(sizes[batches[member].key] for member in (*members, place)) > nbytes
                for members, place in zip(group, places, strict=True)
            )
        ):
            group = [[] for _ in places]
            groups.extend(group)
            if can_join:
                open_groups[alike] = group
        for members, place in zip(group, places, strict=True):
            members.append(place)
    return sorted(map(tuple, groups))


def joined(members: Sequence[MicroBatch]) -> MicroBatch:
    """One micro-batch of several whose data have one structure.

    Index, `batch_idx` and random seed are those of the first; weights and numbers of examples add up. One that is not
    on this rank is not made.

    Example:
        >>> both = joined([MicroBatch(torch.zeros(2, 3), 2.0, 4, size=2), MicroBatch(torch.ones(3, 3), 3.0, 6, size=3)])
        >>> both.data.shape, both.weight, both.index, both.size
        (torch.Size([5, 3]), 5.0, 4, 5)
    """
    first = members[0]
    if len(members) == 1:
        return first
    total, size = sum(batch.weight for batch in members), sum(batch.size for batch in members)
    one = replace(first, weight=total, size=size, checksum=0)
    if not all(batch.is_local for batch in members):
        return replace(one, data=None, is_local=False)
    # By their sizes values of the joined one and of its first member are told apart (`place_of`).
    size = sum(batch.size or _length(batch) for batch in members)
    data = _concatenated([batch.data for batch in members], _structure(first.data, _length(first)))
    off_cpu = first.off_cpu
    if off_cpu and len(set(off_cpu)) == 1:
        off_cpu = off_cpu[:1] * len(tensors_of(data))
    return replace(one, data=data, size=size, off_cpu=off_cpu)


def data_bytes(value: Any) -> int:
    """Bytes of the examples, roughly for what is no array.

    Example:
        >>> data_bytes({"x": torch.zeros(2, 3), "names": ["a", "bcd"]})
        28
    """
    total, left, seen = 0, [value], dict[int, Any]()  # examples may be objects that refer to each other
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            total += bytes_of(item)
        elif isinstance(item, np.ndarray | str | bytes):
            total += int(item.nbytes) if isinstance(item, np.ndarray) else len(item)
        elif not (inner := fields(item)):
            total += NUMBER
        elif id(item) not in seen:
            seen[id(item)] = item  # kept, so that no id is used again
            left.extend(inner.values())
    return total


def _kind(batch: MicroBatch) -> str | None:
    """What batches have in common that can be joined; None: it cannot."""
    try:
        structure = _structure(batch.data, _length(batch))
    except UncuttableError:
        return None
    off_cpu = batch.off_cpu
    if off_cpu is not None and len(set(off_cpu)) > 1 and _has_lists_of_examples(structure):
        return None  # they have more tensors together, and nothing says which of them are on the CPU
    where = off_cpu if off_cpu is None or len(set(off_cpu)) > 1 else set(off_cpu)
    return repr((structure, where, batch.transferred, batch.draw))


def _length(batch: MicroBatch) -> int:
    length = common_length(batch.data, batch.size)
    if length is None:
        raise UncuttableError
    return length


def _structure(value: Any, length: int) -> Structure:
    """All but the examples themselves, as nested tuples that can be printed.

    The first entry says how values of this structure are joined.

    Raises:
        UncuttableError: for what cannot be joined, as what cannot be cut.
    """
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor | np.ndarray):
        cut(value, length, slice(0, 1))  # whether it has as many examples
        if isinstance(value, Tensor) and (vars(value) or value.requires_grad):
            raise UncuttableError
        return "array", name, str(value.dtype), str(getattr(value, "device", "")), tuple(value.shape[1:])
    if isinstance(value, PLAIN):
        return "equal", name, value
    items = fields(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        if items and all(isinstance(item, PLAIN) for item in items.values()):
            if len(value) != length:
                raise UncuttableError
            return "items", name
        try:
            return "fields", name, tuple((key, _structure(item, length)) for key, item in items.items())
        except UncuttableError:
            if len(value) != length or any(isinstance(item, PLAIN) for item in items.values()):
                raise
            return "items", name  # a list of examples
    cut(value, length, slice(0, 1))  # whether it is of a kind that can be made anew
    return "fields", name, tuple((key, _structure(item, length)) for key, item in items.items())


def _has_lists_of_examples(structure: Structure) -> bool:
    if structure[0] == "fields":
        return any(_has_lists_of_examples(inner) for _, inner in structure[2])
    return bool(structure[0] == "items")


def _concatenated(values: Sequence[Any], structure: Structure) -> Any:
    how, first = structure[0], values[0]
    if how == "equal":
        return first
    if how == "array":
        return torch.cat(list(values)) if isinstance(first, Tensor) else np.concatenate(list(values))
    if how == "items":
        return type(first)(chain.from_iterable(values))
    every: list[Mapping[Any, Any]] = [fields(value) for value in values]
    return with_fields(first, {key: _concatenated([one[key] for one in every], inner) for key, inner in structure[2]})
