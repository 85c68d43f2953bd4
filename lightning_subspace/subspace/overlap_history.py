"""The overlaps between the subspaces of all probes of a run, in bounded memory.

Each new sketch is compared with every sketch that is still kept, and the results stay as numbers. When more than `keep`
sketches are held, the one that is closest to its neighbour on a logarithmic scale of steps goes: what is left is spread
evenly over log(step), the first, the last and a reference always among it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_subspace.subspace.sketch import Sketch, sketch_error, sketch_overlap

KEPT_SKETCHES = 64


class OverlapHistory:
    """Sketches and pairwise overlaps of the probes so far.

    Args:
        keep: how many sketches are held at most.

    Example:
        >>> import torch
        >>> overlaps = OverlapHistory()
        >>> for step in (0, 10):
        ...     _ = overlaps.add(step, Sketch(torch.eye(4)[:2], exact=True))
        >>> overlaps.matrix()[1].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, keep: int = KEPT_SKETCHES) -> None:
        if keep < 2:
            raise ValueError(f"keep: expected at least 2 sketches, got {keep}.")
        self._keep = keep
        self._steps: list[int] = []
        self._sketches: dict[int, Sketch] = {}
        self._overlaps: dict[tuple[int, int], float] = {}
        self.reference_step: int | None = None  # whose sketch is never given up

    @classmethod
    def of(
        cls,
        steps: Sequence[int],
        sketches: Mapping[int, Sketch],
        pairs: Mapping[tuple[int, int], float],
        reference_step: int | None,
        keep: int = KEPT_SKETCHES,
    ) -> OverlapHistory:
        """What has these for its attributes."""
        history = cls(keep)
        history._steps, history._sketches, history._overlaps = list(steps), dict(sketches), dict(pairs)
        history.reference_step = reference_step
        return history

    @property
    def steps(self) -> Sequence[int]:
        """The steps of all probes, oldest first."""
        return self._steps

    @property
    def pairs(self) -> Mapping[tuple[int, int], float]:
        """The overlaps that were taken, by the steps of the two probes, the earlier one first."""
        return self._overlaps

    @property
    def sketches(self) -> Mapping[int, Sketch]:
        """The sketches that are held, by their steps, oldest first."""
        return self._sketches

    def compare(self, sketch: Sketch) -> dict[int, float]:
        """The overlaps with all that are held, by their steps."""
        return {step: sketch_overlap(held, sketch) for step, held in self._sketches.items()}

    def add(self, step: int, sketch: Sketch, overlaps: Mapping[int, float] | None = None) -> int | None:
        """Keep a new sketch.

        Args:
            step: of the probe.
            sketch: of its space.
            overlaps: what `compare` gave for it; None: it is compared now.

        Returns:
            The step whose sketch was given up, or None.
        """
        for other, value in (self.compare(sketch) if overlaps is None else overlaps).items():
            self._overlaps[other, step] = value
        self._steps.append(step)
        self._sketches[step] = sketch
        return self._thin() if len(self._sketches) > self._keep else None

    def matrix(self) -> tuple[list[int], np.ndarray]:
        """The steps, and the (p, p) matrix of overlaps in [0, 1] between them; nan where a pair was never compared."""
        position = {step: i for i, step in enumerate(self._steps)}
        matrix = np.full((len(position), len(position)), np.nan)
        for (a, b), value in self._overlaps.items():
            matrix[position[a], position[b]] = matrix[position[b], position[a]] = value
        np.fill_diagonal(matrix, 1.0)
        return list(self._steps), matrix

    @property
    def error(self) -> float | None:
        """Largest standard deviation that an entry of the matrix can have; None where all entries are exact."""
        return max((sketch_error(sketch) for sketch in self._sketches.values()), default=0.0) or None

    def __copy__(self) -> OverlapHistory:
        return OverlapHistory.of(self._steps, self._sketches, self._overlaps, self.reference_step, self._keep)

    def forget(self, step: int) -> None:
        """Undo `add` of this step, but for the sketch that was given up for it."""
        self._steps.remove(step)
        del self._sketches[step]
        self._overlaps = {pair: value for pair, value in self._overlaps.items() if step not in pair}
        if self.reference_step == step:
            self.reference_step = None

    def _thin(self) -> int:
        held = sorted(self._sketches)
        places = [math.log1p(step) for step in held]
        inner = [i for i in range(1, len(held) - 1) if held[i] != self.reference_step]
        crowded = min(inner or [1], key=lambda i: places[i + 1] - places[i - 1])
        del self._sketches[held[crowded]]
        return held[crowded]
