"""Stability edge and next step of the optimizer in use.

Known are exactly the classes `SGD`, `Adam`, `AdamW` and `RMSprop` of torch. Settings and state are read at the time of
the probe, for this rank's coordinates (shards of FSDP2 as they are), without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_subspace.measurements.base import Probe
from lightning_subspace.state.notice import warn

Group = dict[str, Any]
# One number for all coordinates, or a tensor (n,) with one for each.
Diagonal = Tensor | float


@dataclass(frozen=True)
class StabilityEdge:
    """Curvature at which an optimizer becomes unstable.

    There the largest eigenvalue of S (H + D) is 1. On a quadratic, full-batch steps with heavy-ball momentum b and
    learning rate r diverge above H + D = (2 + 2 b) / r. Where steps are divided by P, coordinate by coordinate, that
    holds for P^-1 (H + D). S is P^-1 over the threshold.

    Attributes:
        scale: the diagonal of S; 0 for a parameter that is not moved.
        shift: the diagonal of D, the weight decay that is added to the gradient, without the decoupled one of `AdamW`.
        threshold: for P^-1 H; nan where parameter groups differ in it.
    """

    scale: Diagonal
    shift: Diagonal
    threshold: float


def edge(probe: Probe) -> StabilityEdge | None:
    """Stability edge at the present learning rates, or None if unknown.

    2/lr for gradient descent, (2 + 2b)/lr with heavy-ball momentum b, (2 + 2b)/(lr (1 + 2b)) with Nesterov's (Cohen et
    al. 2021, arXiv 2103.00065, appendix B); (2 + 2 b1)/((1 - b1) lr) with P = (1 - b1^t) (sqrt(v^) + eps) for Adam,
    whose momentum is an average (Cohen et al. 2022, arXiv 2207.14484, section 2); (2 + 2b)/lr with P = sqrt(v) + eps
    for RMSprop.
    """
    view = _OptimizerView.of(probe)
    if view is None or not any(view.moved):
        return None
    kind = type(view.optimizer)
    if kind is SGD:
        divisor: Diagonal = 1.0
        thresholds = view.setting(_sgd_threshold)
    elif kind is RMSprop:
        divisor = (view.state("square_avg") - view.state("grad_avg").square()).clamp(min=0.0).sqrt()
        divisor += view.setting("eps")
        thresholds = view.setting(lambda group: (2.0 + 2.0 * group["momentum"]) / _rate(group))
    else:
        key = "max_exp_avg_sq" if any("max_exp_avg_sq" in state for state in view.states) else "exp_avg_sq"
        ages = view.age.clamp(min=1.0) if isinstance(view.age, Tensor) else view.age
        second = view.state(key) / (1.0 - view.setting("beta2") ** ages)
        divisor = (second.sqrt() + view.setting("eps")) * (1.0 - view.setting("beta1") ** ages)
        thresholds = view.setting(lambda g: (2.0 + 2.0 * g["beta1"]) / ((1.0 - g["beta1"]) * _rate(g)))
    threshold = float("nan") if isinstance(thresholds, Tensor) else thresholds
    return StabilityEdge(view.spread(view.moved) / (divisor * thresholds), view.setting("coupled_decay"), threshold)


def next_step(probe: Probe) -> Tensor | None:  # (n,)
    """Next step with the mean gradient, or None if unknown."""
    view = _OptimizerView.of(probe)
    if view is None:
        return None
    rates = view.setting("lr")
    theta = probe.partition.flatten(probe.parameters, like=probe.gradient)
    gradient = probe.gradient + theta * view.setting("coupled_decay")
    kind = type(view.optimizer)
    if kind is SGD:
        keep, is_nesterov = view.setting("momentum"), view.setting("nesterov")
        velocity = keep * view.state("momentum_buffer") + gradient
        return -rates * (is_nesterov * (gradient + keep * velocity) + (1.0 - is_nesterov) * velocity)
    if kind is RMSprop:
        keep = view.setting("alpha")
        square = keep * view.state("square_avg") + (1.0 - keep) * gradient.square()
        mean = keep * view.state("grad_avg") + (1.0 - keep) * gradient
        centred = view.setting("centered") * mean.square()
        divisor = (square - centred).clamp(min=0.0).sqrt() + view.setting("eps")
        return -rates * (view.setting("momentum") * view.state("momentum_buffer") + gradient / divisor)
    first, second, ages = view.setting("beta1"), view.setting("beta2"), view.age + 1.0
    mean = (first * view.state("exp_avg") + (1.0 - first) * gradient) / (1.0 - first**ages)
    square = second * view.state("exp_avg_sq") + (1.0 - second) * gradient.square()
    square = torch.maximum(square, view.state("max_exp_avg_sq")) / (1.0 - second**ages)
    decay = view.setting("weight_decay") - view.setting("coupled_decay")
    return -rates * (mean / (square.sqrt() + view.setting("eps")) + decay * theta)


def sgd_threshold(optimizer: Optimizer | None) -> float | None:
    """Largest curvature that is stable in all groups of an SGD.

    As `edge` at the present learning rates, less the weight decay, which `SGD` adds to the curvature of the loss. None
    for another optimizer, and where the weight decay alone is unstable.

    Example:
        >>> sgd_threshold(SGD([torch.zeros(1)], lr=0.1, momentum=0.5))
        30.0
    """
    if type(optimizer) is not SGD or why_unknown(optimizer) is not None:
        return None
    moved = [group for group in optimizer.param_groups if float(group["lr"]) > 0.0]
    threshold = min((_sgd_threshold(group) - float(group["weight_decay"]) for group in moved), default=0.0)
    return threshold if threshold > 0.0 else None


def why_unknown(optimizer: Optimizer | None) -> str | None:
    """Reason, in a sentence, why the rule is unknown; None if known."""
    if optimizer is None:
        return "there is no optimizer, or several"
    if type(optimizer) not in (SGD, Adam, AdamW, RMSprop):
        return f"the rule of {type(optimizer).__name__} is not known here (those of SGD, Adam, AdamW, RMSprop are)"
    for group in optimizer.param_groups:
        if group["maximize"]:
            return "the optimizer maximizes"
        if type(optimizer) is SGD and group["momentum"] and group["dampening"]:
            return "its momentum is dampened"
    return None


@dataclass
class Notice:
    """A warning that is given once, on the first rank."""

    is_given: bool = False

    def say(self, probe: Probe, text: str) -> None:
        """Warn, at the first call."""
        if not self.is_given and probe.partition.ranks.index == 0:
            warn(text, stacklevel=3)
        self.is_given = True


def _rate(group: Group) -> float:
    """The learning rate; 1 for 0, since `moved` excludes such groups."""
    return float(group["lr"]) or 1.0


def _sgd_threshold(group: Group) -> float:
    """Largest stable H + D of a moved group under SGD."""
    momentum = float(group["momentum"])
    return (2.0 + 2.0 * momentum) / (_rate(group) * (1.0 + 2.0 * momentum if group["nesterov"] else 1.0))


def _with_common_names(group: Group, kind: type[Optimizer]) -> Group:
    """The settings, and those that the classes name in different ways."""
    # Since torch 2.7 AdamW is an Adam with a setting.
    is_decoupled = group.get("decoupled_weight_decay", kind is AdamW)
    betas = {f"beta{i}": float(beta) for i, beta in enumerate(group.get("betas", ()), start=1)}
    return {**group, **betas, "coupled_decay": 0.0 if is_decoupled else float(group["weight_decay"])}


@dataclass(frozen=True)
class _OptimizerView:
    """Settings and state of an optimizer by coordinates."""

    probe: Probe  # gives the coordinates
    optimizer: Optimizer
    groups: list[Group]  # one a parameter of the space; of rate 0 for a parameter that the optimizer does not have
    states: list[dict[str, Any]]  # one a parameter of the space; empty before its first step

    @classmethod
    def of(cls, probe: Probe) -> _OptimizerView | None:
        """None where the rule of the optimizer is not known."""
        optimizer = probe.optimizer
        if optimizer is None or why_unknown(optimizer) is not None:
            return None
        groups = [_with_common_names(group, type(optimizer)) for group in optimizer.param_groups]
        at_rest = {**groups[0], "lr": 0.0, "weight_decay": 0.0, "coupled_decay": 0.0}
        group_of = {id(p): group for group in groups for p in group["params"]}
        own = [group_of.get(id(parameter), at_rest) for parameter in probe.parameters]
        return cls(probe, optimizer, own, [optimizer.state.get(parameter, {}) for parameter in probe.parameters])

    @property
    def moved(self) -> list[float]:
        """1 for each parameter with a rate and a gradient, else 0."""
        needs_state = type(self.optimizer) is not SGD
        pairs = zip(self.groups, self.states, strict=True)
        return [float(float(group["lr"]) > 0.0 and (bool(state) or not needs_state)) for group, state in pairs]

    @property
    def age(self) -> Diagonal:
        """Number of steps taken, by coordinates."""
        return self.spread([float(state.get("step", 0.0)) for state in self.states])

    def setting(self, read: str | Callable[[Group], float]) -> Diagonal:
        """A setting of the groups, by coordinates."""
        return self.spread([float(group[read] if isinstance(read, str) else read(group)) for group in self.groups])

    def state(self, key: str) -> Tensor:  # (n,)
        """A tensor of the state, by coordinates; zeros where there is none."""
        return self.probe.partition.flatten([state.get(key) for state in self.states], like=self.probe.gradient)

    def spread(self, values: list[float]) -> Diagonal:
        """Values of parameters by coordinates, (n,); a number if all are equal."""
        if len(set(values)) == 1:
            return values[0]
        local = torch.zeros_like(self.probe.gradient)
        of_name = dict(zip(self.probe.space.names, values, strict=True))
        for name, _, place in self.probe.partition.locate():
            local[place.start : place.stop] = of_name[name]
        return local
