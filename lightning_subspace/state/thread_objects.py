"""Objects that other threads of the process are using now.

What a living thread has in its local variables, and what these hold, changes by itself: putting it back would undo the
thread's work. Modules, of torch and of Python, are not gone through: a thread that is given a whole one does not own
what is in it, as those of a notebook's kernel do not own what its cells have defined.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch import Tensor, nn

from lightning_subspace.state.packages import TRAINING, package
from lightning_subspace.state.per_class import per_class
from lightning_subspace.state.threads import frames_of_others

MOST = 10_000  # objects that are looked for
UNSEEN = (nn.Module, Tensor, type, types.ModuleType, str, bytes, int, float, type(None))
RUNNING = (threading.Thread, BaseProcess, Executor)


def runs_threads(value: Any) -> bool:
    """Whether an object keeps a thread, a process or a pool."""
    return any(isinstance(item, RUNNING) for item in getattr(value, "__dict__", {}).values())


def in_other_threads() -> dict[int, Any]:
    """What other threads hold, by id.

    Those of `threading`: others, started by a launcher or in C, have no project's objects.

    Example:
        >>> in_other_threads() if threading.active_count() == 1 else {}
        {}
    """
    idents = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    if not idents:
        return {}
    found, level = dict[int, Any](), list[Any]()
    for ident, frame in frames_of_others().items():
        level.extend(_locals_of(frame) if ident in idents else ())
    while level and len(found) < MOST:
        new = {id(value): value for value in level if _may_be_used(type(value))}
        new = {key: value for key, value in new.items() if key not in found and not _is_namespace(value)}
        found.update(new)
        level = [item for value in new.values() for item in _inside(value)]
    return found


def _locals_of(frame: FrameType | None) -> Iterator[Any]:
    """What a frame and its callers hold."""
    while frame is not None:  # the variables of one that runs a file are those of a module
        yield from () if frame.f_locals is frame.f_globals else frame.f_locals.values()
        frame = frame.f_back


def _is_namespace(value: Any) -> bool:
    """Whether a dict has the variables of a module."""
    name = dict.get(value, "__name__") if type(value) is dict else None
    return type(name) is str and getattr(sys.modules.get(name), "__dict__", None) is value


@per_class
def _may_be_used(cls: type) -> bool:
    """Whether a thread's objects of a class are looked for."""
    return not issubclass(cls, UNSEEN) and package(cls) not in TRAINING


def _inside(value: Any) -> list[Any]:
    """The contents of an object, read without calling code of the user's."""
    attributes = getattr(value, "__dict__", None)
    found: list[Any] = [] if attributes is None else [attributes]
    if isinstance(value, dict):
        found.extend(dict.values(value))
    elif type(value) in (list, tuple, deque, set):
        found.extend(value)
    elif isinstance(value, types.FunctionType):
        found.extend(value.__closure__ or ())
    elif isinstance(value, types.MethodType):
        found.append(value.__self__)
    elif isinstance(value, types.CellType):
        with suppress(ValueError):
            found.append(value.cell_contents)
    return found
