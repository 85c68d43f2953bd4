"""The gradient noise scale against the truth, and its part outside of the top space, which grows as the loss falls.

    python examples/reproduce/noise_scale.py [--quick] [--seed 0]

McCandlish et al., "An empirical model of large-batch training" (arXiv 1812.06162), on scikit-learn's digits: a
64-20-20-10 ReLU network, cross-entropy, plain SGD at learning rate 0.1 with batches of 64. B_simple = S/G^2 has a truth
here: the gradients of all 1,797 single examples.

1. A monitor without eigenvectors (k = 0) draws 1,024 new examples for each probe, in micro-batches of 16: how often is
   the truth within the interval?
2. A second one takes the whole set, in micro-batches of 64, at 20 consecutive steps from each of a few: B_simple
   changes from step to step with the oscillation of the gradient in the top space (k = 9), B_bulk does not, and grows.

With --quick training is 1,020 steps long.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median, pstdev

import torch
from common import BLUE, GREEN, GREY, ORANGE, Reproduction, Task, curve, digits, fit, fully_connected, seeded
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import Measurement, Needs, NoiseScale, SubspaceMonitor

WINDOW = 20  # consecutive steps


class Truth(Measurement):
    """`truth/...`: S, G^2 and their parts in the top space, from the gradients of all single examples.

    Args:
        net: the network, of which a copy in float64 is taken.
        dataset: all examples.
        prefix: of the parameters' names in the module that is trained.
    """

    needs = Needs.NOTHING

    def __init__(self, net: nn.Module, dataset: TensorDataset, prefix: str = "net.") -> None:
        self.net, self.prefix = copy.deepcopy(net).double(), prefix
        inputs, self.labels = dataset.tensors
        self.inputs = inputs.double()

    def measure(self, probe):
        """A gradient of every example."""
        gradients = self.gradients(dict(zip(probe.space.names, probe.parameters, strict=True)))
        mean = gradients.mean(dim=0)
        found = parts(gradients - mean, mean, "")
        if probe.subspace is not None and probe.subspace.trusted:
            basis = probe.top.basis.double()
            found |= parts((gradients - mean) @ basis.T, basis @ mean, "_top")
            for name in ("variance", "square"):
                found[f"truth/{name}_bulk"] = found[f"truth/{name}"] - found[f"truth/{name}_top"]
        return found

    def gradients(self, parameters: Mapping[str, Tensor]) -> Tensor:  # (N, n)
        """One row an example."""
        values = {name.removeprefix(self.prefix): tensor.detach().double() for name, tensor in parameters.items()}

        def loss(values: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(self.net, values, (image[None],)), label[None])

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, self.inputs, self.labels)
        return torch.cat([found[name].flatten(start_dim=1) for name in values], dim=1)


def parts(deviations: Tensor, mean: Tensor, part: str) -> dict[str, float]:
    """S and G^2 of all examples, or of their parts in a space."""
    variance = float(deviations.square().sum() / (len(deviations) - 1))
    return {f"truth/variance{part}": variance, f"truth/square{part}": float(mean @ mean)}


def ratio(monitor: SubspaceMonitor, part: str = "") -> dict[int, float]:
    """The true scale by step."""
    above, below = (curve(monitor, f"truth/{name}{part}") for name in ("variance", "square"))
    return {step: above[step] / below[step] for step in above}


def spread(values: Sequence[float]) -> float:
    """Geometric standard deviation."""
    return math.exp(pstdev([math.log(value) for value in values]))


def main() -> None:
    run = Reproduction.start(
        __file__,
        "Noise scale of the gradient, and its steady part",
        "McCandlish et al., arXiv 1812.06162, section 2.2 and appendix A.1",
        __doc__,
        seed={"type": int, "default": 0},
    )
    starts = (300, 1000) if run.quick else (300, 1000, 2000)
    steps = starts[-1] + WINDOW
    data, seed = digits(), run.arguments.seed
    task = Task(seeded(lambda: fully_connected(64, 20, 20, 10), 1000 + seed))
    common = {"max_overhead": None, "log": "all", "on_failure": "raise"}
    sampled = SubspaceMonitor(
        k=0,
        every_n_steps=list(range(0, steps, 25)),
        sample=256,
        gradient_sample=1024,
        batch_size=16,
        name="sampled",
        measurements=[Truth(task.net, data)],
        **common,
    )
    whole = SubspaceMonitor(
        k=9,
        every_n_steps=[step for start in starts for step in range(start, start + WINDOW)],
        sample="all",
        batch_size=64,
        measurements=[NoiseScale(split_every=1), Truth(task.net, data)],
        **common,
    )
    fit(task, data, steps=steps, callbacks=[sampled, whole], seed=seed)

    truth, low, high = ratio(sampled), curve(sampled, "noise/scale_low"), curve(sampled, "noise/scale_high")
    inside = sum(low[step] <= truth[step] <= high.get(step, math.inf) for step in truth) / len(truth)
    run.claim(
        "1,024 of 1,797 examples: the true B_simple is between `noise/scale_low` and `noise/scale_high` in at least "
        "85 % of the probes",
        "about 95 % (two standard errors)",
        f"{inside:.0%} of {len(truth)}; no upper end in {len(truth) - len(high)}",
        inside >= 0.85,
    )
    exact = {step: curve(whole, "noise/gradient_square")[step] / record for step, record in squares(whole).items()}
    error = max(abs(value - 1.0) for value in exact.values())
    run.claim(
        "the whole set in micro-batches: G^2 is exact, to rounding (1e-4), since nothing of S is subtracted",
        "1/B - 1/N = 0",
        f"{error:.1e}",
        error < 1e-4,
    )
    usual = {
        step: r["noise/variance"] / (r["noise/gradient_square"] - r["noise/variance"] / len(data))
        for step, r in metrics(whole).items()
    }
    share = sum(not 0.0 < usual[step] < 1.2 * value for step, value in ratio(whole).items()) / len(usual)
    run.claim(
        "without the term 1/N (the usual formula) B_simple of the same numbers is more than 20 % too large, or "
        "negative, in at least a fifth of the probes",
        "-",
        f"{share:.0%}",
        share >= 0.2,
    )
    bulk, scale = ratio(whole, "_bulk"), ratio(whole)
    found = curve(whole, "noise/scale_bulk")
    levels = [window(bulk, start) for start in starts]
    spreads = [(spread(window(scale, start)), spread(window(bulk, start))) for start in starts]
    run.claim(
        "over 20 consecutive steps B_simple changes by a geometric standard deviation of at least 1.6, B_bulk by at "
        "most 1.35",
        "-",
        "; ".join(f"from {start}: {a:.2f} and {b:.2f}" for start, (a, b) in zip(starts, spreads, strict=True)),
        all(a >= 1.6 and b <= 1.35 for a, b in spreads),
    )
    run.claim(
        "B_bulk grows as the loss falls, from each window to the next, and at least fivefold in all",
        "the noise scale grows (figure 4)",
        " -> ".join(f"{median(level):,.0f}" for level in levels),
        all(median(a) < median(b) for a, b in pairwise(levels)) and median(levels[-1]) > 5 * median(levels[0]),
    )
    off = median(abs(math.log(found[step] / bulk[step])) for step in found)
    run.claim(
        "`noise/scale_bulk`, from 29 micro-batches of the whole set, is within 15 % of the truth (median)",
        "-",
        f"{math.expm1(off):.1%}",
        math.expm1(off) < 0.15,
    )
    run.save(drawn(sampled, whole, starts))
    run.finish()


def metrics(monitor: SubspaceMonitor) -> dict[int, Mapping[str, float]]:
    """All numbers by step."""
    return {record.step: record.metrics for record in monitor.history}


def squares(monitor: SubspaceMonitor) -> dict[int, float]:
    """The true squared gradient by step."""
    return curve(monitor, "truth/square")


def window(values: Mapping[int, float], start: int) -> list[float]:
    """The values of the consecutive steps from one."""
    return [value for step, value in values.items() if start <= step < start + WINDOW]


def drawn(sampled: SubspaceMonitor, whole: SubspaceMonitor, starts: Sequence[int]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    truth = ratio(sampled)
    low, high = curve(sampled, "noise/scale_low"), curve(sampled, "noise/scale_high")
    top = 3 * max(*truth.values(), *high.values())
    left.vlines(list(low), list(low.values()), [high.get(s, top) for s in low], color=BLUE, alpha=0.35, lw=3)
    left.plot(*zip(*curve(sampled, "noise/scale").items(), strict=True), "o", color=BLUE, ms=4, label="noise/scale")
    left.plot(*zip(*truth.items(), strict=True), "_", color=ORANGE, ms=8, mew=2, label="truth")
    left.set(yscale="log", ylim=(0.5 * min(low.values()), top), xlabel="step", ylabel="B_simple [examples]")
    left.set_title("1,024 of 1,797 examples, and two standard errors")
    left.legend()
    for start in starts:
        for values, colour, name in (
            (ratio(whole), GREY, "B_simple, truth"),
            (ratio(whole, "_bulk"), ORANGE, "B_bulk, truth"),
            (curve(whole, "noise/scale_bulk"), GREEN, "noise/scale_bulk"),
        ):
            shown = {step - start: value for step, value in values.items() if start <= step < start + WINDOW}
            place = [starts.index(start) * (WINDOW + 4) + step for step in shown]
            style = "." if name.startswith("noise") else "-"
            right.plot(place, list(shown.values()), style, color=colour, label=name if start == starts[0] else None)
    right.set_xticks([i * (WINDOW + 4) + WINDOW / 2 for i in range(len(starts))], [f"from step {s}" for s in starts])
    right.set(yscale="log", ylabel="examples")
    right.set_title("The whole set, 20 consecutive steps each")
    right.legend()
    return figure


if __name__ == "__main__":
    main()
