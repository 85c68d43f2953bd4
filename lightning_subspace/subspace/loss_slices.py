"""The loss along eigenvectors at one step, and its logged numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossSlices:
    """The loss along the first eigenvectors, and on the plane of two.

    phi_i(x) = L(theta + x a_i v_i) for x from -1 to 1, with a_i = sqrt(2 c/|lambda_i|), so that the quadratic term is
    c at both ends. All tensors are float64 on the CPU.

    Attributes:
        step: t of theta_t.
        loss: L(theta_t).
        eigenvalues: (d,), lambda_i.
        slopes: (d,), g.v_i, at least 0: the eigenvectors point uphill.
        ranges: (d,), a_i, lengths in parameter space.
        lines: (d, p), phi_i; the middle one of the p points is theta_t.
        plane: (p, p), L(theta + x a_1 v_1 + y a_2 v_2), a row for each y; None where it was not asked for.
    """

    step: int
    loss: float
    eigenvalues: Tensor
    slopes: Tensor
    ranges: Tensor
    lines: Tensor
    plane: Tensor | None

    @property
    def units(self) -> Tensor:  # (p,)
        """The x of the points, from -1 to 1."""
        return grid(self.lines.shape[1])

    @property
    def quadratic_lines(self) -> Tensor:  # (d, p)
        """The quadratic at the points of the lines.

        L + a g.v_i + a^2 lambda_i / 2.
        """
        return self.loss + self._change(self.units[None], self.slopes, self.eigenvalues, self.ranges)

    @property
    def quadratic_plane(self) -> Tensor:  # (p, p)
        """The quadratic at the points of the plane.

        Between eigenvectors there is no mixed term.
        """
        along = self._change(self.units[None], self.slopes, self.eigenvalues, self.ranges)
        return self.loss + along[0][None] + along[1][:, None]

    @property
    def even_ratios(self) -> Tensor:  # (d, (p - 1) / 2)
        """Even part over the quadratic, 1 for a quadratic.

        (phi(x) + phi(-x) - 2 L) / (a^2 lambda) for x > 0.
        """
        middle = self.lines.shape[1] // 2
        even = (self.lines[:, middle + 1 :] + self.lines[:, :middle].flip(1)) / 2.0 - self.loss
        lengths = self.units[middle + 1 :] * self.ranges[:, None]
        return even / (lengths.square() * self.eigenvalues[:, None] / 2.0)

    def metrics(self) -> dict[str, float]:
        """The numbers that are logged, by their keys."""
        found = {}
        for i, (ratio, length) in enumerate(zip(self.even_ratios[:, -1], self.ranges, strict=True), start=1):
            found[f"slices/even_{i}"], found[f"slices/range_{i}"] = float(ratio), float(length)
        return found

    @staticmethod
    def _change(units: Tensor, slopes: Tensor, eigenvalues: Tensor, ranges: Tensor) -> Tensor:  # (d, p)
        lengths = units * ranges[:, None]
        return lengths * slopes[:, None] + lengths.square() * eigenvalues[:, None] / 2.0


def grid(points: int) -> Tensor:  # (points,)
    """Points from -1 to 1, exactly symmetric.

    Example:
        >>> grid(5).tolist()
        [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    half = points // 2
    return torch.arange(-half, half + 1, dtype=torch.float64) / half


def slice_range(share: float, loss: float, eigenvalue: float) -> float:
    """sqrt(2 c/|lambda|) for c = share |L|, or nan.

    Example:
        >>> slice_range(0.5, 4.0, 1.0)
        2.0
    """
    found = math.sqrt(2.0 * share * abs(loss) / abs(eigenvalue)) if eigenvalue else math.nan
    return found if 0.0 < found < math.inf else math.nan
