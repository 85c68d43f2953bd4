"""What it costs to keep the state of a module: processor time of a context in which its loss is evaluated.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.state [--json state.json]

Modules of one small layer hold what a row says, through which nothing is computed. Each is opened, evaluated once and
closed, the first time and then again, and evaluated many times within an open context: the fastest of several. Then
what the wider default type costs: a forward pass and a Hessian product in float64, with its mode and without, in turns.
At last a sum over the state of an optimizer, two moments of one parameter, which an evaluation has met before.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from lightning_subspace.curvature import Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss import precision
from lightning_subspace.loss.findings import Findings
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.loss.watched import WatchedTensors
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.big import GPT, Size, next_token
from tests.benchmarks.clock import seconds
from tests.benchmarks.workloads import cross_entropy
from tests.gpu.models import resnet18

MANY, SOME = 1_000_000, 20_000
HELD: dict[str, Callable[[], Any]] = {
    "nothing else": lambda: None,
    f"a list of {MANY:,} pairs (str, int)": lambda: [(str(i), i) for i in range(MANY)],
    f"a dict of {MANY:,} entries": lambda: {i: str(i) for i in range(MANY)},
    f"{MANY:,} lists in a list": lambda: [[i] for i in range(MANY)],
    f"a list of {MANY:,} floats": lambda: [float(i) for i in range(MANY)],
    f"a set of {MANY:,} entries": lambda: set(range(MANY)),
    f"a deque of {SOME:,} tuples with two arrays": lambda: deque((np.zeros(4), np.zeros(4)) for _ in range(SOME)),
    f"a deque of {SOME:,} tuples with two tensors": lambda: deque(
        (torch.zeros(4), torch.zeros(4)) for _ in range(SOME)
    ),
}
MODULES, AGAIN, EVALUATIONS, PASSES = 3, 3, 50, 7
MOMENTS = 5_500_000  # numbers in each, too many for a copy in each probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    asked = parser.parse_args()
    torch.manual_seed(0)
    print("| the module holds | first time | later | each evaluation |\n| --- | --- | --- | --- |")
    rows = [context(name, make()) for name, make in HELD.items()]
    text = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 32, 32), torch.arange(2)
    networks: dict[str, tuple[nn.Module, Any, Any]] = {
        "gpt": (GPT(Size(64, 4, 4, 256)), next_token, text),
        "resnet": (resnet18(), cross_entropy, images),
    }
    modes = {name: default_type(*network) for name, network in networks.items()}
    for name, found in modes.items():
        print(
            f"{name}, ms: " + ", ".join(f"{what} {1e3 * value:.1f}" for what, value in found.items() if what != "ratio")
        )
    found = {"contexts": rows, "default_type": modes, "optimizer": optimizer()}
    print("optimizer: {numbers:,} numbers, {seconds:.4f} s".format(**found["optimizer"]))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def context(name: str, held: Any) -> dict[str, Any]:
    """Seconds of contexts around a module that holds something."""
    sample = sample_of_batches([(torch.randn(8, 4), torch.arange(8) % 3)]).hessian
    firsts, later = [], []
    for _ in range(MODULES):
        module: Any = nn.Linear(4, 3)
        module.held = held
        firsts.append(seconds(lambda module=module: opened(module, sample)))
        later += [seconds(lambda module=module: opened(module, sample)) for _ in range(AGAIN)]
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        evaluations = [seconds(lambda: loss(sample[0])) for _ in range(EVALUATIONS)]
    row = {"holds": name, "first": min(firsts), "later": min(later), "each": min(evaluations)}
    print(f"| {name} | {row['first']:.3f} | {row['later']:.3f} | {row['each']:.5f} |", flush=True)
    return row


def opened(module: nn.Module, sample: Sequence[MicroBatch]) -> None:
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        loss(sample[0])


def default_type(module: nn.Module, loss_fn: Any, batch: Any) -> dict[str, float]:
    """Seconds of a forward pass and of a Hessian product in float64, with the mode and without."""
    sample, direction = sample_of_batches([batch]).hessian, torch.ones(ParameterSpace.of(module).n, dtype=torch.float64)
    taken: dict[str, list[float]] = {}
    for _ in range(PASSES):
        for way, mode in (("with", precision.DefaultType), ("without", lambda dtype: nullcontext())):
            with mock.patch.object(precision, "DefaultType", mode):
                loss = TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64)
                with loss:
                    operator = Hessian(loss, sample)
                    taken.setdefault(f"forward_{way}", []).append(seconds(lambda loss=loss: loss(sample[0])))
                    taken.setdefault(f"product_{way}", []).append(seconds(lambda to=operator: to.matvec(direction)))
    pairs = zip(taken["product_with"], taken["product_without"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)  # of neighbours, which a busy machine slows alike
    return {**{what: min(times) for what, times in taken.items()}, "ratio": ratio}


def optimizer() -> dict[str, float]:
    """Seconds of one sum over its state."""
    moments, findings = [torch.rand(MOMENTS), torch.rand(MOMENTS)], Findings()
    WatchedTensors(moments, findings).verify()  # a copy, this once
    return {
        "numbers": 2 * MOMENTS,
        "seconds": seconds(lambda: WatchedTensors(moments, findings), rounds=EVALUATIONS),
    }


if __name__ == "__main__":
    main()
