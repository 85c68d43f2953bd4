"""Probes of a fit that failed, and why.

A failure is warned of once a cause, when it comes first; what became of all of them is said at the end.
"""

from __future__ import annotations

import sys
from collections import Counter

from lightning_subspace.callbacks.notices import Notices

MOST = 2  # causes that are told, the most frequent first


class FailedProbes:
    """Counts the probes of a fit, and those that failed.

    Attributes:
        reasons: exception and text by step, of all that failed.

    Example:
        >>> probes = FailedProbes()
        >>> for step in (0, 100, 200):
        ...     probes.see(step, "LossError: the loss is nan." if step else None)
        >>> probes.text
        '2 of 3 probes failed and are left out. LossError: the loss is nan.'
    """

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}
        self._taken = 0

    def begin(self, *, goes_on: bool) -> None:
        """Another fit begins, with or without the probes of the last one."""
        if not goes_on:
            self.reasons, self._taken = {}, 0

    def see(self, step: int, reason: str | None) -> None:
        """A probe was taken, or failed for a reason."""
        self._taken += 1
        if reason is not None:
            self.reasons[step] = sys.intern(reason)  # a run may have very many

    @property
    def text(self) -> str | None:
        """How many failed and why; None if none did."""
        if not self.reasons:
            return None
        failed, causes = len(self.reasons), Counter(self.reasons.values()).most_common()
        head = f"{failed} of {self._taken} probes failed and {'is' if failed == 1 else 'are'} left out"
        if len(causes) == 1:
            return f"{head}. {causes[0][0]}"
        told = [f"{count} by {cause.rstrip('.')}" for cause, count in causes[:MOST]]
        others = sum(count for _, count in causes[MOST:])
        return f"{head}: {'; '.join(told + [f'{others} by other causes'] * (others > 0))}."

    def tell(self, notices: Notices) -> None:
        """Tell it, once a fit."""
        if (text := self.text) is not None:
            notices.info_once(text, "failed probes")
