"""Spikes of Adam's loss, and what foretells them: gamma, the curvature along the preconditioned gradient.

    python examples/reproduce/spikes.py [--quick]

A network of 481 parameters fits sin(pi x) + sin(5 pi x) at 200 points with the full batch. At rates of .01 and .02 the
loss shoots up every few hundred steps. Before it does, three ratios cross one: lambda_1 of the preconditioned Hessian
over 38/lr, which then stays there for long; the same along the preconditioned gradient; and the edge ratio of the step
that was taken, 1 - (change of the loss)/(g.u), above one where a step has raised the loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from common import BLUE, GREEN, GREY, ORANGE, Reproduction, Task, curve, fit, fully_connected, seeded, whole_set_monitor
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import Measurement, Needs, Stability

EVERY = 5  # steps from one eigensolve to the next; the other two ratios are taken at every step
WINDOW = 60  # steps that the minimum before a spike and the peak behind it are looked for in
RISE = 1.5  # a spike is where the loss is so many times that minimum
HEIGHT = 3.0  # of the spikes that are counted; lower ones are swings about the edge, which nothing need foretell
QUICK = (0.02, 0, range(640, 860))
RUNS = [
    *((0.01, seed, range(900, 1900)) for seed in (0, 1)),
    *((0.02, seed, range(600, 1500)) for seed in (0, 1)),
]
CONTROL = (0.001, 0, range(3000, 3400))
RATIOS = {"lambda_1": "stability", "gamma": "gradient_stability", "edge ratio": "edge_ratio"}


class Gain(Measurement):
    """-g.u of the step that was taken, for the edge ratio."""

    needs = Needs.NOTHING

    def after_step(self, probe, gradient, update):
        """With the gradient at the point that the step was taken from."""
        return {"gain": -probe.dot(probe.gradient, update)}


@dataclass(frozen=True)
class Spike:
    """A spike: the step where the loss has risen by half, the peak over the minimum, and both places."""

    rise: int
    start: int
    peak: int
    height: float


@dataclass(frozen=True)
class Run:
    """What one training has shown, by steps."""

    rate: float
    seed: int
    loss: dict[int, float]
    ratios: dict[str, dict[int, float]]
    spikes: list[Spike]

    def calm(self) -> list[int]:
        """The steps outside of all spikes."""
        near = {step for spike in self.spikes for step in range(spike.start - 20, spike.peak + 30)}
        return [step for step in self.loss if step not in near]

    def lead(self, name: str, spike: Spike) -> int | None:
        """Steps from the last upward crossing of 1 to the rise by half; None where there is none."""
        values = {step: value for step, value in self.ratios[name].items() if step <= spike.rise}
        steps = sorted(values)
        crossings = [b for a, b in pairwise(steps) if values[a] <= 1.0 < values[b]]
        return spike.rise - crossings[-1] if crossings and values[steps[-1]] > 1.0 else None


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "Adam's loss spikes about ten steps after the curvature along the preconditioned gradient crosses its edge",
        "arXiv 2506.04805; Cohen et al. 2022, arXiv 2207.14484, section 2",
        __doc__,
    )
    quick = reproduction.quick
    runs = [train(*run) for run in ([QUICK] if quick else RUNS)]
    claim_spikes(reproduction, runs)
    claim_order(reproduction, runs)
    if not quick:
        claim_calm(reproduction, runs)
        claim_control(reproduction, train(*CONTROL))
    reproduction.save(draw(runs[-2 if len(runs) > 1 else 0]))
    reproduction.finish()


def train(rate: float, seed: int, steps: range) -> Run:
    """Train, with a probe before every one of the steps, and one more for the loss behind the last."""
    x = torch.linspace(-1.0, 1.0, 200).double()[:, None]
    dataset = TensorDataset(x, torch.sin(math.pi * x) + torch.sin(5.0 * math.pi * x))
    monitor = whole_set_monitor(
        dataset,
        steps,
        k=0,
        measurements=[Stability(eigensolve=False), Stability(every=EVERY), Gain()],
        dtype="float64",
    )
    net = seeded(lambda: fully_connected(1, 20, 20, 1, activation=nn.Tanh), seed)
    task = Task(net, F.mse_loss, lambda parameters: torch.optim.Adam(parameters, lr=rate))
    fit(task, dataset, steps=steps[-1] + 1, batch_size="all", callbacks=[monitor], double=True, seed=seed)
    loss, gains = curve(monitor, "sample_loss"), curve(monitor, "gain")
    ratios = {name: curve(monitor, key) for name, key in RATIOS.items()}
    # L(theta + u) is the loss of the next probe, on the same examples.
    ratios["edge ratio"] = {
        step: 1.0 + (loss[step + 1] - loss[step]) / gain
        for step, gain in gains.items()
        if step + 1 in loss and gain > 0.0
    }
    run = Run(rate, seed, loss, ratios, spikes_of(loss))
    print(f"lr {rate}, seed {seed}: {[(s.start, s.rise, s.peak, round(s.height, 1)) for s in run.spikes]}", flush=True)
    return run


def spikes_of(loss: Mapping[int, float]) -> list[Spike]:
    """Where the loss is `RISE` times its minimum over the last steps."""
    found, steps = [], sorted(loss)
    i = WINDOW
    while i < len(steps):
        before = min(steps[i - WINDOW : i + 1], key=loss.__getitem__)
        if loss[steps[i]] <= RISE * loss[before]:
            i += 1
            continue
        peak = max(steps[i : i + WINDOW], key=loss.__getitem__)
        found.append(Spike(steps[i], before, peak, loss[peak] / loss[before]))
        i = steps.index(peak) + 40  # behind the peak the loss comes down, with swings
    return found


# -- what is claimed --------------------------------------------------------------------------------------------------


def high(runs: Sequence[Run]) -> list[tuple[Run, Spike]]:
    return [(run, spike) for run in runs for spike in run.spikes if spike.height >= HEIGHT]


def claim_spikes(reproduction: Reproduction, runs: Sequence[Run]) -> None:
    found = high(runs)
    reproduction.claim(
        f"the loss spikes by a factor of {HEIGHT:g} or more, {'once' if len(runs) == 1 else 'eight times'} at least",
        "loss spikes of Adam",
        f"{len(found)} spikes, by {min(s.height for _, s in found):.1f} to {max(s.height for _, s in found):.0f}",
        len(found) >= (1 if len(runs) == 1 else 8),
    )


def claim_order(reproduction: Reproduction, runs: Sequence[Run]) -> None:
    leads = {name: [run.lead(name, spike) for run, spike in high(runs)] for name in RATIOS}
    reproduction.claim(
        f"gamma lr/38 crosses 1 from 0 to 20 steps before the loss has risen by half, at every spike of {HEIGHT:g}",
        "a spike begins when the curvature along the gradient exceeds the threshold",
        f"{', '.join(str(lead) for lead in leads['gamma'])} steps",
        all(lead is not None and 0 <= lead <= 20 for lead in leads["gamma"]),
    )
    middle = {name: statistics.median([lead for lead in found if lead is not None]) for name, found in leads.items()}
    least = 1 if len(runs) == 1 else 6  # lambda_1 is known at every fifth step only
    reproduction.claim(
        "first lambda_1, then gamma, then the edge ratio: the medians of these steps, lambda_1 at least "
        f"{least} before gamma",
        "lambda_1 crosses long before",
        ", ".join(f"{name} {lead:g}" for name, lead in middle.items()),
        middle["lambda_1"] >= middle["gamma"] + least and middle["gamma"] > middle["edge ratio"],
    )


def claim_calm(reproduction: Reproduction, runs: Sequence[Run]) -> None:
    shares = {}
    for name in RATIOS:
        values = [run.ratios[name][step] for run in runs for step in run.calm() if step in run.ratios[name]]
        shares[name] = sum(value > 1.0 for value in values) / len(values)
    reproduction.claim(
        "away from spikes gamma is above its edge at less than 5 % of the steps, lambda_1 and the edge ratio more "
        "often",
        "lambda_1 alone does not tell",
        ", ".join(f"{name} {share:.1%}" for name, share in shares.items()),
        shares["gamma"] < 0.05 and shares["gamma"] < min(shares["lambda_1"], shares["edge ratio"]),
    )


def claim_control(reproduction: Reproduction, run: Run) -> None:
    gamma, largest = max(run.ratios["gamma"].values()), max(run.ratios["lambda_1"].values())
    reproduction.claim(
        f"lr {run.rate:g}: no spike from step {min(run.loss)} to {max(run.loss)}, gamma below .01 of its edge",
        "no spikes below the threshold",
        f"{len(run.spikes)} spikes, gamma at most {gamma:.1g} and lambda_1 {largest:.2f} of the edge",
        not run.spikes and gamma < 0.01 and largest < 1.0,
    )


# -- figure -----------------------------------------------------------------------------------------------------------


def draw(run: Run) -> Figure:
    figure = Figure(figsize=(12.0, 6.2), layout="constrained")
    (whole, near), (whole_ratios, near_ratios) = figure.subplots(2, 2, sharex="col")
    spike = max(run.spikes[:4], key=lambda found: found.height)
    window = range(spike.start - 45, spike.peak + 15)
    for axes, steps in ((whole, sorted(run.loss)), (near, [step for step in window if step in run.loss])):
        axes.semilogy(steps, [run.loss[step] for step in steps], color=GREY, linewidth=1.2)
        axes.set_ylabel("loss")
    whole.set_title(f"Adam, learning rate {run.rate}, full batch", fontsize=10)
    near.set_title(f"one spike, {spike.height:.0f} times", fontsize=10)
    for axes, is_near in ((whole_ratios, False), (near_ratios, True)):
        for (name, values), colour in zip(run.ratios.items(), (BLUE, ORANGE, GREEN), strict=True):
            shown = {step: value for step, value in values.items() if not is_near or step in window}
            if is_near or name != "edge ratio":  # between spikes it jumps with every step
                mark = "o-" if is_near else "-"
                axes.plot(*zip(*shown.items(), strict=True), mark, color=colour, markersize=3, linewidth=1, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step", ylabel="over the edge", ylim=(-0.1, 2.0))
        axes.legend(fontsize=8, loc="upper left")
    near.axvline(spike.rise, color="black", linewidth=0.8, linestyle=":")
    near_ratios.axvline(spike.rise, color="black", linewidth=0.8, linestyle=":")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    main()
