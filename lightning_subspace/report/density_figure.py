"""Figures of the density of all eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_subspace.report import panel
from lightning_subspace.report.panel import Array
from lightning_subspace.subspace.spectral_density import SpectralDensity

# Standard deviation of the Gaussians, and the margin on both sides, in units of the width of the spectrum.
WIDTH, MARGIN = 3e-3, 0.03
POINTS = 1200
MAX_ROWS = 24  # of a ridge, more would blur


def density_figure(densities: Sequence[SpectralDensity]) -> Figure:
    """The density of the last step on a logarithmic scale.

    Known eigenvalues are marked; a single one is a peak of area 1/n. The density is that of a quadrature: valleys in
    the bulk lie between its nodes, and need not be in the spectrum.

    Args:
        densities: the history; the last one is drawn.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=panel.DPI, layout="constrained")
    axes = figure.add_subplot()
    if not densities:
        panel.say(axes, "no densities yet")
        return figure
    last = densities[-1]
    low, high = _range(densities[-1:])
    grid, values, width = _curve(last, low, high)
    single = 1.0 / (last.spectrum.dimension * width * np.sqrt(2.0 * np.pi))
    axes.semilogy(grid, np.maximum(values, 1e-3 * single), color=panel.BLUE, linewidth=1.2, label="density")
    axes.axhline(single, color=panel.GREY, linestyle=":", linewidth=1, label="height of one eigenvalue")
    known = last.spectrum.known.numpy()
    if len(known):
        heights = np.full(len(known), 0.2 * single)
        axes.plot(known, heights, "|", color=panel.VERMILION, markersize=12, label="eigenvalues")
    top = 3.0 * max(values.max(), single)
    axes.set(xlim=(low, high), ylim=(0.1 * single, top), xlabel="eigenvalue", ylabel="density")
    axes.grid(alpha=0.25)
    panel.head(axes, f"Density of the {last.spectrum.dimension:,} eigenvalues at step {last.step}")
    panel.legend_above(axes)
    return figure


def ridge_figure(densities: Sequence[SpectralDensity]) -> Figure:
    """The densities over the steps, each with a logarithmic scale.

    Args:
        densities: the history, in the order of the steps; about two dozen of them are drawn.
    """
    figure = Figure(figsize=(6.4, 5.4), dpi=panel.DPI, layout="constrained")
    axes = figure.add_subplot()
    if not densities:
        panel.say(axes, "no densities yet")
        return figure
    count = min(len(densities), MAX_ROWS)
    shown = [densities[int(i)] for i in np.unique(np.linspace(0, len(densities) - 1, count).round())]
    low, high = _range(shown)
    colours = colormaps["viridis"](np.linspace(0.0, 0.92, len(shown)))
    for row, (density, colour) in enumerate(zip(shown, colours, strict=True)):
        _draw_row(axes, density, (low, high), row, colour, zorder=len(shown) - row)
    rows = range(0, len(shown), -(-len(shown) // 12))
    axes.set_yticks(rows, [str(shown[row].step) for row in rows])
    axes.set(xlim=(low, high), xlabel="eigenvalue", ylabel="step")
    axes.grid(alpha=0.25, axis="x")
    panel.head(axes, f"Density of the {shown[-1].spectrum.dimension:,} eigenvalues")
    panel.note(axes, "logarithmic, from a third of a single eigenvalue upwards")
    return figure


def _draw_row(
    axes: Axes, density: SpectralDensity, ends: tuple[float, float], row: int, colour: Array, zorder: int
) -> None:
    grid, values, width = _curve(density, *ends)
    least = 1.0 / (3.0 * density.spectrum.dimension * width * np.sqrt(2.0 * np.pi))
    heights = np.log10(np.maximum(values / least, 1.0))
    heights = row + 1.8 * heights / max(heights.max(), 1e-12)
    axes.fill_between(grid, row, heights, color=colour, alpha=0.75, linewidth=0, zorder=zorder)
    axes.plot(grid, heights, color="white", linewidth=0.8, zorder=zorder)


def _range(densities: Sequence[SpectralDensity]) -> tuple[float, float]:
    """The ends of all spectra, with a margin."""
    ends = [density.spectrum.ends for density in densities]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    width = (high - low) or max(abs(high), 1.0)
    return low - MARGIN * width, high + MARGIN * width


def _curve(density: SpectralDensity, low: float, high: float) -> tuple[Array, Array, float]:
    """Points, the density there, and the standard deviation of its Gaussians."""
    width = WIDTH * (high - low)
    grid = torch.linspace(low, high, POINTS, dtype=torch.float64)
    return grid.numpy(), density.spectrum.density(grid, width).numpy(), width
