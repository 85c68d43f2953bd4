"""Condition for a projection to begin: a step, or an aligned gradient."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

from lightning_subspace._lightning import MisconfigurationException
from lightning_subspace.probe.arguments import require_integer, require_number, wrong


@dataclass(frozen=True)
class StartWhenAligned:
    """Begin when the average of chi = |P g|/|g| exceeds a threshold.

    chi is the square root of the gradient fraction f_top, g the gradient over the gradient sample; chi = .95 is f_top =
    .9025. It is measured at every refresh, and the average is one over refreshes: a <- decay a + (1 - decay) chi,
    beginning with the first chi. Once begun, projection goes on whatever chi does.

    Threshold and decay are those of Song, Ahn and Yun (arXiv 2405.16002), who measure at every step.

    In YAML: `start_when: {chi: 0.95, decay: 0.9}`.

    Args:
        chi: the threshold, in [0, 1).
        decay: weight of the past, in [0, 1); 0 takes the last chi alone.

    Raises:
        MisconfigurationException: for values outside these ranges.

    Example:
        >>> StartWhenAligned(chi=0.9)
        StartWhenAligned(chi=0.9, decay=0.9)
    """

    chi: float = 0.95
    decay: float = 0.9

    def __post_init__(self) -> None:
        for name in ("chi", "decay"):
            value, expected = getattr(self, name), "a number of at least 0 and below 1"
            try:
                object.__setattr__(self, name, require_number(name, value, expected, lambda x: 0.0 <= x < 1.0))
            except ValueError as error:
                raise MisconfigurationException(f"StartWhenAligned: {error}") from error


def require_start(name: str, value: Any) -> int | StartWhenAligned:
    """A step, or an alignment to wait for."""
    if isinstance(value, StartWhenAligned):
        return value
    if not isinstance(value, Integral):
        raise wrong(name, "a step or a StartWhenAligned(chi=..., decay=...)", value)
    return int(require_integer(name, value, 0))


class StartCondition:
    """Follows a run until the projection begins.

    Args:
        when: a step, or the alignment to wait for.

    Attributes:
        begun: whether it has.
        average: of chi so far; None before the first, and where a step is waited for.

    Example:
        >>> start = StartCondition(StartWhenAligned(chi=0.5, decay=0.5))
        >>> for chi in (0.2, 0.6, 0.8):
        ...     print(start.see_chi(chi), start.begun)
        0.2 False
        0.4 False
        0.6000000000000001 True
    """

    def __init__(self, when: int | StartWhenAligned) -> None:
        self.begun = False
        self.average: float | None = None
        self._when = when

    @property
    def watches(self) -> bool:
        """Whether chi is waited for, so that a subspace is needed already."""
        return isinstance(self._when, StartWhenAligned) and not self.begun

    @property
    def missed(self) -> str | None:
        """Sentence on what is still waited for, or None."""
        if self.begun:
            return None
        reached = "" if self.average is None else f", the average of chi is {self.average:.2g}"
        return f"no step was projected: start_when={self._when!r} was not reached{reached}."

    def see_step(self, step: int) -> bool:
        """A step is reached; whether the projection begins with it."""
        if self.begun or isinstance(self._when, StartWhenAligned) or step < self._when:
            return False
        self.begun = True
        return True

    def see_chi(self, chi: float) -> float:
        """A chi is measured; the average with it."""
        assert isinstance(self._when, StartWhenAligned), "asked for only where `watches`"
        past = chi if self.average is None else self.average
        self.average = self._when.decay * past + (1.0 - self._when.decay) * chi
        self.begun = self.begun or self.average > self._when.chi
        return self.average

    def resume(self, begun: bool, average: float | None) -> None:
        """Go on from where another one was."""
        self.begun, self.average = begun, average
