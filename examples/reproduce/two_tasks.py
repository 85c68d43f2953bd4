"""A second task is learnt outside of the gradients of the first.

    python examples/reproduce/two_tasks.py [--quick] [--seeds 0 1]

Digits of scikit-learn, a 64-40-40-10 ReLU network. It learns the classes 0 to 4 (task A) by 600 steps of SGD, and then,
from there, 5 to 9 (task B), without an example of A in training. `SubspaceProjection("bulk", basis=...)` takes every
step out of the span of some gradients of A's loss: of the mean gradient, of one for each class, or of 32 for
micro-batches; or of the top 10 eigenvectors of its Hessian, or of 32 random directions. A way is judged by A's loss
where that of B first is at most a given value, since a projection slows B down, too.

1. One step along the gradient of B, from the end of A, of length .1 in every way.
2. 200 steps of SGD at learning rate .05 on B, with spaces that are taken anew at every step, every 10 or 100.
3. 400 steps of Adam at learning rate 1e-3, where the update is projected, or the gradient before the step.

With --quick there is one seed, the second part has fewer ways, and the third is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from common import BLUE, GREEN, GREY, ORANGE, Reproduction, Task, digits, fit, fully_connected, seeded
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import SubspaceProjection, measure_subspace

LENGTH = 0.1  # of the single step
PURPLE = "#CC79A7"
KINDS = ("none", "random", "mean gradient", "classes", "micro-batches", "Hessian")
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "A second task outside of the gradients of the first: several and fresh ones protect it best",
        "After Farajtabar et al. 2020, arXiv 1910.07104, who project out of the gradients of outputs",
        __doc__,
        seeds={"type": int, "nargs": "+", "default": [0, 1], "help": "of initial weights and batches"},
    )
    quick = reproduction.quick
    found = [Tasks(seed) for seed in reproduction.arguments.seeds[: 1 if quick else None]]
    singles = {kind: [tasks.single_step(kind) for tasks in found] for kind in KINDS}
    claim_singles(reproduction, singles)
    sgd = [tasks.go_on(FEW_WAYS if quick else SGD_WAYS, sgd_of, 200) for tasks in found]
    claim_sgd(reproduction, sgd)
    adam = [] if quick else [tasks.go_on(ADAM_WAYS, adam_of, 400) for tasks in found]
    if adam:
        claim_adam(reproduction, adam)
    reproduction.save(draw(singles, sgd[0], adam[0] if adam else {}))
    reproduction.finish()


# -- the ways to go on ------------------------------------------------------------------------------------------------

# the basis, steps between two of them, where
FEW_WAYS: dict[str, tuple[str, int, str]] = {
    "none": ("none", 10, "update"),
    "mean gradient": ("mean gradient", 10, "update"),
    "classes": ("classes", 10, "update"),
    "micro-batches": ("micro-batches", 10, "update"),
}
SGD_WAYS: dict[str, tuple[str, int, str]] = {
    **FEW_WAYS,
    "random": ("random", 10, "update"),
    "Hessian": ("Hessian", 10, "update"),
    "micro-batches, every step": ("micro-batches", 1, "update"),
    "micro-batches, every 100": ("micro-batches", 100, "update"),
}
ADAM_WAYS: dict[str, tuple[str, int, str]] = {
    "none": ("none", 10, "update"),
    "classes, update": ("classes", 10, "update"),
    "micro-batches, update": ("micro-batches", 10, "update"),
    "classes, gradient": ("classes", 10, "gradient"),
    "micro-batches, gradient": ("micro-batches", 10, "gradient"),
}


def sgd_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam_of(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class Path(L.Callback):
    """Losses of both tasks: at the first step, and at every tenth."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.at: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Behind a step."""
        step = trainer.global_step
        if step == 1 or step % 10 == 0:
            self.at[step] = self.tasks.losses(pl_module.net)

    def loss_a(self, loss_b: float) -> float | None:
        """The loss of A where that of B first is at most this; None if it never is."""
        return next((a for a, b in self.at.values() if b <= loss_b), None)


@dataclass(frozen=True)
class Single:
    """One step of length .1.

    Attributes:
        kept: length of the projected gradient of B over that of the gradient.
        first_order: g_A.u.
        change_a, change_b: of the losses.
    """

    kept: float
    first_order: float
    change_a: float
    change_b: float


