"""Slices of the loss in a checkpoint: plain values and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, float64

from lightning_subspace.subspace.loss_slices import LossSlices


def encode_slices(history: Sequence[LossSlices]) -> dict[str, Any]:
    """Slices as dicts; an empty one for none."""
    return {"history": [dict(vars(slices)) for slices in history]} if history else {}


def decode_slices(state: Mapping[str, Any], keep: int) -> list[LossSlices]:
    """The slices that `encode_slices` was given, the last `keep` of them.

    Raises:
        ValueError: for what it cannot have returned.
    """
    found = [_decoded(one) for one in state.get("history", ())][-keep:]
    steps = [slices.step for slices in found]
    if steps != sorted(set(steps)) or (state and not found):
        raise ValueError(f"history: expected slices of ascending steps, got those of {steps}")
    return found


def _decoded(state: Mapping[str, Any]) -> LossSlices:
    slices = LossSlices(**{field.name: state.get(field.name) for field in fields(LossSlices)})  # type: ignore[arg-type]
    tensors = [slices.eigenvalues, slices.slopes, slices.ranges, slices.lines]
    tensors += [] if slices.plane is None else [slices.plane]
    are_tensors = all(isinstance(tensor, Tensor) and tensor.dtype == float64 for tensor in tensors)
    if not are_tensors or not isinstance(slices.step, int) or not isinstance(slices.loss, float):
        raise ValueError(f"slices: expected a step, a loss and tensors of float64, got {sorted(state)}")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    directions, points = shapes[3] if len(shapes[3]) == 2 else (0, 0)
    expected = [(directions,)] * 3 + [(directions, points)] + [(points, points)] * (len(shapes) - 4)
    if shapes != expected or points % 2 == 0:
        raise ValueError(f"slices: expected tensors for d directions and an odd number of points, got {shapes}")
    return slices
