"""The gap in the spectrum of the last updates opens while a network groks, and just so where it cannot.

    python examples/reproduce/update_spectrum.py [--quick] [--seed 0]

Modular addition, (a + b) mod 43 from one-hot a and b, by a network 86-100-66-43 (n = 18,247): AdamW, learning rate
3e-3, weight decay 1, full batch of half of all pairs. W = 16 displacements of 20 steps each; what has been read as a
sign of generalisation to come (arXiv 2603.15678, arXiv 2603.28964) is the ratio sigma_1 / sigma_2 of their singular
values.

1. The accuracy on pairs that were not trained on rises long after those of training are known, and the ratio rises.
2. With random labels, which cannot generalise, the ratio rises alike: it tells of the loss that falls ever more slowly,
   and not of what was learned.

With --quick both runs end at step 400, and only the accuracy in training is asserted.
"""

from __future__ import annotations

from typing import Any

import torch
from common import BLUE, GREEN, GREY, ORANGE, Reproduction, Task, curve, fit, fully_connected, seeded
from lightning import Callback
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import SubspaceMonitor, UpdateSpectrum

P = 43
WINDOW, STRIDE, EVERY = 16, 20, 400


class Accuracy(Callback):
    """Training loss, and accuracy on pairs that were not trained on, each 400 steps."""

    def __init__(self, test: tuple[Tensor, Tensor]) -> None:
        self.test = test
        self.loss: dict[int, float] = {}
        self.accuracy: dict[int, float] = {}
        self.trained: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluate the network as it is."""
        if trainer.global_step % EVERY:
            return
        with torch.no_grad():
            self.loss[trainer.global_step] = float(outputs["loss"])
            for into, (inputs, labels) in ((self.accuracy, self.test), (self.trained, batch)):
                into[trainer.global_step] = float((task.net(inputs).argmax(1) == labels).float().mean())


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The gap of the last updates opens with generalisation, and without",
        "arXiv 2603.15678, arXiv 2603.28964",
        __doc__,
        seed={"type": int, "default": 0, "help": "of weights, split and random labels"},
    )
    quick, seed = reproduction.quick, reproduction.arguments.seed
    steps = 400 if quick else 4000
    runs = {name: train(steps, seed, random_labels=name == "random labels") for name in ("addition", "random labels")}

    for name, (_, seen) in runs.items():
        reproduction.claim(
            f"{name}: the pairs of training are known at step {steps:,}",
            "trained to the end",
            f"accuracy {seen.trained[steps]:.3f}, loss {seen.loss[steps]:.1e}",
            seen.trained[steps] > 0.99,
        )
    if not quick:
        claim_rises(reproduction, runs)
    reproduction.save(draw(runs))
    reproduction.finish()


def train(steps: int, seed: int, *, random_labels: bool) -> tuple[SubspaceMonitor, Accuracy]:
    first, second = (torch.arange(P).repeat_interleave(P), torch.arange(P).repeat(P))
    inputs = torch.cat([F.one_hot(first, P), F.one_hot(second, P)], 1).float()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(P, (P * P,), generator=generator) if random_labels else (first + second) % P
    order = torch.randperm(P * P, generator=generator)
    train_set, test_set = order[: P * P // 2], order[P * P // 2 :]
    monitor = SubspaceMonitor(
        curvature="none",
        every_n_steps=list(range(EVERY, steps + 1, EVERY)),
        max_overhead=None,
        sample="all",
        batch_size=len(train_set),
        log="all",
        measurements=[UpdateSpectrum(window=WINDOW, stride=STRIDE)],
        on_failure="raise",
    )
    seen = Accuracy((inputs[test_set], labels[test_set]))
    net = seeded(lambda: fully_connected(2 * P, 100, 66, P), seed)
    task = Task(net, F.cross_entropy, lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1.0))
    data = TensorDataset(inputs[train_set], labels[train_set])
    fit(task, data, steps=steps, batch_size="all", callbacks=[seen, monitor], seed=seed)
    return monitor, seen


def claim_rises(reproduction: Reproduction, runs: dict[str, tuple[SubspaceMonitor, Accuracy]]) -> None:
    ratios = {name: curve(monitor, "updates/gap_ratio") for name, (monitor, _) in runs.items()}
    accuracies = {name: seen.accuracy for name, (_, seen) in runs.items()}
    learned, first, last = accuracies["addition"], EVERY, max(ratios["addition"])
    reproduction.claim(
        "addition: other pairs are known at less than .1 at step 800, and at more than .9 at the end",
        "generalises long after it has fitted",
        ", ".join(f"{value:.2f} at {step:,}" for step, value in learned.items() if step % 800 == 0),
        learned[800] < 0.1 and learned[last] > 0.9,
    )
    for name, sign in (("addition", "a gap that opens before the generalisation"), ("random labels", "not reported")):
        found = ratios[name]
        reproduction.claim(
            f"{name}: sigma_1 / sigma_2 is more than 1.8 times as large at step 3,200 as at step 400",
            sign,
            f"{found[first]:.2f} and {found[3200]:.2f}; accuracy on other pairs {accuracies[name][3200]:.2f}",
            found[3200] > 1.8 * found[first],
        )
    apart = [ratios["random labels"][step] / value for step, value in ratios["addition"].items()]
    reproduction.claim(
        "at every measured step the two ratios are within 30 % of each other",
        "not reported",
        f"with random labels {min(apart):.2f} to {max(apart):.2f} times that with addition",
        all(1 / 1.3 < ratio < 1.3 for ratio in apart),
    )


def draw(runs: dict[str, tuple[SubspaceMonitor, Accuracy]]) -> Figure:
    figure = Figure(figsize=(12.0, 3.7), layout="constrained")
    ratio, accuracy, loss = figure.subplots(1, 3)
    for (name, (monitor, seen)), colour in zip(runs.items(), (BLUE, ORANGE), strict=True):
        ratio.plot(*zip(*curve(monitor, "updates/gap_ratio").items(), strict=True), "o-", color=colour, label=name)
        accuracy.plot(*zip(*seen.accuracy.items(), strict=True), "o-", color=colour, label=name)
        loss.plot(*zip(*seen.loss.items(), strict=True), "o-", color=colour, label=name)
    ratio.axhline(1.0, color=GREY, linestyle=":", label="random walk")
    ratio.axhline(1.83, color=GREEN, linestyle=":", label="noise with momentum .9")
    ratio.set_title("sigma_1 / sigma_2 of the last 16 x 20 steps", fontsize=10)
    accuracy.set_title("accuracy on pairs that were not trained on", fontsize=10)
    loss.set_title("training loss", fontsize=10)
    loss.set_yscale("log")
    for axes in (ratio, accuracy, loss):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
