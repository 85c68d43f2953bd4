"""What a checkpoint holds of a monitor, and how a run goes on from it.

The k * n floats of a basis are not written. The sketches of past subspaces are: they are as good as the basis itself up
to 4,096 parameters, and beyond that estimate every overlap with the standard deviation that `sketch` states. Tensors
and plain values alone, so that a checkpoint loads with `weights_only=True`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_subspace._lightning import rank_zero_warn
from lightning_subspace.linalg import Outcome
from lightning_subspace.overlap_history import OverlapHistory
from lightning_subspace.parameters import ParameterSpace
from lightning_subspace.record import Record
from lightning_subspace.sketch import Sketch, sketch_overlap
from lightning_subspace.subspace import Subspace

if TYPE_CHECKING:
    from lightning_subspace.tracker import OpenRecord, Tracker

# Checkpoints of another format are not read.
FORMAT = 1


@dataclass(frozen=True)
class Resumed:
    """What stands in, after a resume, for what a checkpoint does not hold.

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
        """A new record with the overlaps that could not be taken from eigenvectors, estimated from sketches."""
        metrics = dict(record.metrics)
        if record.sketch is not None:
            for key, other in (("overlap_previous", self.previous), ("overlap_reference", self.reference)):
                if other is not None and key not in metrics:
                    metrics[key] = sketch_overlap(other, record.sketch)
        if self.reopened is not None and self.reopened.step == record.step:
            metrics.update(self.reopened.metrics)
        return replace(record, metrics=metrics)

    def after(self, record: Record) -> Resumed:
        """What is still needed when this record has been taken."""
        return Resumed(self.previous if record.sketch is None else None, self.reference)


def tracker_state(tracker: Tracker, opened: OpenRecord | None) -> dict[str, Any]:
    """All that `restore` needs.

    With p probes of m metrics over n parameters: at most 64 sketches of 4 k min(n, 4096) bytes, 24 bytes for each of
    at most 64 p overlaps, 8 m + 16 k + 40 bytes a record, and the names and shapes of the parameters.
    """
    records = list(tracker.history)
    if opened is not None:
        subspace = opened.record.subspace
        records.append(replace(opened.record, subspace=None if subspace is None else subspace.without_eigenvectors()))
    return {
        "format": FORMAT,
        "k": tracker.plan.solver.k,
        "which": tracker.plan.solver.which,
        "names": list(tracker.space.names),
        "shapes": [list(shape) for shape in tracker.space.shapes],
        "num_probes": tracker.num_probes,
        "history": _history_state(records),
        "overlaps": tracker.overlaps.state(),
        "open": opened is not None,
    }


def resumed(tracker: Tracker, state: Mapping[str, Any], *, reopen: bool, name: str) -> tuple[Tracker, bool] | None:
    """A tracker like a new one, put where the one was that the state was taken from; None, told, where that cannot be.

    Args:
        tracker: the new one, which stays as it is.
        state: from `tracker_state`.
        reopen: see `restore`.
        name: of the monitor.

    Returns:
        The tracker, and whether it awaits that a record is taken again.
    """
    own = copy.copy(tracker)
    if (reason := obstacle(state, own)) is not None:
        rank_zero_warn(
            f"SubspaceMonitor: the state {name!r} of the checkpoint is not used: {reason}. History and overlaps start "
            "anew."
        )
        return None
    return own, restore(own, state, reopen=reopen)


def obstacle(state: Mapping[str, Any], tracker: Tracker) -> str | None:
    """Why a run cannot go on from this state, or None: a probe with another k measures something else."""
    if state.get("format") != FORMAT:
        return "it was written by another version of lightning_subspace"
    solver = tracker.plan.solver
    for name, now in (("k", solver.k), ("which", solver.which)):
        if state[name] != now:
            return f"it was written with {name}={state[name]!r}, and this monitor has {name}={now!r}"
    return None


def restore(tracker: Tracker, state: Mapping[str, Any], *, reopen: bool) -> bool:
    """Put a new tracker where the one was that the state was taken from.

    Args:
        tracker: of the same k.
        state: from `tracker_state`.
        reopen: whether a record that was open is to be taken again; otherwise it is kept without the numbers of the
            step that followed.

    Returns:
        Whether there is such a record.
    """
    overlaps = OverlapHistory.of_state(state["overlaps"])
    records = _history_of_state(state["history"])
    tracker.num_probes = state["num_probes"]
    reopened = None
    if state["open"] and reopen:
        reopened = records.pop()
        tracker.num_probes -= 1
        if reopened.step in overlaps.sketches:
            overlaps.forget(reopened.step)
    tracker.history = [replace(record, sketch=overlaps.sketches.get(record.step)) for record in records]
    shapes = tuple(torch.Size(shape) for shape in state["shapes"])
    # Where the module has other parameters now, `adapt` finds out at the next probe, and starts the overlaps anew.
    tracker.go_on(ParameterSpace(tuple(state["names"]), shapes), overlaps, reopened)
    return reopened is not None


def _history_state(records: Sequence[Record]) -> dict[str, Any]:
    """Records as a table with nan for what is absent; `Record.metrics` and eigenvalues hold no nan themselves."""
    keys = list(dict.fromkeys(key for record in records for key in record.metrics))
    rows = [[record.metrics.get(key, math.nan) for key in keys] for record in records]
    spaces = [record.subspace for record in records]
    return {
        "steps": [record.step for record in records],
        "keys": keys,
        "metrics": torch.tensor(rows, dtype=torch.float64).reshape(len(records), len(keys)),
        "sizes": [-1 if space is None else space.k for space in spaces],
        "eigenvalues": _joined([space.eigenvalues for space in spaces if space is not None]),
        "residuals": _joined([space.residuals for space in spaces if space is not None]),
        "next_eigenvalues": [math.nan if space is None else space.next_eigenvalue for space in spaces],
        "errors": [math.nan if space is None else space.error for space in spaces],
        "outcomes": ["" if space is None else space.outcome.name for space in spaces],
        "verified": [space is not None and space.verified for space in spaces],
        "num_matvecs": [0 if space is None else space.num_matvecs for space in spaces],
    }


def _history_of_state(state: Mapping[str, Any]) -> list[Record]:
    sizes = [max(size, 0) for size in state["sizes"]]
    eigenvalues, residuals = (torch.split(state[key], sizes) for key in ("eigenvalues", "residuals"))
    records = []
    for i, (step, row) in enumerate(zip(state["steps"], state["metrics"].tolist(), strict=True)):
        subspace = None
        if state["sizes"][i] >= 0:
            subspace = Subspace(
                eigenvalues=eigenvalues[i].clone(),
                eigenvectors=None,
                residuals=residuals[i].clone(),
                next_eigenvalue=state["next_eigenvalues"][i],
                error=state["errors"][i],
                outcome=Outcome[state["outcomes"][i]],
                verified=state["verified"][i],
                num_matvecs=state["num_matvecs"][i],
            )
        metrics = {key: value for key, value in zip(state["keys"], row, strict=True) if not math.isnan(value)}
        records.append(Record(step, metrics, subspace))
    return records


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).double().cpu() if parts else torch.zeros(0, dtype=torch.float64)
