"""What a person sees of a run: scalars and figures in any logger, a TensorBoard layout, a line of progress.

Everything here runs on rank 0 alone and writes only; no number is computed, and no failure reaches the training.
The figures are loaded on first use, so that matplotlib is needed by those who draw and costs nobody else its import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_subspace.report.layout import add_layout as add_layout
from lightning_subspace.report.loggers import Reporter as Reporter
from lightning_subspace.report.loggers import logged_name as logged_name
from lightning_subspace.report.loggers import select as select
from lightning_subspace.report.progress import ProgressLine as ProgressLine
from lightning_subspace.report.publisher import Publisher as Publisher

if TYPE_CHECKING:
    from lightning_subspace.report.figures import overlap_figure as overlap_figure
    from lightning_subspace.report.figures import spectrum_figure as spectrum_figure
    from lightning_subspace.report.figures import summary_figure as summary_figure

_FIGURES = frozenset({"overlap_figure", "spectrum_figure", "summary_figure"})


def __getattr__(name: str) -> Any:
    if name in _FIGURES:
        from lightning_subspace.report import figures

        return getattr(figures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
