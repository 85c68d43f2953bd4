"""Entry of a probe for the tab of TensorBoard.

All that is known of it, in plain numbers and words.
"""

from __future__ import annotations

from typing import Any

from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.spectral_density import SpectralDensity

POINTS = 60  # of a density, which is drawn in a few hundred pixels
WIDTH = 1e-2  # standard deviation of its Gaussians, in units of the width of the spectrum


def tab_entry(
    record: Record,
    overlaps: OverlapHistory | None = None,
    *,
    density: SpectralDensity | None = None,
    **beside: Any,
) -> dict[str, Any]:
    """The entry of a record; keys as in `tensorboard_tab/README.md`.

    Args:
        record: with all of its metrics, whatever is logged.
        overlaps: of the run, with the record's step as the last one where its space is trusted.
        density: of this step.
        beside: further keys; those of None are left out.

    Example:
        >>> tab_entry(Record(3, {"gradient_norm": 0.5}), lr=0.1, threshold=None)
        {'step': 3, 'metrics': {'gradient_norm': 0.5}, 'lr': 0.1}
    """
    space = record.subspace
    entry: dict[str, Any] = {"step": record.step}
    if space is not None:
        entry |= {"outcome": space.outcome.name, "trusted": space.trusted, "verified": space.verified}
        if not space.trusted:
            entry["reason"] = space.verdict
        if space.converged:
            values, behind = space.reported, space.k + 1
            entry["eigenvalues"] = [values.get(place) for place in range(1, behind)]
            entry["residuals"] = space.residuals.tolist()
            entry |= {"next": values[behind]} if behind in values else {}
    entry["metrics"] = {key: value for key, value in record.metrics.items() if not key.startswith("eigenvalues/")}
    entry |= {name: table.plain() for name, table in record.tables.items()}
    if overlaps is not None and (row := overlaps.row(record.step)):
        entry["overlaps"] = [list(row), list(row.values())]
        entry["overlap_error"] = overlaps.error
    if density is not None:
        entry["density"] = _curve(density)
    return {key: value for key, value in (entry | beside).items() if value is not None}


def failed_entry(step: int, text: str) -> dict[str, Any]:
    """The entry of a probe that raised.

    Example:
        >>> failed_entry(3, "RuntimeError: no memory")
        {'step': 3, 'failed': 'RuntimeError: no memory'}
    """
    return {"step": step, "failed": text}


def _curve(density: SpectralDensity) -> list[list[float]]:
    """Values at equal distances, and the density there."""
    import torch

    low, high = density.spectrum.ends
    width = (high - low) or max(abs(high), 1.0)
    grid = torch.linspace(low - 0.03 * width, high + 0.03 * width, POINTS, dtype=torch.float64)
    return [grid.tolist(), density.spectrum.density(grid, WIDTH * width).tolist()]
