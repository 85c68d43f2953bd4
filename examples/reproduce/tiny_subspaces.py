"""Most of SGD's gradient lies in the top eigenspace, and yet the loss falls because of the rest.

    python examples/reproduce/tiny_subspaces.py [--quick] [--seed 0]

Song, Ahn and Yun, "Does SGD really happen in tiny subspaces?" (arXiv 2405.16002), on scikit-learn's digits, with plain
SGD at learning rate 0.1. f_top is the share of the full-batch gradient's square in the top 10 eigenvectors of the
Hessian over the training set, and chi its square root.

1. A 64-20-20-10 ReLU network with cross-entropy, from one start: SGD with batches of 64 beside full-batch descent.
2. A 64-20-20-10 tanh network is trained with batches of 50: 600 steps with squared errors, or 1,000 with cross-entropy.
   From this checkpoint it goes on for 500 steps in four ways: SGD; Dom-SGD, which takes the part of every SGD step that
   is inside the top eigenspace, computed anew every 2 steps; Bulk-SGD, which takes the part outside of it; full-batch
   descent. The three of them with batches see the same batches.
3. chi after the switch from SGD to full-batch descent: without the noise of batches the alignment is gone at once.

With --quick the first part is 500 steps long, the others are done with squared errors alone, and the projections take
the eigenspace anew every 5 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Reproduction,
    Task,
    curve,
    digits,
    fit,
    from_step,
    fully_connected,
    half_squares,
    seeded,
    whole_set_monitor,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import SubspaceProjection
from lightning_subspace.measurements import Chi

K = 10
STEPS = [0, 50, 100, 200, 300, 500, 1000, 2000, 3000]
MORE_STEPS = 500  # from the checkpoint
AFTER_SWITCH = [0, 1, 2, 5, 10, 20, 50, 100]
COLOURS = {"SGD": BLUE, "Dom-SGD": ORANGE, "Bulk-SGD": GREEN, "full batch": GREY}


@dataclass
class Experiment:
    """A loss with its checkpoint, and what is found from there.

    Attributes:
        name: of the loss.
        loss: of outputs and labels.
        steps: of SGD up to the checkpoint.
        within: steps of full-batch descent after which chi has to be small.
        losses: over the training set by step, of each of the four ways to go on.
        chi: by step after the switch to full-batch descent.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    within: int
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    chi: dict[int, float] = field(default_factory=dict)


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The gradient of SGD lies in a tiny subspace, and training does not happen there",
        "Song, Ahn and Yun 2024, arXiv 2405.16002, sections 3 and 4",
        __doc__,
        seed={"type": int, "default": 0, "help": "of initial weights and batches"},
    )
    quick, seed = reproduction.quick, reproduction.arguments.seed
    dataset = digits()

    steps = [step for step in STEPS if step <= (500 if quick else 3000)]
    fractions = {
        "SGD": gradient_fractions(dataset, steps, 64, seed),
        "full batch": gradient_fractions(dataset, steps, "all", seed),
    }
    claim_fractions(reproduction, fractions)

    experiments = [Experiment("squared errors", half_squares, steps=600, within=10)]
    if not quick:
        experiments.append(Experiment("cross-entropy", F.cross_entropy, steps=1000, within=50))
    for experiment in experiments:
        go_on(experiment, dataset, seed, refresh=5 if quick else 2)
        claim_losses(reproduction, experiment)
        claim_switch(reproduction, experiment)

    reproduction.save(draw(fractions, experiments))
    reproduction.finish()


def gradient_fractions(dataset: TensorDataset, steps: Sequence[int], batch_size: Any, seed: int) -> dict[int, float]:
    monitor = whole_set_monitor(dataset, steps, k=K)
    net = seeded(lambda: fully_connected(64, 20, 20, 10), seed)
    fit(Task(net), dataset, steps=steps[-1], batch_size=batch_size, callbacks=[monitor], seed=seed)
    return curve(monitor, "gradient_fraction")


def go_on(experiment: Experiment, dataset: TensorDataset, seed: int, refresh: int) -> None:
    """Train to the checkpoint, and from there in four ways."""
    checkpoint = seeded(lambda: fully_connected(64, 20, 20, 10, activation=nn.Tanh), seed)
    fit(Task(checkpoint, experiment.loss), dataset, steps=experiment.steps, batch_size=50, seed=seed)
    monitor = whole_set_monitor(dataset, AFTER_SWITCH, k=K, measurements=[Chi()])
    ways = {
        "SGD": (50, []),
        "Dom-SGD": (50, [projection("top", dataset, refresh)]),
        "Bulk-SGD": (50, [projection("bulk", dataset, refresh)]),
        "full batch": ("all", [monitor]),
    }
    for name, (batch_size, callbacks) in ways.items():
        recorder = LossRecorder(dataset)
        task = Task(copy.deepcopy(checkpoint), experiment.loss)
        callbacks = [*callbacks, recorder]
        fit(task, dataset, steps=MORE_STEPS, batch_size=batch_size, callbacks=callbacks, seed=seed + 100)
        experiment.losses[name] = recorder.losses
    experiment.chi = curve(monitor, "chi_gradient")


