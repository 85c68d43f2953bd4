"""Overlaps in a checkpoint: sketches, and a number for each pair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.probe.entries import Entries
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.sketch import CELLS, Sketch
from lightning_subspace.subspace.subspace import ORTHONORMALITY, orthonormality_defect


def encode_overlaps(overlaps: OverlapHistory) -> dict[str, Any]:
    """Overlaps as tensors and plain values.

    Example:
        >>> encoded = encode_overlaps(OverlapHistory(sketches={3: Sketch(torch.eye(2)[:1], exact=True)}))
        >>> decode_overlaps(Entries(encoded), k=1, n=2, steps={0, 3}).steps
        [3]
    """
    return {
        "steps": sorted(overlaps.steps),
        "pairs": torch.tensor(list(overlaps.pairs), dtype=torch.int64).reshape(-1, 2),
        "overlaps": torch.tensor(list(overlaps.pairs.values()), dtype=torch.float64),
        "sketches": {step: held.basis.clone() for step, held in overlaps.sketches.items()},
        "exact": all(held.exact for held in overlaps.sketches.values()),
        "reference_step": overlaps.reference_step,
    }


def decode_overlaps(entries: Entries, k: int, n: int, steps: set[int]) -> OverlapHistory:
    """The overlaps that `encode_overlaps` was given.

    Args:
        entries: of the state.
        k: dimension of the subspaces.
        n: number of parameters.
        steps: of the records.

    Raises:
        CheckpointError: for what it cannot have been given.
    """
    held, is_exact, given = entries.ascending("steps"), entries.flag("exact"), entries.below("sketches")
    entries.require(len(held) <= OverlapHistory.keep, "steps", f"at most {OverlapHistory.keep} of them")
    entries.require(set(held) <= steps, "steps", "steps of records")
    entries.require(given.values.keys() == set(held), "sketches", f"sketches of the steps {held}")
    values, pairs = _pairs(entries, set(held))
    sketches = {}
    for step in held:
        basis = given.tensor(step, (k, min(n, CELLS)), torch.float32)
        given.require(orthonormality_defect(basis) < ORTHONORMALITY, step, "orthonormal rows")
        sketches[step] = Sketch(basis, is_exact)
    entries.require(is_exact == (n <= CELLS) or not sketches, "exact", f"{n <= CELLS} for {n} parameters")
    reference = None if entries.any("reference_step") is None else entries.integer("reference_step")
    entries.require(reference is None or reference in sketches, "reference_step", "None or the step of a sketch")
    taken = {(a, b): value for (a, b), value in zip(pairs.tolist(), values.tolist(), strict=True)}
    return OverlapHistory(sketches=sketches, pairs=taken, reference_step=reference)


def without_dropped_pairs(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state of format 2 with overlaps of held sketches alone.

    It had those of all probes. The state of a projection has none, and stays as it is.

    Raises:
        CheckpointError: for overlaps that no run can have written.
    """
    if "overlaps" not in state:
        return state
    entries = Entries(state).below("overlaps")
    steps, held = entries.ascending("steps"), entries.below("sketches").values.keys()
    entries.require(held <= set(steps), "sketches", f"sketches of the steps {steps}")
    entries.require(not steps or steps[-1] in held, "sketches", f"the last one, of step {steps[-1:]}, among them")
    values, pairs = _pairs(entries, set(steps))
    kept = [held >= set(pair) for pair in pairs.tolist()]
    own = {"steps": [step for step in steps if step in held], "pairs": pairs[kept], "overlaps": values[kept]}
    return {**state, "overlaps": {**entries.values, **own}}


def _pairs(entries: Entries, steps: set[int]) -> tuple[Tensor, Tensor]:
    """Overlaps, (c,), and the two steps of each, (c, 2)."""
    values = entries.any("overlaps")
    count = len(values) if isinstance(values, Tensor) and values.ndim else 0
    values = entries.tensor("overlaps", (count,))
    entries.require(bool(((values >= 0) & (values <= 1)).all()), "overlaps", "numbers in [0, 1]")
    pairs = entries.tensor("pairs", (count, 2), torch.int64)
    is_right = all(a < b and {a, b} <= steps for a, b in pairs.tolist())
    entries.require(is_right, "pairs", "pairs of the steps, the earlier one first")
    return values, pairs
