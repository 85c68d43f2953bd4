"""The Hessian's outliers count the classes, its bulk counts the parameters; and trace and noise against 2/lr.

    python examples/reproduce/outliers.py [--quick]

The handwritten digits of scikit-learn, a 64-20-20-10 ReLU network, cross-entropy, SGD with learning rate 0.1 and batch
size 64; then with 5 classes, with squared loss, and with a width of 100. Sagun et al. 2017 (arXiv 1706.04454): outliers
about as many as classes above a bulk near zero; more parameters only add to the bulk. The outliers end where
lambda_i / lambda_{i+1} is largest among the first 15 (`gap_index`): for K classes that should be behind the K-1-th with
cross-entropy, whose outputs have one direction without effect, and behind the K-th with squared loss. That k = K is not
at the gap does not matter to the share of the gradient: it is the same for K-1, K and K+1.

Then what is compared with 2/lr: the trace (Wu and Su 2023, arXiv 2305.17490), the estimate of which is checked against
a Hessian written out in float64; the gradient-noise interaction; and the curvature that mini-batches have along their
own gradient against that of the whole loss (Lee and Jang 2023; Andreyev and Beneventano, arXiv 2412.20553).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean

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
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import BatchSharpness, GradientNoise, Measurement, Needs, Probe, SubspaceMonitor, Trace

LEARNING_RATE = 0.1
BOUND = 2 / LEARNING_RATE
FIRST = 15  # eigenvalues among which the gap is looked for
SHOWN = 500  # step of the figure
STEPS = [50, 100, 200, 300, 500, 700, 1000]
WHY_NOT = {
    "5 classes": "the fourth outlier is as far below the third, 2.4 to 3.0 times, as it is above the bulk, so that the "
    "largest ratio is the third or the fourth; seed 1 has it behind 3 throughout, seed 2 behind 4 up to step 500",
    "noise": "single steps with a small gradient make the mean, here step 3,000; without the package, over the 28 "
    "multiples of 100 and with other micro-batches, it is 1.41, 1.59 and 1.32 with seeds 0, 1 and 2 (medians 1.15 to "
    "1.26)",
    "squared loss": "it does up to step 500; then the tenth outlier has come nearer to the bulk",
}
net = partial(fully_connected, 64, 20, 20, 10)


class FractionsAround(Measurement):
    """`fraction/K-1`, `fraction/K`, `fraction/K+1`: the share of the gradient in the first so many eigenvectors."""

    needs = Needs.EIGENVALUES

    def __init__(self, classes: int) -> None:
        self.sizes = {"K-1": classes - 1, "K": classes, "K+1": classes + 1}

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Of eigenvectors that are there."""
        squares = (probe.top.basis @ probe.gradient).double().square().cumsum(0) / probe.norm(probe.gradient) ** 2
        return {f"fraction/{name}": float(squares[size - 1]) for name, size in self.sizes.items()}


