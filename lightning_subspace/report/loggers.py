"""Scalars, histograms and figures to any Lightning logger.

Scalars go to every logger through `log_metrics`. Histograms and figures have no common interface, so each known logger
has its own few lines, found by the *names* of the logger's classes: nothing here imports wandb, MLflow or Comet, and
loggers of `lightning` and `pytorch_lightning` look alike. A logger nobody knows gets the scalars alone.

Nothing here asks for the rank: call it on rank 0 only, as Lightning's loggers expect.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LogLevel: TypeAlias = Literal["default", "all"]

# Logged with log="all" only, like everything under solver/ but the two keys below.
EXTRA_KEYS = frozenset({"batch_gradient_fraction", "gap_index", "gradient_norm", "gradient_curvature"})
# All there is to say where no eigenpairs were computed (k = 0).
GRADIENT_KEYS = frozenset({"gradient_norm", "gradient_curvature"})
# Whether a number can be believed, and what it cost: nobody should have to ask for these.
SOLVER_KEYS = frozenset({"solver/subspace_error", "solver/overhead"})
# All that is left to say about a probe whose solver did not converge.
FAILURE_KEYS = frozenset({"solver/converged", "solver/residual"})


def logged_name(prefix: str, key: str) -> str:
    """Name of a metric in the logger.

    TensorBoard groups by what stands before the first slash; the eigenvalues get a group of their own, since k + 1 of
    them would bury the numbers a person looks at.

    Args:
        prefix: the monitor's `name`.
        key: a key of `Record.metrics`.

    Example:
        >>> logged_name("subspace", "gradient_fraction"), logged_name("subspace", "eigenvalues/01")
        ('subspace/gradient_fraction', 'subspace_eigenvalues/01')
    """
    return f"{prefix}_{key}" if key.startswith("eigenvalues/") else f"{prefix}/{key}"


def select(metrics: Mapping[str, float], log: LogLevel) -> dict[str, float]:
    """The part of a probe's metrics that is sent to the loggers.

    Args:
        metrics: `Record.metrics`.
        log: "default" for what a person looks at, "all" for everything.

    Example:
        >>> select({"sharpness": 2.0, "gap_index": 3.0, "solver/converged": 1.0}, "default")
        {'sharpness': 2.0}
    """
    if log == "all":
        return dict(metrics)
    asked_for = SOLVER_KEYS
    if "solver/converged" not in metrics:
        asked_for |= GRADIENT_KEYS
    elif metrics["solver/converged"] == 0.0:
        asked_for |= FAILURE_KEYS
    return {
        key: value
        for key, value in metrics.items()
        if key in asked_for or not (key in EXTRA_KEYS or key.startswith("solver/"))
    }


class Reporter:
    """Sends values to loggers; a logger that fails loses its values, never the training.

    The first failure of each logger is a warning with the logger's class, the exception and what was lost. Later calls
    go on trying: a dropped connection may come back. Call on rank 0 only.

    Example:
        >>> Reporter().scalars(trainer.loggers, {"subspace/sharpness": 21.3}, step=100)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        """Start with every logger in good standing."""
        # Identities rather than loggers: they need no hash, and a pickled or deep-copied monitor drags no logger along.
        self._warned: set[int] = set()

    def scalars(self, loggers: Iterable[Any], metrics: Mapping[str, float], step: int) -> None:
        """Log the finite values among the metrics.

        Args:
            loggers: `trainer.loggers`.
            metrics: values under their logged names. nan and inf are left out: several services reject them, and then
                all that was sent with them.
            step: the x of the values.
        """
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if not finite:
            return
        lost = f"{len(finite)} scalars ({', '.join(list(finite)[:3])}{', ...' if len(finite) > 3 else ''})"
        for logger in loggers:
            self._attempt(logger, partial(_send_scalars, logger, finite, step), lost, step)

    def histogram(self, loggers: Iterable[Any], tag: str, values: Tensor, step: int) -> None:
        """Log the distribution of some values, where the logger can show one.

        Args:
            loggers: `trainer.loggers`.
            tag: the name, such as "subspace/spectrum".
            values: any shape; non-finite entries are left out.
            step: the x of the values.
        """
        values = values.detach().flatten().double().cpu()
        values = values[values.isfinite()]
        if not len(values):
            return
        for logger in loggers:
            send = _lookup(_HISTOGRAM_SENDERS, logger)
            if send is not None:
                self._attempt(logger, partial(send, logger, tag, values, step), f"the histogram {tag}", step)

    def figure(self, loggers: Iterable[Any], tag: str, figure: Figure, step: int) -> None:
        """Log a matplotlib figure, where the logger can show or store one.

        Args:
            loggers: `trainer.loggers`.
            tag: the name, such as "subspace/overlap".
            figure: left open, and not registered with pyplot.
            step: the x of the figure.
        """
        for logger in loggers:
            send = _lookup(_FIGURE_SENDERS, logger)
            if send is not None:
                self._attempt(logger, partial(send, logger, tag, figure, step), f"the figure {tag}", step)

    def _attempt(self, logger: Any, send: Callable[[], None], lost: str, step: int) -> None:
        try:
            send()
        except Exception as error:
            if id(logger) in self._warned:
                return
            self._warned.add(id(logger))
            warnings.warn(
                f"{type(logger).__name__} raised {type(error).__name__}: {error}. Lost: {lost} of step {step}. "
                "Training goes on and later values are tried again, without a further warning for this logger; all "
                "that was measured is also in the monitor's history.",
                stacklevel=3,
            )


