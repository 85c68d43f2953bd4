"""How much of the wall time a budget really costs, and whether the forecast of a probe is right.

    OMP_NUM_THREADS=1 python tests/benchmarks/overhead.py [--seconds 120] [--max-overhead 0.05] [--slower 3]
        [--ranks 1] [--json overhead.json]

Trains a small net on the digits of scikit-learn with everything at its default; half-way every step becomes `--slower`
times as slow, as where a longer sequence or a second job comes in. Timing depends on the machine and on what else runs
there, so this is a script and not a test. It fails when the share that probes after the first took is below three
fifths or above six fifths of the budget, in either half or in all, and when the forecast was off by more than `WITHIN`.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor

WITHIN = 1.5
FORECAST = re.compile(r"([\d.]+) s the first")


class Classifier(pl.LightningModule):
    """Slower steps from half-way on.

    Args:
        half: seconds from the start.
        slower: factor.
    """

    def __init__(self, half: float, slower: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))
        self.half, self.slower = half, slower
        self._step_began = 0.0
        self._usual = 0.0

    def on_train_start(self) -> None:
        self._began = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._step_began = time.monotonic()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        now = time.monotonic()
        if now - self._began < self.half:
            self._usual = 0.9 * self._usual + 0.1 * (now - self._step_began)
        else:
            time.sleep((self.slower - 1.0) * self._usual)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Forecast(logging.Handler):
    """The seconds that the monitor has announced for its first probe."""

    seconds = float("nan")

    def emit(self, record: logging.LogRecord) -> None:
        found = FORECAST.search(record.getMessage())
        if found:
            self.seconds = float(found.group(1))


def main(seconds: float, max_overhead: float, slower: float, ranks: int, file: Path | None) -> None:
    images, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    pl.seed_everything(0)
    forecast = Forecast()
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning"):
        logging.getLogger(name).addHandler(forecast)
    monitor = SubspaceMonitor(k=10, every_n_steps=100, max_overhead=max_overhead)
    halves = HalfWay(monitor, seconds / 2)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            max_epochs=-1,
            max_time={"seconds": seconds},
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[monitor, halves],
        )
        started = time.monotonic()
        loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)
        trainer.fit(Classifier(seconds / 2, slower), loader)
        elapsed = time.monotonic() - started
    if not trainer.is_global_zero:
        return
    costs = [row["solver/seconds"] for row in monitor.to_rows()]
    price = sum(costs[1:]) / max(len(costs) - 1, 1)
    print(f"{trainer.global_step} steps in {elapsed:.1f} s, {len(costs)} probes of {price:.2f} s each after the first")
    print(f"forecast {forecast.seconds:.2f} s, the first probe {costs[0]:.2f} s")
    print(
        f"share of the wall time: {monitor.overhead:.1%}; after the first probe: {monitor.later_overhead:.1%}, "
        f"{halves.share:.1%} at half-way"
    )
    if file is not None:  # beside what another number of ranks has left there
        kept = json.loads(file.read_text()) if file.exists() else {}
        found = {"half": halves.share, "all": monitor.later_overhead, "first": costs[0], "forecast": forecast.seconds}
        file.write_text(json.dumps(kept | {f"{ranks}": found}, indent=1) + "\n")
    assert costs[0] / WITHIN <= forecast.seconds <= costs[0] * WITHIN
    for share in (monitor.later_overhead, halves.share):
        assert 0.6 * max_overhead <= share <= 1.2 * max_overhead


class HalfWay(pl.Callback):
    """Remembers the overhead at half-time."""

    def __init__(self, monitor: SubspaceMonitor, half: float) -> None:
        self.monitor, self.half = monitor, half
        self.share = float("nan")
        self._began = 0.0

    def on_train_start(self, *args: Any) -> None:
        self._began = time.monotonic()

    def on_train_batch_start(self, *args: Any) -> None:
        if self.share != self.share and time.monotonic() - self._began >= self.half:
            self.share = self.monitor.later_overhead


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--max-overhead", type=float, default=0.05)
    parser.add_argument("--slower", type=float, default=3.0, help="factor of the second half's steps")
    parser.add_argument("--ranks", type=int, default=1, help="processes, by DDP on the CPU")
    parser.add_argument("--json", type=Path, default=None, help="the shares and the forecast, by the number of ranks")
    arguments = parser.parse_args()
    main(arguments.seconds, arguments.max_overhead, arguments.slower, arguments.ranks, arguments.json)
