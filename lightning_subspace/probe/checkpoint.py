"""The state of a run as tensors and plain values, and back.

The k * n floats of a basis are not written. The sketches of past subspaces are: they are as good as the basis itself up
to 4,096 parameters, and beyond that estimate every overlap with the standard deviation that `sketch` states. Whatever
is written loads with `weights_only=True`, and is read without the model that was measured.

A state of an older format is brought up to date by `MIGRATIONS`. One that no run can have written is refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_subspace.data.gathered import Gathered
from lightning_subspace.linalg import Outcome
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.entries import CheckpointError, Entries
from lightning_subspace.probe.overlap_state import decode_overlaps, encode_overlaps, without_dropped_pairs
from lightning_subspace.probe.sample_state import decode_gathered, encode_gathered, is_plain
from lightning_subspace.probe.schedule import Position
from lightning_subspace.probe.table_state import decode_tables, encode_tables
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.subspace import Subspace

FORMAT = 3
# By the format that it reads, a function from a state of that format to one of the next.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda state: {**state, "sample": None},
    2: lambda state: {**without_dropped_pairs(state), "measurements": {}},
}


@dataclass(frozen=True)
class RunState:
    """Everything that a run hands on to the one that resumes it.

    Attributes:
        k: number of eigenpairs.
        which: end of the spectrum.
        space: the parameters that were measured.
        num_probes: how many probes were taken, without those that failed.
        records: of the run, oldest first, without eigenvectors; those whose sketch is still held have it.
        is_open: whether the last record still waited for the step from its point.
        overlaps: between the subspaces whose sketches are held.
        position: of the schedule.
        sample: what was gathered from the batches of training, if the checkpoint may hold it.
        measurements: what they keep between probes, by their keys (see `measurement_states`).
        failed: exception and text of the probes that failed, by step.
    """

    k: int
    which: str
    space: ParameterSpace
    num_probes: int
    records: tuple[Record, ...]
    is_open: bool
    overlaps: OverlapHistory
    position: Position
    sample: Gathered | None = None
    measurements: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)

    def require_continuable(self, k: int, which: str, step: int) -> None:
        """Refuse what a monitor with these settings cannot continue at this step.

        Raises:
            CheckpointError: when it was written with other settings, or later than this step.
        """
        require_same("monitor", {"k": k, "which": which}, {"k": self.k, "which": self.which})
        last = max([self.position.last_step, *(record.step for record in self.records)])
        if last > step:
            raise CheckpointError(f"it is of step {last}, and training starts at step {step}")


def encode(state: RunState) -> dict[str, Any]:
    """A state as tensors and plain values.

    With p probes of m metrics over n parameters: at most 64 sketches of 4 k min(n, 4096) bytes, 24 bytes for each of
    the 2016 overlaps between them, 8 m + 16 k + 40 bytes a record, 4 for each number of its tables, the names and
    shapes of the parameters, what the measurements keep, each reason of a failed probe once, and a gathered sample if
    it is small (see `sample_state`). The time is linear in m p.
    """
    return {
        "format": FORMAT,
        "k": state.k,
        "which": state.which,
        "names": list(state.space.names),
        "shapes": [list(shape) for shape in state.space.shapes],
        "complex_names": sorted(state.space.complex_names),
        "num_probes": state.num_probes,
        "history": _encode_records(state.records),
        "overlaps": encode_overlaps(state.overlaps),
        "open": state.is_open,
        "schedule": encode_position(state.position),
        "sample": encode_gathered(state.sample),
        "measurements": dict(state.measurements),
        "failed": {"steps": list(state.failed), "reasons": list(state.failed.values())},
    }


def decode(saved: Any) -> RunState:
    """The state that `encode` was given.

    Raises:
        CheckpointError: for one that it cannot have been given, or of a format that is not known here.
    """
    entries = up_to_date(saved)
    space = _decode_space(entries)
    records = _decode_records(entries.below("history"))
    k = entries.integer("k")
    overlaps = decode_overlaps(entries.below("overlaps"), k, space.n, {record.step for record in records})
    is_open = entries.flag("open")
    entries.require(bool(records) or not is_open, "open", "False where there are no records")
    return RunState(
        k=k,
        which=entries.text("which"),
        space=space,
        num_probes=entries.integer("num_probes", least=len(records)),
        records=tuple(replace(record, sketch=overlaps.sketches.get(record.step)) for record in records),
        is_open=is_open,
        overlaps=overlaps,
        position=decode_position(entries.below("schedule")),
        sample=decode_gathered(entries.any("sample")),
        measurements=_decode_measurements(entries),
        failed=_decode_failed(entries.below("failed")) if "failed" in entries else {},
    )


def up_to_date(saved: Any) -> Entries:
    """Migrate a state of an earlier format to this one.

    Raises:
        CheckpointError: for any other.
    """
    entries = Entries(saved)
    while True:
        number = entries.any("format") if "format" in entries else None
        if not isinstance(number, int) or isinstance(number, bool) or number not in (FORMAT, *MIGRATIONS):
            raise CheckpointError(
                f"format: expected {FORMAT}, got {number!r}; it was written by another version of lightning_subspace"
            )
        if number == FORMAT:
            return entries
        entries = Entries({**MIGRATIONS[number](dict(entries.values)), "format": number + 1})


def require_same(who: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse a state of other settings: they measure something else.

    Raises:
        CheckpointError: naming the first setting of `now` that was another one then.
    """
    for name, value in now.items():
        if then[name] != value:
            raise CheckpointError(f"it was written with {name}={then[name]!r}, and this {who} has {name}={value!r}")


