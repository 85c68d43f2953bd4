"""The loss along the sharpest directions: how far its quadratic holds.

    python examples/reproduce/slices.py [--quick]

Along an eigenvector v of eigenvalue lambda the quadratic term reaches c at a distance of a = sqrt(2 c/lambda). The even
part of the true change there, over c, is 1 for a quadratic. It is measured for c of .001 to 1 times the loss, for a
classifier of the digits with GELU and with ReLU, at the start and while SGD trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Reproduction,
    Task,
    digits,
    fit,
    fully_connected,
    seeded,
    whole_set_monitor,
)
from lightning.pytorch import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset

from lightning_subspace import LossSlices, Slices

SHARES = (0.001, 0.01, 0.1, 0.3, 1.0)  # c over the loss
STEPS = [0, 100, 500, 2000]
ACTIVATIONS = {"GELU": nn.GELU, "ReLU": nn.ReLU}
FIRST_SEED = 1000  # that of the weights whose start is compared
AT_START = (1.01, 1.10, 1.96, 3.12, 4.22)  # along v_1, by code that shares nothing with this package
LATE = 500  # steps from here on


@dataclass(frozen=True)
class Run:
    """Slices of one training: for each share, and the lines and the plane of c = L at one step."""

    name: str
    by_share: dict[float, dict[int, LossSlices]]
    whole: dict[int, LossSlices]
    theta: dict[int, float]

    def ratios(self, step: int, direction: int = 0) -> list[float]:
        """Even part over c along an eigenvector, for each share."""
        return [float(self.by_share[share][step].even_ratios[direction, -1]) for share in SHARES]


class Length(Callback):
    """|theta| at some steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps, self.found = steps, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        """Before the step."""
        if trainer.global_step in self.steps:
            flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
            self.found[trainer.global_step] = float(flat.norm())


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The quadratic along the sharpest directions holds to the whole loss late in training, and not at the start",
        "Definitions as in loss-landscape slices along Hessian axes; numbers of an independent computation",
        __doc__,
    )
    steps = [step for step in STEPS if step <= (LATE if reproduction.quick else max(STEPS))]
    seeds = (0,) if reproduction.quick else (0, 1)
    runs = {(name, seed): train(name, seed, steps) for name in ACTIVATIONS for seed in seeds}
    claim_start(reproduction, runs["GELU", 0])
    claim_early(reproduction, [runs["GELU", seed] for seed in seeds], [runs["ReLU", seed] for seed in seeds])
    claim_late(reproduction, list(runs.values()))
    claim_range(reproduction, list(runs.values()))
    reproduction.save(draw(runs["GELU", 0], runs["ReLU", 0]))
    reproduction.finish()


def train(name: str, seed: int, steps: Sequence[int]) -> Run:
    images, labels = digits().tensors
    dataset = TensorDataset(images.double(), labels)
    shares, whole = [Slices(share=share, points=3, plane=False) for share in SHARES], Slices(points=21)
    monitor = whole_set_monitor(dataset, steps, k=3, measurements=[*shares, whole], dtype="float64", tol=1e-5)
    net = seeded(lambda: fully_connected(64, 20, 20, 10, activation=ACTIVATIONS[name]), FIRST_SEED + seed)
    length = Length(steps)
    fit(Task(net), dataset, steps=steps[-1] + 1, callbacks=[length, monitor], double=True, seed=seed)
    by_share = {slices.share: {found.step: found for found in slices.history} for slices in shares}
    return Run(f"{name}, seed {seed}", by_share, {found.step: found for found in whole.history}, length.found)


# -- what is claimed --------------------------------------------------------------------------------------------------


