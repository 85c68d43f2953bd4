"""Batch as it reaches `training_step`, behind all hooks that may change it.

A callback's own `on_train_batch_start` comes too early: those behind it and the module may still write to the batch. So
the strategy's `training_step` is covered for one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_subspace._lightning import Trainer


class Tap:
    """Cover of `strategy.training_step` for one call.

    Somebody else may have covered the method before, or cover this one: theirs stays in its place either way.

    Args:
        strategy: of a Trainer.

    Attributes:
        functions: get the next batch; by the id of their owner.
    """

    def __init__(self, strategy: Any) -> None:
        self.functions: dict[int, Callable[[Any], None]] = {}
        self._strategy = strategy
        self._covered = vars(strategy).get("training_step")  # of an instance: somebody else's cover
        self._step = strategy.training_step

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Show the batch to the functions, and take the step."""
        functions, self.functions = self.functions, {}  # once, also where another cover calls this one again
        self.remove()
        for function in functions.values():
            function(batch)
        return self._step(batch, *args, **kwargs)

    def remove(self) -> None:
        """Uncover the method, unless another cover is there by now."""
        own = vars(self._strategy)
        if own.get("training_step") is not self:
            return
        if self._covered is None:
            del own["training_step"]
        else:
            own["training_step"] = self._covered


def before_training_step(trainer: Trainer, owner: object, function: Callable[[Any], None]) -> None:
    """Call a function with the next batch, directly before `training_step`.

    Args:
        trainer: in training.
        owner: who asks; it has one function at a time.
        function: gets the batch. What it raises ends the step.
    """
    tap = vars(trainer.strategy).get("training_step")
    if not isinstance(tap, Tap):
        tap = trainer.strategy.training_step = Tap(trainer.strategy)
    tap.functions[id(owner)] = function


def forget_batches(trainer: Trainer, owner: object) -> None:
    """Call no function of this owner: training is over."""
    tap = vars(trainer.strategy).get("training_step")
    if isinstance(tap, Tap):
        tap.functions.pop(id(owner), None)
        if not tap.functions:
            tap.remove()
