"""The run behind the checkpoints in `stored/`, which stand for those that users have.

They were written on 2026-11-26 by the first version whose checkpoints are promised to be readable (format 1), with
lightning 2.6.6 and torch 2.14.1, by `python -m tests.probe.stored_run`. They are not to be written again: a checkpoint
of today says nothing about one of yesterday.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import StartWhenAligned, SubspaceMonitor, SubspaceProjection

FOLDER = Path(__file__).parent / "stored"
# By the width of the network: 123 parameters, whose sketch is the basis itself, and 8,003, whose sketch estimates.
WIDTHS = (6, 400)
STEPS = 10
START = StartWhenAligned(chi=0.3, decay=0.5)
AT = 6  # where the checkpoint is written: a probe has just been taken, and its record is open


class Net(LightningModule):
    """A smooth classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 3))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def checkpoint(width: int) -> Path:
    """Where the checkpoint of this width lies."""
    return FOLDER / f"width={width}.ckpt"


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Three classes of 16 features; one step an epoch, so that every step can be resumed from."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(64) % 3
    inputs = torch.randn(64, 16, generator=generator) + 2.0 * torch.eye(3, 16)[labels]
    return DataLoader(TensorDataset(inputs, labels), batch_size=64)


def callbacks() -> tuple[SubspaceMonitor, SubspaceProjection]:
    """A monitor, and a projection that has begun before the checkpoint is written."""
    sample = {"batch_size": 16, "sample": 48, "gradient_sample": 64, "on_failure": "raise"}
    monitor = SubspaceMonitor(k=2, every_n_steps=3, max_overhead=None, reference_step=3, log="all", **sample)
    return monitor, SubspaceProjection("bulk", k=2, refresh_every_n_steps=2, start_when=START, **sample)


class Save(Callback):
    """Write a checkpoint after step `AT`; it holds no path, as one of ModelCheckpoint's would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == AT:
            trainer.save_checkpoint(self.path)


def train(module: Net, *extra: Callback, ckpt_path: Path | None = None, steps: int = STEPS) -> Net:
    """Train to the end, from the start or from a checkpoint."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
    trainer = Trainer(max_steps=steps, callbacks=list(extra), enable_checkpointing=False, **quiet)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def _write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for width in WIDTHS:
        monitor, projection = callbacks()
        module = train(Net(width), monitor, projection, Save(checkpoint(width)))
        steps, matrix = monitor.overlap_matrix()
        rows = [{k: v for k, v in row.items() if math.isfinite(v)} for row in monitor.to_rows()]
        expected = {
            "rows": rows,
            "steps": steps,
            "overlaps": matrix.tolist(),
            "chi": projection.chi,
            "norm": float(nn.utils.parameters_to_vector(module.parameters()).detach().norm()),
        }
        (FOLDER / f"width={width}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    _write()