class ExactTrace(L.Callback):
    """The trace of the Hessian of the mean loss, row by row in float64, at some steps."""

    def __init__(self, dataset: TensorDataset, steps: list[int]) -> None:
        self.inputs, self.labels = dataset.tensors[0].double(), dataset.tensors[1]
        self.steps = steps
        self.at: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Differentiate each entry of the gradient."""
        if trainer.global_step in self.steps:
            self.at[trainer.global_step] = float(dense_hessian(pl_module.net, self.inputs, self.labels).trace())


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The Hessian's outliers count the classes, its bulk the parameters; what stays at 2/lr and what does not",
        "Sagun et al. 2017, arXiv 1706.04454; Wu and Su 2023, arXiv 2305.17490; Lee and Jang 2023",
        __doc__,
    )
    quick = reproduction.quick
    monitors = {
        "10 classes": spectrum(digits(), net, 10, quick=quick),
        "5 classes": spectrum(digits(num_classes=5), partial(fully_connected, 64, 20, 20, 5), 5, quick=quick),
        "squared loss": spectrum(digits(), net, 10, loss=half_squares, quick=quick),
        "width 100": spectrum(digits(), partial(fully_connected, 64, 100, 100, 10), 10, quick=quick),
    }
    claim_outliers(reproduction, monitors)
    claim_trace(reproduction, monitors)
    noise = claim_noise(reproduction)
    reproduction.save(draw(monitors, noise))
    reproduction.finish()


def spectrum(
    dataset: TensorDataset,
    make: Callable[[], nn.Module],
    classes: int,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    quick: bool,
) -> SubspaceMonitor:
    steps = [step for step in STEPS if step <= SHOWN or not quick]
    measurements = [FractionsAround(classes), Trace()]
    monitor = whole_set_monitor(dataset, steps, k=FIRST, max_matvecs=400, measurements=measurements)
    fit(Task(seeded(make), loss), dataset, steps=steps[-1], callbacks=[monitor])
    return monitor


def claim_outliers(reproduction: Reproduction, monitors: Mapping[str, SubspaceMonitor]) -> None:
    last = max(curve(monitors["10 classes"], "sharpness"))
    for name, first, expected in (
        ("10 classes", 200, 9),
        ("5 classes", 200, 4),
        ("squared loss", 50, 10),
        ("width 100", 200, 9),
    ):
        gaps = {step: int(gap) for step, gap in curve(monitors[name], "gap_index").items() if step >= first}
        reproduction.claim(
            f"{name}: the gap of the spectrum lies behind eigenvalue {expected} at each measured step in "
            f"[{first}, {last}]",
            "as many outliers as classes, whatever the width",
            ", ".join(f"{gap} at {step}" for step, gap in gaps.items())
            + f"; lambda_{expected}/lambda_{expected + 1} is "
            + ", ".join(f"{ratio(monitors[name], expected, step):.1f}" for step in gaps),
            len(gaps) == sum(step >= first for step in steps_of(monitors[name])) and set(gaps.values()) == {expected},
            why_not="" if reproduction.quick and name == "squared loss" else WHY_NOT.get(name, ""),
        )
    narrow, wide = (outliers_and_bulk(monitors[name]) for name in ("10 classes", "width 100"))
    reproduction.claim(
        f"with width 100 for 20, so 9 times the parameters, each of 9 outliers at step {SHOWN} is within a factor of 2",
        "more parameters only scale the bulk",
        f"outliers {narrow[0][0]:.1f} to {narrow[0][-1]:.2f} with 1,930 parameters, {wide[0][0]:.1f} to "
        f"{wide[0][-1]:.2f} with 17,610; the sum of the others is {narrow[1]:.1f} and {wide[1]:.1f}",
        all(0.5 <= a / b <= 2.0 for a, b in zip(narrow[0], wide[0], strict=True)),
    )
    spread, worst = 0.0, ""
    for name in ("10 classes", "5 classes", "width 100"):
        shares = [curve(monitors[name], f"fraction/{size}") for size in ("K-1", "K", "K+1")]
        for step in (step for step in steps_of(monitors[name]) if step >= 200):
            found = [share[step] for share in shares]
            if max(found) - min(found) >= spread:
                spread, worst = max(found) - min(found), f"{name}, step {step}: {', '.join(f'{x:.3f}' for x in found)}"
    reproduction.claim(
        "cross-entropy: shares of the gradient in the first K-1, K and K+1 eigenvectors within .02 from step 200 on",
        "k = number of classes",
        f"at most {spread:.4f} apart ({worst})",
        spread <= 0.02,
    )


def claim_trace(reproduction: Reproduction, monitors: Mapping[str, SubspaceMonitor]) -> None:
    dataset, steps = digits(), [200] if reproduction.quick else [200, 500]
    exact = ExactTrace(dataset, steps)
    monitor = whole_set_monitor(dataset, steps, k=10, measurements=[Trace()])
    task = Task(seeded(net))
    fit(task, dataset, steps=steps[-1], callbacks=[exact, monitor], double=True)
    estimates, errors = curve(monitor, "trace"), curve(monitor, "trace_error")
    reproduction.claim(
        "Trace() is within 3 of its standard errors of the trace of the Hessian written out",
        "an identity",
        "; ".join(f"{estimates[s]:.2f} +- {errors[s]:.2f} and {exact.at[s]:.2f} at step {s}" for s in steps),
        all(abs(estimates[s] - exact.at[s]) <= 3 * errors[s] for s in steps),
    )
    traces = {name: curve(monitors[name], "trace") for name in ("10 classes", "squared loss")}
    reproduction.claim(
        f"tr(H) is at most 2/lr = {BOUND:.0f} from step 200 on",
        "tr(H) <= 2/lr where SGD is linearly stable, at a minimum",
        "; ".join(
            f"{'cross-entropy' if name == '10 classes' else name}: "
            + ", ".join(f"{value:.0f} at {step}" for step, value in values.items() if step >= 200)
            for name, values in traces.items()
        ),
        max(max(from_step(values, 200)) for values in traces.values()) <= BOUND,
        why_not="it is a condition at minima that fit every example, where the noise of the gradient is tied to the "
        "curvature; these networks are still on their way at these steps",
    )


def claim_noise(reproduction: Reproduction) -> dict[int, SubspaceMonitor]:
    """Monitors, by batch size, whose micro-batches have the size of those of training."""
    long = [300, 500, 700, 1000] if reproduction.quick else [300, 400, 500, 700, 1000, 1500, 2000, 3000]
    plans = {64: (LEARNING_RATE, long)} | ({} if reproduction.quick else {8: (0.05, [300, 500, 1000])})
    noise = {}
    for size, (rate, steps) in plans.items():
        noise[size] = SubspaceMonitor(
            k=0,
            every_n_steps=steps,
            max_overhead=None,
            sample="all",
            batch_size=size,
            log="all",
            measurements=[GradientNoise(batches=28), BatchSharpness(batches=28)],  # the same micro-batches
            on_failure="raise",
        )
        task = Task(seeded(net), optimizer=partial(torch.optim.SGD, lr=rate))
        fit(task, digits(), steps=steps[-1], batch_size=size, callbacks=[noise[size]])
    ratios = {step: value / BOUND for step, value in curve(noise[64], "gradient_noise_interaction").items()}
    mean = fmean(from_step(ratios, 300))
    reproduction.claim(
        "the mean of the gradient-noise interaction over 2/lr, from step 300 on, is in [.6, 1.6]",
        "1: a step neither lowers nor raises the loss on average",
        f"{mean:.2f}; " + ", ".join(f"{ratio:.2f} at {step}" for step, ratio in ratios.items()),
        0.6 <= mean <= 1.6,
        why_not="" if reproduction.quick else WHY_NOT["noise"],
    )
    for size, monitor in noise.items():
        own, whole = curve(monitor, "batch_sharpness"), curve(monitor, "interaction_sharpness")
        lowest = min(own, key=lambda step: own[step] / whole[step])
        reproduction.claim(
            f"batch size {size}: batch sharpness is at least .95 of the interaction sharpness at each step from 300 on",
            "mini-batches meet more curvature than the whole loss has",
            f"{own[lowest]:.1f} and {whole[lowest]:.1f} at step {lowest}, the lowest ratio of {len(own)}; "
            f"2/lr is {2 / plans[size][0]:.0f}",
            all(own[step] >= 0.95 * whole[step] for step in own),
        )
    return noise


def ratio(monitor: SubspaceMonitor, index: int, step: int) -> float:
    values = [curve(monitor, f"eigenvalues/{i:02d}")[step] for i in (index, index + 1)]
    return values[0] / values[1]


def steps_of(monitor: SubspaceMonitor) -> list[int]:
    return [record.step for record in monitor.history]


def outliers_and_bulk(monitor: SubspaceMonitor) -> tuple[list[float], float]:
    """The first 9 eigenvalues, and the sum of all others."""
    values = [curve(monitor, f"eigenvalues/{i:02d}")[SHOWN] for i in range(1, 10)]
    return values, curve(monitor, "trace")[SHOWN] - sum(values)


def dense_hessian(module: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:  # (n, n)
    parameters = list(module.parameters())
    with torch.enable_grad():
        loss = F.cross_entropy(module(inputs), labels)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def draw(monitors: Mapping[str, SubspaceMonitor], noise: Mapping[int, SubspaceMonitor]) -> Figure:
    figure = Figure(figsize=(10.0, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(monitors, (BLUE, GREEN, ORANGE, GREY), strict=True))
    for name, monitor in monitors.items():
        values = [curve(monitor, f"eigenvalues/{i:02d}")[SHOWN] for i in range(1, FIRST + 1)]
        gap = int(curve(monitor, "gap_index")[SHOWN])
        left.plot(range(1, FIRST + 1), values, "o-", color=colours[name], markersize=4, linewidth=1, label=name)
        left.plot([gap, gap + 1], values[gap - 1 : gap + 1], "-", color=colours[name], linewidth=4, alpha=0.5)
    left.set_yscale("log")
    left.set_xticks(range(1, FIRST + 1))
    left.set_xlabel("index")
    left.set_title(f"eigenvalues at step {SHOWN}; the largest ratio is thick", fontsize=10)

    for key, label, colour in (
        ("gradient_noise_interaction", "gradient-noise interaction", ORANGE),
        ("batch_sharpness", "batch sharpness", BLUE),
        ("interaction_sharpness", "interaction sharpness", GREEN),
    ):
        points = curve(noise[64], key)
        right.plot(list(points), list(points.values()), "o-", color=colour, markersize=4, label=label)
    points = {step: value for step, value in curve(monitors["10 classes"], "trace").items() if step >= 200}
    right.plot(list(points), list(points.values()), "s-", color=GREY, markersize=4, label="trace")
    right.axhline(BOUND, color="black", linestyle="--", linewidth=1, label="2 / learning rate")
    right.set_yscale("log")
    right.set_yticks([3, 5, 10, 20, 50, 100], labels=["3", "5", "10", "20", "50", "100"])
    right.minorticks_off()
    right.set_xlabel("optimizer step")
    right.set_title("cross-entropy, 10 classes", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
