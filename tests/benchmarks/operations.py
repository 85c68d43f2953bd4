"""What a product costs in floating-point operations and in convolutions, which no machine changes.

    python -m tests.benchmarks.operations [--json operations.json]

Prices are in gradients of the same loss on the same sample: of a product on a graph that is kept, with the Hessian and
with the Gauss-Newton matrix, and with the Hessian on a graph that is rebuilt. Convolutions are those of
`loss/convolution.py`, which a GPU gets and which are forced on the CPU here; for the layer whose image has no gradient,
and for any other, from networks of one and of two layers. Ends in an error where a product asks torch for a convolution
whose kernel is as large as the image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_subspace.curvature import GaussNewton, Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss import convolution
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.workloads import WORKLOADS, Batch, cross_entropy
from tests.gpu.models import resnet18

SHAPES = {"digits": (784,), "colour": (3, 32, 32)}
WAYS: dict[str, Callable[..., Any]] = {
    "exact": Hessian,
    "ggn": GaussNewton,
    "rebuilt": lambda loss, sample: Hessian(loss, sample, memory=0.0),
}
KERNEL = (3, 3)


class Convolutions(TorchDispatchMode):
    """Counts those that are asked for, forward and towards image and weight, and notes the sizes of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.kernels = 0, set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.count += 1
            self.kernels.add(tuple(args[1].shape[2:]))
        elif func is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1][:2])
            self.kernels.add(tuple(args[2].shape[2:]))
        return func(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="where to store the tables")
    asked = parser.parse_args()
    found: dict[str, Any] = {"prices": {}}
    for name, workload in WORKLOADS.items():
        batch = random_batch(SHAPES[workload.data], workload.examples)
        found["prices"][name] = report(workload.name, prices(workload.make(), batch))
    with mock.patch.object(convolution, "DEVICES", frozenset({"cpu"})):
        found["resnet"] = report("ResNet-18", prices(resnet18(), random_batch(SHAPES["colour"], 4)))
        one, two = convolutions(1), convolutions(2)
        found["first"] = report("convolutions of the first layer", one)
        found["other"] = report("of any other", {what: two[what] - one[what] for what in one})
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def report(name: str, row: dict[str, float]) -> dict[str, float]:
    print(f"{name}: " + ", ".join(f"{what} {value:.3g}" for what, value in row.items()), flush=True)
    return row


def prices(module: nn.Module, batch: Batch) -> dict[str, float]:
    """Operations of a product over those of a gradient, by the way."""
    counted = {what: FlopCounterMode(display=False) for what in ("gradient", *WAYS)}
    of_calls(module, batch, counted)
    one = counted["gradient"].get_total_flops()
    return {what: counted[what].get_total_flops() / one for what in WAYS}


def convolutions(layers: int) -> dict[str, float]:
    """Convolutions of a gradient and of products, for a network of some layers."""
    widths = [2, *[4] * layers]
    parts = [part for wide, wider in pairwise(widths) for part in (nn.Conv2d(wide, wider, KERNEL), nn.GELU())]
    module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    counted = {what: Convolutions() for what in ("gradient", "exact", "ggn")}
    of_calls(module, random_batch((2, 12, 12), 4), counted)
    assert all(found.kernels == {KERNEL} for found in counted.values()), "a kernel of the size of the image"
    return {what: found.count for what, found in counted.items()}


def of_calls(module: nn.Module, batch: Batch, counted: dict[str, Any]) -> None:
    """Take a gradient, and a product each way, within the contexts of these names."""
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        [single] = sample = sample_of_batches([batch]).hessian
        with counted["gradient"]:
            evaluation = loss(single)
            torch.autograd.grad(evaluation.value, evaluation.leaves)
        for what in counted.keys() & WAYS.keys():
            operator = WAYS[what](loss, sample)
            direction = torch.ones(operator.n)
            with counted[what]:
                operator.matvec(direction)


def random_batch(shape: tuple[int, ...], examples: int) -> tuple[Tensor, Tensor]:
    """Images and labels; what they are makes no difference."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(examples, *shape, generator=generator), torch.arange(examples) % 10


if __name__ == "__main__":
    main()