def encode_position(position: Position) -> dict[str, Any]:
    """A schedule's position as plain values."""
    return {
        "last_step": position.last_step,
        "passed_over": list(position.passed_over),
        "num_passed_over": position.num_passed_over,
    }


def decode_position(entries: Entries) -> Position:
    """The position that `encode_position` was given.

    Raises:
        CheckpointError: for an entry that is none of `encode_position`.
    """
    passed_over = entries.ascending("passed_over")
    count = entries.integer("num_passed_over", least=len(passed_over))
    return Position(entries.integer("last_step"), tuple(passed_over), count)


def _decode_space(entries: Entries) -> ParameterSpace:
    names = entries.texts("names")
    shapes = entries.any("shapes")
    is_right = isinstance(shapes, list) and len(shapes) == len(names)
    entries.require(is_right, "shapes", f"a list of {len(names)} shapes")
    each = [torch.Size(Entries({i: shape}, "shapes").integers(i)) for i, shape in enumerate(shapes)]
    complex_names = entries.texts("complex_names") if "complex_names" in entries else []
    return ParameterSpace(tuple(names), tuple(each), frozenset(complex_names))


def _encode_records(records: Sequence[Record]) -> dict[str, Any]:
    """Records as a table, with nan where a metric is absent."""
    keys = list(dict.fromkeys(key for record in records for key in record.metrics))
    cells = (record.metrics.get(key, math.nan) for record in records for key in keys)
    table = np.fromiter(cells, np.float64, len(records) * len(keys)).reshape(len(records), len(keys))
    spaces = [record.subspace for record in records]
    return {
        "steps": [record.step for record in records],
        "keys": keys,
        "metrics": torch.from_numpy(table),
        "sizes": [-1 if space is None else space.k for space in spaces],
        "eigenvalues": _joined([space.eigenvalues for space in spaces if space is not None]),
        "residuals": _joined([space.residuals for space in spaces if space is not None]),
        "next_eigenvalues": [math.nan if space is None else space.next_eigenvalue for space in spaces],
        "errors": [math.nan if space is None else space.error for space in spaces],
        "outcomes": ["" if space is None else space.outcome.name for space in spaces],
        "verified": [space is not None and space.verified for space in spaces],
        "num_matvecs": [0 if space is None else space.num_matvecs for space in spaces],
        "tables": encode_tables(records),
    }


def _decode_records(entries: Entries) -> list[Record]:
    steps, keys = entries.ascending("steps"), entries.texts("keys")
    count = len(steps)
    table = entries.tensor("metrics", (count, len(keys)))
    entries.require(not table.isinf().any(), "metrics", "finite numbers, or nan where one is absent")
    sizes = entries.integers("sizes", count, least=-1)
    lengths = [max(size, 0) for size in sizes]
    eigenvalues, residuals = (entries.tensor(name, (sum(lengths),)) for name in ("eigenvalues", "residuals"))
    following, errors = entries.numbers("next_eigenvalues", count), entries.numbers("errors", count)
    outcomes = entries.texts("outcomes", count)
    is_right = all(
        (name in Outcome.__members__) if size >= 0 else not name for name, size in zip(outcomes, sizes, strict=True)
    )
    entries.require(is_right, "outcomes", "names of outcomes, empty where a record has no subspace")
    verified, num_matvecs = entries.flags("verified", count), entries.integers("num_matvecs", count)
    tables = decode_tables(entries.below("tables") if "tables" in entries else Entries({}), count)
    parts = zip(torch.split(eigenvalues, lengths), torch.split(residuals, lengths), strict=True)
    records = []
    for i, (step, row, (values, bounds)) in enumerate(zip(steps, table.tolist(), parts, strict=True)):
        subspace = None
        if sizes[i] >= 0:
            subspace = Subspace(
                eigenvalues=values.clone(),
                eigenvectors=None,
                residuals=bounds.clone(),
                next_eigenvalue=following[i],
                error=errors[i],
                outcome=Outcome[outcomes[i]],
                verified=verified[i],
                num_matvecs=num_matvecs[i],
            )
            is_finite = bool(torch.isfinite(values).all() and torch.isfinite(bounds).all())
            entries.require(is_finite or not subspace.converged, "eigenvalues", "finite ones, and finite residuals")
        metrics = {key: value for key, value in zip(keys, row, strict=True) if not math.isnan(value)}
        records.append(Record(step, metrics, subspace, tables=tables[i]))
    return records


def _decode_measurements(entries: Entries) -> Mapping[str, Any]:
    """States that the measurements themselves have to judge."""
    found = entries.below("measurements").values
    is_right = all(isinstance(key, str) and isinstance(state, Mapping) for key, state in found.items())
    entries.require(is_right and is_plain(dict(found)), "measurements", "plain states by the names of measurements")
    return found


def _decode_failed(entries: Entries) -> Mapping[int, str]:
    steps = entries.ascending("steps")
    return dict(zip(steps, map(sys.intern, entries.texts("reasons", len(steps))), strict=True))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.float64)
