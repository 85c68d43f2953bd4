"""ResNet-18 on CIFAR-10 by the LightningCLI, with the monitor in the YAML file.

    python examples/cifar/train.py fit --config examples/cifar/config.yaml --data.root DIR

Without `--data.root` a few thousand images are generated, so that it runs anywhere. Nothing in this file knows of the
monitor: it is three lines of config.yaml.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import CIFAR10
from torchvision.models import resnet18
from torchvision.transforms import v2

CLASSES = 10
SCALE = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))]
AUGMENT = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]


class Classifier(L.LightningModule):
    """torchvision's ResNet-18, SGD with Nesterov momentum, one cycle of the learning rate.

    Args:
        lr: largest learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = resnet18(num_classes=CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy."""
        images, labels = batch
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("validation_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log("validation_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, object]:
        """SGD under one cycle, step by step."""
        hyper = self.hparams
        optimizer = torch.optim.SGD(
            self.parameters(), hyper.lr, momentum=hyper.momentum, weight_decay=hyper.weight_decay, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        # The momentum stays, so that the threshold of the sharpness changes with the learning rate alone.
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, hyper.lr, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Images(L.LightningDataModule):
    """CIFAR-10, augmented as usual, or generated images of the same shape.

    Args:
        root: folder of torchvision's CIFAR10, downloaded there if missing; without it images are generated.
        batch_size: of each process.
        num_workers: processes that load images.
        generated: number of training images to generate where there is no root.
    """

    def __init__(
        self, root: str | None = None, batch_size: int = 128, num_workers: int = 0, generated: int = 4096
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Download, on one process alone."""
        if self.hparams.root is not None:
            CIFAR10(self.hparams.root, download=True)

    def setup(self, stage: str) -> None:
        """Training images with augmentation, validation images without."""
        root, augmented, plain = self.hparams.root, v2.Compose(AUGMENT + SCALE), v2.Compose(SCALE)
        if root is None:
            self.train: Dataset = Transformed(generated_images(self.hparams.generated, seed=0), augmented)
            self.validation: Dataset = Transformed(generated_images(1024, seed=1), plain)
        else:
            self.train = CIFAR10(root, train=True, transform=augmented)
            self.validation = CIFAR10(root, train=False, transform=plain)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of one size."""
        return DataLoader(
            self.train, self.hparams.batch_size, shuffle=True, drop_last=True, num_workers=self.hparams.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        """All of them, in order."""
        return DataLoader(self.validation, self.hparams.batch_size, num_workers=self.hparams.num_workers)


class Transformed(Dataset):
    """The images of a dataset behind a transform, as torchvision's own datasets apply it."""

    def __init__(self, data: TensorDataset, transform: v2.Transform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return self.transform(image), int(label)


def generated_images(count: int, *, seed: int) -> TensorDataset:
    """Ten coarse patterns, each half hidden by another one and by noise: (count, 3, 32, 32) bytes, and labels."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, size=32, mode="bicubic")
    drawn = torch.Generator().manual_seed(1 + seed)
    labels, others = torch.randint(CLASSES, (2, count), generator=drawn)
    noise = torch.randn(count, 3, 32, 32, generator=drawn)
    images = 128 + 32 * (patterns[labels] + 0.7 * patterns[others] + noise)
    return TensorDataset(images.clamp(0, 255).to(torch.uint8), labels)


if __name__ == "__main__":
    LightningCLI(Classifier, Images, seed_everything_default=0)
