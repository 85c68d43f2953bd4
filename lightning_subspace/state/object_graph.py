"""Python objects that hold state, found by following references.

`walk` goes from some roots through everything that can hold state. Every object stays the same object. It goes in one
of two ways: through a module, whose tensors are to be copied, or around it, where more is followed and nothing copied.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
import types
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict, UserList, UserString, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_subspace.state.buffers import behind, in_memory
from lightning_subspace.state.bulk import Bulk
from lightning_subspace.state.containers import MutableObject, attributes, built_in, hidden
from lightning_subspace.state.generators import rewind
from lightning_subspace.state.packages import (
    ITSELF,
    MACHINERY,
    TRAINING,
    WRITERS,
    is_ours,
    own_globals,
    package,
    package_names,
)
from lightning_subspace.state.thread_objects import RUNNING, runs_threads

# Classes of foreign packages that are nothing but state.
PLAIN = (
    types.SimpleNamespace, Namespace, UserDict, UserList, UserString, ChainMap, Distribution, SobolEngine,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet, threading.local,
)  # fmt: skip
# Classes of torch whose objects are followed around a module, and those of a user's own that are not.
AROUND = (Dataset, Sampler, DataLoader, Optimizer, LRScheduler)
NOT_AROUND = frozenset({"Logger", "Trainer", "Strategy", "SummaryWriter"})
RESULTS = "_ResultCollection"  # of what is logged, which is muted; it refers to the batch
LEFT_ALONE = TRAINING | WRITERS | MACHINERY | {ITSELF, "numpy"}
CONSTANT = (str, int, float, complex, bytes, range, type, types.ModuleType, torch.dtype, torch.device, torch.Size)


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
        if type(value) in weakref.ProxyTypes:  # says that it is of the class of what it stands for
            stack.extend(behind(value))
            continue
        if value is None or isinstance(value, CONSTANT) or id(value) in found.seen:
            continue
        if isinstance(value, tuple | types.MappingProxyType | frozenset):  # often temporary: its id may be reused
            stack.extend(value.values() if isinstance(value, types.MappingProxyType) else value)
            continue
        if visited >= most:
            found.is_whole = False
            return found
        visited += 1
        found.seen.add(id(value))
        if isinstance(value, Tensor):
            found.tensors.append(value)
            stack.extend(vars(value).values())
        elif isinstance(value, np.ndarray):
            found.arrays.append(value)
            stack.extend(value.ravel().tolist() if value.dtype.hasobject else ())
        elif (large := bulk(value)) is not None:
            found.bulks.append(large)
        elif (generator := rewind(value)) is not None:
            found.generators.append(generator)
            own = attributes(value)  # of a class of a user's own
            found.containers.extend(own)
            stack.extend(item for container in own for item in container.items)
        elif isinstance(value, functools._lru_cache_wrapper):
            found.caches.append(value)
        elif is_queue(value):
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
            stack.extend(item for container in containers for item in container.items)
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
    return [value for value in own_globals(module) if isinstance(value, functools._lru_cache_wrapper)]


def own_generators(module: nn.Module) -> list[Any]:
    """The random generators in a module's classes and in their files."""
    return [value for value in own_globals(module) if rewind(value) is not None]


def is_queue(value: Any) -> bool:
    """Whether an object is a queue between threads, processes or tasks."""
    if isinstance(value, queue.Queue | queue.SimpleQueue):
        return True
    kind = type(value).__module__
    return kind in ("multiprocessing.queues", "torch.multiprocessing.queue", "asyncio.queues")


def may_be_watched(value: Any) -> bool:
    """Whether an object that is not followed is not left alone."""
    if isinstance(value, (Tensor, nn.Module, types.FunctionType, types.BuiltinFunctionType, *RUNNING, BaseProcess)):
        return False
    if package(type(value)) in LEFT_ALONE or is_ours(value):
        return False
    return not runs_threads(value)


def _may_be_mixed(value: Any) -> bool:
    """Whether an object with attributes may have more."""
    is_known = isinstance(value, (nn.Module, *PLAIN, types.CellType, types.MethodType, types.BuiltinMethodType))
    return not is_known and may_be_watched(value) and not built_in(value) and not in_memory(value)


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
    is_state = isinstance(value, (nn.Module, *PLAIN))
    if found or is_state or _is_own(value, packages) or (around and _is_around(value)):
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
    if isinstance(value, AROUND):
        return not runs_threads(value)
    if any(cls.__name__ in NOT_AROUND for cls in type(value).__mro__):
        return False
    return may_be_watched(value)
