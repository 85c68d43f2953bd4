"""Format of the tab's data: one JSON object a probe.

It is kept in a string tensor.

What is absent is not known. Keys may be added; a reader ignores those that it does not know. Where the meaning of one
changes, `SCHEMA` does, and an older page says that it does not show the newer probes.

What is long is written in fewer bytes, and `from_json` undoes that, as does `packed.js`:

- metrics of one prefix are an object under it: `{"noise/": {"scale": 3, "variance": 2}}`
- `overlaps` are `packed`: the first step and the differences of the others, and thousandths
- metrics have five digits, layers three, and residuals two, for they are bounds; other numbers six

An entry is written at every probe, so its numbers are formatted once, as they go into the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import isfinite
from typing import Any

PLUGIN = "lightning_subspace"  # in the metadata of each tensor, and in the addresses of the server
SCHEMA = 1
DIGITS, DIGITS_OF = 6, {"metrics": 5, "layers": 3, "residuals": 2}
PARTS = 1000  # of an overlap, whose standard deviation is several of them
LOST = "null"  # a number that JSON does not have
EXACT = {int, bool, str, type(None)}  # types without digits to leave out
ENCODE = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


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

    Args:
        probe: numbers, words, and lists and mappings of these by name; `metrics` are finite numbers, or lost.

    Example:
        >>> to_json({"step": 3, "metrics": {"sharpness": 2.0000001, "lost": float("nan")}, "next": [1.0, float("inf")]})
        '{"v":1,"step":3,"metrics":{"sharpness":2},"next":[1,null]}'
    """
    return "{" + ",".join(_parts({"v": SCHEMA, **probe})) + "}"


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


def _parts(probe: Mapping[str, Any]) -> Iterator[str]:
    """Keys with their values, the long ones in fewer bytes."""
    for key, value in probe.items():
        if key == "metrics":
            yield _name(key) + _by_prefix(value)
        elif key == "overlaps":
            if value:
                yield _name("packed") + ENCODE(_packed(*value))
        elif (text := _text(value, DIGITS_OF.get(key, DIGITS))) != LOST or value is None:
            yield _name(key) + text


def _packed(steps: Sequence[int], overlaps: Sequence[float]) -> list[Sequence[int | None]]:
    differences = [step - before for step, before in zip(steps, [0, *steps], strict=False)]
    return [differences, [round(PARTS * value) if isfinite(value) else None for value in overlaps]]


def _by_prefix(metrics: Mapping[str, float]) -> str:
    known = {key: value for key, value in metrics.items() if isfinite(value)}
    layout, keys = _layout(tuple(known))
    return layout % tuple([known[key] for key in keys])


@lru_cache(maxsize=64)  # most probes of a run have the same metrics
def _layout(keys: tuple[str, ...]) -> tuple[str, list[str]]:
    """JSON of metrics with places for numbers, and the order of these."""
    groups: dict[str, list[str]] = {"": []}
    for key in keys:
        groups.setdefault(key[: key.find("/") + 1], []).append(key)
    items = []
    for prefix, group in groups.items():
        names = [_name(key.removeprefix(prefix)).replace("%", "%%") for key in group]
        texts = ",".join([f"{name}%.{DIGITS_OF['metrics']}g" for name in names])
        items.append(_name(prefix).replace("%", "%%") + "{" + texts + "}" if prefix else texts)
    return "{" + ",".join(filter(None, items)) + "}", [key for group in groups.values() for key in group]


def _text(value: Any, digits: int) -> str:
    """JSON of a value, with numbers of so many digits."""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if isfinite(value) else LOST
    if isinstance(value, dict):
        texts = [(key, item, _text(item, digits)) for key, item in value.items()]
        return "{" + ",".join([_name(key) + text for key, item, text in texts if text != LOST or item is None]) + "}"
    if isinstance(value, list | tuple):
        return _list(value, digits)
    return ENCODE(value)


def _list(values: Sequence[Any], digits: int) -> str:
    kinds = set(map(type, values))
    if kinds <= EXACT:
        return ENCODE(values)
    if kinds == {float} and all(map(isfinite, values)):  # the most frequent case, all at once
        return "[" + ",".join([f"%.{digits}g"] * len(values)) % tuple(values) + "]"
    return "[" + ",".join([_text(item, digits) for item in values]) + "]"


@lru_cache(maxsize=1024)  # keys of one entry are those of the next
def _name(key: str) -> str:
    return ENCODE(key) + ":"
