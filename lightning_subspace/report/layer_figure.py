"""Figure of shares by layer: top space, gradient, update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_subspace._arguments import require_instances
from lightning_subspace.report import panel
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.table import Table

TABLE = "layers"
BARS = (
    ("participation", "top space", panel.BLUE),
    ("gradient", "gradient", panel.VERMILION),
    ("update", "update", panel.ORANGE),
)
MAX_COLUMNS = 200  # of the map: more would be narrower than its pixels
# Inches of a row, and those that title, legend and labels take; letters of a name, of which the end is kept; and points
# that steps have beside the names.
ROW, AROUND, LETTERS, STEPS = 0.19, 1.05, 16, 105.0


def layers_figure(records: Sequence[Record]) -> Figure:
    """Shares of the top space over the steps, and the last shares.

    Args:
        records: the history; those with other groups than the last one are left out.

    Raises:
        ValueError: for anything but records.
    """
    records = require_instances("records", records, Record, "a list of instances of lightning_subspace.Record")
    tables = {record.step: record.tables[TABLE] for record in records if TABLE in record.tables}
    newest = list(tables.values())[-1] if tables else None
    height = AROUND + ROW * max(len(newest.groups) if newest else 0, 4)
    figure, (last, over_steps) = panel.logged_figure(height, height)
    if newest is None:
        for axes in (over_steps, last):
            panel.say(axes, "no layers yet")
        return figure
    same = {step: table for step, table in tables.items() if table.groups == newest.groups}
    _draw_map(over_steps, newest.groups, same)
    _draw_bars(last, newest, list(same)[-1])
    return figure


def _draw_map(axes: Axes, groups: Sequence[str], tables: dict[int, Table]) -> None:
    panel.head(axes, "Share of the top space")
    columns = {step: table.rows["participation"] for step, table in tables.items() if "participation" in table.names}
    if not columns:
        panel.say(axes, "not measured")
        return
    every = -(-len(columns) // MAX_COLUMNS)
    steps = list(columns)[::-every][::-1]  # the last one among them
    image = axes.imshow(
        np.array([columns[step] for step in steps]).T, vmin=0.0, cmap="viridis", interpolation="nearest",
        aspect="auto",
    )  # fmt: skip
    panel.colour_bar(axes, image, "share")
    shown = panel.fitting(steps, STEPS)
    axes.set_xticks(shown, [str(steps[place]) for place in shown])
    axes.set_yticks(range(len(groups)), _short(groups))
    axes.set_xlabel("step")


def _draw_bars(axes: Axes, table: Table, step: int) -> None:
    panel.head(axes, f"Shares at step {step}", lines=2)
    rows, places = table.rows, np.arange(len(table.groups), dtype=np.float64)
    there = [(name, label, colour) for name, label, colour in BARS if name in rows]
    height = 0.8 / max(len(there), 1)
    for number, (name, label, colour) in enumerate(there):
        axes.barh(places + (number - (len(there) - 1) / 2) * height, rows[name], height, color=colour, label=label)
    if "null" in rows:
        axes.plot(rows["null"], places, "|", color="black", markersize=8, label="parameters")
    axes.set_yticks(places, _short(table.groups))
    axes.invert_yaxis()
    axes.set(xlim=(0.0, None), xlabel="share")
    axes.grid(axis="x", alpha=0.25)
    panel.legend_above(axes, columns=2)


def _short(groups: Sequence[str]) -> list[str]:
    """Names by their ends, which tell them apart."""
    return [name if len(name) <= LETTERS else f"\N{HORIZONTAL ELLIPSIS}{name[1 - LETTERS :]}" for name in groups]
