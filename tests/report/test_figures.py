"""The figures show the numbers of the records, and gaps where there are none."""

from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_subspace.linalg import Outcome
from lightning_subspace.report import layers_figure, overlap_figure, spectrum_figure, summary_figure
from lightning_subspace.report.slices_figure import slices_figure
from lightning_subspace.subspace.loss_slices import LossSlices
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.subspace import Subspace
from lightning_subspace.subspace.table import Table

NOTHING = np.empty((0, 0))


def record(
    step: int,
    eigenvalues: tuple[float, ...] = (4.0, 2.0),
    next_eigenvalue: float = 1.0,
    outcome: Outcome = Outcome.CONVERGED,
    **metrics: float,
) -> Record:
    """One probe, with its eigenvalues among its metrics."""
    values = [*eigenvalues, next_eigenvalue]
    subspace = Subspace(
        eigenvalues=torch.tensor(eigenvalues, dtype=torch.float64),
        eigenvectors=None,
        residuals=torch.full((len(eigenvalues),), 0.01, dtype=torch.float64),
        next_eigenvalue=next_eigenvalue,
        error=0.01,
        outcome=outcome,
        verified=True,
        num_matvecs=20,
    )
    keyed = {f"eigenvalues/{index:02d}": value for index, value in enumerate(values, 1)}
    return Record(step=step, metrics={**keyed, **metrics}, subspace=subspace)


def line(axes: Axes, label: str) -> np.ndarray:
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return np.asarray(found.get_ydata())


def texts(axes: Axes) -> str:
    return " ".join([axes.get_title(loc="left"), *(text.get_text() for text in axes.texts)])


def draw(figure: Figure) -> Figure:
    """Lay everything out, which is when layouts and formatters fail or warn."""
    figure.draw_without_rendering()
    return figure


def long_history(count: int) -> list[Record]:
    return [
        record(50 * i, (4.0 + i, 2.0), gradient_fraction=0.5, overlap_previous=0.9, gradient_hessian_cosine=0.4)
        for i in range(count)
    ]


def test_spectrum_shows_eigenvalues_residuals_and_the_gap() -> None:
    figure = draw(spectrum_figure([record(0), record(50, (8.0, 5.0), next_eigenvalue=3.0)]))
    (axes,) = figure.axes
    (container,) = axes.containers
    points, _, (bars,) = container.lines
    np.testing.assert_array_equal(points.get_ydata(), [8.0, 5.0])
    np.testing.assert_allclose(np.ptp([segment[:, 1] for segment in bars.get_segments()], axis=1), 0.02)
    np.testing.assert_array_equal(line(axes, "next"), [3.0])
    assert "gap 2" in axes.get_legend_handles_labels()[1]
    assert "step 50" in texts(axes)


def test_spectrum_without_a_next_eigenvalue_has_no_gap() -> None:
    (axes,) = draw(spectrum_figure([record(0, next_eigenvalue=float("nan"))])).axes
    assert not any("gap" in label for label in axes.get_legend_handles_labels()[1])
    assert "eigenvalue 3 is not known" in texts(axes)


def test_spectrum_by_magnitude_claims_no_gap_between_signs() -> None:
    (axes,) = draw(spectrum_figure([record(0, (4.0, -3.0), next_eigenvalue=2.0)])).axes
    assert not any("gap" in label for label in axes.get_legend_handles_labels()[1])


def test_spectrum_says_when_the_solver_did_not_converge() -> None:
    (axes,) = draw(spectrum_figure([record(0, outcome=Outcome.MAX_MATVECS)])).axes
    assert "not converged" in texts(axes)


def test_spectrum_is_that_of_the_last_probe_that_has_one() -> None:
    (axes,) = draw(spectrum_figure([record(7), Record(step=9, metrics={})])).axes
    assert "step 7" in texts(axes)
    (axes,) = draw(spectrum_figure([])).axes
    assert "no eigenvalues yet" in texts(axes)


