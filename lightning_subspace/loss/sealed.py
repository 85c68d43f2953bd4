"""Stand-ins for what cannot be put back: iterators, open files, queues.

A stand-in refuses whatever is asked of it in the thread that measures, and is the original to every other thread.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NoReturn

# What tells nothing but how much is in a queue.
HARMLESS = frozenset({"qsize", "empty", "full", "maxsize", "closed", "name", "mode"})


class Sealed:
    """Replacement for an iterator, a file or a queue; raises when used.

    Example:
        >>> stand_in = Sealed(iter([1, 2]))
        >>> next(stand_in)
        Traceback (most recent call last):
        TypeError: the training step uses an object of type list_iterator that ... cannot be put back afterwards; ...
    """

    def __init__(self, original: Any) -> None:
        self._original = original
        self._kind = type(original).__name__
        self._thread = threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        if self._is_elsewhere() or name in HARMLESS:
            return getattr(self._original, name)
        if name.startswith("__"):  # such as `__torch_function__`: whoever looks for one is not using it
            raise AttributeError(name)
        return self._refuse()

    def __iter__(self) -> Any:
        return iter(self._original) if self._is_elsewhere() else self._refuse()

    def __next__(self) -> Any:
        return next(self._original) if self._is_elsewhere() else self._refuse()

    def __enter__(self) -> Any:
        return self._original.__enter__() if self._is_elsewhere() else self._refuse()

    def __exit__(self, *exc_info: object) -> Any:
        return self._original.__exit__(*exc_info) if self._is_elsewhere() else self._refuse()

    def _is_elsewhere(self) -> bool:
        return threading.get_ident() != self._thread

    def _refuse(self) -> NoReturn:
        raise TypeError(
            f"the training step uses an object of type {self._kind} that the module or something around it keeps, "
            "which cannot be put back afterwards; pass loss_fn=, a loss without it."
        )


def is_standard_stream(value: Any) -> bool:
    """Whether a file is where the process prints to."""
    return any(value is stream for stream in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__))
