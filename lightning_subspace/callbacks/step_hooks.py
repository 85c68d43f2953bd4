"""Functions called directly before and after an optimizer step.

They hang on the optimizer (`torch.optim.Optimizer.register_step_pre_hook` and `register_step_post_hook`), so nothing of
a training loop can come between them and the step, and they are not called where no step is taken: while gradients are
accumulated, or when a GradScaler skips one. A closure that the optimizer evaluates, in Lightning the training step and
the backward pass, runs between the two; the gradient is there behind it, clipped and unscaled. So a function that is to
see the gradient is called at the end of the closure, or before the step where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer


class StepHooks:
    """Functions around the steps of some optimizers.

    Where a step takes another one (a wrapper, or a class that calls the step of its base), it is the outermost that
    counts.

    Args:
        before: called with nothing.
        after: called with nothing, unless the step has raised.
        at_gradient: called with the optimizer when the gradient of a step is there, after each closure; None: nothing.

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

    def __init__(
        self,
        before: Callable[[], None],
        after: Callable[[], None],
        at_gradient: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self._before = before
        self._after = after
        self._at_gradient = at_gradient
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

    def _enter(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a step: other arguments for it, or None."""
        self._depth += 1
        if self._depth > 1:
            return None
        self._before()
        if (see := self._at_gradient) is None:
            return None
        # torch counts the optimizer itself among the arguments.
        own, *positional = args
        closure = positional[0] if positional else kwargs.get("closure")
        if closure is None:
            see(optimizer)
            return None

        def closed(*given: Any, **named: Any) -> Any:
            value = closure(*given, **named)
            see(optimizer)
            return value

        if positional:
            return (own, closed, *positional[1:]), kwargs
        return args, {**kwargs, "closure": closed}

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._after()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizers of a run behind."""
        return {**vars(self), "_handles": [], "_held": [], "_depth": 0}
