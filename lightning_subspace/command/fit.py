"""Fit in which nothing is trained and checkpoints are measured."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_subspace import Measurement
from lightning_subspace._arguments import wrong
from lightning_subspace._lightning import DummyLogger
from lightning_subspace.callbacks.checkpoint_walk import CheckpointWalk, WalkEnd
from lightning_subspace.callbacks.saved_points import SavedPoint
from lightning_subspace.command.project import Configuration, build, imported
from lightning_subspace.probe.settings import ProbeSettings

# Everything of a fit that is not needed before its first step.
QUIET = {
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
    # Every rank reads the whole sample and keeps its part, so that their number changes no number.
    "use_distributed_sampler": False,
}
LIGHTNING = r"(lightning|pytorch_lightning)(\.|$)"  # modules whose warnings are not shown
EVENTS = "events.out.tfevents.*"


def walk(
    configuration: Configuration,
    points: Sequence[SavedPoint],
    asked: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    *,
    file: Path,
    name: str,
    trust: bool = False,
    anew: bool = False,
) -> CheckpointWalk:
    """Measure checkpoints of a project.

    Args:
        configuration: of the project.
        points: the checkpoints.
        asked: options of a probe by name, as plain values.
        hyperparameters: of the module, as a checkpoint has them.
        file: of the results; TensorBoard's events are written beside it.
        name: of the monitor that the results look like.
        trust: whether checkpoints are read by pickle.
        anew: whether earlier results are written over.

    Returns:
        What has been done.

    Raises:
        ValueError: for wrong options, or results of something else.
        KeyboardInterrupt: at Ctrl-C.
        SystemExit: from LightningCLI, which has told what is wrong.
    """
    settings = settings_of(asked)
    done: CheckpointWalk | None = None

    def options(namespace: str) -> dict[str, Any]:
        nonlocal done
        bar = importlib.import_module(f"{namespace}.callbacks").TQDMProgressBar()
        loggers = importlib.import_module(f"{namespace}.loggers")
        events = loggers.TensorBoardLogger(str(file.parent), name="", version="", default_hp_metric=False)
        own = partial(_each, bar)
        done = CheckpointWalk(
            points, settings, file, asked, loggers=[events], name=name, trust=trust, anew=anew, each=own
        )
        # Ours comes first and ends the fit, so that the bar of training does not appear.
        return {**QUIET, "callbacks": [done, bar], "logger": DummyLogger()}

    project = build(configuration, hyperparameters, options)
    assert done is not None, "made with the trainer"
    if anew and project.trainer.is_global_zero:
        for old in [*file.parent.glob(EVENTS), *([file] if file.exists() else [])]:
            old.unlink()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=LIGHTNING)  # of a fit, which this is none
            project.trainer.fit(project.module, datamodule=project.data)
    except WalkEnd:
        pass
    except SystemExit:
        if project.trainer.interrupted:  # so does Lightning end a fit at Ctrl-C
            raise KeyboardInterrupt from None
        raise
    return done


def settings_of(asked: Mapping[str, Any]) -> ProbeSettings:
    """The settings of a probe.

    Raises:
        ValueError: for a wrong one.
    """
    given = {**asked, "measurements": [measurement_of(name) for name in asked["measurements"]]}
    given["read_timeout"] = math.inf  # no training waits for the sample
    if asked["loss_fn"] is not None:
        given["loss_fn"] = imported("--loss-fn", asked["loss_fn"])
    return ProbeSettings(**given)


def measurement_of(name: str) -> Measurement:
    """A measurement, by its name or its class path.

    Raises:
        ValueError: where there is none of this name, or it needs arguments.

    Example:
        >>> type(measurement_of("Trace")).__name__
        'Trace'
    """  # noqa: DOC501  # `wrong` makes one
    cls = imported("--measurements", name if "." in name else f"lightning_subspace.{name}")
    expected = "the name of a measurement, or the class path of one of yours"
    if not isinstance(cls, type) or not issubclass(cls, Measurement):
        raise wrong("--measurements", expected, name)
    try:
        return cls()
    except TypeError as error:
        raise wrong("--measurements", f"{expected}, which needs no arguments ({error})", name) from error


def _each(bar: Any, points: Sequence[SavedPoint]) -> Iterator[SavedPoint]:
    """The points, with a bar that shows a probe's products, too."""
    if not points:
        return
    with tqdm(total=len(points), unit="checkpoint", dynamic_ncols=True, disable=bar.is_disabled) as shown:
        bar.train_progress_bar = shown
        for point in points:
            shown.set_description(point.path.name)
            yield point
            shown.update()
