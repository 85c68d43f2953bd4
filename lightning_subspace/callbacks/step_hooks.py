"""Functions called directly before and after an optimizer step.

They hang on the optimizer (`torch.optim.Optimizer.register_step_pre_hook` and `register_step_post_hook`), so nothing of
a training loop can come between them and the step, and they are not called where no step is taken: while gradients are
accumulated, or when a GradScaler skips one. A closure that the optimizer evaluates, in Lightning the training step and
the backward pass, runs between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer


class StepHooks:
    """A pair of functions around the steps of some optimizers.

    Where a step takes another one (a wrapper, or a class that calls the step of its base), it is the outermost that
    counts.

    Args:
        before: called with nothing.
        after: called with nothing, unless the step has raised.

    Example:
        >>> import torch
        >>> hooks = StepHooks(lambda: print("before"), lambda: print("after"))
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> hooks.attach([optimizer])
        >>> optimizer.step()
        before
        after
        >>> hooks.release()
        >>> optimizer.step()
    """

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before = before
        self._after = after
        self._depth = 0
        self._handles: list[Any] = []
        self._held: list[int] = []  # identities of the optimizers

    def attach(self, optimizers: Iterable[Any]) -> None:
        """Attach to these optimizers alone. To be called between steps.

        Raises:
            TypeError: for something that is not derived from `torch.optim.Optimizer`.
        """
        self._depth = 0  # the last step may have ended by an exception
        optimizers = list(optimizers)
        if self._held == [id(optimizer) for optimizer in optimizers]:
            return
        self.release()
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"expected optimizers derived from torch.optim.Optimizer, which has hooks around its steps; got "
                    f"{type(optimizer).__name__}."
                )
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._enter))
            self._handles.append(optimizer.register_step_post_hook(self._leave))
        self._held = [id(optimizer) for optimizer in optimizers]

    def release(self) -> None:
        """Leave the optimizers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    def _enter(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self._before()

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._after()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizers of a run behind."""
        return {**vars(self), "_handles": [], "_held": [], "_depth": 0}
