"""Pictures of runs: what `monitor.plot()` draws, from what was logged."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_subspace import Outcome, Record, Subspace
from lightning_subspace.command.runs import Probe, Runs, by_step
from lightning_subspace.command.table import monitor_of, numbers
from lightning_subspace.report.figures import summary_figure


def draw(runs: Runs, file: Path) -> list[Path]:
    """Draw one picture a run and monitor; the files.

    Of several, each has the run and the monitor in its name.

    Raises:
        OSError: where one cannot be written.
    """
    each = [(run, tag, by_step(probes)) for run, tags in runs.items() for tag, probes in tags.items()]
    files = []
    for run, tag, probes in each:
        name = re.sub(r"[^\w.-]+", "_", f"{file.stem}_{run}_{monitor_of(tag)}")
        files.append(file if len(each) == 1 else file.with_name(f"{name}{file.suffix}"))
        steps, matrix = overlaps_of(probes)
        error = next((probe["overlap_error"] for probe in reversed(probes) if "overlap_error" in probe), None)
        summary_figure([record_of(probe) for probe in probes if "failed" not in probe], steps, matrix, error).savefig(
            files[-1], format=file.suffix.lstrip(".") or "png"
        )
    return files


def record_of(probe: Probe) -> Record:
    """The record that an entry was made of, with its digits."""
    metrics = {key: float(value) for key, value in numbers(probe).items() if key not in ("lr", "threshold")}
    if "eigenvalues" not in probe:
        return Record(probe["step"], metrics)
    values, bounds = (
        torch.tensor([math.nan if value is None else value for value in probe[name]], dtype=torch.float64)
        for name in ("eigenvalues", "residuals")
    )
    subspace = Subspace(
        eigenvalues=values,
        eigenvectors=None,
        residuals=bounds,
        next_eigenvalue=float(probe.get("next", math.nan)),
        error=metrics.get("solver/subspace_error", math.inf),
        outcome=Outcome[probe["outcome"]],
        verified=bool(probe.get("verified", False)),
        num_matvecs=int(metrics.get("solver/matvecs", 0)),
    )
    return Record(probe["step"], metrics, subspace)


def overlaps_of(probes: Sequence[Probe]) -> tuple[list[int], NDArray[np.float64]]:
    """Steps of the spaces that were held last, and their overlaps.

    The matrix has nan where two were never compared.
    """
    rows = {probe["step"]: dict(zip(*probe["overlaps"], strict=True)) for probe in probes if "overlaps" in probe}
    if not rows:
        return [], np.zeros((0, 0))
    last = max(rows)
    steps = sorted([*rows[last], last])
    matrix = np.eye(len(steps))
    for i, one in enumerate(steps):
        for j, other in enumerate(steps[:i]):
            value = rows.get(one, {}).get(other, rows.get(other, {}).get(one))
            matrix[i, j] = matrix[j, i] = math.nan if value is None else value
    return steps, matrix
