"""What the hooks of a callback do on all ranks or on none, and what is told where they could not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_subspace._lightning import MisconfigurationException
from lightning_subspace.collectives import Ranks
from lightning_subspace.messages import Messages
from lightning_subspace.sample import Sample
from lightning_subspace.sample_source import SampleSource
from lightning_subspace.schedule import Schedule

T = TypeVar("T")
NOT_COPIED = "the batch could not be copied, so nothing is measured"


class Joint:
    """Blocks and decisions that all ranks come out of alike.

    Args:
        ranks: the processes of the run.
        schedule: keeps the account of the time.
        messages: what goes wrong is told there.

    Attributes:
        ranks: the processes of the run.
    """

    def __init__(self, ranks: Ranks, schedule: Schedule, messages: Messages) -> None:
        self.ranks = ranks
        self._schedule = schedule
        self._messages = messages

    def do(self, what: str, block: Callable[[], T], wrong: type[Exception] | None = None) -> T | None:
        """What a block gives on all ranks, or None on all of them, which is told.

        Args:
            what: comes of it when the block fails.
            block: what to do.
            wrong: the exception that says that the user has asked for something that cannot be.

        Raises:
            MisconfigurationException: when it was such an exception, on any rank.
        """
        try:
            with self.ranks.together(), self._schedule.aside():
                return block()
        except Exception as error:
            if wrong is not None and any(self.ranks.listed(isinstance(error, wrong))):
                raise MisconfigurationException(f"SubspaceMonitor: {error}") from error
            self._messages.failure(what, error, self.ranks)
            return None

    def wants(self, wants: bool, source: SampleSource) -> bool:
        """Whether the first rank wants to probe, and every rank has a sample."""
        if not self.ranks.first(wants):
            return False

        def sample() -> Sample | None:
            if source.failure is not None:
                raise source.failure
            return source.sample

        return self.do(NOT_COPIED, sample) is not None
