"""Spaces of one probe, top and next, to compare with later ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.measurements.memory import kind, tensor_entry
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.sketch import CELLS, Sketch, sketch, sketch_overlap
from lightning_subspace.subspace.subspace import ORTHONORMALITY, TRUSTED_ERROR, orthonormality_defect, overlap


@dataclass(frozen=True, eq=False)
class Spaces:
    """The top and the next eigenspace of a probe.

    Attributes:
        step: of the probe.
        space: digest of the parameters.
        sketches: of both; where there are few parameters, the bases themselves.
        error: of an overlap with the next one.
        bases: both, (k, n), on the CPU, under ranks this rank's columns; None after a resume.
    """

    step: int
    space: str
    sketches: tuple[Sketch, Sketch]
    error: float
    bases: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, step: int, basis: Tensor, k: int, error: float, partition: Partition) -> Spaces:
        """The spaces of k rows, and of the others. A collective."""
        bases = basis[:k], basis[k:]
        images = (_image(bases[0], partition), _image(bases[1], partition))
        return cls(step, _digest(partition.space), images, error, (bases[0].cpu(), bases[1].cpu()))

    def fits(self, partition: Partition, k: int) -> bool:
        """Whether they have k dimensions, and the parameters are these, dealt alike."""
        image = self.sketches[0]
        is_dealt_alike = self.bases is None or self.bases[0].shape[1] == partition.local_n
        is_same = self.space == _digest(partition.space) and image.exact == (partition.n <= CELLS)
        return is_same and is_dealt_alike and image.basis.shape == (k, min(partition.n, CELLS))

    def overlaps(self, other: Spaces, partition: Partition) -> tuple[float, float]:
        """Overlaps of the top spaces and of the next ones. A collective.

        Estimates from sketches where the other one's bases are gone.
        """
        assert self.bases is not None, "those of the probe at hand"
        others = other.bases
        if others is None and other.sketches[0].exact:
            others = partition.cut(other.sketches[0].basis), partition.cut(other.sketches[1].basis)
        if others is None:
            first, second = (sketch_overlap(b, a) for a, b in zip(self.sketches, other.sketches, strict=True))
        else:
            first, second = (overlap(a, b, partition.ranks) for a, b in zip(self.bases, others, strict=True))
        return first, second

    def state(self) -> dict[str, Any]:
        """Tensors and plain values."""
        top, following = self.sketches
        return {
            "step": self.step,
            "space": self.space,
            "top": top.basis,
            "next": following.basis,
            "exact": top.exact,
            "error": self.error,
        }

    @classmethod
    def from_state(cls, state: Any) -> Spaces:
        """The spaces that gave a state, without their bases.

        Raises:
            ValueError: for what `state` cannot have returned.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"expected the spaces of a probe, got {kind(state)}")
        step, space, exact, error = (state.get(name) for name in ("step", "space", "exact", "error"))
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step: expected an integer of at least 0, got {kind(step)}")
        if not isinstance(space, str) or not isinstance(exact, bool):
            raise ValueError(f"space, exact: expected a digest and a truth value, got {kind(space)}, {kind(exact)}")
        if not isinstance(error, float) or not 0.0 <= error <= TRUSTED_ERROR:
            raise ValueError(f"error: expected a number in [0, {TRUSTED_ERROR}], got {kind(error)}")
        dtype = torch.float64 if exact and getattr(state.get("top"), "dtype", None) == torch.float64 else torch.float32
        top, following = (tensor_entry(state, name, dtype, 2) for name in ("top", "next"))
        if not top.shape == following.shape or not len(top):
            raise ValueError(f"next: expected a basis like `top`, got {kind(following)}")
        if not all(orthonormality_defect(basis) < ORTHONORMALITY for basis in (top, following)):
            raise ValueError("top, next: expected orthonormal rows")
        return cls(step, space, (Sketch(top, exact), Sketch(following, exact)), error)


def _image(basis: Tensor, partition: Partition) -> Sketch:
    """A sketch; of few parameters the basis itself, in its type."""
    # So a resumed run has the same numbers.
    if partition.n > CELLS:
        return sketch(basis, partition)
    return Sketch(torch.stack([partition.gather(row).clone() for row in basis]).cpu(), exact=True)


def _digest(space: ParameterSpace) -> str:
    """Names and shapes in few letters; a checkpoint has them elsewhere."""
    text = repr((space.names, [tuple(shape) for shape in space.shapes], sorted(space.complex_names)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
