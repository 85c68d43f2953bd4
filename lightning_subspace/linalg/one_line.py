"""Representation of a result in one line, for terminals and notebooks.

Numbers have four digits, a vector its first and last ones, and a matrix its shape alone: the n numbers of an
eigenvector tell a reader nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from torch import Tensor

MOST = 6  # entries of a vector or a mapping


def one_line(value: Any, **first: Any) -> str:
    """A dataclass as `Name(field=..., ...)`; for its `__repr__`.

    Args:
        value: an instance; its fields with `repr=False` are left out.
        first: what comes before them, also in place of a field of this name.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Found:
        ...     values: Tensor
        ...     vectors: Tensor
        >>> one_line(Found(Tensor([2.0, 1 / 3]), Tensor(2, 1_000)), k=2)
        'Found(k=2, values=[2, 0.3333], vectors=float32 of shape (2, 1000))'
    """
    given = {field.name: getattr(value, field.name) for field in fields(value) if field.repr}
    inside = ", ".join(f"{name}={shown(part)}" for name, part in {**first, **given, **first}.items())
    return f"{type(value).__name__}({inside})"


def shown(value: Any) -> str:
    """A value in a few words.

    Example:
        >>> shown(Tensor(range(100))), shown({"a": 0.123456, "b": 2})
        ('[0, 1, 2, 3, 4, ..., 99]', "{'a': 0.1235, 'b': 2}")
    """
    if isinstance(value, Tensor):
        if value.ndim != 1:
            return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        numbers = [*map(shown, value[: MOST - 1].tolist()), *(["..."] if len(value) > MOST else [])]
        return f"[{', '.join([*numbers, *map(shown, value[MOST - 1 :][-1:].tolist())])}]"
    if isinstance(value, Mapping):
        pairs = [f"{key!r}: {shown(one)}" for key, one in list(value.items())[:MOST]]
        return f"{{{', '.join(pairs + [f'... {len(value) - MOST} more'] * (len(value) > MOST))}}}"
    if isinstance(value, Enum):
        return value.name
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
