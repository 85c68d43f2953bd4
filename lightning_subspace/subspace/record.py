"""Record of one probe, and those of a run."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lightning_subspace._arguments import require_instance, require_instances, require_integer, wrong
from lightning_subspace.linalg.one_line import one_line
from lightning_subspace.subspace.sketch import Sketch
from lightning_subspace.subspace.subspace import Subspace
from lightning_subspace.subspace.table import Table

# What a representation shows first of the metrics.
HEADLINES = ("gradient_fraction", "gradient_fraction_low", "gradient_fraction_high", "sharpness", "gradient_norm")


@dataclass(frozen=True)
class Record:
    """One measurement at one point of the training.

    Attributes:
        step: the t of theta_t: the number of optimizer steps taken before the measurement.
        metrics: the measured numbers, keyed as in the README's table without the monitor's prefix
            (`"gradient_fraction"`, `"solver/seconds"`, `"eigenvalues/01"` ...). Untrusted values are absent.
        subspace: the eigenspace; without its eigenvectors in `SubspaceMonitor.history`; None for k = 0.
        sketch: the compressed eigenspace, from which overlaps with every other probe are computed.
        tables: numbers for figures, which are no scalars, by name: `"layers"`.

    Raises:
        ValueError: for an attribute of another type, or a negative step.
    """

    step: int
    metrics: Mapping[str, float]
    subspace: Subspace | None = None
    sketch: Sketch | None = field(default=None, repr=False)
    tables: Mapping[str, Table] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require_integer("step", self.step, 0)
        require_instance("metrics", self.metrics, Mapping, "a mapping from keys to numbers")
        require_instance("subspace", self.subspace, Subspace, "a Subspace or None", optional=True)
        require_instance("sketch", self.sketch, Sketch, "a Sketch or None", optional=True)
        if not isinstance(self.tables, Mapping) or not all(isinstance(value, Table) for value in self.tables.values()):
            raise wrong("tables", "a mapping from names to tables", self.tables)

    def __repr__(self) -> str:
        known = [*(key for key in HEADLINES if key in self.metrics), *sorted(self.metrics, key=_is_aside)]
        metrics = {key: self.metrics[key] for key in known if not key.startswith("eigenvalues/")}
        return one_line(self, step=self.step, metrics=metrics)

    def with_found(self, found: Mapping[str, float | Table]) -> Record:
        """The record with more numbers and tables.

        A number that is not finite means "not defined here" and is left out. A table adds its rows to one of its name.
        """
        metrics, tables = dict(self.metrics), dict(self.tables)
        for name, value in as_numbers(found).items():
            if isinstance(value, Table):
                tables[name] = tables[name].with_rows_of(value) if name in tables else value
            elif math.isfinite(value):
                metrics[name] = value
        return replace(self, metrics=metrics, tables=tables)

    def without_eigenvectors(self) -> Record:
        """The record as a history keeps it."""
        return self if self.subspace is None else replace(self, subspace=self.subspace.without_eigenvectors())


def _is_aside(key: str) -> bool:
    return key.startswith("solver/")


def as_numbers(found: Mapping[str, float | Table]) -> dict[str, float | Table]:
    """Numbers and tables by key.

    Raises:
        ValueError, TypeError: for a value that is none.
    """
    return {key: value if isinstance(value, Table) else float(value) for key, value in found.items()}


class History(list[Record]):
    """Records of a run, in the order of their steps.

    Example:
        >>> history = History()
        >>> history.keep(Record(3, {"sharpness": 2.0}))
        >>> history[0].metrics
        {'sharpness': 2.0}
    """

    def keep(self, record: Record) -> None:
        """Append a record, without its eigenvectors."""
        # The same key is the same object in all records: a run may have very many.
        metrics = {sys.intern(key): value for key, value in record.metrics.items()}
        before = self[-1].tables if self else {}
        tables = {name: table.sharing_names(before.get(name)) for name, table in record.tables.items()}
        self.append(replace(record, metrics=metrics, tables=tables).without_eigenvectors())

    def drop_sketch(self, step: int | None) -> None:
        """Drop the sketch of this step's record, if it is here."""
        place = len(self) if step is None else bisect_left(self, step, key=lambda record: record.step)
        if place < len(self) and self[place].step == step:
            self[place] = replace(self[place], sketch=None)


def to_rows(records: Iterable[Record]) -> list[dict[str, float]]:
    """Flatten records into one dict a probe, all with the same keys.

    Absent values are nan. The rows go as they are into `csv.DictWriter`, `pandas.DataFrame` or a printed table.

    Raises:
        ValueError: for anything but records.
    """
    records = require_instances("records", records, Record, "a list of instances of lightning_subspace.Record")
    keys = list(dict.fromkeys(key for record in records for key in record.metrics))
    return [{"step": r.step, **{key: r.metrics.get(key, float("nan")) for key in keys}} for r in records]
