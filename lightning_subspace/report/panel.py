"""Parts of a panel: lines with gaps, scales, titles, legends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.typing import ColorType
from numpy.typing import NDArray

from lightning_subspace.subspace.record import Record

Array = NDArray[np.float64]

# The colours of Okabe and Ito, distinct for every kind of colour vision.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
GREY = "0.55"
DPI = 100
# Of a figure for loggers, which show it some 350 pixels wide: a text of 9 points has 12 pixels there.
LOGGED_WIDTH, LOGGED_DPI = 3.6, 180
# Labels at an axis of places, at most; each has the room of its digits, in points.
MOST_LABELS, DIGIT, APART = 8, 6.0, 8.0
CROWDED = 1000  # with more points than this in a panel, lines and markers are drawn small


def draw_line(
    axes: Axes,
    records: Sequence[Record],
    key: str,
    colour: ColorType,
    label: str = "",
    linestyle: str = "-",
    crowded: bool | None = None,
) -> None:
    """Draw one metric over the steps, with gaps where it is missing.

    Line and markers are small if `crowded`, by default for more than 100 records.
    """
    values = series(records, key)
    if not np.isfinite(values).any():
        return
    # Markers, however small, keep a value between two gaps visible.
    size, width = (1.5, 0.9) if (len(values) > 100 if crowded is None else crowded) else (4.0, 1.4)
    axes.plot(
        step_values(records), values, linestyle, color=colour, label=label, marker="o", markersize=size, linewidth=width
    )


def finish(axes: Axes, records: Sequence[Record], title: str, quantity: str) -> None:
    """Title, labels and limits of a panel over the steps."""
    head(axes, title)
    if not axes.has_data():
        say(axes, "not measured" if records else "no probes yet")
        return
    first, last = records[0].step, records[-1].step
    margin = max(0.03 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set(xlabel="step", ylabel=quantity)
    axes.grid(alpha=0.25)


def logged_figure(*heights: float) -> tuple[Figure, list[Axes]]:
    """A figure for loggers, of panels one below another.

    Heights are in inches.
    """
    figure = Figure(figsize=(LOGGED_WIDTH, sum(heights)), dpi=LOGGED_DPI, layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes in panels:
        axes.tick_params(labelsize=9)
    return figure, list(panels)


def fitting(steps: Sequence[int], width: float) -> range:
    """Places of those steps whose labels have room.

    The width is in points.
    """
    digits = max(len(str(step)) for step in steps)
    most = max(min(MOST_LABELS, int(width / (DIGIT * digits + APART))), 1)
    return range(0, len(steps), -(-len(steps) // most))


def head(axes: Axes, title: str, lines: int = 1) -> None:
    """Put the title on top, small in a narrow figure."""
    # `root=` for figures within figures came with matplotlib 3.10; panels are never in such ones.
    is_narrow = axes.get_figure().get_size_inches()[0] <= LOGGED_WIDTH  # type: ignore[union-attr]
    # The pad leaves lines for the legend or a note, above the data instead of on it.
    axes.set_title(title, loc="left", pad=10 + 14 * lines, fontsize=10 if is_narrow else None)


def note(axes: Axes, text: str) -> None:
    """Put a small remark between the title and the data."""
    axes.annotate(text, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=GREY)


def legend_above(axes: Axes, columns: int = 4) -> None:
    """Put the legend between the title and the data."""
    if not axes.get_legend_handles_labels()[0]:
        return
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
        borderpad=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
        handlelength=1.4,
    )
    # The title has kept the room; a legend that counted too would squeeze a narrow panel to fit beside it.
    legend.set_in_layout(False)


def colour_bar(axes: Axes, mappable: ScalarMappable, label: str) -> Axes:
    """Add a colour bar as high as the panel.

    An inset, since a bar with a place of its own drifts away from an image that is narrower than its place.
    """
    inset = axes.inset_axes((1.02, 0.0, 0.03, 1.0))
    axes.get_figure().colorbar(mappable, cax=inset, label=label)  # type: ignore[union-attr]
    return inset


def say(axes: Axes, text: str) -> None:
    """Say why a panel is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=[], yticks=[])


def unit_limits(axes: Axes) -> None:
    """Show all of [0, 1], and negative values if any."""
    if axes.has_data():
        axes.set_ylim(min(axes.dataLim.y0, 0.0) - 0.03, 1.03)


def scale_values(axes: Axes, values: Array) -> None:
    """Make the y axis logarithmic, symmetric where values are <= 0."""
    values = values[np.isfinite(values)]
    if not values.any():
        return
    if (values > 0).all():
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Powers of ten alone leave an axis of less than a decade without a label.
        if high < 5 * low:
            axes.yaxis.set_major_locator(MaxNLocator(6))
        elif high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        # Linear up to between a hundredth and a tenth of the largest.
        axes.set_yscale("symlog", linthresh=10.0 ** (np.floor(np.log10(np.abs(values).max())) - 1))
        axes.autoscale(axis="y")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def step_values(records: Sequence[Record]) -> Array:
    """The x of every record, (p,)."""
    return np.array([record.step for record in records], dtype=np.float64)


def series(records: Sequence[Record], key: str) -> Array:
    """The values of one metric, (p,), nan where a probe has none."""
    return np.array([record.metrics.get(key, np.nan) for record in records], dtype=np.float64)