def test_overlap_shows_the_matrix_from_zero_to_one() -> None:
    matrix = np.array([[1.0, 0.4, np.nan], [0.4, 1.0, 0.7], [np.nan, 0.7, 1.0]])
    axes = draw(overlap_figure([0, 10, 20], matrix, error=0.003)).axes[0]
    (image,) = axes.get_images()
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), matrix)
    assert image.get_clim() == (0.0, 1.0)
    assert "± 0.003" in texts(axes)
    assert "grey: unknown" in texts(axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10", "20"]
    assert len(axes.texts) == 8, "seven known cells and a note"


def test_overlap_thins_its_labels() -> None:
    axes = draw(overlap_figure(list(range(0, 3000, 10)), np.eye(300))).axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert len(axis.get_ticklocs()) <= 8
        assert [label.get_text() for label in axis.get_ticklabels()] == [f"{10 * i:.0f}" for i in axis.get_ticklocs()]
    assert "±" not in texts(axes)


SHOWN = 350.0  # pixels that loggers give a figure
LATE = list(range(100_000, 103_200, 50))  # steps of six digits


def decay(steps: list[int]) -> np.ndarray:
    return np.exp(-np.abs(np.subtract.outer(steps, steps)) / 800)


@pytest.mark.parametrize(
    "make",
    [
        lambda: spectrum_figure([record(123_456, tuple(1.234567e-3 * 0.9**i for i in range(10)), 3.1234e-4)]),
        lambda: spectrum_figure([record(0, tuple(0.9**i for i in range(50)), float("nan"))]),
        lambda: overlap_figure(LATE[:5], decay(LATE[:5]), 0.0038),
        lambda: overlap_figure(LATE[:8], decay(LATE[:8])),
        lambda: overlap_figure(LATE, np.where(decay(LATE) < 0.1, np.nan, decay(LATE)), 0.0038),
        lambda: layers_figure(
            [layered(step, [f"transformer.layers.{i}.attention" for i in range(16)]) for step in LATE]
        ),
        lambda: layers_figure([layered(0, ["a", "b"])]),
        lambda: slices_figure(slices()),
    ],
)
def test_a_figure_of_a_logger_can_be_read_at_the_size_that_it_is_shown(make) -> None:
    figure = draw(make())
    width, height = figure.get_size_inches() * figure.dpi
    shrunk = SHOWN / width
    for axes in figure.axes:
        ticks = [drawn_labels(axis) for axis in (axes.xaxis, axes.yaxis)]
        words = [child for child in axes.get_children() if isinstance(child, Text)]  # the titles among them
        words += [axes.xaxis.label, axes.yaxis.label]
        words += axes.get_legend().get_texts() if axes.get_legend() else []
        for text in [text for text in (*words, *ticks[0], *ticks[1]) if text.get_text()]:
            assert text.get_fontsize() * figure.dpi / 72 * shrunk >= 11
            place = text.get_window_extent()
            assert (place.x0 >= -1, place.x1 <= width + 1, place.y0 >= -1, place.y1 <= height + 1) == (True,) * 4
        for labels in ticks:
            places = [label.get_window_extent() for label in labels]
            assert not any(one.overlaps(other) for i, one in enumerate(places) for other in places[:i])
    assert all(len(drawn_labels(axis)) >= 1 for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis))


def layered(step: int, groups: list[str]) -> Record:
    """A record with a table of as many equal shares."""
    shares = np.full(len(groups), 1 / len(groups))
    rows = dict.fromkeys(("participation", "gradient", "update", "null"), shares)
    return Record(step, {}, tables={"layers": Table.of(groups, rows)})


def slices() -> LossSlices:
    """Of a quadratic with curvatures that are far apart, and a slope."""
    values, ranges = torch.tensor([123.4, 20.0, 1e-3]).double(), torch.tensor([0.012345, 0.1, 30.0]).double()
    units = torch.linspace(-1, 1, 11, dtype=torch.float64)
    lines = 0.5 + (units * ranges[:, None]) ** 2 * values[:, None] / 2
    plane = lines[0][None] + lines[1][:, None] - 0.5
    return LossSlices(123_456, 0.5, values, torch.full((3,), 1e-3).double(), ranges, lines, plane)


def drawn_labels(axis: Axis) -> list[Text]:
    """Those within the limits: an axis has more of them."""
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_overlap_of_nothing_says_so() -> None:
    assert "no overlaps yet" in texts(draw(overlap_figure([], NOTHING)).axes[0])


