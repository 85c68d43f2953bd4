"""Settings and state of the optimizer in use, by coordinates.

Known are the classes of `KNOWN`, exactly: a subclass may step otherwise. Settings and state are read at the time of the
probe, for this rank's coordinates (shards of FSDP2 as they are), without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_subspace.measurements.base import Probe

KNOWN: tuple[type[Optimizer], ...] = (SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop)

Settings = dict[str, Any]  # of a group of parameters, or the state of one
# One number for all coordinates, or a tensor (n,) with one for each.
Diagonal = Tensor | float


def why_unknown(optimizer: Optimizer | None) -> str | None:
    """Reason, in a sentence, why the rule is unknown; None if known."""
    if optimizer is None:
        return "there is no optimizer, or several"
    if type(optimizer) not in KNOWN:
        known = ", ".join(kind.__name__ for kind in KNOWN)
        return f"the rule of {type(optimizer).__name__} is not known here (those of {known} are)"
    for group in optimizer.param_groups:
        if group.get("maximize", False):
            return "the optimizer maximizes"
        if type(optimizer) is SGD and group["momentum"] and group["dampening"]:
            return "its momentum is dampened"
    return None


@dataclass(frozen=True)
class OptimizerView:
    """Settings and state of an optimizer by coordinates.

    Attributes:
        probe: gives the coordinates.
        optimizer: one of a known class.
        groups: settings, one a parameter of the space; of rate 0 for one that the optimizer does not have.
        states: one a parameter of the space; empty before its first step.
    """

    probe: Probe
    optimizer: Optimizer
    groups: list[Settings]
    states: list[Settings]

    @classmethod
    def of(cls, probe: Probe) -> OptimizerView | None:
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
        """1 for each parameter with a rate and its state, else 0.

        Some versions of torch make a state before the first step: one without a step behind it does not count.
        """
        needs_state = type(self.optimizer) is not SGD
        pairs = zip(self.groups, self.states, strict=True)
        return [
            float(float(group["lr"]) > 0.0 and (not needs_state or float(state.get("step", 0.0)) > 0.0))
            for group, state in pairs
        ]

    @property
    def age(self) -> Diagonal:
        """Number of steps taken, by coordinates."""
        return self.each(lambda _, state: float(state.get("step", 0.0)))

    def setting(self, read: str | Callable[[Settings], float]) -> Diagonal:
        """A setting of the groups, by coordinates."""
        return self.each(lambda group, _: float(group[read] if isinstance(read, str) else read(group)))

    def each(self, read: Callable[[Settings, Settings], float]) -> Diagonal:
        """A number from group and state of each parameter, by coordinates."""
        return self.spread([read(group, state) for group, state in zip(self.groups, self.states, strict=True)])

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


def _with_common_names(group: Settings, kind: type[Optimizer]) -> Settings:
    """The settings, and those that the classes name in different ways."""
    # Since torch 2.7 AdamW is an Adam with a setting.
    is_decoupled = group.get("decoupled_weight_decay", kind is AdamW)
    betas = {f"beta{i}": float(beta) for i, beta in enumerate(group.get("betas", ()), start=1)}
    return {**group, **betas, "coupled_decay": 0.0 if is_decoupled else float(group["weight_decay"])}
