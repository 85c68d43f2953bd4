"""Contents of containers and objects: how to read and replace them.

An object stays the same object: what refers to it sees the other contents. It is touched only where they differ.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

from lightning_subspace.state.per_class import per_class


@dataclass(slots=True)
class MutableObject:
    """A mutable object.

    Attributes:
        items: its original contents, or those that were remembered last.
        replace_contents: sets other contents, as many and in the same order.
        read: its present contents; None where they cannot change.
        key: id of the object.
    """

    items: list[Any]
    replace_contents: Callable[[list[Any]], None]
    read: Callable[[], list[Any]] | None = None
    key: int = 0

    @classmethod
    def of(cls, read: Callable[[Any], list[Any]], fill: Callable[[Any, list[Any]], None], target: Any) -> MutableObject:
        """One whose contents two functions of it read and set."""
        return cls(read(target), functools.partial(fill, target), functools.partial(read, target), id(target))

    def remember(self) -> None:
        """Take its present contents for the original ones."""
        if self.read is not None:
            self.items = self.read()

    def has_changed(self) -> bool:
        """Whether its contents are others than at first, by identity."""
        if self.read is None:
            return False
        now = self.read()
        return len(now) != len(self.items) or not all(map(is_same, now, self.items))


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are one, or equal bytes or numbers."""
    return a is b or (isinstance(a, bytes | int) and type(a) is type(b) and a == b)


def immutable_items(value: Any) -> list[Any] | None:
    """The items of a tuple or a read-only dict, or None."""
    if isinstance(value, tuple):
        return list(value)
    return list(value.values()) if isinstance(value, types.MappingProxyType) else None


def with_items(value: Any, items: list[Any]) -> Any:
    """A tuple or a read-only dict with other items."""
    if isinstance(value, types.MappingProxyType):
        return types.MappingProxyType(dict(zip(value, items, strict=True)))
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


# A class derived from one of these may do anything in methods of its own, so those of the built-in class are called.


KINDS = (OrderedDict, dict, list, deque, set)


def _kind(target: Any) -> Any:
    exact = type(target)
    return exact if exact in KINDS else next(kind for kind in KINDS if isinstance(target, kind))


def read_dict(target: dict[Any, Any]) -> list[Any]:
    """Keys, and behind them the values."""
    kind = _kind(target)
    return [*kind.keys(target), *kind.values(target)]


def fill_dict(target: dict[Any, Any], items: list[Any]) -> None:
    """Set keys and values in this order."""
    kind, keys, values = _kind(target), items[: len(items) // 2], items[len(items) // 2 :]
    if kind.__len__(target) != len(keys) or not all(map(is_, kind.keys(target), keys)):
        kind.clear(target)
        for key, value in zip(keys, values, strict=True):
            kind.__setitem__(target, key, value)
        return
    if all(map(is_, kind.values(target), values)):
        return
    # By entry if the keys are unchanged: guards of compiled code look at the dict.
    for key, old, new in zip(keys, list(kind.values(target)), values, strict=True):
        if old is not new:
            kind.__setitem__(target, key, new)


def read_class(target: type) -> list[Any]:
    """Names of a class's own attributes, and behind them the values."""
    return read_dict(dict(vars(target)))


def fill_class(target: type, items: list[Any]) -> None:
    """Set the attributes of a class."""
    old = dict(zip(items[: len(items) // 2], items[len(items) // 2 :], strict=True))
    now = dict(vars(target))
    for name in now.keys() - old.keys():
        delattr(target, name)
    for name, value in old.items():
        if name not in now or now[name] is not value:
            setattr(target, name, value)


def read_items(target: Any) -> list[Any]:
    """The items of a list, a deque or a set."""
    return list(_kind(target).__iter__(target))


def fill_list(target: list[Any] | deque[Any], items: list[Any]) -> None:
    """Set the items of a list or a deque."""
    kind = _kind(target)
    if len(items) != kind.__len__(target) or not all(map(is_, items, kind.__iter__(target))):
        kind.clear(target)
        kind.extend(target, items)


def fill_set(target: set[Any], items: list[Any]) -> None:
    """Set the items of a set."""
    # Only the difference: the order of iteration depends on how a set was built.
    set.intersection_update(target, items)
    set.update(target, items)


def _fill_partial(target: functools.partial[Any], items: list[Any]) -> None:
    if target.func is not items[0] or target.args is not items[1]:
        target.__setstate__((items[0], items[1], target.keywords, vars(target)))  # type: ignore[attr-defined]


def _fill_function(target: types.FunctionType, items: list[Any]) -> None:
    if target.__defaults__ is not items[0]:
        target.__defaults__ = items[0]


# Kinds of built-in containers: how to read their contents, and how to fill them.
BUILT_IN: Any = (
    (dict, read_dict, fill_dict),
    ((list, deque), read_items, fill_list),
    (set, read_items, fill_set),
    (functools.partial, lambda target: [target.func, target.args, target.keywords], _fill_partial),
    (types.FunctionType, lambda f: [f.__defaults__, f.__kwdefaults__, *(f.__closure__ or ())], _fill_function),
)


def built_in(value: Any) -> list[MutableObject]:
    """The contents of a built-in container or a class derived from one."""
    return [MutableObject.of(read, fill, value) for read, fill in of_built_in(type(value))]


@per_class
def of_built_in(cls: type) -> list[tuple[Any, Any]]:
    """How to read and fill a built-in class; none for any other."""
    return [(read, fill) for kind, read, fill in BUILT_IN if issubclass(cls, kind)]


def attributes(value: Any) -> list[MutableObject]:
    """The contents of an object's `__dict__` and of its slots."""
    # Asked of the object: that of a `threading.local` is another in each thread, and the present one's is meant.
    found = [MutableObject.of(read_dict, fill_dict, vars(value))] if hasattr(value, "__dict__") else []
    return [*found, *in_slots(value)]


def hidden(value: Any) -> list[Any]:
    """References beside attributes: the fields of a class made in C.

    They are read from the garbage collector, so that no code of the object runs.
    """
    known = {id(type(value)), id(getattr(value, "__dict__", None))}
    known.update(id(item) for part in attributes(value) for item in part.items)
    return [item for item in gc.get_referents(value) if id(item) not in known]


def in_slots(target: Any) -> list[MutableObject]:
    """The contents of an object's slots, if its class has any."""
    slots = _slots_of(type(target))
    if not slots:
        return []
    filled = {slot: slot.__get__(target) for slot in slots if _has(slot, target)}

    def fill(items: list[Any]) -> None:
        for slot in slots:
            if slot not in filled and _has(slot, target):
                slot.__delete__(target)
        for slot, item in zip(filled, items, strict=True):
            if not _has(slot, target) or slot.__get__(target) is not item:
                slot.__set__(target, item)

    def read() -> list[Any]:
        return [slot.__get__(target) for slot in slots if _has(slot, target)]

    return [MutableObject(list(filled.values()), fill, read, id(target))]


@per_class
def _slots_of(cls: type) -> list[types.MemberDescriptorType]:
    bases = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
    return [d for own in bases for d in own.values() if isinstance(d, types.MemberDescriptorType)]


def _has(slot: types.MemberDescriptorType, target: Any) -> bool:
    try:
        slot.__get__(target)
    except AttributeError:
        return False
    return True
