"""Probes of a fit that failed, or refreshes of a projection.

A failure is warned of once a cause, when it comes first; what became of all of them is said at the end. Reasons that
differ in their numbers alone are one cause.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping

from lightning_subspace.callbacks.notices import Notices, without_numbers

MOST = 2  # causes that are told, the most frequent first


class FailedProbes:
    """Counts the probes of a fit, and those that failed.

    Args:
        what: they did, in words, with "are" in braces where it goes by their number.

    Attributes:
        reasons: exception and text by step, of all that failed.

    Example:
        >>> probes = FailedProbes()
        >>> for step in (0, 100, 200):
        ...     probes.see(step, "LossError: the loss is nan." if step else None)
        >>> probes.text
        '2 of 3 probes failed and are left out. LossError: the loss is nan.'
    """

    def __init__(self, what: str = "probes failed and {are} left out") -> None:
        self.reasons: dict[int, str] = {}
        self._what = what
        self._others = 0

    def begin(self, *, goes_on: bool) -> None:
        """Another fit begins, with or without the probes of the last one."""
        if not goes_on:
            self.reasons, self._others = {}, 0

    def see(self, step: int, reason: str | None) -> None:
        """A probe was taken, or failed for a reason."""
        if reason is None:
            self._others += 1
            self.reasons.pop(step, None)  # of a probe that is taken again where a run is resumed
        else:
            self.reasons[step] = sys.intern(reason)  # a run may have very many

    def resume(self, reasons: Mapping[int, str], count: int) -> None:
        """Go on behind those of a checkpoint, and `count` others."""
        self.reasons, self._others = dict(reasons), count

    @property
    def text(self) -> str | None:
        """How many failed and why; None if none did."""
        if not self.reasons:
            return None
        failed = len(self.reasons)
        first: dict[str, str] = {}  # text of each cause
        for reason in self.reasons.values():
            first.setdefault(without_numbers(reason), reason)
        counted = Counter(map(without_numbers, self.reasons.values())).most_common()
        causes = [(first[cause], count) for cause, count in counted]
        head = f"{failed} of {failed + self._others} {self._what.format(are='is' if failed == 1 else 'are')}"
        if len(causes) == 1:
            return f"{head}. {causes[0][0][:1].upper()}{causes[0][0][1:]}"
        told = [f"{count} by {cause.rstrip('.')}" for cause, count in causes[:MOST]]
        others = sum(count for _, count in causes[MOST:])
        return f"{head}: {'; '.join(told + [f'{others} by other causes'] * (others > 0))}."

    def tell(self, notices: Notices) -> None:
        """Tell it, once a fit."""
        if (text := self.text) is not None:
            notices.info_once(text, self._what)
