"""How much of the wall time a budget of 20 % really costs.

    python tests/benchmarks/overhead.py [--seconds 60] [--max-overhead 0.2]

Trains a small net on the digits of scikit-learn with everything at its default. Timing depends on the machine and on
what else runs there, so this is a script and not a test; it ends with the share that probes after the first took, and
fails when that is outside three quarters to eleven tenths of the budget.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(seconds: float, max_overhead: float) -> None:
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    pl.seed_everything(0)
    monitor = SubspaceMonitor(k=10, every_n_steps=100, max_overhead=max_overhead)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_time={"seconds": seconds},
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[monitor],
        )
        started = time.monotonic()
        trainer.fit(Classifier(), DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True))
        elapsed = time.monotonic() - started
    probes = len(monitor.history)
    price = sum(row["solver/seconds"] for row in monitor.to_rows()[1:]) / max(probes - 1, 1)
    print(f"{trainer.global_step} steps in {elapsed:.1f} s, {probes} probes of {price:.2f} s each after the first")
    print(f"share of the wall time: {monitor.overhead:.1%}, after the first probe: {monitor.later_overhead:.1%}")
    assert 0.75 * max_overhead <= monitor.later_overhead <= 1.1 * max_overhead


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-overhead", type=float, default=0.2)
    arguments = parser.parse_args()
    main(arguments.seconds, arguments.max_overhead)
