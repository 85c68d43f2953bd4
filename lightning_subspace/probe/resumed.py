"""Substitutes, after a resume, for what a checkpoint does not hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.sketch import Sketch, sketch_overlap


@dataclass(frozen=True)
class Resumed:
    """Sketches in place of eigenvectors, and a record to take again.

    Attributes:
        previous: sketch of the last probe, until there is one with eigenvectors.
        reference: sketch of the reference probe.
        reopened: a record that was open when the checkpoint was written. Its probe is taken again at the same point for
            the eigenvectors, which the numbers of the next step need; those it has already stay as they were.
    """

    previous: Sketch | None = None
    reference: Sketch | None = None
    reopened: Record | None = None

    def complete(self, record: Record) -> Record:
        """Add the overlaps that have no eigenvectors, estimated from sketches."""
        metrics = dict(record.metrics)
        if record.sketch is not None:
            for key, other in (("overlap_previous", self.previous), ("overlap_reference", self.reference)):
                if other is not None and key not in metrics:
                    metrics[key] = sketch_overlap(other, record.sketch)
        if self.reopened is not None and self.reopened.step == record.step:
            metrics.update(self.reopened.metrics)
        return replace(record, metrics=metrics)

    def after(self, record: Record) -> Resumed:
        """The substitutes still needed after this record."""
        return Resumed(self.previous if record.sketch is None else None, self.reference)
