"""Temporary."""

from __future__ import annotations

from typing import Any


class ExampleCounter:
    """Temporary."""

    def __init__(self, batch_size: int | None) -> None:
        self.learned: Any = None
