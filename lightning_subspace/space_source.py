"""Where `SubspaceProjection` has its subspaces from: a probe of its own, or that of a monitor at the same point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lightning_subspace.collectives import Ranks
from lightning_subspace.curvature.choice import CheckError
from lightning_subspace.messages import Messages
from lightning_subspace.monitor import SubspaceMonitor
from lightning_subspace.plan import Plan
from lightning_subspace.pool import SampleError
from lightning_subspace.record import Record
from lightning_subspace.sample_source import SampleRequest, SampleSource
from lightning_subspace.subspace import TRUSTED_ERROR, Subspace
from lightning_subspace.tracker import Tracker


class SpaceSource:
    """Gives the subspace at each point of a run, where there is one to be trusted.

    Args:
        plan: how it is computed, and what is measured in it.
        request: the examples; those for the gradient are drawn only where something is measured.
        messages: what goes wrong is told there.
        instead: what happens without a subspace, in words.

    Attributes:
        plan: as given.
        tracker: of the run; None before one.
    """

    def __init__(self, plan: Plan, request: SampleRequest, messages: Messages, instead: str) -> None:
        self.plan = plan
        self.tracker: Tracker | None = None
        self._request = request
        if isinstance(request.sample, int) and not plan.measurements:
            request = replace(request, gradient_sample=request.sample)
        self._sample = SampleSource(request)
        self._messages = messages
        self._instead = instead
        self._ranks = Ranks()

    def begin(self, trainer: Any, module: nn.Module, ranks: Ranks, *, continues: bool) -> None:
        """Training starts: draw the sample, or prepare to gather it.

        Raises:
            ValueError: on all ranks, when on one of them what the user asked for cannot be had.
        """
        self._ranks = ranks
        is_of_arguments = True  # whether a ValueError is: one of the sample may be of the data's own
        try:
            with ranks.together():
                if not continues or self.tracker is None:
                    self.tracker = None
                    self.tracker = Tracker(self.plan, module, ranks)
                self.tracker.join(ranks)
                is_of_arguments = False
                self._sample.begin(trainer, ranks, continues=continues)
        except Exception as error:
            self.tracker = None
            self._sample.forget()
            if any(ranks.listed(isinstance(error, ValueError if is_of_arguments else SampleError))):
                raise ValueError(str(error)) from error
            self._messages.failure(f"the sample could not be drawn; {self._instead}", error, self._ranks)

    def see(self, batch: Any, epoch: int) -> bool:
        """Training is about to use a batch; whether the sample comes from such."""
        if not self._sample.is_gathered:
            return False
        try:
            self._sample.see(batch, epoch)
        except Exception as error:
            self._not_copied(error)
        return True

    def has_changed(self, module: nn.Module, step: int) -> bool:
        """Whether the set of trainable parameters is another than before, so that earlier spaces are of no use."""
        if self.tracker is None:
            return False
        try:
            changed = self.tracker.adapt(module)
        except Exception as error:  # such as that nothing is left to train
            self._messages.failure(f"there is no space at step {step}; {self._instead}", error, self._ranks)
            return True
        if changed:
            self._messages.once("parameters", f"the set of trainable parameters has changed by step {step}.")
        return changed

    def is_ready(self) -> bool:
        """Whether there is a sample, on all ranks. A collective."""
        try:
            with self._ranks.together():
                if self._sample.failure is not None:
                    raise self._sample.failure
        except Exception as error:
            self._not_copied(error)
            return False
        return self.tracker is not None and self._sample.sample is not None

    def take(self, trainer: Any, module: nn.Module, step: int) -> Record | None:
        """The record of theta_t with a subspace that is trusted, or None. A collective, of a source that is ready."""
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, SubspaceMonitor)]
        found = [monitor.record_at(step, self.plan, self._request) for monitor in monitors]
        record = next((r for r in found if r is not None), None)
        if record is None:
            try:
                record = self._probe(module, step)
            except Exception as error:
                if isinstance(error, CheckError) and self.plan.on_check_fail == "raise":
                    raise
                self._messages.failure(
                    f"the space of step {step} could not be computed; {self._instead}", error, self._ranks
                )
                return None
        assert record.subspace is not None, "k is positive"
        if not record.subspace.trusted:
            self._messages.once(record.subspace.outcome.name, f"at step {step}, {_refusal(record.subspace)}")
            return None
        return record

    def release(self) -> None:
        """Let go of the examples."""
        self._sample.release()

    def _probe(self, module: nn.Module, step: int) -> Record:
        tracker, sample = self.tracker, self._sample.sample
        assert tracker is not None, "it is ready"
        assert sample is not None, "it is ready"
        if tracker.self_check is None:
            tracker.check(module, sample)
            if tracker.notice is not None:
                self._messages.once("self-check", tracker.notice)
        return tracker.measure(module, sample, step).record

    def _not_copied(self, error: Exception) -> None:
        self._messages.failure(f"the batch could not be copied; {self._instead}", error, self._ranks)


def _refusal(subspace: Subspace) -> str:
    if not subspace.converged:
        return f"the space is not used. {subspace.outcome.value}"
    return (
        f"the space is not used: eigenvalue {subspace.k} is so close to the next one that the space of the first "
        f"{subspace.k} is not determined (residual / gap = {subspace.error:.2g}, at most {TRUSTED_ERROR}). Choose k at "
        "a gap of the spectrum, or a smaller tol."
    )
