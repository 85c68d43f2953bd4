"""Objects whose state Python cannot show, noticed where it changes.

An object made in C may tell its state to `pickle`. It is pickled before and behind the first evaluation of a probe, to
a checksum and up to a size. Of a file the position is looked at, and of fields of C the objects that they refer to.
None can be put back, except for a file that is read.
"""

from __future__ import annotations

import io
import itertools
import operator
import pickle
import sqlite3
import time
import types
import zlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_subspace.state.containers import hidden
from lightning_subspace.state.kinds import Kind, kind_of

MOST = 1 << 20  # bytes of one object's state
SLOWEST = 0.01  # seconds for one object's state; others are not asked again
MOST_SECONDS = 0.1  # for all of them


class WatchedObjects:
    """Objects of unknown contents, and files.

    Args:
        objects: as they are before an evaluation.
        mixed: those with attributes, which are followed, and fields of C.
        skipped: types of objects that are not asked, as they told nothing or took too long; added to.
    """

    def __init__(self, objects: Iterable[Any], mixed: Iterable[Any], skipped: set[type]) -> None:
        objects = list(objects)
        self._states: list[tuple[Any, Any]] = []
        self._fields = [(value, fields) for value in (*objects, *mixed) if (fields := hidden(value))]
        end = time.monotonic() + MOST_SECONDS
        for value in objects:
            if _has_position(value):
                state = _position(value)
            elif type(value) in skipped or time.monotonic() > end:
                continue
            else:
                start = time.monotonic()
                state = _digest(value)
                # Twice: a state with a time or an address in it is another one each time.
                if state is None or time.monotonic() - start > SLOWEST or _digest(value) != state:
                    skipped.add(type(value))
                    continue
            if state is not None:
                self._states.append((value, state))

    def begin(self) -> None:
        """Compare positions and fields with those of now."""
        self._fields = [(value, hidden(value)) for value, _ in self._fields]
        self._states = [(v, _position(v) if _has_position(v) else old) for v, old in self._states]

    def changed(self, *, thorough: bool) -> list[Any]:
        """Those in another state; only the position is looked at unless `thorough`."""
        positions = [v for v, old in self._states if _has_position(v) and _position(v) != old]
        # A field that was empty before may be filled by a reader, such as one of a cache.
        positions += [v for v, old in self._fields if not {*map(id, old)} <= {*map(id, hidden(v))}]
        if not thorough:
            return positions
        return positions + [v for v, old in self._states if not _has_position(v) and _digest(v) != old]

    def verify(self) -> None:
        """Remember nothing: they are looked at in each probe."""

    def put_back(self, value: Any) -> bool:
        """Set back the position of a file that is only read."""
        if not isinstance(value, io.IOBase) or value.closed or value.writable():
            return False
        value.seek(next(old for other, old in self._states if other is value))
        return True


def _has_position(value: Any) -> bool:
    is_counted = isinstance(value, itertools.count) or hasattr(value, "__length_hint__")
    return is_counted or isinstance(value, io.IOBase | types.GeneratorType) or kind_of(type(value)) is Kind.QUEUE


def _position(value: Any) -> Any:
    """The position of a file or iterator; the length of a queue."""
    try:
        if isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            return None if frame is None else (frame.f_lasti, *map(id, frame.f_locals.values()))
        if kind_of(type(value)) is Kind.QUEUE:
            return int(value.qsize())
        if isinstance(value, itertools.count):
            return repr(value)
        if hasattr(value, "__length_hint__"):
            return operator.length_hint(value)
        return None if value.closed or not value.seekable() else int(value.tell())
    except (OSError, ValueError, NotImplementedError):  # it is being iterated over, or is no real file
        return None


def _changes(connection: sqlite3.Connection) -> Any:
    """Rows that it has written, or None for another thread's."""
    try:
        return connection.total_changes, connection.in_transaction
    except sqlite3.ProgrammingError:
        return None


class _TooLargeError(Exception):
    """The state is larger than what is looked at."""


class _Checksum:
    """A file that keeps nothing but a checksum."""

    def __init__(self) -> None:
        self.value = 0
        self._left = MOST

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise _TooLargeError
        self.value = zlib.crc32(data, self.value)
        return len(data)


class _Pickler(pickle.Pickler):
    """Names tensors and modules, which are looked at elsewhere, by their ids."""

    def persistent_id(self, value: Any) -> Any:
        return id(value) if isinstance(value, Tensor | nn.Module) else None


def _digest(value: Any) -> Any:
    """Digest that an object gives, or checksum of its pickle, or None."""
    if hasattr(type(value), "digest_size") and hasattr(type(value), "hexdigest"):
        return value.hexdigest()
    if isinstance(value, sqlite3.Connection):
        return _changes(value)
    file = _Checksum()
    try:
        _Pickler(file, protocol=4).dump(value)
    except Exception:  # of any kind: it is the code of the object's class that runs
        return None
    return file.value
