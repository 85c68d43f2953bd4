"""Cost of what every monitor measures beside the eigenpairs: the step and the noise.

    python -m tests.benchmarks.defaults

Trains each network with a probe at every step and without curvature, with and without these default measurements in
turns. The difference of the processor's time is given in gradients of the sample, of which an eigensolver takes some
tens. Ends in an error above half a gradient a probe, which is what they are to cost together.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import warnings
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import NoiseScale, Step, SubspaceMonitor
from lightning_subspace.measurements import default_measurements
from lightning_subspace.probe import settings
from tests.benchmarks.workloads import WORKLOADS, Batch, colour_images, cross_entropy, digits

MEASURED = (Step, NoiseScale)
STEPS, PAIRS, GRADIENTS = 20, 5, 30
MOST = 0.5  # gradients


class Classifier(pl.LightningModule):
    """A network with the cross-entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return cross_entropy(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def without(k: int) -> list[Any]:
    return [item for item in default_measurements(k) if not isinstance(item, MEASURED)]


def seconds_of(net: nn.Module, data: TensorDataset, examples: int, defaults: Any) -> float:
    """Processor seconds of a fit, a probe at each step."""
    monitor = SubspaceMonitor(k=0, curvature="none", every_n_steps=1, max_overhead=None, sample=examples)
    with mock.patch.object(settings, "default_measurements", defaults):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[monitor],
        )
        torch.manual_seed(0)
        begin = time.process_time()
        trainer.fit(Classifier(net), DataLoader(data, batch_size=64, shuffle=True))
        taken = time.process_time() - begin
    assert len(monitor.history) >= STEPS, "a probe was not taken"
    return taken


def gradient_seconds(net: nn.Module, batch: Batch) -> float:
    taken = []
    for _ in range(GRADIENTS):
        begin = time.process_time()
        torch.autograd.grad(cross_entropy(net, batch), list(net.parameters()))
        taken.append(time.process_time() - begin)
    return statistics.median(taken)


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = False
    print("| network | n | a gradient | step and noise, in gradients |\n| --- | --- | --- | --- |")
    sets = {"digits": digits(), "colour": colour_images()}
    for workload in WORKLOADS.values():
        images, labels = sets[workload.data]
        data = TensorDataset(images, labels)
        net = workload.make()
        unit = gradient_seconds(net, (images[: workload.examples], labels[: workload.examples]))
        taken: dict[Any, list[float]] = {default_measurements: [], without: []}
        for _, defaults in itertools.product(range(PAIRS), taken):
            taken[defaults].append(seconds_of(workload.make(), data, workload.examples, defaults))
        extra = (min(taken[default_measurements]) - min(taken[without])) / STEPS / unit
        n = sum(parameter.numel() for parameter in net.parameters())
        print(f"| {workload.name} | {n:,} | {unit * 1e3:.0f} ms | {extra:.2f} |", flush=True)
        failed |= extra > MOST
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
