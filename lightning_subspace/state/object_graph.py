"""Python objects that hold state, and how to replace their contents.

`walk` follows references from some roots through everything that can hold state. Every object stays the same object.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from argparse import Namespace
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.quasirandom import SobolEngine
from torch.utils.data import Dataset

# Objects of these packages, and of classes derived from theirs, manage training itself: they are not followed.
TRAINING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric", "torch"})
FOREIGN = TRAINING | sys.stdlib_module_names
# Classes of foreign packages that are nothing but state.
PLAIN = (types.SimpleNamespace, Namespace, UserDict, UserList, Distribution, SobolEngine)


@dataclass(frozen=True)
class MutableObject:
    """A mutable object.

    Attributes:
        items: its original contents.
        replace_contents: sets other contents, as many and in the same order.
    """

    items: list[Any]
    replace_contents: Callable[[list[Any]], None]


@dataclass
class ObjectGraph:
    """Result of a walk.

    Attributes:
        seen: ids of all visited objects.
        containers: the mutable objects.
        generators: for each random generator, a function and its argument that set its state.
        tensors: all tensors, parameters included.
        iterators: objects that cannot be restored: iterators with hidden state, open files.
    """

    seen: set[int]
    containers: list[MutableObject] = field(default_factory=list)
    generators: list[tuple[Callable[[Any], Any], Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    iterators: list[Iterator[Any]] = field(default_factory=list)


def walk(roots: Iterable[Any], packages: frozenset[str], seen: Iterable[int] = ()) -> ObjectGraph:
    """Find everything that can be reached from the roots, once.

    Args:
        roots: objects to begin with.
        packages: a plain object is followed if its class comes from one of these.
        seen: ids of objects that are not visited again.

    Raises:
        TypeError: for a TorchScript module.

    Example:
        >>> [container.items for container in walk([{"a": [1, 2]}], frozenset()).containers]
        [['a', [1, 2]], [1, 2]]
    """
    found = ObjectGraph(set(seen))
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value is None or isinstance(value, str | int | float | type | types.ModuleType) or id(value) in found.seen:
            continue
        if isinstance(value, tuple | types.MappingProxyType):  # often temporary: its id may be reused
            stack.extend(value if isinstance(value, tuple) else value.values())
            continue
        found.seen.add(id(value))
        if isinstance(value, Tensor):
            found.tensors.append(value)
            stack.extend(vars(value).values())
        elif (rewind := _rewind(value)) is not None:
            found.generators.append(rewind)
        else:
            containers = _containers(value, packages)
            found.containers.extend(containers)
            if not containers and isinstance(value, Iterator):
                found.iterators.append(value)
            stack.extend(item for container in containers for item in container.items)
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
        raise errors[0]


def packages_of(objects: Iterable[object]) -> frozenset[str]:
    """Packages of the classes of some objects, without `FOREIGN` ones."""
    return frozenset(_package(cls) for value in objects for cls in type(value).__mro__) - FOREIGN


def own_caches(module: nn.Module) -> list[functools._lru_cache_wrapper[Any]]:
    """The `functools.cache`s in a module's classes and in their files."""
    return [value for value in _own_globals(module) if isinstance(value, functools._lru_cache_wrapper)]


def own_generators(module: nn.Module) -> list[Any]:
    """The random generators in a module's classes and in their files."""
    return [value for value in _own_globals(module) if _rewind(value) is not None]


def _own_globals(module: nn.Module) -> list[Any]:
    classes = {cls for m in module.modules() for cls in type(m).__mro__ if _package(cls) not in FOREIGN}
    files = {cls.__module__ for cls in classes} & set(sys.modules)
    places = [*map(vars, classes), *(vars(sys.modules[name]) for name in files)]
    return [value for place in places for value in list(place.values())]


