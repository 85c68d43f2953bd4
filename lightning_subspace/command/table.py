"""Table of probes: in a terminal, and as rows for a spreadsheet.

In a terminal it has the numbers that a person looks at first, those that a run has; a name is broken behind its
underscores. What is absent is not known, and the last column says why.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_subspace.command.runs import Probe, Runs, by_step

SHOWN = (
    "sharpness",
    "sharpness_over_threshold",
    "gradient_fraction",
    "gradient_fraction_low",
    "gradient_fraction_high",
    "update_fraction",
    "overlap_previous",
    "step/edge_ratio",
    "noise/scale",
)
WORDS = ("outcome", "trusted", "verified", "reason", "failed")
HEADER = ("k", "n", "sample", "curvature", "optimizer")
NARROWEST = 20  # columns for the reason why numbers are left out


def in_terminal(runs: Runs, keys: Sequence[str] = (), last: int | None = None, width: int | None = None) -> str:
    """One table a run and monitor.

    Args:
        runs: by run and tag.
        keys: shell-style patterns of the numbers to show; by default those that are looked at first.
        last: how many probes to show, of each run the last ones; None: all.
        width: of the terminal, in characters; None: lines may be of any length.

    Raises:
        ValueError: for a pattern that fits no number.

    Example:
        >>> probes = [{"step": 0, "metrics": {"sharpness": 12.345}}, {"step": 10, "failed": "RuntimeError: no memory"}]
        >>> print(in_terminal({"a": {"subspace/probes": probes}}))
        a, subspace: 2 probes, steps 0 to 10
        step  sharpness
           0      12.35
          10             failed: RuntimeError: no memory
    """
    parts = []
    for run, tags in runs.items():
        for tag, found in tags.items():
            probes = by_step(found)
            rows = probes if last is None else probes[max(len(probes) - last, 0) :]
            shown = set(_numbers_of(rows))
            names = [name for name in _chosen(_numbers_of(probes), keys) if name in shown]
            parts.append("\n".join([_title(run, tag, probes), *_lines(rows, names, width)]))
    return "\n\n".join(parts)


def as_csv(runs: Runs) -> str:
    """One row a probe, with every number that any of them has.

    Example:
        >>> print(as_csv({"a": {"subspace/probes": [{"step": 0, "metrics": {"sharpness": 2.5}}]}}))
        run,monitor,step,sharpness
        a,subspace,0,2.5
        <BLANKLINE>
    """
    rows: list[dict[str, Any]] = []
    for run, tags in runs.items():
        for tag, probes in tags.items():
            first = {"run": run, "monitor": monitor_of(tag)}
            for probe in by_step(probes):
                words = {name: probe[name] for name in WORDS if name in probe}
                rows.append({**first, "step": probe["step"], **numbers(probe), **words})
    keys = dict.fromkeys(key for row in rows for key in row)
    names = [*(key for key in keys if key not in WORDS), *(word for word in WORDS if word in keys)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def numbers(probe: Probe) -> dict[str, float]:
    """All numbers of a probe, by the keys of the README's table.

    Example:
        >>> numbers({"step": 0, "eigenvalues": [3.0, None], "next": 1.0, "lr": 0.1, "metrics": {"sharpness": 3.0}})
        {'sharpness': 3.0, 'eigenvalues/01': 3.0, 'eigenvalues/03': 1.0, 'lr': 0.1}
    """
    found: dict[str, float] = dict(probe.get("metrics", {}))
    values = [*probe.get("eigenvalues", ()), *([probe["next"]] if "next" in probe else [])]
    found |= {f"eigenvalues/{i:02d}": value for i, value in enumerate(values, start=1) if value is not None}
    return found | {name: probe[name] for name in ("lr", "threshold") if name in probe}


def monitor_of(tag: str) -> str:
    """The name of a monitor, of its tag.

    Example:
        >>> monitor_of("subspace/probes")
        'subspace'
    """
    return tag.removesuffix("/probes")


def _numbers_of(probes: Sequence[Probe]) -> list[str]:
    return list(dict.fromkeys(key for probe in probes for key in numbers(probe)))


def _chosen(known: Sequence[str], keys: Sequence[str]) -> list[str]:
    """The numbers to show, in the order of what was asked for."""
    if not keys:
        return [key for key in SHOWN if key in known]
    found: dict[str, None] = {}
    for pattern in keys:
        fitting = fnmatch.filter(known, pattern)
        if not fitting:
            raise ValueError(
                f"--keys: expected names of numbers that the run has, got {pattern!r}; it has {', '.join(known)}."
            )
        found.update(dict.fromkeys(fitting))
    return list(found)


def _title(run: str, tag: str, probes: Sequence[Probe]) -> str:
    asked: Mapping[str, Any] = next((probe["run"] for probe in probes if "run" in probe), {})
    told = [f"{name} = {asked[name]}" for name in HEADER if name in asked]
    count = f"{len(probes)} probe{'s' * (len(probes) != 1)}"
    steps = f"step{'s' * (len(probes) != 1)} {probes[0]['step']}" if probes else "no step"
    if len(probes) > 1:
        steps += f" to {probes[-1]['step']}"
    place = monitor_of(tag) if run == "." else f"{run}, {monitor_of(tag)}"
    return f"{place}: {count}, {steps}" + (f"; {', '.join(told)}" if told else "")


def _lines(probes: Sequence[Probe], names: Sequence[str], width: int | None) -> list[str]:
    """The lines of a table, its head first."""
    heads = [["step"], *(re.findall(r"[^_/]+[_/]?", name) for name in names)]
    depth = max(map(len, heads))
    columns = [[""] * (depth - len(head)) + head for head in heads]
    for probe in probes:
        known = numbers(probe)
        columns[0].append(str(probe["step"]))
        for column, name in zip(columns[1:], names, strict=True):
            column.append(_shown(known[name]) if name in known else "")
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.rjust(size) for cell, size in zip(cells, widths, strict=True))
        for cells in zip(*columns, strict=True)
    ]
    left = None if width is None else max(width - len(lines[0]) - 2, NARROWEST)
    reasons = [""] * depth + [_cut(_reason(probe), left) for probe in probes]
    return [f"{line}  {reason}".rstrip() for line, reason in zip(lines, reasons, strict=True)]


def _reason(probe: Probe) -> str:
    failed = f"failed: {probe['failed']}" if "failed" in probe else ""
    return failed or str(probe.get("reason", ""))


def _shown(value: float) -> str:
    return f"{value:.4g}"


def _cut(text: str, length: int | None) -> str:
    text = " ".join(text.split())
    return text if length is None or len(text) <= length else f"{text[: length - 3]}..."