def _lookup(senders: Mapping[str, _Sender], logger: Any) -> _Sender | None:
    """The sender for the most derived class of the logger that has one."""
    return next((senders[base.__name__] for base in type(logger).__mro__ if base.__name__ in senders), None)


def _send_scalars(logger: Any, metrics: Mapping[str, float], step: int) -> None:
    # A dict of its own for each, since loggers add keys to what they are given.
    logger.log_metrics(dict(metrics), step=step)


def _numbered(tag: str, step: int, suffix: str) -> str:
    # Six digits keep the files of a folder in the order of the steps.
    return f"{tag}_{step:06d}.{suffix}"


def _tensorboard_histogram(logger: Any, tag: str, values: Tensor, step: int) -> None:
    logger.experiment.add_histogram(tag, values.numpy(), step)


def _tensorboard_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.add_figure(tag, figure, step, close=False)


def _wandb_histogram(logger: Any, tag: str, values: Tensor, step: int) -> None:
    # The user's logger has imported it already.
    wandb = importlib.import_module("wandb")
    logger.log_metrics({tag: wandb.Histogram(values.numpy())}, step=step)


def _wandb_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.log_image(tag, [figure], step=step)


def _mlflow_histogram(logger: Any, tag: str, values: Tensor, step: int) -> None:
    # MLflow shows no histograms; the values themselves are few and keep more.
    logger.experiment.log_dict(logger.run_id, {"step": step, "values": values.tolist()}, _numbered(tag, step, "json"))


def _mlflow_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, _numbered(tag, step, "png"))


def _comet_histogram(logger: Any, tag: str, values: Tensor, step: int) -> None:
    logger.experiment.log_histogram_3d(values.numpy(), name=tag, step=step)


def _comet_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)


def _csv_figure(logger: Any, tag: str, figure: Figure, step: int) -> None:
    # The experiment claims the folder when it is made, and warns about one that is not empty: it has to come first.
    _ = logger.experiment
    folder = Path(logger.log_dir) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / _numbered(tag.replace("/", "_"), step, "png"))


_Sender: TypeAlias = Callable[[Any, str, Any, int], None]

_HISTOGRAM_SENDERS: Mapping[str, _Sender] = {
    "TensorBoardLogger": _tensorboard_histogram,
    "WandbLogger": _wandb_histogram,
    "MLFlowLogger": _mlflow_histogram,
    "CometLogger": _comet_histogram,
}

_FIGURE_SENDERS: Mapping[str, _Sender] = {
    "TensorBoardLogger": _tensorboard_figure,
    "WandbLogger": _wandb_figure,
    "MLFlowLogger": _mlflow_figure,
    "CometLogger": _comet_figure,
    "CSVLogger": _csv_figure,
}
