"""Updates of the steps directly before a probe."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace.callbacks.runner import ProbeRunner
from lightning_subspace.measurements import Measurement
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.state.free_memory import free_memory

# Of the time that so many steps have taken: a budget that a probe is beyond now may allow it by then.
MARGIN = 2.0


class UpdateWatch:
    """Shows measurements the updates of the steps before a probe.

    Parameters are copied before such a step: on their own device, or on the CPU where that has no room for two copies.
    Nothing is communicated, and nothing raised: where a copy fails, the update is missing.

    Args:
        runner: with the schedule and the measurements.
    """

    def __init__(self, runner: ProbeRunner) -> None:
        self._runner = runner
        self._before: Tensor | None = None  # theta before the step, while it is taken
        self._step = -1  # the last one that has ended
        self._ended = time.monotonic()
        self._pace = (0, 0.0)  # what the last batch with a step added to the count, and the seconds it took

    def begin(self, step: int) -> None:
        """Training starts, or goes on, at this step."""
        self._before, self._step, self._pace, self._ended = None, step, (0, 0.0), time.monotonic()

    def look(self, module: nn.Module, *, is_scheduled: bool) -> None:
        """Copy the parameters where a probe follows soon.

        Args:
            module: at the start of a batch.
            is_scheduled: whether the schedule says when probes are taken; otherwise each step may be followed by one.
        """
        if self._before is not None or (window := max((m.window for m in self._wanting), default=0)) == 0:
            return
        if is_scheduled and not self._is_near(window):
            return
        with self._runner.schedule.aside():
            try:
                self._before = self._run.partition.point(module, self._room(module))
            except Exception as error:  # such as no memory
                self._tell(error)

    def see_step(self, module: nn.Module, step: int) -> None:
        """Show the update of a step that has ended."""
        now = time.monotonic()
        self._pace, self._step, self._ended = (step - self._step, now - self._ended), step, now
        before, self._before = self._before, None
        if before is None:
            return
        with self._runner.schedule.aside():
            try:
                update = self._run.partition.point(module, before.device).sub_(before)
                for measurement in self._wanting:
                    measurement.see_update(step, update, self._run.partition)
            except Exception as error:  # also of a user's measurement
                self._tell(error)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the parameters behind."""
        return {**vars(self), "_before": None}

    @property
    def _wanting(self) -> list[Measurement]:
        run = self._runner.run
        if run is None:
            return []
        return [m for m in run.settings.taken if m.window and m.is_due(run.num_probes)]

    def _is_near(self, window: int) -> bool:
        """Whether a probe may follow within so many steps."""
        steps, seconds = self._pace
        left = self._runner.schedule.steps_to_next()
        if left is None or left > window * max(steps, 1):
            return False
        return self._runner.schedule.is_affordable(MARGIN * window * seconds)

    @property
    def _run(self) -> ProbeRun:
        assert self._runner.run is not None, "a measurement has asked for it"
        return self._runner.run

    def _room(self, module: nn.Module) -> torch.device:
        """Where a copy of this rank's part of the parameters has room."""
        space, device = self._run.space, self._run.space.tensors(module)[0].device
        nbytes = self._run.partition.local_n * space.widest_dtype(module).itemsize
        return torch.device("cpu") if device.type != "cpu" and free_memory(device) < 2 * nbytes else device

    def _tell(self, error: Exception) -> None:
        self._before = None
        self._runner.notices.warn_once(
            "updates", f"the update of a step before a probe is left out, {type(error).__name__}: {error}."
        )
