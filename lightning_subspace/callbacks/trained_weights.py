"""Weights of the last optimizer step, for the last probe.

Weight averaging puts the average into the module before training has ended: in `on_train_end`, at the end of an epoch
or around a validation, and callbacks that stand in front of a monitor do so first. So a copy is kept from a step that
may be the last of the fit, and lent to the module while the last probe is taken. What is not trained is copied along
if it is not larger than what is: a momentum teacher counts in the loss, a frozen backbone does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace._lightning import Trainer, is_a, undeclared
from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.parallel.fsdp import local_part
from lightning_subspace.state.failure import Waiting
from lightning_subspace.state.signals import waiting_signals

LEFT_OUT = "the last probe, of the weights that the last step gave, is left out"
AVERAGED = (
    "the module holds other weights at the end of training than the last step gave, such as an average; the last probe "
    "is of those that the step gave."
)
NOT_TRAINED = (
    "StochasticWeightAveraging has put the average into the module and runs an epoch for batch-norm alone; nothing is "
    "measured in it."
)
# Lightning's own callbacks that put other weights into a module, or run functions of the user's.
REPLACING = ("WeightAveraging", "StochasticWeightAveraging", "ModelPruning", "LambdaCallback")
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_subspace")


def may_be_replaced(trainer: Trainer) -> bool:
    """Whether a callback may replace the weights before training ends."""
    callbacks = undeclared(trainer, "callbacks")
    return any(
        any(is_a(callback, name) for name in REPLACING) or type(callback).__module__.split(".")[0] not in LIGHTNING
        for callback in callbacks
    )


def may_be_last(trainer: Trainer) -> bool:
    """Whether training may end with the present batch."""
    max_steps: int = undeclared(trainer, "max_steps")
    is_last: bool = undeclared(trainer, "is_last_batch") or undeclared(trainer, "should_stop")
    return is_last or 0 <= max_steps <= trainer.global_step


class TrainedWeights:
    """Copy of a module's weights as an optimizer step has left them.

    Attributes:
        step: the step of the copy; -1 while there is none.

    Example:
        >>> module, kept = nn.Linear(1, 1), TrainedWeights()
        >>> kept.keep(module, 7)
        >>> kept.step
        7
    """

    def __init__(self) -> None:
        self.step = -1
        self._copies: dict[str, Tensor] = {}
        self._failure = Waiting()  # why there are none
        self._covered: list[tuple[Tensor, Tensor]] = []  # parts of the module, and what they held

    def keep(self, module: nn.Module, step: int) -> None:
        """Copy the weights after this step. Never raises."""
        self.drop()
        self.step = step
        try:
            self._copies = {name: part.clone() for name, part in _parts(module).items()}
        except Exception as error:  # such as no memory; told if the copy is needed
            self._failure.keep(error)

    def drop(self) -> None:
        """Free the copy: another step comes."""
        self.step, self._copies = -1, {}
        self._failure.drop()

    @contextmanager
    def lent(self, runner: ProbeRunner, module: nn.Module) -> Iterator[bool]:
        """Put the copy into the module for a block. A collective.

        Yields:
            Whether it is there on all ranks; where one has failed, there has been a warning.
        """
        with waiting_signals():
            try:
                yield runner.on_all_ranks(LEFT_OUT, lambda: self._put_into(module)) is not None
            finally:
                covered, self._covered = self._covered, []
                for part, held in covered:
                    part.copy_(held)

    @property
    def is_lent(self) -> bool:
        """Whether the module held other weights, within `lent`."""
        return bool(self._covered)

    def _put_into(self, module: nn.Module) -> bool:
        self._failure.end()
        named = dict([*module.named_parameters(), *module.named_buffers()])
        parts = {name: local_part(named[name].detach()) for name in self._copies if name in named}
        for name, copy in self._copies.items():
            if name not in parts or parts[name].shape != copy.shape:
                raise ValueError(f"{name!r} is no longer part of the module.")
        for name, copy in self._copies.items():
            if not torch.equal(parts[name], copy):
                self._covered.append((parts[name], parts[name].clone()))
                parts[name].copy_(copy)
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copy behind."""
        return {"step": -1, "_copies": {}, "_failure": Waiting(), "_covered": []}


def _parts(module: nn.Module) -> dict[str, Tensor]:
    """This rank's part of what training changes, by name."""
    named: list[tuple[str, Tensor, bool]] = [(name, p, p.requires_grad) for name, p in module.named_parameters()]
    named += [(name, b, False) for name, b in module.named_buffers()]
    sizes = {trained: sum(t.nbytes for _, t, is_trained in named if is_trained == trained) for trained in (True, False)}
    takes_all = sizes[False] <= sizes[True]
    return {name: local_part(tensor.detach()) for name, tensor, trained in named if trained or takes_all}
