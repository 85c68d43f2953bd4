"""What a monitor says in the course of a run: one sentence on what happened, one on what to do, and not twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_subspace._lightning import rank_zero_info, rank_zero_warn
from lightning_subspace.collectives import Ranks
from lightning_subspace.partition import Partition
from lightning_subspace.schedule import forecast
from lightning_subspace.solver import Solver


class Messages:
    """Tells each thing once a run.

    Args:
        on_failure: "raise" turns a failure into the exception that it is.
        speaker: the callback whose messages these are.
    """

    def __init__(self, on_failure: Literal["warn", "raise"], speaker: str = "SubspaceMonitor") -> None:
        self._on_failure = on_failure
        self._speaker = speaker
        self._told: set[str] = set()

    def begin(self) -> None:
        """A new run begins."""
        self._told.clear()

    def is_new(self, cause: str) -> bool:
        """Whether nothing has been told of it in this run."""
        return cause not in self._told

    def once(self, cause: str, text: str) -> None:
        """One warning a run and cause; the history has the rest."""
        if self.is_new(cause):
            self._told.add(cause)
            rank_zero_warn(f"{self._speaker}: {text} Later ones like it are not told.")

    def note(self, text: str, cause: str | None = None) -> None:
        """Something to know, not to worry about; once a run and cause, which is by default the text."""
        cause = text if cause is None else cause
        if self.is_new(cause):
            self._told.add(cause)
            rank_zero_info(f"{self._speaker}: {text}")

    def failure(self, what: str, error: Exception, ranks: Ranks) -> None:
        """Something went wrong in a probe, on all ranks, and training goes on without it.

        Raises:
            Exception: `error`, with on_failure="raise".
        """
        if self._on_failure == "raise":
            raise error
        cause = ranks.cause(error)
        self.once(cause, f"{what}, training goes on. {cause} (on_failure='raise' shows where.)")

    def forecast(
        self,
        solver: Solver,
        partition: Partition,
        seconds: tuple[float, float],
        held: int,
        max_overhead: float | None,
    ) -> None:
        """What this probe will take, and one later on, in seconds."""
        first, later = seconds
        text = forecast(
            n=partition.n,
            k=solver.k,
            ncv=solver.ncv,
            seconds=later,
            first=first,
            held=held,
            max_overhead=max_overhead,
            num_ranks=partition.ranks.count,
        )
        self.note(text, "forecast")

    def passed_over(self, count: int, first: Sequence[int], max_overhead: float | None) -> None:
        """The budget has left out `count` steps that were asked for, of which a few are named."""
        some = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
        rank_zero_warn(
            f"SubspaceMonitor: {count} steps ({some}) were passed over to keep max_overhead={max_overhead}, since "
            "a probe takes long beside this training; pass max_overhead=None to measure at every one, or a smaller "
            "sample or k."
        )
