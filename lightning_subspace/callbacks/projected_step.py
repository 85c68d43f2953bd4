"""Projection of optimizer steps, before or after the optimizer."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_subspace._lightning import Trainer, undeclared
from lightning_subspace.callbacks.projector import Projector
from lightning_subspace.callbacks.step_hooks import StepHooks
from lightning_subspace.probe.arguments import wrong

# "update": what the optimizer did; "gradient": what it is given
Place = Literal["update", "gradient"]


class ProjectedSteps:
    """Projects the steps of a run while there is a projector.

    Args:
        where: what is projected.

    Attributes:
        projector: of the steps to come; None leaves them as they are.

    Example:
        >>> steps = ProjectedSteps("update")
        >>> steps.projector is None, steps.found()
        (True, {})
    """

    def __init__(self, where: Place) -> None:
        self.projector: Projector | None = None
        self._where = where
        self._hooks = StepHooks(_nothing, _nothing)
        self._theta: Tensor | None = None  # of the step that is being taken
        self._of_gradient: dict[str, float] = {}
        self._found: dict[int, dict[str, float]] = {}

    def start(self, trainer: Trainer, module: nn.Module) -> None:
        """Hang on the optimizers of a fit.

        Raises as `attach` does.
        """
        see = (lambda optimizer: self._see_gradient(trainer, module, optimizer)) if self._where == "gradient" else None
        self._hooks = StepHooks(lambda: self.begin(trainer, module), lambda: self._end(trainer, module), see)
        self.attach(trainer)

    def attach(self, trainer: Trainer) -> None:
        """Hang on the present optimizers, between steps.

        Raises:
            TypeError: for what is no optimizer of torch.
            ValueError: for several optimizers, where the gradient is projected.
        """  # noqa: DOC501  # `wrong` makes one, and `StepHooks` raises the other
        count = len(trainer.optimizers)
        if self._where == "gradient" and count > 1:
            way_out = f"each of the {count} has a part of the gradient alone"
            raise wrong("where", "'update' where there are several optimizers", self._where, way_out)
        self._hooks.attach(trainer.optimizers)

    def release(self) -> None:
        """Leave the optimizers as they were."""
        self._hooks.release()

    def found(self) -> dict[int, dict[str, float]]:
        """Numbers of the steps since the last call, by step."""
        found, self._found = self._found, {}
        return found

    def begin(self, trainer: Trainer, module: nn.Module) -> None:
        """Directly before a step, or where there is another projector in it."""
        projector, self._theta = self.projector, None
        is_needed = projector is not None and (self._where == "update" or (projector.compares and _is_logged(trainer)))
        if projector is not None and is_needed:
            self._theta = projector.theta(module)

    def _see_gradient(self, trainer: Trainer, module: nn.Module, optimizer: Optimizer) -> None:
        """Where the gradient of a step is there, perhaps of several."""
        if self.projector is not None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._of_gradient = self.projector.project_gradient(module, held, measured=_is_logged(trainer))

    def _end(self, trainer: Trainer, module: nn.Module) -> None:
        """Directly after a step."""
        projector, theta, is_logged = self.projector, self._theta, _is_logged(trainer)
        found, self._theta, self._of_gradient = self._of_gradient, None, {}
        if projector is not None and theta is not None:
            if self._where == "update":
                found = projector.project(module, theta, measured=is_logged)
            else:
                found = {**found, **projector.compared(module, theta)}
        if found:
            self._found[trainer.global_step] = found

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to a step, and the trainer."""
        own: dict[str, Any] = {
            "_hooks": StepHooks(_nothing, _nothing),
            "_theta": None,
            "_of_gradient": {},
            "_found": {},
        }
        return {**vars(self), **own}


def _is_logged(trainer: Trainer) -> bool:
    """Whether the step that is being taken is logged."""
    every = undeclared(trainer, "log_every_n_steps")
    return bool(every > 0 and trainer.global_step % every == 0)


def _nothing() -> None:
    """Stand in for a hook outside of a run."""
