"""Objects over bare memory, and references kept for others."""

from __future__ import annotations

import array
import contextvars
import ctypes
import io
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from lightning_subspace.state.containers import MutableObject
from lightning_subspace.state.per_class import per_class

# Numbers and pointers of C: the base of `c_int` and its like has no public name.
C_DATA: Any = (ctypes.Array, ctypes.Structure, ctypes.Union, ctypes.c_int.__mro__[1])


def in_memory(value: Any) -> list[MutableObject]:
    """The contents of such an object; none for any other.

    Example:
        >>> held = bytearray(b"abc")
        >>> [found] = in_memory(held)
        >>> held += b"d"; found.has_changed()
        True
        >>> found.replace_contents(found.items); held
        bytearray(b'abc')
    """
    for read, fill in of_memory(type(value)):
        with suppress(ValueError, BufferError, TypeError, NotImplementedError):  # closed, released, of no known format
            return [MutableObject.of(read, fill, value)]
    return []


@per_class
def of_memory(cls: type) -> list[tuple[Any, Any]]:
    """How to read and fill such a class; none for any other."""
    return [(read, fill) for kind, read, fill in KINDS if issubclass(cls, kind)][:1]


def behind(proxy: Any) -> list[Any]:
    """The object that a weak proxy stands for, if any."""
    try:
        return [proxy.__repr__.__self__]
    except (ReferenceError, AttributeError):
        return []


def _fill_bytes(target: Any, items: list[Any]) -> None:
    old: bytes = items[0]
    if target.tobytes() != old if isinstance(target, array.array) else target != old:
        # Of the same length in place: memory that somebody looks into cannot be resized.
        target[:] = array.array(target.typecode, old) if isinstance(target, array.array) else old


def _read_view(target: memoryview) -> list[Any]:
    return [] if target.readonly else [target.tobytes()]


def _fill_view(target: memoryview, items: list[Any]) -> None:
    if items and target.tobytes() != items[0]:
        here = np.asarray(target)
        np.copyto(here, np.frombuffer(items[0], here.dtype).reshape(here.shape))


def _read_c(target: Any) -> list[Any]:
    return [ctypes.string_at(ctypes.addressof(target), ctypes.sizeof(target))]


def _fill_c(target: Any, items: list[Any]) -> None:
    if _read_c(target) != items:
        ctypes.memmove(ctypes.addressof(target), items[0], len(items[0]))


def _read_file(target: Any) -> list[Any]:
    contents, *rest, position, _ = target.__getstate__()
    return [contents.encode("utf-8", "surrogatepass") if isinstance(contents, str) else contents, *rest, position]


def _fill_file(target: Any, items: list[Any]) -> None:
    if _read_file(target) == items:
        return
    contents, *rest, position = items
    text = contents.decode("utf-8", "surrogatepass") if isinstance(target, io.StringIO) else contents
    target.__setstate__((text, *rest, position, getattr(target, "__dict__", None)))


_UNSET: Any = object()


def _fill_variable(target: contextvars.ContextVar[Any], items: list[Any]) -> None:
    if items[0] is not _UNSET and target.get(_UNSET) is not items[0]:
        target.set(items[0])


def _constant(*args: Any) -> None:
    """What is referred to is followed, and the reference cannot change."""


KINDS: tuple[tuple[Any, Callable[[Any], list[Any]], Callable[[Any, list[Any]], None]], ...] = (
    (bytearray, lambda target: [bytes(target)], _fill_bytes),
    (array.array, lambda target: [target.tobytes()], _fill_bytes),
    (memoryview, _read_view, _fill_view),
    (C_DATA, _read_c, _fill_c),
    ((io.StringIO, io.BytesIO), _read_file, _fill_file),
    (contextvars.ContextVar, lambda target: [target.get(_UNSET)], _fill_variable),
    (weakref.ref, lambda target: [target()], _constant),
)
