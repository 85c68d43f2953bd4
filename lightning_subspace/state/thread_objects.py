"""Objects that other threads of the process are using now.

What a living thread has in its local variables, and what these hold, changes by itself: putting it back would undo the
thread's work. Modules are not gone through: a thread that is given a whole module does not own what is in it.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import deque
from concurrent.futures import Executor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

from torch import Tensor, nn

from lightning_subspace.state.packages import TRAINING

MOST = 10_000  # objects that are looked for
UNSEEN = (nn.Module, Tensor, type, types.ModuleType, str, bytes, int, float, type(None))
RUNNING = (threading.Thread, BaseProcess, Executor)


def runs_threads(value: Any) -> bool:
    """Whether an object keeps a thread, a process or a pool."""
    return any(isinstance(item, RUNNING) for item in getattr(value, "__dict__", {}).values())


def in_other_threads() -> dict[int, Any]:
    """What other threads hold, by id.

    Example:
        >>> in_other_threads() if threading.active_count() == 1 else {}
        {}
    """
    if threading.active_count() == 1:
        return {}
    # Documented, with the underscore, as the one way to the frames of other threads.
    own, found = threading.get_ident(), dict[int, Any]()
    level: list[Any] = []
    for ident, start in sys._current_frames().items():
        frame = None if ident == own else start
        while frame is not None:
            level.extend(frame.f_locals.values())
            frame = frame.f_back
    while level and len(found) < MOST:
        new = [value for value in level if id(value) not in found and not isinstance(value, UNSEEN)]
        new = [value for value in new if type(value).__module__.split(".")[0] not in TRAINING]
        found.update((id(value), value) for value in new)
        level = [item for value in new for item in _inside(value)]
    return found


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
