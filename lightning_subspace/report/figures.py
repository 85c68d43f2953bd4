"""Figures of a run: spectrum, overlaps between probes, and summary.

Only matplotlib's object interface is used, no pyplot, backend or global state: drawing during training neither opens a
window nor touches the user's figures or rcParams. A missing value is a gap in a line or a grey cell, never a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lightning_subspace._arguments import is_integer, is_list_like, require_instances, require_number, wrong
from lightning_subspace.report import panel
from lightning_subspace.report.panel import Array
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.subspace import Subspace

UNKNOWN = "0.88"
NUMBER = 32.0  # points that the number of a cell needs
# Width of a matrix in points, in the summary and in a figure of its own.
WIDE, NARROW = 310.0, 165.0


def spectrum_figure(records: Sequence[Record]) -> Figure:
    """The eigenvalues of the last probe, and the gap below.

    Args:
        records: the history; the last record that has a subspace is drawn.
    """
    records = _require_records(records)
    figure, [axes] = panel.logged_figure(2.9)
    last = next((record for record in reversed(records) if record.subspace is not None), None)
    if last is None or last.subspace is None:
        panel.say(axes, "no eigenvalues yet")
        return figure
    _draw_spectrum(axes, last.subspace)
    unconverged = "" if last.subspace.converged else ", not converged"
    panel.head(axes, f"Hessian eigenvalues, step {last.step}{unconverged}")
    return figure


def overlap_figure(steps: Sequence[int], matrix: Array, error: float | None = None) -> Figure:
    """The overlap of the subspaces of every two probes.

    Args:
        steps: the step of each probe.
        matrix: (p, p) overlaps in [0, 1]; nan where unknown.
        error: standard deviation of an entry, where entries are estimates from sketches; stated in the title.
    """
    steps = _require_matrix(steps, matrix, error)
    figure, [axes] = panel.logged_figure(3.4)
    _draw_overlaps(axes, steps, matrix, error, NARROW)
    axes.set_aspect("equal")
    return figure


def summary_figure(
    records: Sequence[Record], steps: Sequence[int], matrix: Array, error: float | None = None
) -> Figure:
    """Four panels over the steps of the training.

    Eigenvalues, fractions of gradient and updates, overlaps with earlier probes, and the overlap matrix; for a run
    without eigenvectors (k = 0), the quantities of a single Hessian product.

    Args:
        records: the history, in the order of the steps.
        steps: the step of each row of the matrix.
        matrix: (p, p) overlaps, as for `overlap_figure`.
        error: standard deviation of an entry, if known.
    """
    records = _require_records(records)
    steps = _require_matrix(steps, matrix, error)
    if records and not _eigenvalue_keys(records) and all(record.subspace is None for record in records):
        return _gradient_figure(records)
    figure = Figure(figsize=(12.0, 8.0), dpi=panel.DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    axes = figure.subplots(2, 2)
    _draw_eigenvalues(axes[0, 0], records)
    _draw_gradient(axes[0, 1], records)
    _draw_stability(axes[1, 0], records)
    _draw_overlaps(axes[1, 1], steps, matrix, error, WIDE)
    return figure


def _require_records(records: Sequence[Record]) -> tuple[Record, ...]:
    return require_instances("records", records, Record, "a list of instances of lightning_subspace.Record")


def _require_matrix(steps: Sequence[int], matrix: Array, error: float | None) -> tuple[int, ...]:
    found = tuple(steps) if is_list_like(steps) else ()
    if not is_list_like(steps) or not all(map(is_integer, found)):
        raise wrong("steps", "a list of steps", steps)
    shape = len(found), len(found)
    if not isinstance(matrix, np.ndarray) or matrix.shape != shape or matrix.dtype.kind != "f":
        raise wrong("matrix", f"an array of floats of shape {shape}, as there are steps", matrix)
    if error is not None:
        require_number("error", error, "a number of at least 0 or None", lambda x: x >= 0.0)
    return found


def _gradient_figure(records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(12.0, 3.8), dpi=panel.DPI, layout="constrained")
    cosine, norm, curvature = figure.subplots(1, 3)
    panel.draw_line(cosine, records, "gradient_hessian_cosine", panel.BLUE)
    panel.finish(cosine, records, "Cosine between g and Hg", "cosine")
    panel.unit_limits(cosine)
    for axes, key, colour, title, quantity in (
        (norm, "gradient_norm", panel.VERMILION, "Length of the gradient", "|g|"),
        (curvature, "gradient_curvature", panel.GREEN, "Curvature along the gradient", "g·Hg / |g|²"),
    ):
        panel.draw_line(axes, records, key, colour)
        panel.finish(axes, records, title, quantity)
        panel.scale_values(axes, panel.series(records, key))
    return figure


def _draw_spectrum(axes: Axes, subspace: Subspace) -> None:
    k = subspace.k
    values = subspace.eigenvalues.double().cpu().numpy()
    residuals = subspace.residuals.double().cpu().numpy()
    if subspace.converged:
        values = np.where(subspace.known.numpy(), values, np.nan)  # as in the log
    index = np.arange(1, k + 1)
    axes.errorbar(index, values, yerr=residuals, fmt="o", color=panel.BLUE, markersize=4, capsize=3, label="± residual")
    axes.set_xlim(0.4, k + 0.6)
    rest = subspace.next_eigenvalue
    if np.isfinite(rest):
        values = np.append(values, rest)
        # Ordered by magnitude, with both signs, the two neighbours of the gap do not enclose it.
        steps = np.diff(values)
        if (steps <= 0.0).all() or (steps >= 0.0).all():
            low, high = sorted(values[-2:])
            axes.axhspan(low, high, color=panel.ORANGE, alpha=0.25, linewidth=0, label=f"gap {high - low:.3g}")
        axes.axvline(k + 0.5, color=panel.GREY, linestyle=":", linewidth=1)
        axes.plot(k + 1, rest, "o", color=panel.GREY, markersize=4, markerfacecolor="none", label="next")
        axes.set_xlim(0.4, k + 1.6)
    elif subspace.converged:
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
        axes.text(0.98, 0.96, f"eigenvalue {k + 1} is not known,\nnor the gap", color=panel.GREY, fontsize=9, **place)
    panel.scale_values(axes, values)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.set(xlabel="index", ylabel="eigenvalue")
    axes.grid(alpha=0.25)
    panel.legend_above(axes)


def _draw_eigenvalues(axes: Axes, records: Sequence[Record]) -> None:
    keys = _eigenvalue_keys(records)
    k = max((record.subspace.k for record in records if record.subspace is not None), default=len(keys))
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.92, max(k, 1))))
    crowded = len(keys) * len(records) > panel.CROWDED
    for index, key in enumerate(keys):
        colour, linestyle = (colours(index), "-") if index < k else (panel.GREY, "--")
        panel.draw_line(axes, records, key, colour, linestyle=linestyle, crowded=crowded)
    panel.finish(axes, records, "Top eigenvalues of the Hessian", "eigenvalue")
    if not axes.has_data():
        return
    if len(keys) > k:
        panel.note(axes, f"dashed: eigenvalue {k + 1}, behind the gap")
    panel.scale_values(axes, np.concatenate([panel.series(records, key) for key in keys]))
    # A swatch for each index says what k legend entries would, and takes the same room for k = 2 and k = 50.
    if k > 1:
        bar = panel.colour_bar(axes, ScalarMappable(BoundaryNorm(np.arange(0.5, k + 1), k), colours), "index")
        bar.yaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        bar.minorticks_off()
        bar.invert_yaxis()


def _draw_gradient(axes: Axes, records: Sequence[Record]) -> None:
    low, high = panel.series(records, "gradient_fraction_low"), panel.series(records, "gradient_fraction_high")
    panel.draw_line(axes, records, "gradient_fraction", panel.BLUE, "gradient")
    if np.isfinite(low + high).any():
        # A bar at each probe that measured it; a band between them would show what nobody measured.
        at = panel.step_values(records)
        axes.vlines(at, low, high, color=panel.BLUE, alpha=0.25, linewidth=6, zorder=1, label="its error bar")
    panel.draw_line(axes, records, "update_fraction", panel.ORANGE, "update")
    panel.draw_line(axes, records, "gradient_hessian_cosine", panel.VERMILION, "cosine of g and Hg")
    panel.finish(axes, records, "Fraction in the top subspace", "fraction, cosine")
    panel.unit_limits(axes)
    panel.legend_above(axes)


def _draw_stability(axes: Axes, records: Sequence[Record]) -> None:
    panel.draw_line(axes, records, "overlap_previous", panel.BLUE, "with the previous probe")
    panel.draw_line(axes, records, "overlap_reference", panel.VERMILION, "with the reference probe")
    panel.finish(axes, records, "Overlap of the top subspace", "overlap")
    panel.unit_limits(axes)
    panel.legend_above(axes)


def _draw_overlaps(axes: Axes, steps: Sequence[int], matrix: Array, error: float | None, width: float) -> None:
    panel.head(axes, "Overlap between probes" + ("" if error is None else f", ± {error:.2g}"))
    if not len(steps):
        panel.say(axes, "no overlaps yet")
        return
    axes.set_facecolor(UNKNOWN)
    if np.isnan(matrix).any():
        panel.note(axes, "grey: unknown")
    image = axes.imshow(
        matrix, vmin=0.0, vmax=1.0, cmap="viridis", origin="lower", interpolation="nearest", aspect="auto"
    )
    panel.colour_bar(axes, image, "overlap")
    count = len(steps)
    shown = panel.fitting(steps, width)
    labels = [str(steps[index]) for index in shown]
    axes.set_xticks(shown, labels)
    axes.set_yticks(shown, labels)
    axes.set(xlabel="step", ylabel="step")
    if count <= width / NUMBER:
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                colour = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)


def _eigenvalue_keys(records: Sequence[Record]) -> list[str]:
    keys = {key for record in records for key in record.metrics if key.startswith("eigenvalues/")}
    return sorted(keys, key=lambda key: int(key.removeprefix("eigenvalues/")))
