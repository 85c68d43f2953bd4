"""Format of the tab's data: one JSON object a probe.

It is kept in a string tensor.

What is absent is not known. Keys may be added; a reader ignores those that it does not know. Where the meaning of one
changes, `SCHEMA` does, and an older page says that it does not show the newer probes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

PLUGIN = "lightning_subspace"  # in the metadata of each tensor, and in the addresses of the server
SCHEMA = 1


def tag_of(name: str) -> str:
    """The tag of a monitor's probes.

    Example:
        >>> tag_of("subspace")
        'subspace/probes'
    """
    return f"{name}/probes"


def to_json(probe: Mapping[str, Any]) -> str:
    """A probe as it is written, with short numbers.

    Numbers that JSON does not have are left out, or null in a list.

    Example:
        >>> to_json({"step": 3, "metrics": {"sharpness": 2.0000001, "lost": float("nan")}, "values": [1.0, math.inf]})
        '{"v":1,"step":3,"metrics":{"sharpness":2},"values":[1,null]}'
    """
    return json.dumps({"v": SCHEMA, **_short(probe)}, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What was written, as a browser would read it.

    Raises:
        ValueError: for anything else, such as a NaN, which Python alone takes for JSON.

    Example:
        >>> from_json(to_json({"step": 3}))
        {'v': 1, 'step': 3}
    """
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise ValueError(f"the number {word}")


def _short(value: Any) -> Any:
    """A value with finite numbers of six digits."""
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items() if not _is_lost(item)}
    if isinstance(value, list | tuple):
        return [None if _is_lost(item) else _short(item) for item in value]
    if isinstance(value, float):
        rounded = float(f"{value:.6g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return value


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
