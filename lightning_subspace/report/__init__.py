"""Output of a run: scalars, entries for the tab, figures, progress.

Everything here runs on rank 0 alone and only writes; no failure reaches the training. The figures are loaded on first
use, since matplotlib takes a while to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_subspace.report.loggers import Reporter as Reporter
from lightning_subspace.report.loggers import logged_name as logged_name
from lightning_subspace.report.loggers import select as select
from lightning_subspace.report.progress import ProgressLine as ProgressLine
from lightning_subspace.report.publisher import Publisher as Publisher

if TYPE_CHECKING:
    from lightning_subspace.report.figures import overlap_figure as overlap_figure
    from lightning_subspace.report.figures import spectrum_figure as spectrum_figure
    from lightning_subspace.report.figures import summary_figure as summary_figure
    from lightning_subspace.report.layer_figure import layers_figure as layers_figure


def __getattr__(name: str) -> Any:
    if name in ("overlap_figure", "spectrum_figure", "summary_figure"):
        from lightning_subspace.report import figures

        return getattr(figures, name)
    if name == "layers_figure":
        from lightning_subspace.report.layer_figure import layers_figure

        return layers_figure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
