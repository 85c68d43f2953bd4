"""State of a projection in a checkpoint, without eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_subspace.probe.checkpoint import FORMAT, decode_position, encode_position, require_same, up_to_date
from lightning_subspace.probe.schedule import Position

AVERAGE = "a number in [0, 1], or None"


@dataclass(frozen=True)
class ProjectionState:
    """What a run goes on from.

    Attributes:
        k, which: of the space.
        position: in the schedule.
        start_when: the condition, in words.
        begun: whether it has been met.
        average: of chi; None where it was not measured.
        num_probes: how many spaces were taken.

    Example:
        >>> from lightning_subspace.probe.schedule import Position
        >>> state = ProjectionState(3, "LA", Position(7), "0", True, None, 2)
        >>> ProjectionState.decoded(state.encoded(), k=3, which="LA") == state
        True
    """

    k: int
    which: str
    position: Position
    start_when: str
    begun: bool
    average: float | None
    num_probes: int

    def encoded(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "format": FORMAT,
            "k": self.k,
            "which": self.which,
            "schedule": encode_position(self.position),
            "start_when": self.start_when,
            "start": {"begun": self.begun, "average": self.average},
            "num_probes": self.num_probes,
        }

    @classmethod
    def decoded(cls, saved: Any, *, k: int, which: str) -> ProjectionState:
        """From plain values.

        Raises:
            CheckpointError: for others than `encoded` makes, or of another k or end of the spectrum.
        """
        entries = up_to_date(saved)
        require_same(
            "projection", {"k": k, "which": which}, {"k": entries.integer("k"), "which": entries.text("which")}
        )
        position, start = decode_position(entries.below("schedule")), entries.below("start")
        average = start.any("average")
        start.require(average is None or (isinstance(average, float) and 0.0 <= average <= 1.0), "average", AVERAGE)
        begun, condition = start.flag("begun"), entries.text("start_when")
        return cls(k, which, position, condition, begun, average, entries.integer("num_probes"))
