"""Entries of a saved state, checked for type, shape and range.

A checkpoint may come from another version, or be damaged. Whatever an entry turns out to be, reading it gives the
value that was asked for or a `CheckpointError` that names it; nothing else goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Name = str | int  # of an entry: a key of a dict


class CheckpointError(ValueError):
    """A saved state cannot be used; the message names the entry."""


class Entries:
    """A mapping from names to values from a file.

    Args:
        values: the mapping; anything else is refused.
        path: what it is an entry of, for messages.

    Attributes:
        values: the mapping.

    Raises:
        CheckpointError: from every method, for an entry that is absent or not as asked for.

    Example:
        >>> Entries({"k": 3}).integer("k")
        3
        >>> Entries({"k": "3"}, "run").integer("k")
        Traceback (most recent call last):
        lightning_subspace.probe.entries.CheckpointError: run.k: expected an integer of at least 0, got '3'
    """

    def __init__(self, values: Any, path: str = "") -> None:
        self._path = path
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{path or 'state'}: expected a dict, got {_shown(values)}")
        self.values = values

    def __contains__(self, name: Name) -> bool:
        return name in self.values

    def any(self, name: Name) -> Any:
        """The value as it is."""
        if name not in self.values:
            raise CheckpointError(f"{self._at(name)}: expected an entry of this name, got none")
        return self.values[name]

    def below(self, name: Name) -> Entries:
        """A mapping inside of this one."""
        return Entries(self.any(name), self._at(name))

    def flag(self, name: Name) -> bool:
        """True or False."""
        value: bool = self._checked(name, lambda value: isinstance(value, bool), "True or False")
        return value

    def text(self, name: Name) -> str:
        """A string."""
        value: str = self._checked(name, lambda value: isinstance(value, str), "a string")
        return value

    def integer(self, name: Name, least: int = 0) -> int:
        """An integer of at least `least`."""
        value: int = self._checked(name, lambda value: _is_integer(value, least), f"an integer of at least {least}")
        return value

    def integers(self, name: Name, length: int | None = None, least: int = 0) -> list[int]:
        """A list of so many integers."""
        return self._list(name, length, lambda value: _is_integer(value, least), f"an integer of at least {least}")

    def ascending(self, name: Name) -> list[int]:
        """A list of steps, each after the one before."""
        steps = self.integers(name)
        self.require(steps == sorted(set(steps)), name, "ascending steps")
        return steps

    def texts(self, name: Name, length: int | None = None) -> list[str]:
        """A list of so many strings."""
        return self._list(name, length, lambda value: isinstance(value, str), "a string")

    def flags(self, name: Name, length: int) -> list[bool]:
        """A list of so many truth values."""
        return self._list(name, length, lambda value: isinstance(value, bool), "True or False")

    def numbers(self, name: Name, length: int) -> list[float]:
        """A list of so many floats, of which some may be nan."""
        return self._list(name, length, lambda value: isinstance(value, float), "a floating-point number")

    def tensor(self, name: Name, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """A tensor of this shape and type, on the CPU."""

        def is_right(value: Any) -> bool:
            return isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype

        value: Tensor = self._checked(name, is_right, f"a tensor of shape {shape} and type {dtype}")
        return value.detach().cpu()

    def require(self, holds: bool, name: Name, expected: str) -> None:
        """Refuse an entry with a value that no run can have."""
        self._checked(name, lambda _: holds, expected)

    def _list(self, name: Name, length: int | None, is_right: Callable[[Any], bool], what: str) -> list[Any]:
        def is_list(value: Any) -> bool:
            return isinstance(value, list) and length in (None, len(value))

        values: list[Any] = self._checked(name, is_list, f"a list{'' if length is None else f' of length {length}'}")
        for i, value in enumerate(values):
            if not is_right(value):
                raise CheckpointError(f"{self._at(name)}[{i}]: expected {what}, got {_shown(value)}")
        return values

    def _checked(self, name: Name, is_right: Callable[[Any], bool], expected: str) -> Any:
        value = self.any(name)
        if not is_right(value):
            raise CheckpointError(f"{self._at(name)}: expected {expected}, got {_shown(value)}")
        return value

    def _at(self, name: Name) -> str:
        return f"{self._path}.{name}" if self._path else str(name)


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _shown(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__} of {text[:40]}..."