def in_words(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def claim_start(reproduction: Reproduction, run: Run) -> None:
    found = run.ratios(0)
    reproduction.claim(
        "GELU, before training, along v_1: even part over c within 1 % at c = .001, .01, .1, .3 and 1 times the loss",
        in_words(AT_START),
        in_words(found),
        all(abs(ours / theirs - 1.0) < 0.01 for ours, theirs in zip(found, AT_START, strict=True)),
    )


def claim_early(reproduction: Reproduction, smooth: Sequence[Run], kinked: Sequence[Run]) -> None:
    small, large = [run.ratios(100)[0] for run in smooth], [run.ratios(100)[-1] for run in smooth]
    reproduction.claim(
        "GELU, step 100, along v_1: within .03 of 1 at c = .001 of the loss, below .95 at all of it",
        "1.00 and .70",
        f"{in_words(small)} and {in_words(large)}",
        all(abs(value - 1.0) < 0.03 for value in small) and all(value < 0.95 for value in large),
    )
    bent = [run.ratios(100)[0] for run in kinked]
    reproduction.claim(
        "ReLU, step 100, along v_1: above 1.1 at c = .001 of the loss, as the Hessian does not see the kinks",
        "1.9",
        in_words(bent),
        all(value > 1.1 for value in bent),
    )


def claim_late(reproduction: Reproduction, runs: Sequence[Run]) -> None:
    late = [step for step in runs[0].whole if step >= LATE]
    tenth, whole = (
        [run.ratios(step, direction)[place] for run in runs for step in late for direction in (0, 2)]
        for place in (SHARES.index(0.1), SHARES.index(1.0))
    )
    reproduction.claim(
        f"from step {LATE} on, along v_1 and v_3, both activations: within .1 of 1 at c = .1 of the loss",
        "1.01 to 1.06",
        f"{min(tenth):.2f} to {max(tenth):.2f}",
        all(abs(value - 1.0) < 0.1 for value in tenth),
    )
    reproduction.claim(
        f"from step {LATE} on, along v_1 and v_3, both activations: from .95 to 1.4 at c = the loss",
        "1.05 to 1.27",
        f"{min(whole):.2f} to {max(whole):.2f}",
        all(0.95 < value < 1.4 for value in whole),
    )


def claim_range(reproduction: Reproduction, runs: Sequence[Run]) -> None:
    ranges = [float(run.whole[LATE].ranges[0]) for run in runs]
    lengths = [run.theta[LATE] for run in runs]
    reproduction.claim(
        f"step {LATE}: the range along v_1 at c = the loss is below .4, so that a fixed range of 1 is far too wide",
        ".19 with |theta| = 9.4",
        f"{in_words(ranges)} with |theta| = {in_words(lengths)}",
        all(value < 0.4 for value in ranges),
    )


# -- figure -----------------------------------------------------------------------------------------------------------


def draw(smooth: Run, kinked: Run) -> Figure:
    figure = Figure(figsize=(12.0, 6.4), layout="constrained")
    (start, late, plane), (ratio, bent, other) = figure.subplots(2, 3)
    draw_line(start, smooth.whole[0], "GELU, before training")
    draw_line(late, smooth.whole[LATE], f"GELU, step {LATE}")
    draw_plane(plane, smooth.whole[LATE], f"GELU, step {LATE}: on (v_1, v_2)")
    for axes, run in ((ratio, smooth), (bent, kinked)):
        for step, colour in zip(run.whole, (GREY, ORANGE, BLUE, GREEN), strict=False):
            axes.semilogx(SHARES, run.ratios(step), "o-", color=colour, markersize=4, label=f"step {step}")
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="c over the loss", ylabel="even part over c", ylim=(0.0, 2.5))
        axes.set_title(f"along v_1, {run.name.split(',')[0]}", fontsize=10)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
    draw_plane(other, smooth.whole[0], "GELU, before training: on (v_1, v_2)")
    return figure


def draw_line(axes: Axes, found: LossSlices, title: str) -> None:
    for i, colour in enumerate((BLUE, ORANGE, GREEN)):
        axes.plot(found.units, found.lines[i], "-", color=colour, label=f"v_{i + 1}")
        axes.plot(found.units, found.quadratic_lines[i], "--", color=colour, linewidth=1)
    axes.set(xlabel="distance over a, c = the loss", ylabel="loss (dashed: its quadratic)")
    axes.set_ylim(0.0, 3.2 * found.loss)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


def draw_plane(axes: Axes, found: LossSlices, title: str) -> None:
    levels = [found.loss * level for level in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)]
    across, up = (found.units * length for length in found.ranges[:2])
    axes.contour(across, up, found.plane, levels, colors=BLUE, linewidths=1.1)
    axes.contour(across, up, found.quadratic_plane, levels, colors=ORANGE, linewidths=0.9, linestyles="--")
    axes.plot(0.0, 0.0, "k+")
    axes.set(xlabel="along v_1", ylabel="along v_2")
    axes.set_title(title, fontsize=10)


if __name__ == "__main__":
    main()
