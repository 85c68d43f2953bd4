"""A project that LightningCLI trains in float64: its classes, and its run of three checkpoints."""

import sys
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

FEATURES, CLASSES, EXAMPLES, BATCH, EPOCHS = 4, 3, 48, 16, 3
LR = 0.5


class Net(LightningModule):
    """A smooth classifier of 27 parameters."""

    def __init__(self, width: int = 3, classes: int = 2):  # by default not as many classes as the data have
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, classes)).double()

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def on_train_start(self):
        assert not IS_MEASURED, "training has begun"

    def on_train_end(self):
        assert not IS_MEASURED, "training has ended"


class Counting(Net):
    """Its loss depends on the number of steps taken and of epochs."""

    def training_step(self, batch, index):
        return super().training_step(batch, index) * (1.0 + self.global_step + 100.0 * self.current_epoch)


class Data(LightningDataModule):
    """Classes by the largest of the first features."""

    def __init__(self, examples: int = EXAMPLES, classes: int = CLASSES, iterable: bool = False):
        super().__init__()
        self.examples, self.classes, self.iterable = examples, classes, iterable

    def setup(self, stage):
        x = torch.randn(self.examples, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.whole = TensorDataset(x, x[:, : self.classes].argmax(dim=1))

    def train_dataloader(self):
        if self.iterable:
            return DataLoader(Stream(self.whole), batch_size=BATCH)
        return DataLoader(self.whole, batch_size=BATCH, shuffle=True)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data[i] for i in range(len(self.data)))


class LinkingCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.init_args.classes", "model.init_args.classes")


class FixedCLI(LightningCLI):
    """The optimizer is the project's own, so that its section has no class path."""

    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.classes", "model.classes")
        parser.add_optimizer_args(torch.optim.Adam)


HERE = f"{__name__}."
IS_MEASURED = False
QUIET = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
SAVED = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]


def train(folder: Path, cli=LinkingCLI, net="Net", *classes, epochs=EPOCHS, options=()) -> Path:
    """Train as a user does, and return the folder with config.yaml and the checkpoints."""
    named = [] if classes else [f"--model={HERE}{net}", f"--data={HERE}Data", "--optimizer=SGD", f"--optimizer.lr={LR}"]
    fit = [f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={folder}", "--trainer.log_every_n_steps=1"]
    with mock.patch.object(sys, "argv", ["main.py"]):
        cli(*classes, args=["fit", *named, *options, *fit, *SAVED, *QUIET])
    [version] = (folder / "lightning_logs").iterdir()
    for file in (version / "checkpoints").iterdir():
        file.rename(version / file.name)
    return version