class Tasks:
    """Both tasks, and a network that has learnt the first."""

    def __init__(self, seed: int) -> None:
        whole = digits()
        inputs, labels = (tensor.double() if tensor.is_floating_point() else tensor for tensor in whole.tensors)
        is_first = labels < 5
        self.seed = seed
        self.a = TensorDataset(inputs[is_first], labels[is_first])
        self.b = TensorDataset(inputs[~is_first], labels[~is_first])
        self.net = seeded(lambda: fully_connected(64, 40, 40, 10), seed).double()
        fit(Task(self.net), self.a, steps=600, double=True, seed=seed)

    def losses(self, net: nn.Module) -> tuple[float, float]:
        """Of A and B, over all of them."""
        with torch.no_grad():
            first, second = (float(F.cross_entropy(net(x), y)) for x, y in (self.a.tensors, self.b.tensors))
        return first, second

    def batches(self, kind: str) -> Batches:
        """Batches of A, whose gradients are a basis."""
        inputs, labels = self.a.tensors
        if kind == "mean gradient":
            return [(inputs, labels)]
        if kind == "classes":
            return [(inputs[labels == c], labels[labels == c]) for c in range(5)]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        parts = order[: len(labels) // 32 * 32].view(32, -1)
        return [(inputs[part], labels[part]) for part in parts]

    def projection(self, kind: str, every: int = 1, where: Any = "update") -> SubspaceProjection:
        """Out of the space of that kind."""
        options: dict[str, Any] = {"refresh_every_n_steps": every, "where": where, "on_failure": "raise"}
        if kind == "Hessian":
            return SubspaceProjection("bulk", basis=self.eigenvectors, **options)
        if kind == "random":
            generator = torch.Generator().manual_seed(self.seed)
            size = sum(parameter.numel() for parameter in self.net.parameters())
            return SubspaceProjection(
                "bulk", basis=lambda module: torch.randn(32, size, generator=generator), **options
            )
        return SubspaceProjection("bulk", basis=self.batches(kind), **options)

    def eigenvectors(self, module: nn.Module) -> Tensor:
        """The top 10 of the Hessian of A's loss, as rows."""
        record = measure_subspace(module, [self.a.tensors], k=10, verify="never")
        return record.subspace.eigenvectors

    def single_step(self, kind: str) -> Single:
        """One step along the projected gradient of B, from the end of A."""
        net, before, start = copy.deepcopy(self.net), self.losses(self.net), flat(self.net)
        task = Task(net, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        callbacks = [] if kind == "none" else [self.projection(kind)]
        fit(task, self.b, steps=1, batch_size="all", callbacks=callbacks, double=True)
        projected = flat(net) - start
        update = projected * (LENGTH / float(projected.norm()))
        nn.utils.vector_to_parameters(start + update, net.parameters())
        after = self.losses(net)
        whole, own = (gradient_of(self.net, data) for data in (self.b, self.a))
        return Single(
            kept=float(projected.norm() / whole.norm()),
            first_order=float(own @ update),
            change_a=after[0] - before[0],
            change_b=after[1] - before[1],
        )

    def go_on(
        self, ways: dict[str, tuple[str, int, str]], optimizer: Callable[[Any], torch.optim.Optimizer], steps: int
    ) -> dict[str, Path]:
        """Train on B from the end of A."""
        found = {}
        for name, (kind, every, where) in ways.items():
            path = found[name] = Path(self)
            projections = [] if kind == "none" else [self.projection(kind, every, where)]
            task = Task(copy.deepcopy(self.net), optimizer=optimizer)
            fit(task, self.b, steps=steps, callbacks=[*projections, path], double=True, seed=self.seed + 100)
        return found


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def gradient_of(net: nn.Module, data: TensorDataset) -> Tensor:
    inputs, labels = data.tensors
    loss = F.cross_entropy(net(inputs), labels)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


# -- what is claimed --------------------------------------------------------------------------------------------------


def claim_singles(reproduction: Reproduction, singles: dict[str, list[Single]]) -> None:
    def words(key: str, *kinds: str) -> str:
        return "; ".join(f"{kind} {', '.join(f'{getattr(one, key):.2g}' for one in singles[kind])}" for kind in kinds)

    exact = [abs(one.first_order) for kind in ("mean gradient", "classes") for one in singles[kind]]
    reproduction.claim(
        "one step: |g_A.u| < 1e-12 with the mean gradient of A, or those of classes, whose mean it is",
        "an identity",
        f"at most {max(exact):.0e}; {words('first_order', 'none', 'micro-batches', 'Hessian')}",
        max(exact) < 1e-12,
    )
    reproduction.claim(
        "one step: with the mean gradient alone the loss of A rises by .002 or more, to second order",
        "code apart: .0032 and .0024",
        words("change_a", "none", "random", "mean gradient"),
        min(one.change_a for one in singles["mean gradient"]) >= 0.002,
    )
    pairs = [
        several.change_a / one.change_a
        for kind in ("classes", "micro-batches")
        for several, one in zip(singles[kind], singles["mean gradient"], strict=True)
    ]
    reproduction.claim(
        "one step: with classes or micro-batches it rises by at most 5 % of that",
        "code apart: 2.1 and 2.7 %, 1.4 and .6 %",
        words("change_a", "classes", "micro-batches"),
        max(pairs) <= 0.05,
    )
    shares = [
        one.change_b / whole.change_b
        for kind in ("classes", "micro-batches")
        for one, whole in zip(singles[kind], singles["none"], strict=True)
    ]
    reproduction.claim(
        "one step: of what the loss of B falls by without a projection, .7 or more is left with them",
        "code apart: .86 to .89 and .78 to .81",
        f"{min(shares):.2f} to {max(shares):.2f}",
        min(shares) >= 0.7,
    )


def claim_sgd(reproduction: Reproduction, paths: Sequence[dict[str, Path]]) -> None:
    at = {name: [path[name].loss_a(0.6) for path in paths] for name in paths[0]}

    def claim(text: str, paper: str, names: Sequence[str], holds: Callable[[float], bool]) -> None:
        known = [name for name in names if name in at]
        if known:
            ours = "; ".join(f"{name} {numbers(at[name])}" for name in known)
            values = [value for name in known for value in at[name]]
            reproduction.claim(
                f"SGD, the loss of A where that of B is first <= .6: {text}",
                paper,
                ours,
                all(value is not None and holds(value) for value in values),
            )

    claim("without, or out of random directions, >= 2", "code apart: 3.9 to 4.2", ["none", "random"], lambda a: a >= 2)
    claim(
        "out of the mean gradient, every 10 steps, <= 1.5",
        "code apart: .76 and .87",
        ["mean gradient"],
        lambda a: a <= 1.5,
    )
    claim(
        "out of classes or micro-batches <= 1",
        "code apart: .36 to .67",
        ["classes", "micro-batches"],
        lambda a: a <= 1,
    )
    claim("the same, out of the top 10 of the Hessian <= 1", "code apart: .35 and .51", ["Hessian"], lambda a: a <= 1)
    claim(
        "out of micro-batches taken at every step <= .25",
        "code apart: .09 and .11",
        ["micro-batches, every step"],
        lambda a: a <= 0.25,
    )
    claim(
        "out of those taken every 100 steps >= 1.5",
        "code apart: 3.5",
        ["micro-batches, every 100"],
        lambda a: a >= 1.5,
    )


def claim_adam(reproduction: Reproduction, paths: Sequence[dict[str, Path]]) -> None:
    at, late = ({name: [path[name].loss_a(b) for path in paths] for name in paths[0]} for b in (2.0, 1.0))
    kinds = ("classes, gradient", "micro-batches, gradient")
    values = [value for name in kinds for value in at[name]]
    reproduction.claim(
        "Adam, the loss of A where that of B is first <= 2, with the gradient projected: <= .3",
        "code apart: .14, .14, .12, .17; without a projection .74 and .64",
        "; ".join(f"{name} {numbers(at[name])}" for name in at),
        all(value is not None and value <= 0.3 for value in values),
    )
    reproduction.claim(
        "Adam: within 400 steps the loss of B falls to 1 where the gradient is projected, and not where the update is",
        "the same",
        "; ".join(f"{name} {numbers(late[name])}" for name in late),
        all(value is not None for name in kinds for value in late[name])
        and all(value is None for name in ("classes, update", "micro-batches, update") for value in late[name]),
    )


def numbers(values: Sequence[float | None]) -> str:
    return ", ".join("never" if value is None else f"{value:.2g}" for value in values)


# -- figure -----------------------------------------------------------------------------------------------------------

COLOURS = {
    "none": GREY,
    "random": "black",
    "mean gradient": BLUE,
    "classes": ORANGE,
    "micro-batches": GREEN,
    "Hessian": PURPLE,
}
STYLES = {"": "-", "every step": "--", "every 100": ":", "update": "--", "gradient": "-"}


def draw(singles: dict[str, list[Single]], sgd: dict[str, Path], adam: dict[str, Path]) -> Figure:
    figure = Figure(figsize=(12.0, 3.9), layout="constrained")
    parts = [("SGD on B", sgd), *([("Adam on B", adam)] if adam else [])]
    bars, *panels = figure.subplots(1, 1 + len(parts))
    heights = [max(abs(one.change_a) for one in singles[kind]) for kind in KINDS]
    bars.bar(range(len(KINDS)), heights, color=[COLOURS[kind] for kind in KINDS])
    bars.set_yscale("log")
    bars.set_xticks(range(len(KINDS)), [kind.replace(" ", "\n").replace("-", "-\n") for kind in KINDS], fontsize=8)
    bars.set_title("rise of A's loss by one step of length .1", fontsize=10)
    for axes, (title, paths) in zip(panels, parts, strict=True):
        for name, path in paths.items():
            kind, _, rest = name.partition(", ")
            losses = [(b, a) for a, b in path.at.values()]
            width = 4.0 if kind == "none" else 1.3  # random directions lie upon it
            axes.plot(*zip(*losses, strict=True), STYLES[rest], color=COLOURS[kind], linewidth=width, label=name)
        axes.set_title(f"{title}: from right to left", fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([0.3, 1, 3, 10], ["0.3", "1", "3", "10"])
        axes.set_xticks([], minor=True)
        axes.set_ylim(0.0015, 8.0)
        axes.set_xlabel("loss of B")
        axes.set_ylabel("loss of A")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="lower left", ncols=2)
    return figure


if __name__ == "__main__":
    main()
