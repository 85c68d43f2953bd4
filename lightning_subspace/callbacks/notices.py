"""Notices to the user, each once a run or a process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from lightning_subspace._lightning import rank_zero_info
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.failure import free_frames
from lightning_subspace.state.notice import warn_on_first_rank
from lightning_subspace.state.signals import SignalError
from lightning_subspace.state.threads import other_threads

OnFailure: TypeAlias = Literal["warn", "raise"]
NUMBER = re.compile(r"-?\d[\d.e+-]*")
_TOLD_IN_PROCESS: set[str] = set()


class Notices:
    """Tells each thing once a run, on the first rank.

    Args:
        speaker: the callback whose notices these are.
        on_failure: "raise" turns a failure into the exception that it is.
    """

    def __init__(self, speaker: str, on_failure: OnFailure) -> None:
        self.speaker = speaker
        self._on_failure = on_failure
        self._told: set[str] = set()
        self.last_failure: str | None = None  # its exception and text, until the next one or a new run

    def begin(self) -> None:
        """A new run begins."""
        self._told.clear()
        self.last_failure = None

    def is_new(self, cause: str) -> bool:
        """Whether nothing has been told of it in this run."""
        return cause not in self._told

    def warn(self, text: str) -> None:
        """Warn, however often."""
        warn_on_first_rank(f"{self.speaker}: {text}")

    def warn_once(self, cause: str, text: str) -> None:
        """Warn once a run and cause; the history has the rest."""
        if self.is_new(cause):
            self._told.add(cause)
            self.warn(f"{text} Later ones like it are not told.")

    def info_once(self, text: str, cause: str | None = None, *, in_process: bool = False) -> None:
        """Inform once a run and cause, which is by default the text.

        With `in_process` once a process and text, whatever numbers are in it: each fit would say it again.
        """
        cause, words = text if cause is None else cause, without_numbers(f"{self.speaker}: {text}")
        if self.is_new(cause) and not (in_process and words in _TOLD_IN_PROCESS):
            self._told.add(cause)
            rank_zero_info(f"{self.speaker}: {text}")
            if in_process:
                _TOLD_IN_PROCESS.add(words)

    def failure(self, what: str, error: Exception, ranks: Ranks) -> None:
        """Warn of a probe that failed on all ranks; training goes on.

        Raises:
            Exception: `error`, with on_failure="raise".
        """
        if self._on_failure == "raise":
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        free_frames(error)
        cause = self.last_failure = ranks.describe(error)
        self.warn_once(cause, f"{what}, training goes on. {cause} (on_failure='raise' shows where.)")

    def is_of_signal(self, step: int, error: Exception, ranks: Ranks) -> bool:
        """Tell of a signal that has ended a probe. A collective."""
        everywhere = ranks.all_gather_object(error.signals if isinstance(error, SignalError) else ())
        names = list(dict.fromkeys(name for signals in everywhere for name in signals))
        if names:
            text = f"the probe at step {step} was given up, since {', '.join(names)} arrived; training goes on."
            self.info_once(text, "signal")
        return bool(names)

    def inform_of_threads(self) -> None:
        """Inform of threads that may draw a probe's random numbers."""
        if self.is_new("threads") and (names := other_threads()):
            self.info_once(
                "threads: expected none of yours beside training's, since a probe seeds the global random generators "
                f"and puts them back, got {', '.join(map(repr, names))}; where it draws from them during a probe "
                "(torch.rand, numpy.random, random), it gets the probe's numbers, and training then draws as if it had "
                "not. Give it generators of its own: torch.Generator, numpy.random.default_rng, random.Random.",
                "threads",
            )

    def budget_skipped(self, count: int, first: Sequence[int], max_overhead: float | None) -> None:
        """Warn of the steps that the budget left out, naming a few."""
        some = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
        steps, were = ("step", "was") if count == 1 else ("steps", "were")
        self.warn(
            f"{count} {steps} ({some}) {were} passed over to keep max_overhead={max_overhead}, since a probe takes "
            "long beside this training; pass max_overhead=None to measure at every one, or a smaller sample or k."
        )


def without_numbers(text: str) -> str:
    """The words of a text, whatever numbers are in it.

    Example:
        >>> without_numbers("rank 1: 2 of 1.5e-3")
        'rank :  of '
    """
    return NUMBER.sub("", text)
