"""Fields of containers and objects, by key."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

# Values that are whole: what they are made of is no part of a batch.
WHOLE = (
    Tensor, np.ndarray, np.generic, nn.Module, str, bytes, bytearray, int, float, complex, type, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType,
)  # fmt: skip


def fields(value: Any) -> dict[Any, Any]:
    """Contents of a value by key, index or name; {} if whole.

    Properties are not called: only what is stored counts. Sets have no order and count as whole.

    Example:
        >>> fields([5, "a"]), fields({"x": 1}), fields(types.SimpleNamespace(y=2)), fields("text")
        ({0: 5, 1: 'a'}, {'x': 1}, {'y': 2}, {})
    """
    if value is None or isinstance(value, (*WHOLE, set, frozenset)):
        return {}
    if isinstance(value, Mapping):
        return dict(value.items())
    if is_named_tuple(value):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    return {**_in_slots(value), **getattr(value, "__dict__", {})}


def is_named_tuple(value: Any) -> bool:
    """Whether a tuple has names for its items."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def walk_leaves(value: Any, kind: type) -> list[Any]:
    """All values of a kind in a batch, each once, in order."""
    found: list[Any] = []
    stack, seen = [value], dict[int, Any]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # kept, so that no id is used again
        if isinstance(item, kind):
            found.append(item)
        else:
            stack.extend(reversed(fields(item).values()))
    return found


def with_fields(value: Any, new: Mapping[Any, Any]) -> Any:
    """A container of the same kind with other contents for all keys.

    Raises:
        TypeError: for an object that is neither a collection nor a dataclass.
    """
    if is_named_tuple(value):
        return type(value)(*new.values())
    if isinstance(value, list | tuple):
        return type(value)(new.values())
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        for key, item in new.items():
            changed[key] = item
    elif dataclasses.is_dataclass(value):
        for name, item in new.items():
            object.__setattr__(changed, name, item)
    else:
        raise TypeError(f"batch: expected a collection or a dataclass, got {type(value).__name__}.")
    return changed


def _in_slots(value: Any) -> dict[str, Any]:
    classes = reversed(type(value).__mro__)
    slots = [d for cls in classes for d in vars(cls).values() if isinstance(d, types.MemberDescriptorType)]
    names = [slot.__name__ for slot in slots if slot.__name__ != "__dict__"]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}
