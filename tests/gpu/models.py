"""The networks of these tests and of `tests.benchmarks.gpu`, large for a card and small for tests: one place for both.

The large ones have the sizes that people have on one card: an MLP, a CNN and a vision transformer on images of 32 x 32
pixels, ResNet-18 with group norm, and GPT-2 small by its own configuration, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from tests.benchmarks.big import GPT, SIZES, Size, next_token
from tests.benchmarks.workloads import ViT, cnn, colour_images, cross_entropy, mlp

TEXT = Path(__file__).parents[2] / "README.md"
PIXELS = 3 * 32 * 32


class Residual(nn.Module):
    """Two convolutions with group norm, added to their input."""

    def __init__(self, wide: int, wider: int, stride: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, wider, 3, stride, padding=1, bias=False),
            nn.GroupNorm(groups, wider),
            nn.ReLU(),
            nn.Conv2d(wider, wider, 3, padding=1, bias=False),
            nn.GroupNorm(groups, wider),
        )
        self.skip = nn.Identity()
        if wide != wider or stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(wide, wider, 1, stride, bias=False), nn.GroupNorm(groups, wider))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet18(width: int = 64, groups: int = 32) -> nn.Module:
    """Of He et al. (2016), with the first layer that is usual for images of 32 x 32 pixels."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width), nn.ReLU()]
    for number, (wide, wider) in enumerate(pairwise(widths)):
        layers += [Residual(wide, wider, 1 if number == 0 else 2, groups), Residual(wider, wider, 1, groups)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


def images(count: int, parts: int = 1) -> list[Any]:
    """Coloured images with labels, in batches."""
    data = colour_images(count=count)
    return list(zip(*(piece.chunk(parts) for piece in data), strict=True))


def text(sequences: int, length: int, parts: int = 1, vocabulary: int = 256) -> list[Any]:
    """Bytes of the README of this repository, in batches of sequences with their next token."""
    tokens = torch.tensor(list(TEXT.read_bytes()[: sequences * (length + 1)])) % vocabulary
    return list(tokens.view(sequences, length + 1).chunk(parts))


@dataclass(frozen=True)
class Problem:
    """A network with a sample.

    Attributes:
        name: for the tables.
        make: the network at its initialisation.
        batches: the sample, on the host.
        parted: about as much in small batches.
        loss: of the network on a batch.
        k: eigenpairs that are asked for.
        goal: what is aimed for, how many times as long hessian-eigenthings tuned by hand takes; None: no goal.
    """

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    parted: Callable[[], list[Any]]
    loss: Callable[..., Tensor] = cross_entropy
    k: int = 10
    goal: float | None = None


LARGE = {
    "mlp": Problem(
        "MLP, 512 images", partial(mlp, PIXELS, (512, 256)), partial(images, 512), partial(images, 512, 8), goal=2.0
    ),
    "cnn": Problem(
        "CNN, 512 images", partial(cnn, (32, 64, 64)), partial(images, 512), partial(images, 512, 8), goal=2.0
    ),
    "vit": Problem(
        "ViT, 512 images", partial(ViT, 128, 4, patch=4), partial(images, 512), partial(images, 512, 8), goal=1.5
    ),
    "resnet": Problem(
        "ResNet-18 (group norm), 256 images", resnet18, partial(images, 256), partial(images, 256, 4), goal=2.5
    ),
    "gpt": Problem(
        "GPT-2 small, 4 x 256 tokens",
        partial(GPT, SIZES["small"]),
        partial(text, 4, 256),
        partial(text, 8, 256, 4),
        next_token,
        k=5,
        goal=1.5,
    ),
}
SMALL = {
    "mlp": Problem("MLP, 64 images", partial(mlp, PIXELS, (8, 8)), partial(images, 64), partial(images, 64, 4)),
    "cnn": Problem("CNN, 64 images", partial(cnn, (4, 8, 8)), partial(images, 64), partial(images, 64, 4)),
    "cnn with batch-norm": Problem(
        "CNN with batch-norm, 64 images",
        partial(cnn, (4, 8, 8), batch_norm=True),
        partial(images, 64),
        partial(images, 64, 4),
    ),
    "vit": Problem("ViT, 64 images", partial(ViT, 32, 2), partial(images, 64), partial(images, 64, 4)),
    "resnet": Problem(
        "ResNet-18 (group norm) of width 4, 16 images",
        partial(resnet18, 4, 2),
        partial(images, 16),
        partial(images, 16, 4),
    ),
    "gpt": Problem(
        "GPT, 4 x 16 tokens",
        partial(GPT, Size(32, 2, 2, 256)),
        partial(text, 4, 16),
        partial(text, 8, 16, 4),
        next_token,
        k=3,
    ),
}


def trained(problem: Problem, device: torch.device, steps: int = 30, lr: float = 0.02) -> nn.Module:
    """The network on a device, after some steps of SGD on the whole sample, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = problem.make().to(device)
    batches = on(device, problem.batches())
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        problem.loss(module, batches[step % len(batches)], 0).backward()
        optimizer.step()
    for p in module.parameters():
        p.grad = None
    return module


def on(device: torch.device, batches: Any) -> Any:
    """Batches on a device."""
    return tree_map(lambda piece: piece.to(device), batches)
