"""Processor time of a call, which other work on the machine does not add to."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds(call: Callable[[], object], *, rounds: int = 1) -> float:
    """Of the fastest of some calls."""
    return min(_once(call) for _ in range(rounds))


def _once(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun
