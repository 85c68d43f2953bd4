"""Scalars, histograms, figures and files to any Lightning logger.

Scalars go to every logger through `log_metrics`. Everything else has no common interface: each known logger has
a row in a table, found by the *names* of the logger's classes, so that nothing here imports wandb, MLflow or Comet, and
loggers of `lightning` and `pytorch_lightning` look alike. An unknown logger gets the scalars alone.

Call on rank 0 only, as Lightning's loggers expect.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_subspace._arguments import require_instance, require_word
from lightning_subspace._torch import file_writer
from lightning_subspace.parallel.ranks import in_words
from lightning_subspace.report.guard import Guard
from lightning_subspace.state.notice import warn
from lightning_subspace.tensorboard_tab.schema import tag_of
from lightning_subspace.tensorboard_tab.summary import summary_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_subspace._lightning import Trainer

LogLevel: TypeAlias = Literal["default", "all"]

# Whether a number can be believed, and what it cost: always logged.
SOLVER_KEYS = frozenset({"solver/subspace_error", "solver/overhead", "solver/check_error", "solver/unchecked"})
# All that a probe whose solver did not converge can log.
FAILURE_KEYS = frozenset({"solver/converged", "solver/residual"})


def logged_name(prefix: str, key: str) -> str:
    """Name in the loggers of a key of `Record.metrics`.

    `prefix` is the monitor's name. TensorBoard groups by the part before the first slash. The eigenvalues get a group
    of their own, since k + 1 of them would bury the numbers a person looks at.

    Example:
        >>> logged_name("subspace", "gradient_fraction"), logged_name("subspace", "eigenvalues/01")
        ('subspace/gradient_fraction', 'subspace_eigenvalues/01')
    """
    for name, value in (("prefix", prefix), ("key", key)):
        require_instance(name, value, str, "a string")
    return f"{prefix}_{key}" if key.startswith("eigenvalues/") else f"{prefix}/{key}"


def select(metrics: Mapping[str, float], log: LogLevel, extra: Set[str]) -> dict[str, float]:
    """The part of a probe's metrics that is sent to the loggers.

    Args:
        metrics: `Record.metrics`.
        log: "default" for what a person looks at, "all" for everything.
        extra: keys that "default" leaves out, unless k = 0, like all of `solver/` but a few.

    Example:
        >>> select({"sharpness": 2.0, "gap_index": 3.0, "solver/converged": 1.0}, "default", {"gap_index"})
        {'sharpness': 2.0}
    """
    require_instance("metrics", metrics, Mapping, "a mapping from keys to numbers")
    require_word("log", log, get_args(LogLevel))
    require_instance("extra", extra, Set, "a set of keys")
    if log == "all":
        return dict(metrics)
    kept = SOLVER_KEYS | (FAILURE_KEYS if metrics.get("solver/converged") == 0.0 else frozenset())
    if metrics.get("solver/converged") == 1.0 and metrics.get("solver/verified") == 0.0:
        kept |= {"solver/verified"}
    has_eigenpairs = "solver/converged" in metrics  # without them (k = 0) there is little else to log

    def is_left_out(key: str) -> bool:
        return key.startswith("solver/") or (has_eigenpairs and key in extra)

    return {key: value for key, value in metrics.items() if key in kept or not is_left_out(key)}


class Reporter:
    """Sends values to loggers; one that fails loses its values alone.

    The first failure of each logger is a warning with the logger's class, the exception and what was lost. Later calls
    try again, since a dropped connection may come back. No `Exception` leaves any method, and `KeyboardInterrupt` and
    `SystemExit` do. Call on rank 0 only, but for `callback_metrics`. In all methods `loggers` are those of the trainer,
    `tag` is a name such as "subspace/spectrum", and `step` is the x of the values.

    Example:
        >>> Reporter().scalars(trainer.loggers, {"subspace/sharpness": 21.3}, step=100)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        # Identities rather than loggers: they need no hash, and a pickled or deep-copied monitor drags no logger along.
        self._warned: set[int] = set()
        self._guard = Guard()

    def callback_metrics(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Show metrics under their logged names to other callbacks; earlier ones stay."""
        with self._guard.of("the values for ModelCheckpoint and EarlyStopping could not be set"):
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def scalars(self, loggers: Iterable[Any], metrics: Mapping[str, float], step: int) -> None:
        """Log metrics under their logged names, nan and inf left out."""
        with self._guard.of("scalars were lost"):
            # Several services reject these, and then all that was sent with them.
            finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            if not finite:
                return
            lost = f"{len(finite)} scalars ({', '.join(list(finite)[:3])}{', ...' if len(finite) > 3 else ''})"
            for logger in loggers:
                self._attempt(logger, _log_scalars, finite, step=step, lost=lost)

    def histogram(self, loggers: Iterable[Any], tag: str, values: Tensor, step: int) -> None:
        """Log the distribution of the finite values, where a logger can."""
        with self._guard.of(f"the histogram {tag} was lost"):
            values = values.detach().flatten().double().cpu()
            values = values[values.isfinite()]
            if len(values):
                self._send(_HISTOGRAMS, loggers, tag, values, step, f"the histogram {tag}")

    def tab(self, loggers: Iterable[Any], name: str, text: str, step: int) -> None:
        """Write an entry for the tab, where a logger is TensorBoard's."""
        with self._guard.of("an entry for the tab of TensorBoard was lost"):
            self._send(_TABS, loggers, tag_of(name), text, step, "an entry for TensorBoard's tab")

    def figure(self, loggers: Iterable[Any], tag: str, figure: Figure, step: int) -> None:
        """Log a matplotlib figure, where a logger can; it is left open."""
        with self._guard.of(f"the figure {tag} was lost"):
            self._send(_FIGURES, loggers, tag, figure, step, f"the figure {tag}")

    def file(self, loggers: Iterable[Any], name: str, text: str, step: int) -> None:
        """Keep a text as a file, where a logger keeps files."""
        with self._guard.of(f"the file {name} was lost"):
            self._send(_FILES, loggers, name, text, step, f"the file {name}")

    @staticmethod
    def takes_entries(loggers: Iterable[Any]) -> bool:
        """Whether any of these loggers is TensorBoard's."""
        return any(_row(_TABS, logger) is not None for logger in loggers)

    @staticmethod
    def takes_figures(loggers: Iterable[Any]) -> bool:
        """Whether any of these loggers has a place for figures."""
        return any(_row(_FIGURES, logger) is not None for logger in loggers)

    @staticmethod
    def takes_files(loggers: Iterable[Any]) -> bool:
        """Whether any of these loggers keeps files."""
        return any(_row(_FILES, logger) is not None for logger in loggers)

    def _send(
        self, senders: Mapping[str, _Sender], loggers: Iterable[Any], tag: str, value: Any, step: int, lost: str
    ) -> None:
        for logger in loggers:
            if (send := _row(senders, logger)) is not None:
                self._attempt(logger, send, tag, value, step=step, lost=lost)

    def _attempt(self, logger: Any, send: Callable[..., None], *values: Any, step: int, lost: str) -> None:
        try:
            send(logger, *values, step)
        except Exception as error:
            if id(logger) in self._warned:
                return
            self._warned.add(id(logger))
            warn(
                f"{type(logger).__name__} raised {in_words(error)}. Lost: {lost} of step {step}. Training goes on and "
                "later values are tried again, without a further warning for this logger; all that was measured is "
                "also in the monitor's history.",
                stacklevel=3,
            )


def _row(senders: Mapping[str, _Sender], logger: Any) -> _Sender | None:
    """Row of a logger in a table, by its most derived class."""
    names = [base.__name__ for base in type(logger).__mro__]
    return next((senders[name] for name in names if name in senders), None)


def _log_scalars(logger: Any, metrics: Mapping[str, float], step: int) -> None:
    # A dict for each, since loggers add keys to the one they are given.
    logger.log_metrics(dict(metrics), step=step)


def _numbered(tag: str, step: int, suffix: str) -> str:
    # Six digits keep the files of a folder in the order of the steps.
    return f"{tag}_{step:06d}.{suffix}"


def _folder_of_csv(logger: Any, name: str = "") -> Path:
    # The experiment claims the folder when it is made, and warns about one that is not empty: it has to come first.
    _ = logger.experiment
    folder = Path(logger.log_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save_beside_csv(logger: Any, tag: str, figure: Figure, step: int) -> None:
    figure.savefig(_folder_of_csv(logger, "figures") / _numbered(tag.replace("/", "_"), step, "png"))


def _keep_in_wandb(logger: Any, name: str, text: str, step: int) -> None:
    artifact = importlib.import_module("wandb").Artifact(name.removesuffix(".json"), type="subspace")
    with artifact.new_file(name) as file:
        file.write(text)
    logger.experiment.log_artifact(artifact)


_Sender: TypeAlias = Callable[[Any, str, Any, int], None]  # logger, tag, value, step

_HISTOGRAMS: Mapping[str, _Sender] = {
    # The user's logger has imported wandb already.
    "WandbLogger": lambda logger, tag, values, step: logger.log_metrics(
        {tag: importlib.import_module("wandb").Histogram(values.numpy())}, step=step
    ),
    # MLflow shows no histograms; the values themselves are few and keep more.
    "MLFlowLogger": lambda logger, tag, values, step: logger.experiment.log_dict(
        logger.run_id, {"step": step, "values": values.tolist()}, _numbered(tag, step, "json")
    ),
    "CometLogger": lambda logger, tag, values, step: logger.experiment.log_histogram_3d(
        values.numpy(), name=tag, step=step
    ),
}


def _add_summary(logger: Any, tag: str, text: str, step: int) -> None:
    # What the writer's own methods end in; none of them takes a string tensor with metadata.
    file_writer(logger.experiment).add_summary(summary_of(text, tag), step)


_TABS: Mapping[str, _Sender] = {"TensorBoardLogger": _add_summary}

_FIGURES: Mapping[str, _Sender] = {
    "WandbLogger": lambda logger, tag, figure, step: logger.log_image(tag, [figure], step=step),
    "MLFlowLogger": lambda logger, tag, figure, step: logger.experiment.log_figure(
        logger.run_id, figure, _numbered(tag, step, "png")
    ),
    "CometLogger": lambda logger, tag, figure, step: logger.experiment.log_figure(
        figure_name=tag, figure=figure, step=step
    ),
    "CSVLogger": _save_beside_csv,
}

_FILES: Mapping[str, _Sender] = {
    "WandbLogger": _keep_in_wandb,
    "MLFlowLogger": lambda logger, name, text, step: logger.experiment.log_text(logger.run_id, text, name),
    "CometLogger": lambda logger, name, text, step: logger.experiment.log_asset_data(text, name=name, step=step),
    "CSVLogger": lambda logger, name, text, step: _write(_folder_of_csv(logger) / name, text),
}


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
