"""Figure of the loss along eigenvectors, beside its quadratic."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_subspace.report import panel
from lightning_subspace.subspace.loss_slices import LossSlices

LEVELS = 10  # contours of the plane
HEIGHT = 2.8  # inches of a panel
WALLS = 4.0  # the loss is drawn up to so many times the rise of the quadratic; beyond, walls would flatten the valley


def slices_figure(slices: LossSlices | None) -> Figure:
    """A panel for each line, and one for the plane.

    In the plane the loss is a map with solid contours, and its quadratic has dashed ones at the same levels.

    Args:
        slices: of one step; None draws an empty figure.
    """
    count = 1 if slices is None else len(slices.lines) + (slices.plane is not None)
    figure, axes = panel.logged_figure(*[HEIGHT] * max(count, 1))
    if slices is None:
        panel.say(axes[0], "no slices yet")
        return figure
    for one in axes:
        one.xaxis.set_major_locator(MaxNLocator(4))  # lengths may have many digits
    for i in range(len(slices.lines)):
        _draw_line(axes[i], slices, i)
    if slices.plane is not None:
        _draw_plane(axes[-1], slices)
    return figure


def _draw_line(axes: Axes, slices: LossSlices, i: int) -> None:
    length, line, model = float(slices.ranges[i]), slices.lines[i].numpy(), slices.quadratic_lines[i].numpy()
    where = slices.units.numpy() * length
    fine = np.linspace(-length, length, 101)
    slope, value = float(slices.slopes[i]), float(slices.eigenvalues[i])
    quadratic = slices.loss + fine * slope + fine**2 * value / 2.0
    axes.plot(where, line, "o-", color=panel.BLUE, markersize=3.5, linewidth=1.4, label="loss")
    axes.plot(fine, quadratic, "--", color=panel.VERMILION, linewidth=1.2, label="quadratic")
    axes.axvline(0.0, color=panel.GREY, linewidth=0.8, linestyle=":")
    finite = line[np.isfinite(line)]
    low, high = min(finite.min(initial=slices.loss), model.min()), max(finite.max(initial=slices.loss), model.max())
    highest = slices.loss + WALLS * max(model.max() - slices.loss, 0.0)
    if high > highest > low:
        axes.set_ylim(low - 0.05 * (highest - low), highest)
    axes.set(xlabel=f"distance along v_{i + 1}")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    panel.head(axes, f"lambda_{i + 1} = {value:.3g}" + (f", step {slices.step}" if i == 0 else ""))
    panel.legend_above(axes)


def _draw_plane(axes: Axes, slices: LossSlices) -> None:
    assert slices.plane is not None
    across, up = (slices.units.numpy() * float(length) for length in slices.ranges[:2])
    loss, quadratic = slices.plane.numpy(), slices.quadratic_plane.numpy()
    finite = loss[np.isfinite(loss)]
    low, high = min(finite.min(initial=slices.loss), quadratic.min()), quadratic.max()
    levels = np.linspace(low, max(high, low + 1e-12 * max(abs(low), 1e-300)), LEVELS + 1)
    shown = np.ma.masked_invalid(loss)
    image = axes.contourf(across, up, shown, levels, cmap="viridis", extend="max")
    axes.contour(across, up, shown, levels, colors="white", linewidths=0.7)
    axes.contour(across, up, quadratic, levels, colors=panel.VERMILION, linewidths=0.9, linestyles="--")
    axes.plot(0.0, 0.0, "+", color="white", markersize=9)
    axes.set(xlabel="distance along v_1", ylabel="distance along v_2")
    panel.head(axes, "Loss on the plane of v_1, v_2")
    panel.note(axes, "dashed: the quadratic")
    panel.colour_bar(axes, image, "loss")
