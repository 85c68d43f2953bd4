"""Watch the gradient move into the top subspace, on 1,797 real handwritten digits, in under a minute.

    python examples/digits.py [--steps 1500] [--out runs/digits]

A small network is trained on scikit-learn's digits (inside its wheel, nothing is downloaded) under `L.Trainer`, with
one line added: the `SubspaceMonitor`. It prints a table, saves a figure and writes everything to TensorBoard.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_subspace import SubspaceMonitor


class Digits(L.LightningModule):
    """The paper's kind of network, smaller: 64-20-20-10 with ReLU, plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, with the accuracy logged."""
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as in the paper."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps, at least 300")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="folder for the figure and the logs")
    arguments = parser.parse_args()

    L.seed_everything(0, verbose=False)
    data = load_digits()
    dataset = TensorDataset(torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target))
    loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)

    # The exact schedule, since these steps take a millisecond; leave max_overhead at its default where time matters.
    # No layer mixes examples, so one large micro-batch gives the same loss as many small ones, for less work.
    monitor = SubspaceMonitor(
        k=10, every_n_steps=100, max_overhead=None, sample="all", batch_size=len(dataset), log="all"
    )
    trainer = L.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.out, name="logs"),
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(Digits(), loader)

    print_table(monitor)
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure = arguments.out / "subspace.png"
    monitor.plot().savefig(figure)
    print(f"\noverhead: {monitor.overhead:.0%} of the time went into {len(monitor.history)} probes")
    print(f"figure: {figure}")
    print(f"TensorBoard: tensorboard --logdir {arguments.out / 'logs'}")

    late = [record.metrics["gradient_fraction"] for record in monitor.history if record.step >= 300]
    assert late, "no probe after step 300 had a subspace to trust"
    assert min(late) >= 0.8, "after the transient nearly all of the gradient lies in 10 of 1,930 directions"


def print_table(monitor: SubspaceMonitor) -> None:
    columns = {
        "sharpness": "lambda_1",
        "gradient_fraction": "f_top",
        "update_fraction": "update",
        "gradient_hessian_cosine": "cos(g,Hg)",
        "overlap_previous": "overlap",
        "gap_index": "gap at",
        "solver/matvecs": "products",
        "solver/seconds": "seconds",
    }
    print(f"{'step':>6} " + " ".join(f"{title:>9}" for title in columns.values()))
    for row in monitor.to_rows():
        values = (row.get(key, math.nan) for key in columns)
        print(f"{row['step']:6.0f} " + " ".join(f"{value:9.3g}" for value in values))


if __name__ == "__main__":
    main()