def _package(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _containers(value: Any, packages: frozenset[str]) -> list[MutableObject]:
    """A value's containers: items, attributes, both, or none for a constant."""
    if isinstance(value, torch.jit.ScriptModule):
        raise TypeError(
            f"module: expected an eager module, got the TorchScript module {type(value).__name__}, whose parameters "
            "cannot be replaced by copies; use the eager one, or pass loss_fn=, a loss without it."
        )
    if isinstance(value, types.CellType):
        try:
            contents = value.cell_contents
        except ValueError:  # a variable without a value yet
            return []
        return [MutableObject([contents], lambda items: setattr(value, "cell_contents", items[0]))]
    if isinstance(value, types.MethodType | types.BuiltinMethodType):
        return [MutableObject([value.__self__], lambda items: None)]
    found = [
        MutableObject(read(value), functools.partial(fill, value))
        for kind, read, fill in BUILT_IN
        if isinstance(value, kind)
    ]
    if found or isinstance(value, (nn.Module, *PLAIN)) or _is_own(value, packages):
        if hasattr(value, "__dict__"):
            found.append(MutableObject(_read_dict(vars(value)), functools.partial(_fill_dict, vars(value))))
        found.extend(_of_slots(value))
    return found


def _is_own(value: Any, packages: frozenset[str]) -> bool:
    """Whether an object's class is of these packages, not of training's."""
    if isinstance(value, Dataset):
        return False
    own = {_package(cls) for cls in type(value).__mro__}
    return bool(own & packages) and not own & TRAINING


def _read_dict(target: dict[Any, Any]) -> list[Any]:
    return [*target, *target.values()]


def _fill_dict(target: dict[Any, Any], items: list[Any]) -> None:
    keys, values = items[: len(items) // 2], items[len(items) // 2 :]
    if len(target) != len(keys) or not all(map(is_, target, keys)):
        target.clear()
        for key, value in zip(keys, values, strict=True):
            target[key] = value
        return
    # By entry if the keys are unchanged: guards of compiled code look at the dict.
    for key, old, new in zip(keys, list(target.values()), values, strict=True):
        if old is not new:
            target[key] = new


def _fill_list(target: list[Any] | deque[Any], items: list[Any]) -> None:
    if len(items) != len(target) or not all(map(is_, items, target)):
        target.clear()
        target.extend(items)


def _fill_set(target: set[Any], items: list[Any]) -> None:
    # Only the difference: the order of iteration depends on how a set was built.
    target.intersection_update(items)
    target.update(items)


def _fill_partial(target: functools.partial[Any], items: list[Any]) -> None:
    if target.func is not items[0] or target.args is not items[1]:
        target.__setstate__((items[0], items[1], target.keywords, vars(target)))  # type: ignore[attr-defined]


def _fill_function(target: types.FunctionType, items: list[Any]) -> None:
    if target.__defaults__ is not items[0]:
        target.__defaults__ = items[0]


# Kinds of built-in containers: how to read their contents, and how to fill them.
BUILT_IN: Any = (
    (dict, _read_dict, _fill_dict),
    ((list, deque), list, _fill_list),
    (set, list, _fill_set),
    (functools.partial, lambda target: [target.func, target.args, target.keywords], _fill_partial),
    (types.FunctionType, lambda f: [f.__defaults__, f.__kwdefaults__, *(f.__closure__ or ())], _fill_function),
)


def _of_slots(target: Any) -> list[MutableObject]:
    classes = [cls for cls in type(target).__mro__ if "__slots__" in vars(cls)]
    slots = [d for cls in classes for d in vars(cls).values() if isinstance(d, types.MemberDescriptorType)]
    filled = {slot: slot.__get__(target) for slot in slots if _has(slot, target)}

    def fill(items: list[Any]) -> None:
        for slot in slots:
            if slot not in filled and _has(slot, target):
                slot.__delete__(target)
        for slot, item in zip(filled, items, strict=True):
            slot.__set__(target, item)

    return [MutableObject(list(filled.values()), fill)] if slots else []


def _has(slot: types.MemberDescriptorType, target: Any) -> bool:
    try:
        slot.__get__(target)
    except AttributeError:
        return False
    return True


def _rewind(value: Any) -> tuple[Callable[[Any], Any], Any] | None:
    """Function and argument that put back a random generator, or None."""
    if isinstance(value, torch.Generator):
        return value.set_state, value.get_state()
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return functools.partial(setattr, value, "state"), value.state
    if isinstance(value, np.random.RandomState):
        return value.set_state, value.get_state()
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.setstate, value.getstate()
    return None
