"""Overlaps between the subspaces of a run's probes, in constant memory.

At most `keep` sketches are held, whatever the number of probes, and the overlap of each pair of them. A new one is
compared with all of these; the one that is dropped for it takes its overlaps along. Those that stay are spread evenly
over log(step): a matrix of them shows a run at every scale of time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lightning_subspace.subspace.sketch import Sketch, sketch_overlap


@dataclass(eq=False)
class OverlapHistory:
    """Sketches and pairwise overlaps of probes, of a bounded number of them.

    Raises:
        ValueError: for `keep` below 2.

    Example:
        >>> import torch
        >>> overlaps = OverlapHistory()
        >>> for step in (0, 10):
        ...     _ = overlaps.add(step, Sketch(torch.eye(4)[:2], exact=True))
        >>> overlaps.matrix()[1].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """

    keep: int = 64  # how many sketches are held at most
    sketches: dict[int, Sketch] = field(default_factory=dict)  # those held, by their steps, oldest first
    pairs: dict[tuple[int, int], float] = field(default_factory=dict)  # overlaps of two held steps, earlier one first
    reference_step: int | None = None  # whose sketch is always kept

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise ValueError(f"keep: expected at least 2 sketches, got {self.keep}.")

    @property
    def steps(self) -> list[int]:
        """The steps whose sketches are held, oldest first."""
        return list(self.sketches)

    def compare(self, sketch: Sketch) -> dict[int, float]:
        """The overlaps with all that are held, by their steps."""
        return {step: sketch_overlap(held, sketch) for step, held in self.sketches.items()}

    def add(self, step: int, sketch: Sketch, overlaps: Mapping[int, float] | None = None) -> int | None:
        """Keep a new sketch.

        Args:
            step: of the probe.
            sketch: of its space.
            overlaps: the result of `compare` for it; None: it is compared now.

        Returns:
            The step whose sketch was dropped for it, or None.
        """
        for other, value in (self.compare(sketch) if overlaps is None else overlaps).items():
            self.pairs[_pair(other, step)] = value
        self.sketches[step] = sketch
        return self._thin() if len(self.sketches) > self.keep else None

    def matrix(self) -> tuple[list[int], np.ndarray]:
        """The steps that are held, and the overlaps between them.

        The matrix is (h, h), h at most `keep`, with entries in [0, 1], or nan where a pair was never compared.
        """
        position = {step: i for i, step in enumerate(self.sketches)}
        matrix = np.full((len(position), len(position)), np.nan)
        for (a, b), value in self.pairs.items():
            matrix[position[a], position[b]] = matrix[position[b], position[a]] = value
        np.fill_diagonal(matrix, 1.0)
        return self.steps, matrix

    def row(self, step: int) -> dict[int, float]:
        """The overlaps of one held step with the others, by their steps."""
        if step not in self.sketches:
            return {}
        return {other: self.pairs[pair] for other in self.sketches if (pair := _pair(other, step)) in self.pairs}

    @property
    def error(self) -> float | None:
        """Largest standard deviation of an entry; None where all are exact."""
        return max((sketch.error for sketch in self.sketches.values()), default=0.0) or None

    def __copy__(self) -> OverlapHistory:
        return OverlapHistory(self.keep, dict(self.sketches), dict(self.pairs), self.reference_step)

    def forget(self, step: int) -> None:
        """Undo `add` of this step; what it dropped stays dropped."""
        self._drop(step)
        if self.reference_step == step:
            self.reference_step = None

    def _thin(self) -> int:
        # The sketch closest to its neighbours in log(step) goes: the others are spread evenly on that scale. The first,
        # the last and the reference stay.
        held = sorted(self.sketches)
        places = [math.log1p(step) for step in held]
        inner = [i for i in range(1, len(held) - 1) if held[i] != self.reference_step]
        crowded = min(inner or [1], key=lambda i: places[i + 1] - places[i - 1])
        self._drop(held[crowded])
        return held[crowded]

    def _drop(self, step: int) -> None:
        del self.sketches[step]
        for other in self.sketches:
            self.pairs.pop(_pair(step, other), None)


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)
