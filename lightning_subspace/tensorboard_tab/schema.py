"""Format of the tab's data: one JSON object a probe.

It is kept in a string tensor.

What is absent is not known. Keys may be added; a reader ignores those that it does not know. Where the meaning of one
changes, `SCHEMA` does, and an older page says that it does not show the newer probes.

What is long is written in fewer bytes, and `from_json` undoes that, as does `packed.js`:

- metrics of one prefix are an object under it: `{"noise/": {"scale": 3, "variance": 2}}`
- `overlaps` are `packed`: the first step and the differences of the others, and thousandths
- metrics have five digits, and residuals two, for they are bounds; other numbers six
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

PLUGIN = "lightning_subspace"  # in the metadata of each tensor, and in the addresses of the server
SCHEMA = 1
DIGITS, DIGITS_OF = 6, {"metrics": 5, "residuals": 2}
PARTS = 1000  # of an overlap, whose standard deviation is several of them


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
    return json.dumps({"v": SCHEMA, **_packed(probe)}, separators=(",", ":"), allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """What was written, as a browser would read it.

    Raises:
        ValueError: for anything else, such as a NaN, which Python alone takes for JSON.

    Example:
        >>> from_json(to_json({"step": 3}))
        {'v': 1, 'step': 3}
    """
    return json.loads(text, parse_constant=_refuse, object_hook=_unpacked)


def _refuse(word: str) -> None:
    raise ValueError(f"the number {word}")


def _packed(probe: Mapping[str, Any]) -> dict[str, Any]:
    """A probe with short numbers, and its long parts in fewer bytes."""
    packed: dict[str, Any] = _short({key: value for key, value in probe.items() if key != "overlaps"})
    if "metrics" in packed:
        packed["metrics"] = _by_prefix(packed["metrics"])
    if probe.get("overlaps"):
        steps, values = probe["overlaps"]
        differences = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
        packed["packed"] = [differences, [round(PARTS * value) if math.isfinite(value) else None for value in values]]
    return packed


def _by_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        prefix, slash, rest = key.partition("/")
        if slash:
            groups.setdefault(prefix + slash, {})[rest] = value
    return {key: value for key, value in metrics.items() if "/" not in key} | groups


def _unpacked(found: dict[str, Any]) -> dict[str, Any]:
    """An object of JSON as it was before it was packed."""
    whole: dict[str, Any] = {}
    for key, value in found.items():
        if key.endswith("/") and isinstance(value, dict):
            whole |= {key + rest: item for rest, item in value.items()}
        elif key == "packed":
            differences, parts = value
            whole["overlaps"] = [
                list(accumulate(differences)),
                [None if part is None else part / PARTS for part in parts],
            ]
        else:
            whole[key] = value
    return whole


def _short(value: Any, digits: int = DIGITS) -> Any:
    """A value with numbers of so many digits, where finite."""
    if isinstance(value, float):  # first, for nearly all are: this takes most of the time of an entry
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{digits}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    if isinstance(value, dict):
        short = {key: _short(item, DIGITS_OF.get(key, digits)) for key, item in value.items()}
        return {key: item for key, item in short.items() if item is not None or value[key] is None}
    if isinstance(value, list | tuple):
        return [_short(item, digits) for item in value]
    return value
