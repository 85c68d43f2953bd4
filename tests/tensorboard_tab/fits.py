"""A small fit with a monitor and TensorBoard's logger."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, EXAMPLES, BATCH = 4, 3, 32, 8
LR, DECAY = 0.1, 0.5


class Net(LightningModule):
    """A smooth classifier of 27 parameters in float64, trained by SGD whose learning rate halves at every step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.Tanh(), nn.Linear(CLASSES, CLASSES)).double()

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LR)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)
    labels = (x @ torch.randn(FEATURES, CLASSES, generator=generator, dtype=torch.float64)).argmax(dim=1)
    return DataLoader(TensorDataset(x, labels), batch_size=BATCH, shuffle=True)


def trainer_of(monitor, loggers, steps, **options):
    return Trainer(
        callbacks=monitor if isinstance(monitor, list) else [monitor] if monitor else [],
        logger=loggers,
        max_steps=steps,
        accelerator="cpu",
        precision="64-true",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def fit(folder, monitor, steps, *, net=None, loggers=None, **options):
    """Train, and return the Trainer; the logs are in `folder / "logs"`."""
    seed_everything(0, verbose=False)
    loggers = TensorBoardLogger(str(folder), name="logs", version="") if loggers is None else loggers
    trainer = trainer_of(monitor, loggers, steps, **options)
    trainer.fit(net or Net(), data())
    return trainer
