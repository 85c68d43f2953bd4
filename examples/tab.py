"""Three learning rates beside each other in the tab "Subspace" of TensorBoard, on scikit-learn's digits.

    python examples/tab.py [--steps 1500] [--out runs/tab] [--picture tab.png]

Trains a small network three times, with the monitor almost as it is by default. Look at the runs by

    tensorboard --logdir runs/tab                           # the tab "Subspace"
    lightning-subspace show runs/tab --html subspace.html   # the same page as one file

`--picture` saves what TensorBoard shows of them, see picture.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from picture import take_picture
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor

RATES = (0.03, 0.1, 0.3)


class Digits(L.LightningModule):
    """64-100-10 with tanh, trained by SGD with one learning rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/tab"), help="folder for the logs")
    parser.add_argument("--picture", type=Path, help="file for a picture of the tab")
    arguments = parser.parse_args()

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target))
    for rate in RATES:
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(
            max_steps=arguments.steps,
            accelerator="cpu",
            logger=TensorBoardLogger(arguments.out, name="", version=f"lr={rate}"),
            # The exact schedule, since these steps take a millisecond.
            callbacks=[SubspaceMonitor(every_n_steps=50, max_overhead=None)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Digits(rate), DataLoader(data, batch_size=64, shuffle=True, drop_last=True))
    if arguments.picture is not None:
        take_picture(arguments.out, arguments.picture)


if __name__ == "__main__":
    main()
