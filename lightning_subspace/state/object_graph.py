"""Python objects that hold state, found by following references.

`walk` goes from some roots through everything that can hold state. Every object stays the same object. It goes in one
of two ways: through a module, whose tensors are to be copied, or around it, where more is followed and nothing copied.
"""

from __future__ import annotations

import math
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_subspace.state.buffers import behind, in_memory
from lightning_subspace.state.bulk import Bulk
from lightning_subspace.state.containers import MutableObject, attributes, built_in, hidden
from lightning_subspace.state.generators import rewind
from lightning_subspace.state.kinds import Kind, is_all_known, is_followed_around, is_state, is_watched, kind_of
from lightning_subspace.state.packages import TRAINING, is_ours, own_globals, package_names
from lightning_subspace.state.thread_objects import runs_threads

RESULTS = "_ResultCollection"  # of what is logged, which is muted; it refers to the batch


@dataclass
class ObjectGraph:
    """Result of a walk.

    Attributes:
        seen: ids of all visited objects.
        containers: the mutable objects.
        generators: for each random generator, a function and its argument that set its state.
        tensors, arrays: all of them, parameters included, but for those in `bulks`.
        iterators: objects that cannot be restored: iterators with hidden state, open files, queues.
        others: objects that were not followed and may hold state.
        mixed: objects that were followed and have more than attributes, in fields of C.
        bulks: large containers of plain data, which were not walked through.
        caches: of `functools`.
        is_whole: whether all was visited.
    """

    seen: set[int]
    containers: list[MutableObject] = field(default_factory=list)
    generators: list[tuple[Callable[[Any], Any], Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    arrays: list[np.ndarray[Any, Any]] = field(default_factory=list)
    iterators: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    mixed: list[Any] = field(default_factory=list)
    bulks: list[Bulk] = field(default_factory=list)
    caches: list[Any] = field(default_factory=list)
    is_whole: bool = True


def walk(
    roots: Iterable[Any],
    packages: frozenset[str],
    seen: Iterable[int] = (),
    *,
    around: bool = False,
    most: float = math.inf,
    bulk: Callable[[Any], Bulk | None] = lambda value: None,
) -> ObjectGraph:
    """Find everything that can be reached from the roots, once.

    Args:
        roots: objects to begin with.
        packages: a plain object is followed if its class comes from one of these.
        seen: ids of objects that are not visited again.
        around: whether objects of all other packages are followed, too, nearest first.
        most: how many objects are visited.
        bulk: tells large containers of plain data, which are not walked through.

    Raises:
        TypeError: for a TorchScript module.

    Example:
        >>> [container.items for container in walk([{"a": [1, 2]}], frozenset()).containers]
        [['a', [1, 2]], [1, 2]]
    """
    found = ObjectGraph(set(seen))
    stack, visited = deque(roots), 0
    take = stack.popleft if around else stack.pop
    while stack:
        value = take()
        kind = kind_of(type(value))
        if kind is Kind.CONSTANT or id(value) in found.seen:
            continue
        if kind is Kind.PROXY:  # says that it is of the class of what it stands for
            stack.extend(behind(value))
            continue
        if kind is Kind.IMMUTABLE:  # often temporary: its id may be reused
            stack.extend(value.values() if isinstance(value, types.MappingProxyType) else value)
            continue
        if visited >= most:
            found.is_whole = False
            return found
        visited += 1
        found.seen.add(id(value))
        if kind is Kind.TENSOR:
            found.tensors.append(value)
            stack.extend(vars(value).values())
        elif kind is Kind.ARRAY:
            found.arrays.append(value)
            stack.extend(value.ravel().tolist() if value.dtype.hasobject else ())
        elif (large := bulk(value)) is not None:
            found.bulks.append(large)
        elif kind is Kind.GENERATOR and (generator := rewind(value)) is not None:
            found.generators.append(generator)
            own = attributes(value)  # of a class of a user's own
            found.containers.extend(own)
            stack.extend(item for container in own for item in container.items)
        elif kind is Kind.CACHE:
            found.caches.append(value)
        elif kind is Kind.QUEUE:
            found.iterators.append(value)
        else:
            containers = _containers(value, packages, around=around)
            found.containers.extend(containers)
            if not containers and isinstance(value, Iterator):
                found.iterators.append(value)
            elif not containers:
                found.others.append(value)
            elif _may_be_mixed(value) and (fields := hidden(value)):
                found.mixed.append(value)
                found.others.extend(() if around else fields)  # in C nothing can be replaced by a copy
                stack.extend(fields if around else ())
            for container in containers:
                stack.extend(container.items)
            if around and not containers and may_be_watched(value):
                stack.extend(hidden(value))
    return found


def restore(containers: Iterable[MutableObject], generators: Iterable[tuple[Callable[[Any], Any], Any]]) -> None:
    """Put back all original contents and generators, even if one raises."""
    errors: list[BaseException] = []
    for container in containers:
        try:
            container.replace_contents(container.items)
        except BaseException as error:
            errors.append(error)
    for set_state, state in generators:
        set_state(state)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # their tracebacks refer to this frame


def own_caches(module: nn.Module) -> list[Any]:
    """The `functools.cache`s in a module's classes and in their files."""
    return [value for value in own_globals(module) if kind_of(type(value)) is Kind.CACHE]


def own_generators(module: nn.Module) -> list[Any]:
    """The random generators in a module's classes and in their files."""
    return [value for value in own_globals(module) if kind_of(type(value)) is Kind.GENERATOR]


def may_be_watched(value: Any) -> bool:
    """Whether an object that is not followed is not left alone."""
    return is_watched(type(value)) and not runs_threads(value)


def _may_be_mixed(value: Any) -> bool:
    """Whether an object with attributes may have more."""
    return not is_all_known(type(value)) and may_be_watched(value)


def _containers(value: Any, packages: frozenset[str], *, around: bool = False) -> list[MutableObject]:
    """A value's containers: items, attributes, both, or none for a constant."""
    if isinstance(value, torch.jit.ScriptModule):
        if around:
            return []
        raise TypeError(
            f"module: expected an eager module, got the TorchScript module {type(value).__name__}, whose parameters "
            "cannot be replaced by copies; use the eager one, or pass loss_fn=, a loss without it."
        )
    if around and type(value).__name__ == RESULTS:
        return []
    if isinstance(value, types.CellType):
        try:
            contents = value.cell_contents
        except ValueError:  # a variable without a value yet
            return []
        return [_of_cell(value, contents)]
    if isinstance(value, types.MethodType | types.BuiltinMethodType):
        return [MutableObject([value.__self__], lambda items: None)]
    found = [*built_in(value), *in_memory(value)]
    if found or is_state(type(value)) or _is_own(value, packages) or (around and _is_around(value)):
        found.extend(attributes(value))
    return found


def _of_cell(cell: types.CellType, contents: Any) -> MutableObject:
    return MutableObject(
        [contents], lambda items: setattr(cell, "cell_contents", items[0]), lambda: [cell.cell_contents]
    )


def _is_own(value: Any, own: frozenset[str]) -> bool:
    """Whether an object's class is of these packages, not of training's."""
    names = package_names(value)
    return bool(names & own) and not names & TRAINING and not is_ours(value)


def _is_around(value: Any) -> bool:
    """Whether an object around a module is followed."""
    return is_followed_around(type(value)) and not runs_threads(value)
