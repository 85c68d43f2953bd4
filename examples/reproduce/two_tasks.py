"""A second task is learnt outside of the gradients of the first: what it costs, and what it protects.

    python examples/reproduce/two_tasks.py [--quick] [--seeds 0 1]

Digits of scikit-learn, a 64-40-40-10 ReLU network. It learns the classes 0 to 4 (task A) by 600 steps of SGD, then 5 to
9 (task B) from there, without an example of A in training. `SubspaceProjection("bulk", basis=...)` takes every step out
of the span of some gradients of A: the mean gradient, one for each class, or 32 of micro-batches; or of the top 10
eigenvectors of the Hessian of A's loss, or of 32 random directions. A way is judged by the loss of A when that of B
first is at most a given value, since a projection also slows B down.

1. One step along the gradient of B, from the end of A, of length .1 in every way.
2. 200 steps of SGD at learning rate .05 on B, with spaces that are taken anew at every step, 10 or 100.
3. 400 steps of Adam at learning rate 1e-3, with the update projected, or the gradient before the step.

With --quick there is one seed, the second part takes spaces every 10 steps alone, and the third is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from common import Reproduction, Task, digits, fit, fully_connected, seeded
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import SubspaceProjection, measure_subspace

LENGTH = 0.1  # of the single step
KINDS = ("none", "random", "mean gradient", "classes", "micro-batches", "Hessian")
Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "A second task outside of the gradients of the first: several fresh ones protect it, one does not",
        "After Farajtabar et al. 2020, arXiv 1910.07104, who project out of the gradients of outputs",
        __doc__,
        seeds={"type": int, "nargs": "+", "default": [0, 1], "help": "of initial weights and batches"},
    )
    quick = reproduction.quick
    found = [Tasks(seed) for seed in reproduction.arguments.seeds[: 1 if quick else None]]
    singles = {kind: [tasks.single_step(kind) for tasks in found] for kind in KINDS}
    claim_singles(reproduction, singles)
    sgd = [tasks.go_on(sgd_ways([10] if quick else [1, 10, 100]), sgd_of, 200) for tasks in found]
    claim_sgd(reproduction, sgd)
    adam = [] if quick else [tasks.go_on(ADAM_WAYS, adam_of, 400) for tasks in found]
    if adam:
        claim_adam(reproduction, adam)
    reproduction.save(draw(singles, sgd, adam))
    reproduction.finish()


# -- the ways to go on ------------------------------------------------------------------------------------------------

Way = tuple[str, int, str]  # the basis, steps between two of them, where


def sgd_ways(refreshes: Sequence[int]) -> dict[str, Way]:
    ways = {f"{kind}, every 10": (kind, 10, "update") for kind in ("none", "random", "mean gradient", "classes")}
    for every in refreshes:
        ways |= {f"{kind}, every {every}": (kind, every, "update") for kind in ("micro-batches", "Hessian")}
    return ways


ADAM_WAYS: dict[str, Way] = {
    "none": ("none", 10, "update"),
    **{
        f"{kind}, {where}": (kind, 10, where)
        for kind in ("classes", "micro-batches")
        for where in ("update", "gradient")
    },
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
        self, ways: dict[str, Way], optimizer: Callable[[Any], torch.optim.Optimizer], steps: int
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


def show(paths):
    for name in paths[0]:
        print(
            name,
            [[None if (v := p[name].loss_a(x)) is None else round(v, 3) for x in (2.0, 1.0, 0.6)] for p in paths],
            flush=True,
        )


def claim_singles(r, singles):
    for k, v in singles.items():
        print(k, v, flush=True)


def claim_sgd(r, paths):
    show(paths)


def claim_adam(r, paths):
    show(paths)


def draw(*a):
    return Figure()


if __name__ == "__main__":
    main()
