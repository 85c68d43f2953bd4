"""Two runs of any project under any Trainer, with and without a monitor, compared in everything that can be seen."""

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F

from lightning_subspace import Measurement, Needs, SubspaceMonitor
from lightning_subspace.data.sample import Sample
from tests.left_out import without_error_bar
from tests.modules import CLASSES, FEATURES, Observer, differences


class Classifier(LightningModule):
    """A smooth two-layer net for batches of (x, y), with what training and a sample saw of them.

    Args:
        read: the inputs and labels in a batch.
    """

    def __init__(self, read: Callable[[Any], tuple[torch.Tensor, torch.Tensor]] = tuple) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        self.read = read

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = self.read(batch)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class KeepSample(Measurement):
    """Keeps the sample of every probe, with the step."""

    needs = Needs.NOTHING

    def __init__(self) -> None:
        self.samples: dict[int, Sample] = {}

    def measure(self, probe: Any) -> dict[str, float]:
        self.samples[probe.step] = probe.sample
        return {}


@dataclass
class Compared:
    """A run with a monitor, and how it differs from the same run without.

    Attributes:
        differing: paths of what differs; empty where training is unchanged.
        monitor: after the run.
        samples: of every probe, by step.
        trainer: after the run.
        seen: what was observed of the run.
    """

    differing: list[str]
    monitor: SubspaceMonitor
    samples: dict[int, Sample]
    trainer: Trainer
    seen: dict[str, Any] = field(repr=False)

    @property
    def sample(self) -> Sample:
        """Of the last probe."""
        return list(self.samples.values())[-1]

    @property
    def steps(self) -> list[int]:
        return [record.step for record in self.monitor.history]


def compare(
    folder: Path,
    module: Callable[[], LightningModule],
    data: Callable[[], Any],
    *,
    callbacks: Callable[[], Sequence[Callback]] = list,
    monitor: dict[str, Any] | None = None,
    validation: Callable[[], Any] | None = None,
    **options: Any,
) -> Compared:
    """Train twice, once with a monitor.

    Args:
        folder: for files.
        module: makes the module.
        data: makes the training loader or a data module.
        callbacks: makes further callbacks.
        monitor: arguments of the monitor.
        validation: makes the validation loader.
        options: of the Trainer.
    """
    keep = KeepSample()
    defaults = {"k": 1, "every_n_steps": 2, "max_overhead": None, "sample": 16, "gradient_sample": 24}
    arguments = {**defaults, "on_failure": "raise", "measurements": [keep], **(monitor or {})}
    watching = SubspaceMonitor(**arguments)
    alone, _ = _run(folder / "alone", module, data, callbacks, None, validation, options)
    with without_error_bar():
        watched, trainer = _run(folder / "watched", module, data, callbacks, watching, validation, options)
    return Compared(differences(alone, watched), watching, keep.samples, trainer, watched)


def _run(folder, module, data, callbacks, monitor, validation, options) -> tuple[dict[str, Any], Trainer]:
    seed_everything(1, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    project, loader, observer = module(), data(), Observer()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[*([] if monitor is None else [monitor]), *callbacks(), observer],
        **{**quiet, "max_epochs": 2, "enable_checkpointing": False, **options},
    )
    with contextlib.redirect_stdout(io.StringIO()):
        if hasattr(loader, "train_dataloader"):
            trainer.fit(project, datamodule=loader)
        else:
            trainer.fit(project, loader, None if validation is None else validation())
    observer.seen["finished"] = (trainer.global_step, trainer.current_epoch, trainer.should_stop)
    return observer.seen, trainer
