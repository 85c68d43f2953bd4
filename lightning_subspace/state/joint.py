"""Context of the whole process that several may be in at once.

Each of two threads that set a flag of the process and put back what they have found puts back what the other one has
set, where they leave in the order in which they came. Here the first one in sets, and the last one out puts back. So
does a context within the same one, which then costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from threading import Lock


class Joint(AbstractContextManager[None]):
    """Context that the first one opens and the last one closes.

    Args:
        made: makes the context that is shared.

    Example:
        >>> from contextlib import contextmanager
        >>> @contextmanager
        ... def told():
        ...     print("set")
        ...     yield
        ...     print("put back")
        >>> both = Joint(told)
        >>> with both, both:
        ...     print("inside")
        set
        inside
        put back
    """

    def __init__(self, made: Callable[[], AbstractContextManager[object]]) -> None:
        self._made = made
        self._lock = Lock()
        self._users = 0
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._stack.enter_context(self._made())
            self._users += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._stack.close()
