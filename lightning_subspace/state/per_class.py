"""Cache of what is asked of classes, found once for each.

A walk through everything around a module asks the same of some dozen classes thousands of times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar
from weakref import ReferenceType, ref

T = TypeVar("T")


def per_class(function: Callable[[type], T]) -> Callable[[type], T]:
    """A function of a class, which remembers results while it lives.

    By identity: a metaclass may say that two classes are equal, or that they have no hash.

    Example:
        >>> asked = []
        >>> @per_class
        ... def name(cls):
        ...     asked.append(cls)
        ...     return cls.__name__
        >>> name(int), name(int), len(asked)
        ('int', 'int', 1)
    """
    known: dict[int, tuple[ReferenceType[type], T]] = {}

    @wraps(function)
    def remembered(cls: type) -> T:
        found = known.get(id(cls))
        if found is None or found[0]() is not cls:
            key = id(cls)
            found = known[key] = ref(cls, lambda _: known.pop(key, None)), function(cls)
        return found[1]

    return remembered
