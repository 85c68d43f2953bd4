"""The step that was taken tells how close to unstable it is, for any optimizer, by one forward pass.

    python examples/reproduce/step_taken.py [--quick] [--seed 0]

For a step u from theta, with g and L of the whole training set, rho = 1 - (L(theta + u) - L(theta)) / (g.u) is the
second order of the change over the first: above 1 the step has raised the loss. It is followed for four optimizers on
scikit-learn's digits (64-20-20-10), at 20 steps in a row from 50, 100, 300, 500, 1,000 and 2,000 on, pooled: the sum of
the second orders over the sum of the gains -g.u.

1. Full-batch gradient descent (tanh, half the sum of squared errors, lr .2) reaches the edge of stability at about 350
   steps: rho goes from 0 to 1, and successive updates from parallel to opposite.
2. Full-batch Muon (the same, matrices alone, lr .02) reaches rho = 1, too, where lambda_1 over 2/lr is far below 1 and
   says nothing (Islamov et al., arXiv 2603.05002, derive its edge in the spectral norm).
3. SGD with batches of 64 (ReLU, cross-entropy, lr .1) has rho = 1 as well, and lambda_1 is below its threshold: there
   the loss oscillates as fast as it falls, which is no edge.
4. AdamW (1e-3, batches of 64): single steps go uphill at every third probe, and rho of one is no number; the sums of
   gain and second order are.

With --quick descent and AdamW end at step 320, Muon is measured from step 500 on, and there is no SGD.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

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
    fully_connected,
    half_squares,
    seeded,
    whole_set_monitor,
)
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from lightning_subspace import Step, StepCurvature, SubspaceMonitor

STARTS = (50, 100, 300, 500, 1000, 2000)
IN_A_ROW = 20
RATE, MUON_RATE = 0.2, 0.02


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The step that was taken tells the edge of stability for any optimizer, by one forward pass",
        "arXiv 2606.04662 (gain and directional sharpness); arXiv 2603.05002 (Muon's edge)",
        __doc__,
        seed={"type": int, "default": 0, "help": "of the initial weights and batches"},
    )
    quick, seed = reproduction.quick, reproduction.arguments.seed
    starts = [start for start in STARTS if start <= (300 if quick else 2000)]

    squares, entropy = (nn.Tanh, half_squares, "all"), (nn.ReLU, F.cross_entropy, 64)
    runs = {
        "gradient descent": train(lambda p: torch.optim.SGD(p, lr=RATE), *squares, starts, seed),
        "AdamW": train(lambda p: torch.optim.AdamW(p, lr=1e-3), *entropy, starts, seed),
    }
    late = [500] if quick else starts
    muons = train(muon, *squares, late, seed, frozen="bias")
    if not quick:
        runs["Muon"] = muons
        runs["SGD"] = train(lambda p: torch.optim.SGD(p, lr=0.1), *entropy, starts, seed)
    claim_edge(reproduction, runs["gradient descent"], starts)
    claim_muon(reproduction, muons, late)
    if not quick:
        claim_noise(reproduction, runs["SGD"], starts)
        claim_erratic(reproduction, runs["AdamW"], starts)
    claim_secants(reproduction, runs, starts)
    reproduction.save(draw(runs, starts))
    reproduction.finish()


def muon(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in parameters if p.requires_grad], lr=MUON_RATE, weight_decay=0.0)


def train(
    optimizer: Callable[[Any], torch.optim.Optimizer],
    activation: Callable[[], nn.Module],
    loss: Callable[..., Any],
    batch_size: Any,
    starts: Sequence[int],
    seed: int,
    frozen: str = "nothing",
) -> SubspaceMonitor:
    """A run whose parameters of this kind are left at their start."""
    dataset = digits()
    steps = [step for start in starts for step in range(start, start + IN_A_ROW)]
    wanted = [Step(pool=IN_A_ROW), StepCurvature(hessian=True)]
    monitor = whole_set_monitor(dataset, steps, k=1, measurements=wanted, tol=0.01, verify="never")
    net = seeded(lambda: fully_connected(64, 20, 20, 10, activation=activation), seed)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    fit(
        Task(net, loss, optimizer),
        dataset,
        steps=steps[-1] + 1,
        batch_size=batch_size,
        callbacks=[monitor],
        double=True,
        seed=seed,
    )
    return monitor


def windows(monitor: SubspaceMonitor, starts: Sequence[int], key: str) -> dict[int, list[float]]:
    """The values of a quantity in each row of steps."""
    found = curve(monitor, key)
    return {start: [found[s] for s in range(start, start + IN_A_ROW) if s in found] for start in starts}


def pooled(monitor: SubspaceMonitor, starts: Sequence[int]) -> dict[int, float]:
    """Sum of the second orders over the sum of the gains, in each row of steps."""
    ratios = {}
    for start in starts:
        rows = [r.metrics for r in monitor.history if start <= r.step < start + IN_A_ROW and "step/gain" in r.metrics]
        gain = sum(row["step/gain"] for row in rows)
        ratios[start] = (
            sum(row["step/change"] + row["step/gain"] for row in rows) / gain if gain > 0.0 else float("nan")
        )
    return ratios


def listed(values: dict[int, float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f} at {step:,}" for step, value in values.items())


def means(monitor: SubspaceMonitor, starts: Sequence[int], key: str) -> dict[int, float]:
    return {start: statistics.fmean(found) for start, found in windows(monitor, starts, key).items()}


# -- what is claimed --------------------------------------------------------------------------------------------------


def claim_edge(reproduction: Reproduction, monitor: SubspaceMonitor, starts: Sequence[int]) -> None:
    ratios, cosines = pooled(monitor, starts), means(monitor, starts, "step/cosine_previous")
    early, late = [s for s in starts if s <= 100], [s for s in starts if s >= 500]
    reproduction.claim(
        "gradient descent: rho < .02 and cosine of successive updates > .99 in the steps from 50 and 100",
        "below the edge the flow is followed",
        f"rho {listed({s: ratios[s] for s in early}, 4)}; cosine {listed({s: cosines[s] for s in early}, 3)}",
        all(ratios[s] < 0.02 and cosines[s] > 0.99 for s in early),
    )
    if late:
        reproduction.claim(
            "gradient descent: rho in [.9, 1.05] and cosine < -.8 in the steps from 500, 1,000 and 2,000",
            "at the edge u.Hu / |u|^2 = 2 / lr",
            f"rho {listed({s: ratios[s] for s in late}, 3)}; cosine {listed({s: cosines[s] for s in late}, 3)}",
            all(0.9 <= ratios[s] <= 1.05 and cosines[s] < -0.8 for s in late),
        )


def claim_muon(reproduction: Reproduction, monitor: SubspaceMonitor, starts: Sequence[int]) -> None:
    ratios, sharpness = pooled(monitor, starts), means(monitor, starts, "sharpness")
    late = [s for s in starts if s >= 500]
    plain = {s: sharpness[s] * MUON_RATE / 2.0 for s in late}
    reproduction.claim(
        "Muon: rho in [.85, 1.1] in the steps from 500 on, where lambda_1 lr / 2 < .3",
        "at the edge of its own norm",
        f"rho {listed({s: ratios[s] for s in late})}; lambda_1 lr / 2 {listed(plain)}",
        all(0.85 <= ratios[s] <= 1.1 and plain[s] < 0.3 for s in late),
    )


def claim_noise(reproduction: Reproduction, monitor: SubspaceMonitor, starts: Sequence[int]) -> None:
    ratios, sharpness = pooled(monitor, starts), means(monitor, starts, "sharpness")
    late = [s for s in starts if s >= 500]
    below = {s: sharpness[s] * 0.1 / 2.0 for s in late}
    reproduction.claim(
        "SGD: rho in [.85, 1.15] in the steps from 500 on, where lambda_1 lr / 2 < .9",
        "an oscillation by noise, no edge",
        f"rho {listed({s: ratios[s] for s in late})}; lambda_1 lr / 2 {listed(below)}",
        all(0.85 <= ratios[s] <= 1.15 and below[s] < 0.9 for s in late),
    )


def claim_erratic(reproduction: Reproduction, monitor: SubspaceMonitor, starts: Sequence[int]) -> None:
    gains = [g for s, found in windows(monitor, starts, "step/gain").items() if s >= 500 for g in found]
    uphill = sum(gain <= 0.0 for gain in gains) / len(gains)
    reproduction.claim(
        "AdamW: from step 500 on at least 15 % of the steps have no gain on the whole set",
        "the batch's own gradient promises more",
        f"{uphill:.0%} of {len(gains)} steps; mean gain {statistics.fmean(gains):.1e}, "
        f"standard deviation {statistics.stdev(gains):.1e}",
        uphill >= 0.15,
    )


def claim_secants(reproduction: Reproduction, runs: dict[str, SubspaceMonitor], starts: Sequence[int]) -> None:
    apart = []
    for monitor in runs.values():
        for row in (record.metrics for record in monitor.history if "step/curvature_hessian" in record.metrics):
            exact = row["step/curvature_hessian"]
            if exact > 0.3 * row["sharpness"] and "step/curvature" in row:
                apart.append(abs(row["step/curvature"] / exact - 1.0))
    reproduction.claim(
        "all: where u.Hu > .3 lambda_1 |u|^2, the loss's secant is within 10 % of it in the median",
        "1 to 8 %",
        f"{statistics.median(apart):.1%} in the median of {len(apart)} steps",
        statistics.median(apart) < 0.1,
    )


# -- figure -----------------------------------------------------------------------------------------------------------


def draw(runs: dict[str, SubspaceMonitor], starts: Sequence[int]) -> Figure:
    figure = Figure(figsize=(12.0, 3.7), layout="constrained")
    ratio, cosine, loss = figure.subplots(1, 3)
    colours = {"gradient descent": BLUE, "Muon": GREEN, "SGD": ORANGE, "AdamW": GREY}
    for name, monitor in runs.items():
        colour = colours[name]
        found = {step: value for step, value in pooled(monitor, starts).items() if -1.0 < value < 3.0}
        ratio.plot(*zip(*found.items(), strict=True), "o-", color=colour, markersize=4, label=name)
        found = means(monitor, starts, "step/cosine_previous")
        cosine.plot(*zip(*found.items(), strict=True), "o-", color=colour, markersize=4, label=name)
    ratio.axhline(1.0, color="black", linestyle=":", linewidth=1)
    ratio.set_title("rho, pooled over 20 steps", fontsize=10)
    cosine.axhline(0.0, color="black", linestyle=":", linewidth=1)
    cosine.set_title("cosine of successive updates, mean of 20", fontsize=10)
    adam = runs["AdamW"]
    gains, changes = means(adam, starts, "step/gain"), means(adam, starts, "step/change")
    loss.plot(*zip(*gains.items(), strict=True), "o-", color=GREEN, markersize=4, label="gain, -g.u")
    seconds = {step: changes[step] + gain for step, gain in gains.items()}
    loss.plot(*zip(*seconds.items(), strict=True), "o-", color=ORANGE, markersize=4, label="second order")
    spread = {step: statistics.stdev(found) for step, found in windows(adam, starts, "step/gain").items()}
    low, high = ([gains[s] + sign * spread[s] for s in starts] for sign in (-1.0, 1.0))
    loss.fill_between(list(starts), low, high, color=GREEN, alpha=0.15, linewidth=0, label="gain of single steps")
    loss.set_title("AdamW: gain and second order, mean of 20", fontsize=10)
    loss.set_yscale("symlog", linthresh=1e-4)
    for axes in (ratio, cosine, loss):
        axes.set_xscale("log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
