"""The Gauss-Newton matrix has the top eigenspace of the Hessian once training is under way, but not at the start.

    python examples/reproduce/gauss_newton.py [--quick]

The handwritten digits of scikit-learn, a 64-20-20-10 ReLU network, cross-entropy, SGD with learning rate 0.1 and batch
size 64. Two monitors look at the same parameters: one at the Hessian H, one at its Gauss-Newton part G, the mean of
J^T A J for the Jacobian J of the outputs and the second derivative A of the loss by them. H - G weighs the second
derivatives of the outputs with the residuals, so it fades as the network learns. That the large eigenvalues of H are
those of G is from Sagun et al. 2017 (arXiv 1706.04454) and Papyan 2019 (arXiv 1901.08244). Compared are the spaces of
the first 10 eigenvectors, by Tr(P P') / 10: 1 for equal spaces, .005 for unrelated ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from common import (
    BLUE,
    GREY,
    ORANGE,
    Reproduction,
    Task,
    curve,
    digits,
    fit,
    fully_connected,
    seeded,
    whole_set_monitor,
)
from matplotlib.figure import Figure
from torch import Tensor

from lightning_subspace import Measurement, Probe, SubspaceMonitor
from lightning_subspace.subspace.subspace import overlap

K = 10
AT_START = 0
LATE = 200
STEPS = [0, 20, 50, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000]
QUICK_STEPS = [0, 50, 100, 200, 300, 500]


class KeepEigenvectors(Measurement):
    """Holds the eigenvectors of every probe."""

    def __init__(self) -> None:
        self.at: dict[int, Tensor] = {}  # step -> (k, n)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """A copy."""
        self.at[probe.step] = probe.top.gather()
        return {}


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The Gauss-Newton matrix has the Hessian's top eigenspace, except at the start",
        "Sagun et al. 2017, arXiv 1706.04454; Papyan 2019, arXiv 1901.08244",
        __doc__,
    )
    steps = QUICK_STEPS if reproduction.quick else STEPS
    dataset = digits()
    kept = {"hessian": KeepEigenvectors(), "ggn": KeepEigenvectors()}
    monitors = {
        name: whole_set_monitor(dataset, steps, k=K, measurements=[held], curvature=name, name=name)
        for name, held in kept.items()
    }
    task = Task(seeded(lambda: fully_connected(64, 20, 20, 10)))
    fit(task, dataset, steps=steps[-1], callbacks=list(monitors.values()))

    overlaps = {step: overlap(kept["hessian"].at[step], kept["ggn"].at[step]) for step in steps}
    late = {step: value for step, value in overlaps.items() if step >= LATE}
    lowest = min(late, key=lambda step: late[step])
    reproduction.claim(
        f"at every measured step from {LATE} to {steps[-1]} the top-10 spaces of H and G overlap by at least .97",
        "the outliers of the spectrum are those of G",
        f"{late[lowest]:.3f} at step {lowest}, the lowest of {len(late)}; "
        + ", ".join(f"{late[step]:.3f} at {step}" for step in (200, 500, 1000, 3000) if step in late),
        late[lowest] >= 0.97,
    )
    reproduction.claim(
        "before training they overlap by less than .5",
        "H = G + R, where R fades with the residuals",
        f"{overlaps[AT_START]:.3f}",
        overlaps[AT_START] < 0.5,
    )
    reproduction.save(draw(overlaps, monitors))
    reproduction.finish()


def draw(overlaps: Mapping[int, float], monitors: Mapping[str, SubspaceMonitor]) -> Figure:
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(list(overlaps), list(overlaps.values()), "o-", color=BLUE, markersize=4)
    left.axhline(0.97, color=GREY, linestyle=":", label=f".97, required from step {LATE} on")
    left.set_ylim(-0.03, 1.03)
    left.set_title("overlap of the top-10 spaces of H and G", fontsize=10)
    left.legend(fontsize=8, loc="lower right")

    for name, label, style in (("hessian", "Hessian", "-"), ("ggn", "Gauss-Newton", "--")):
        for index, colour in ((1, BLUE), (9, ORANGE), (10, GREY)):
            points = curve(monitors[name], f"eigenvalues/{index:02d}")
            right.plot(
                list(points), list(points.values()), style, color=colour, label=f"{label}, {index}", linewidth=1.4
            )
    right.set_yscale("log")
    right.set_title("eigenvalues 1, 9 and 10", fontsize=10)
    right.legend(fontsize=8, ncols=1, loc="upper left")
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=20, linscale=0.4)
        axes.set_xticks(
            [0, 20, 50, 100, 200, 500, 1000, 3000], labels=["0", "20", "50", "100", "200", "500", "1k", "3k"]
        )
        axes.set_xlim(-3, 1.15 * max(overlaps))
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    main()