def projection(keep: Any, dataset: TensorDataset, refresh: int) -> SubspaceProjection:
    return SubspaceProjection(
        keep, k=K, refresh_every_n_steps=refresh, sample="all", batch_size=len(dataset), on_failure="raise"
    )


class LossRecorder(L.Callback):
    """The loss over the whole training set, every 10 steps and at the end."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.inputs, self.labels = dataset.tensors
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before every 10th step."""
        if trainer.global_step % 10 == 0:
            self.record(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """After the last one."""
        self.record(trainer, pl_module)

    def record(self, trainer: L.Trainer, task: Any) -> None:
        """One forward pass."""
        with torch.no_grad():
            self.losses[trainer.global_step] = float(task.loss(task.net(self.inputs), self.labels))


# -- what is claimed --------------------------------------------------------------------------------------------------


def claim_fractions(reproduction: Reproduction, fractions: dict[str, dict[int, float]]) -> None:
    sgd, descent = from_step(fractions["SGD"], 300), from_step(fractions["full batch"], 100)
    reproduction.claim(
        "SGD, batches of 64, cross-entropy: f_top >= .9 at every measured step from 300",
        "the gradient aligns with the dominant subspace",
        f"{min(sgd):.3f} to {max(sgd):.3f}",
        min(sgd) >= 0.9,
    )
    reproduction.claim(
        "full-batch descent from the same start and at the same learning rate: f_top < .1 at every one from 100",
        "no alignment without the noise of batches",
        f"at most {max(descent):.2g}",
        max(descent) < 0.1,
    )


def claim_losses(reproduction: Reproduction, experiment: Experiment) -> None:
    start = experiment.losses["SGD"][0]
    sgd, dom, bulk = (experiment.losses[name][MORE_STEPS] for name in ("SGD", "Dom-SGD", "Bulk-SGD"))
    after = f"{experiment.name}, {MORE_STEPS} steps from the checkpoint: "
    reproduction.claim(
        after + "the loss of SGD is <= .8 of what it was",
        "SGD trains on",
        f"{start:.4f} to {sgd:.4f}, {sgd / start:.2f}",
        sgd <= 0.8 * start,
    )
    reproduction.claim(
        after + "that of Dom-SGD is >= .97 of what it was",
        "inside the dominant subspace the loss does not decrease further",
        f"{start:.4f} to {dom:.4f}, {dom / start:.3f}",
        dom >= 0.97 * start,
    )
    reproduction.claim(
        after + "that of Bulk-SGD is within 5 % of SGD's",
        "without the dominant subspace training is as effective as SGD",
        f"{bulk:.4f} beside {sgd:.4f}, {bulk / sgd - 1:+.1%}",
        abs(bulk / sgd - 1.0) <= 0.05,
    )


def claim_switch(reproduction: Reproduction, experiment: Experiment) -> None:
    first, later = experiment.chi[0], experiment.chi[experiment.within]
    reproduction.claim(
        f"{experiment.name}, from SGD to full-batch descent: chi from > .9 to < .2 within {experiment.within} steps",
        "the alignment disappears with the noise",
        ", ".join(f"{value:.3f} at {step}" for step, value in experiment.chi.items() if step in (0, 1, 10, 50, 100)),
        first > 0.9 and later < 0.2,
    )


# -- figure -----------------------------------------------------------------------------------------------------------


def draw(fractions: dict[str, dict[int, float]], experiments: Sequence[Experiment]) -> Figure:
    figure = Figure(figsize=(12.0, 3.7), layout="constrained")
    shares, losses, switch = figure.subplots(1, 3)
    for name, colour in (("SGD", BLUE), ("full batch", GREY)):
        shares.plot(*zip(*fractions[name].items(), strict=True), "o-", color=colour, markersize=4, label=name)
    label(shares, "share of the gradient in the top 10", "step", "f_top")
    for experiment, line in zip(experiments, ("-", "--"), strict=False):
        for name, values in experiment.losses.items():
            start = values[0]
            points = [(step, value / start) for step, value in values.items()]
            shown = name if line == "-" else None
            losses.plot(*zip(*points, strict=True), line, color=COLOURS[name], linewidth=1.4, label=shown)
        losses.plot([], [], line, color="black", label=experiment.name)
        points = experiment.chi.items()
        switch.plot(*zip(*points, strict=True), "o" + line, color=GREY, markersize=4, label=experiment.name)
    label(losses, "four ways to go on from SGD's checkpoint", "step after it", "training loss / that of the checkpoint")
    switch.set_xscale("symlog", linthresh=1)
    switch.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    label(switch, "after the switch to full batches", "step after it", "chi of the gradient")
    return figure


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    main()