def test_summary_draws_the_metrics_with_gaps_where_they_are_missing() -> None:
    records = [
        record(0, gradient_fraction=0.5, gradient_hessian_cosine=0.3, update_fraction=0.2),
        record(50, gradient_hessian_cosine=0.4),
        record(90, gradient_fraction=0.7, gradient_hessian_cosine=-0.5, overlap_previous=0.9, overlap_reference=0.8),
    ]
    eigenvalues, gradient, stability, overlaps = draw(summary_figure(records, [0, 90], np.eye(2), 0.01)).axes[:4]
    np.testing.assert_array_equal([line.get_ydata()[0] for line in eigenvalues.get_lines()], [4.0, 2.0, 1.0])
    np.testing.assert_array_equal(eigenvalues.get_lines()[0].get_xdata(), [0, 50, 90])
    np.testing.assert_array_equal(line(gradient, "gradient"), [0.5, np.nan, 0.7])
    np.testing.assert_array_equal(line(gradient, "update"), [0.2, np.nan, np.nan])
    np.testing.assert_array_equal(line(gradient, "cosine of g and Hg"), [0.3, 0.4, -0.5])
    np.testing.assert_array_equal(line(stability, "with the previous probe"), [np.nan, np.nan, 0.9])
    np.testing.assert_array_equal(line(stability, "with the reference probe"), [np.nan, np.nan, 0.8])
    assert gradient.get_ylim()[0] < -0.5
    assert overlaps.get_images()[0].get_clim() == (0.0, 1.0)
    assert "± 0.01" in texts(overlaps)


def test_summary_shows_the_error_bar_where_it_was_measured() -> None:
    measured = record(50, gradient_fraction=0.7, gradient_fraction_low=0.6, gradient_fraction_high=0.8)
    gradient = draw(summary_figure([record(0, gradient_fraction=0.5), measured], [], NOTHING)).axes[1]
    (bars,) = gradient.collections
    drawn = [segment for segment in bars.get_segments() if len(segment)]
    np.testing.assert_array_equal(drawn, [[[50, 0.6], [50, 0.8]]])


@pytest.mark.parametrize(("smallest", "scale"), [(1.0, "log"), (-1.0, "symlog")])
def test_eigenvalues_are_logarithmic_also_when_some_are_negative(smallest: float, scale: str) -> None:
    axes = draw(summary_figure([record(0, next_eigenvalue=smallest), record(5)], [], NOTHING)).axes[0]
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert low < smallest
    assert high > 4.0


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_summary_of_any_length_is_1200_pixels_wide(count: int) -> None:
    records = long_history(count)
    figure = draw(summary_figure(records, [entry.step for entry in records], np.eye(count)))
    assert figure.get_figwidth() * figure.dpi == 1200
    assert len(figure.axes) == 4
    assert ("no probes yet" in texts(figure.axes[0])) == (count == 0)


@pytest.mark.parametrize("count", [1, 2, 300])
def test_legends_lie_above_the_data(count: int) -> None:
    figure = draw(summary_figure(long_history(count), [], NOTHING))
    boxes = [(axes.get_legend().get_window_extent(), axes.bbox) for axes in figure.axes if axes.get_legend()]
    assert boxes
    for legend, axes in boxes:
        assert legend.y0 >= axes.y1 - 1
        assert legend.x1 <= figure.bbox.x1


def test_more_than_99_eigenvalues_stay_in_order() -> None:
    values = tuple(float(value) for value in range(120, 0, -1))
    axes = draw(summary_figure([record(0, values, next_eigenvalue=0.5)], [], NOTHING)).axes[0]
    np.testing.assert_array_equal([line.get_ydata()[0] for line in axes.get_lines()], [*values, 0.5])


def test_a_run_without_eigenvectors_shows_its_gradient() -> None:
    metrics = [
        {"gradient_hessian_cosine": 0.5, "gradient_norm": 2.0, "gradient_curvature": -1.0},
        {"gradient_norm": 1.0, "gradient_curvature": 3.0},
    ]
    figure = draw(summary_figure([Record(step=i, metrics=m) for i, m in enumerate(metrics)], [], NOTHING))
    drawn = [axes.get_lines()[0].get_ydata() for axes in figure.axes]
    np.testing.assert_array_equal(drawn, [[0.5, np.nan], [2.0, 1.0], [-1.0, 3.0]])


def test_drawing_leaves_no_trace() -> None:
    before = dict(mpl.rcParams)
    draw(summary_figure(long_history(3), [0, 50, 100], np.eye(3)))
    assert dict(mpl.rcParams) == before


@pytest.mark.thorough  # claims/test_package.py reads the same off the files
def test_pyplot_is_not_imported_and_matplotlib_only_for_figures() -> None:
    code = (
        "import sys, lightning_subspace.report as report; assert 'matplotlib' not in sys.modules;"
        "report.spectrum_figure([]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
