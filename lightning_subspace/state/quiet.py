"""Silence for the warnings of one thread.

`warnings.catch_warnings` belongs to the process: meanwhile the warnings of other threads are lost, what they do to the
filters is undone, and behind it Python says again what it had said once. A filter that matches in one thread alone does
none of this.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Context that drops the warnings of this thread.

    Example:
        >>> with quiet():
        ...     warnings.warn("nobody hears it")
    """
    filters: Any = warnings.filters
    matcher = _ThisThread()
    own = ("ignore", matcher, Warning, None, 0)
    filters.insert(0, own)
    try:
        yield
    finally:
        # Somebody may have put another list in its place, or a copy.
        now: Any = warnings.filters
        for present in (filters, now):
            with suppress(ValueError):
                present.remove(own)
        matcher.is_over = True


class _ThisThread:
    """Stand-in for a filter's pattern: matches any text of one thread."""

    pattern = ""  # whoever lists the filters asks for it

    def __init__(self) -> None:
        self.is_over = False  # in a list that is out of reach
        self._thread = threading.get_ident()

    def match(self, text: str) -> bool:
        """Whether a warning is of the thread."""
        return not self.is_over and threading.get_ident() == self._thread
