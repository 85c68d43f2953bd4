"""Schedule of probes, by steps and by a budget of time.

Steps are counted by crossings (`step // every` changes), not by remainders, since a step may count for several. A
budget makes the interval a minimum distance: a candidate step is passed over while the probes so far, together with
the one to come, would take more than `max_overhead` of the wall time. The first probe is taken in any case and kept
out of this account: it bears the set-up, looks closer, and is what the price of the second is guessed from.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# An ordinary probe over the first one, which looks at an untrained network (58 products for k = 10 on digits, where
# later ones take 16), verifies it, and solves for two halves of the sample besides: measured .1 to .5, so this waits.
LATER_SHARE = 0.5
# How many of the steps that were passed over are kept by name.
NAMED_STEPS = 5


@dataclass(frozen=True)
class Position:
    """Position of a schedule among the steps, without its time.

    Attributes:
        last_step: the step that was asked about last.
        passed_over: the first few candidate steps that the budget did not allow.
        num_passed_over: how many such steps there were.
    """

    last_step: int
    passed_over: tuple[int, ...] = ()
    num_passed_over: int = 0


class Schedule:
    """Decides when a probe is due, and keeps account of the time.

    Args:
        every_n_steps: distance between probes in optimizer steps, or the list of steps to probe at.
        max_overhead: largest share of the wall time in (0, 1) that probes after the first may take; None: no limit.
        clock: seconds, monotonic.

    Example:
        >>> now = [0.0]
        >>> schedule = Schedule(10, None, clock=lambda: now[0])
        >>> schedule.begin(0)
        >>> [step for step in range(1, 35) if schedule.is_due(step)]
        [10, 20, 30]
    """

    def __init__(
        self,
        every_n_steps: int | Sequence[int],
        max_overhead: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.max_overhead = max_overhead
        self._listed = [] if isinstance(every_n_steps, int) else sorted(every_n_steps)
        self._clock = clock
        self.begin(0)

    def begin(self, step: int) -> None:
        """Training starts, or goes on, at this step."""
        self.last_seconds = 0.0  # that the last probe took
        self.passed_over: list[int] = []  # the first few candidate steps that the budget did not allow
        self.num_passed_over = 0  # and how many there were
        self.was_candidate = False  # whether the step last asked about was one, whatever the budget said
        self._began = self._clock()
        self._ended: float | None = None
        self._last_step = step
        self._num_probes = 0
        self._spent = 0.0  # on probes and all that goes with them
        self._first = 0.0  # of it on the first probe
        self._price = 0.0  # what the next probe is expected to take

    @property
    def position(self) -> Position:
        """The position among the steps."""
        return Position(self._last_step, tuple(self.passed_over), self.num_passed_over)

    def resume(self, position: Position, step: int) -> None:
        """Go on at this step from an earlier position."""
        self.begin(min(step, position.last_step))
        self.passed_over, self.num_passed_over = list(position.passed_over), position.num_passed_over

    def end(self) -> None:
        """Training has ended: the shares below stay what they are."""
        self._ended = self._clock()

    @property
    def misses_what_was_asked(self) -> bool:
        """Whether a listed step was passed over, or all of an interval's."""
        return bool(self.passed_over) and (not isinstance(self.every_n_steps, int) or self._num_probes <= 1)

    @property
    def is_listed(self) -> bool:
        """Whether exactly the steps of a list are asked for."""
        return not isinstance(self.every_n_steps, int)

    @property
    def probes_first_step(self) -> bool:
        """Whether to probe where training starts: always, unless a list says otherwise."""
        return isinstance(self.every_n_steps, int) or self._last_step in self.every_n_steps

    @property
    def may_probe_last_step(self) -> bool:
        """Whether to probe the end where the budget allows it."""
        return isinstance(self.every_n_steps, int)

    @property
    def probes_last_step(self) -> bool:
        """Whether to probe the end: for an interval, within the budget."""
        return self.may_probe_last_step and self.is_affordable()

    def is_due(self, step: int) -> bool:
        """Whether to probe at `step`; to be asked once after each."""
        last, self._last_step = self._last_step, step
        if isinstance(self.every_n_steps, int):
            is_candidate = step // self.every_n_steps > last // self.every_n_steps
        else:
            # By halves: the list may be long, and this is asked at each step.
            is_candidate = bisect.bisect(self._listed, step) > bisect.bisect(self._listed, last)
        self.was_candidate = is_candidate
        if not is_candidate:
            return False
        if not self.is_affordable():
            self.num_passed_over += 1
            self.passed_over = [*self.passed_over, step][:NAMED_STEPS]
            return False
        return True

    def steps_to_next(self) -> int | None:
        """Steps to the next candidate, from the last one asked about."""
        if isinstance(self.every_n_steps, int):
            return self.every_n_steps - self._last_step % self.every_n_steps
        place = bisect.bisect(self._listed, self._last_step)
        return None if place == len(self._listed) else self._listed[place] - self._last_step

    def is_affordable(self, ahead: float = 0.0) -> bool:
        """Whether one more probe, some seconds ahead, stays within the budget."""
        if self.max_overhead is None or self._num_probes == 0:
            return True
        elapsed = self._elapsed + ahead - self._first
        later = self._spent - self._first
        return later + self._price <= self.max_overhead * (elapsed + self._price)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Count the time inside as a probe's, except what is counted `aside`."""
        start, aside = self._clock(), self._spent
        try:
            yield
        finally:
            self.last_seconds = self._price = self._clock() - start - (self._spent - aside)
            self._spent += self.last_seconds
            self._num_probes += 1
            if self._num_probes == 1:
                self._first = self._spent
                self._price *= LATER_SHARE

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count the time inside as overhead beside a probe: set-up and reports.

        Reports raise the price of the next probe, which will have its own. Those of the first do not, as little as its
        set-up does: libraries are imported there.
        """
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._spent += seconds
            if self._num_probes <= 1:
                self._first += seconds
            else:
                self._price += seconds

    @property
    def overhead(self) -> float:
        """The share of training's wall time spent on probes, in [0, 1]."""
        return self._spent / self._elapsed if self._elapsed > 0.0 else 0.0

    @property
    def later_overhead(self) -> float:
        """The same without the first probe: what `max_overhead` bounds."""
        elapsed = self._elapsed - self._first
        return (self._spent - self._first) / elapsed if elapsed > 0.0 else 0.0

    @property
    def _elapsed(self) -> float:
        return (self._clock() if self._ended is None else self._ended) - self._began
