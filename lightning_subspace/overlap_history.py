"""The overlaps between the subspaces of all probes of a run, in bounded memory.

Each new sketch is compared with every sketch that is still kept, and the results stay as numbers. When more than `keep`
sketches are held, the one that is closest to its neighbour on a logarithmic scale of steps goes: what is left is spread
evenly over log(step), the first and the last always among it.
"""

from __future__ import annotations

import math

import numpy as np

from lightning_subspace.sketch import Sketch, sketch_error, sketch_overlap

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

    def add(self, step: int, sketch: Sketch) -> int | None:
        """Compare a new sketch with all that are held.

        Returns:
            The step whose sketch was given up, or None.
        """
        for other, held in self._sketches.items():
            self._overlaps[other, step] = sketch_overlap(held, sketch)
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

    def _thin(self) -> int:
        held = sorted(self._sketches)
        places = [math.log1p(step) for step in held]
        crowded = min(range(1, len(held) - 1), key=lambda i: places[i + 1] - places[i - 1])
        del self._sketches[held[crowded]]
        return held[crowded]
