"""Batches before all hooks that may change them, and behind those.

A callback's own hooks come too late for the one, and too early for the other: callbacks behind it and the module may
still write to the batch. So a method of the trainer's parts is covered for one call: `precision_plugin.convert_input`,
which the loop calls with what the loader gives, or `strategy.training_step`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_subspace._lightning import Trainer


class Tap:
    """Cover of a method for one call.

    Somebody else may have covered the method before, or cover this one: theirs stays in its place either way.

    Args:
        part: of a Trainer.
        name: of its method, whose first argument is a batch.
        shows_result: whether what the method returns is shown, and not what it is given.

    Attributes:
        functions: get the next batch; by the id of their owner.
    """

    def __init__(self, part: Any, name: str, *, shows_result: bool = False) -> None:
        self.functions: dict[int, Callable[[Any], None]] = {}
        self._part = part
        self._name = name
        self._shows_result = shows_result
        self._covered = vars(part).get(name)  # of an instance: somebody else's cover
        self._method = getattr(part, name)

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Show the batch to the functions, and call the method."""
        functions, self.functions = self.functions, {}  # once, also where another cover calls this one again
        self.remove()
        result = self._method(batch, *args, **kwargs) if self._shows_result else None
        for function in functions.values():
            function(result if self._shows_result else batch)
        return result if self._shows_result else self._method(batch, *args, **kwargs)

    def remove(self) -> None:
        """Uncover the method, unless another cover is there by now."""
        own = vars(self._part)
        if own.get(self._name) is not self:
            return
        if self._covered is None:
            del own[self._name]
        else:
            own[self._name] = self._covered


def before_hooks(trainer: Trainer, owner: object, function: Callable[[Any], None]) -> None:
    """Call a function with the next batch as the loader gives it.

    Args:
        trainer: in training.
        owner: who asks; it has one function at a time.
        function: gets the batch.
    """
    _tap(trainer.precision_plugin, "convert_input", shows_result=True).functions[id(owner)] = function


def before_training_step(trainer: Trainer, owner: object, function: Callable[[Any], None]) -> None:
    """Call a function with the next batch, directly before `training_step`.

    Args:
        trainer: in training.
        owner: who asks; it has one function at a time.
        function: gets the batch. What it raises ends the step.
    """
    _tap(trainer.strategy, "training_step").functions[id(owner)] = function


def forget_batches(trainer: Trainer, owner: object) -> None:
    """Call no function of this owner: training is over."""
    forget_raw_batches(trainer, owner)
    _forget(trainer.strategy, "training_step", owner)


def forget_raw_batches(trainer: Trainer, owner: object) -> None:
    """Call no function of this owner with what the loader gives."""
    _forget(trainer.precision_plugin, "convert_input", owner)


def _forget(part: Any, name: str, owner: object) -> None:
    tap = vars(part).get(name)
    if isinstance(tap, Tap):
        tap.functions.pop(id(owner), None)
        if not tap.functions:
            tap.remove()


def _tap(part: Any, name: str, **options: Any) -> Tap:
    tap = vars(part).get(name)
    if not isinstance(tap, Tap):
        tap = Tap(part, name, **options)
        setattr(part, name, tap)
    return tap
