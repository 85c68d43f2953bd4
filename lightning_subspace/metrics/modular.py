"""Metrics of subspaces as torchmetrics: each is the mean over its updates.

All hold a sum in float64 and a count, both summed over processes. So the metric of two processes is the mean over the
updates of both, whether they saw the same tensors or different ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_subspace._arguments import is_integer, require_flag, wrong
from lightning_subspace.metrics.functional import gradient_fraction, principal_angles, subspace_overlap


class _Mean(Metric):
    """The mean of a number over updates.

    Args:
        validate_args: check the arguments of every update.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: for a validate_args that is no bool.
    """

    is_differentiable: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    total: Tensor  # the sum of all values
    count: Tensor  # their number

    def __init__(self, validate_args: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_flag("validate_args", validate_args)
        self.validate_args = validate_args
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The mean over all updates; nan where there was none."""
        return self.total / self.count

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot results, by default that of `compute`, see `torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def _add(self, value: Tensor) -> None:
        self.total += value
        self.count += 1


class GradientFraction(_Mean):
    """Share of a vector's squared length inside a subspace, mean over updates.

    |P v|^2 / |v|^2, in [0, 1]. With the top eigenvectors of the Hessian and the gradient it is f_top (Gur-Ari, Roberts
    and Dyer 2018, arXiv 1812.04754, section 2); a random vector gives k/n. Neither end is better. A vector that is zero
    or not finite has no such share, and its update does not count.

    `update` takes a basis (k, n) of orthonormal rows and a vector (n,); `forward` and `compute` return a float64 scalar
    tensor, nan before the first update.

    Args:
        validate_args: check shapes, and that the rows are orthonormal, at every update.
        kwargs: additional arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: for a validate_args that is no bool, and in `update` as `gradient_fraction`.

    Example:
        >>> metric = GradientFraction()
        >>> metric.update(torch.eye(4)[:2], torch.tensor([3.0, 0.0, 4.0, 0.0]))
        >>> metric.update(torch.eye(4)[:2], torch.tensor([1.0, 0.0, 0.0, 0.0]))
        >>> metric.compute()
        tensor(0.6800, dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    plot_upper_bound: float = 1.0

    def update(self, basis: Tensor, vector: Tensor) -> None:
        """Add the fraction of one vector."""
        value = gradient_fraction(basis, vector, validate_args=self.validate_args)
        if value.isfinite():
            self._add(value)


class SubspaceOverlap(_Mean):
    """Overlap of two subspaces, mean over updates.

    Tr(P P') / min(k, m), in [0, 1]: 1 for equal spaces, 0 for orthogonal ones, k/n for random ones. Equation 4 of
    Gur-Ari, Roberts and Dyer (2018, arXiv 1812.04754).

    `update` takes two bases (k, n) and (m, n) of orthonormal rows; `forward` and `compute` return a float64 scalar
    tensor, nan before the first update.

    Args:
        validate_args: check shapes, and that the rows are orthonormal, at every update.
        kwargs: additional arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: for a validate_args that is no bool, and in `update` as `subspace_overlap`.

    Example:
        >>> metric = SubspaceOverlap()
        >>> metric.update(torch.eye(4)[:2], torch.eye(4)[1:3])
        >>> metric.update(torch.eye(4)[:2], torch.eye(4)[:2])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better: bool = True
    plot_upper_bound: float = 1.0

    def update(self, basis: Tensor, other: Tensor) -> None:
        """Add the overlap of one pair."""
        self._add(subspace_overlap(basis, other, validate_args=self.validate_args))


class PrincipalAngles(_Mean):
    """Principal angles between two subspaces, in radians, mean over updates.

    Ascending, each in [0, pi/2]: 0 for a direction of both spaces, pi/2 for one that is orthogonal to the other space.
    Bjorck and Golub (1973, Numerical Methods for Computing Angles Between Linear Subspaces).

    `update` takes two bases (k, n) and (m, n) of orthonormal rows; `forward` and `compute` return a float64 tensor
    (num_angles,), nan before the first update.

    Args:
        num_angles: min(k, m) of every update, so that processes can be summed.
        validate_args: check shapes, and that the rows are orthonormal, at every update.
        kwargs: additional arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: for a num_angles that is no positive integer, a validate_args that is no bool, and in `update` as
            `principal_angles`, or for another number of angles.

    Example:
        >>> metric = PrincipalAngles(2)
        >>> metric.update(torch.eye(4)[:2], torch.eye(4)[1:3])
        >>> metric.compute()
        tensor([0.0000, 1.5708], dtype=torch.float64)
    """

    higher_is_better: bool = False
    plot_upper_bound: float = torch.pi / 2
    plot_legend_name: str = "Angle"

    def __init__(self, num_angles: int, validate_args: bool = True, **kwargs: Any) -> None:
        if not is_integer(num_angles) or num_angles < 1:
            raise wrong("num_angles", "a positive integer", num_angles)
        super().__init__(validate_args, **kwargs)
        self.num_angles = int(num_angles)
        self.add_state("total", torch.zeros(self.num_angles, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, basis: Tensor, other: Tensor) -> None:
        """Add the angles of one pair."""
        angles = principal_angles(basis, other, validate_args=self.validate_args)
        if len(angles) != self.num_angles:
            raise ValueError(
                f"basis, other: expected {self.num_angles} angles, as num_angles says, got {len(angles)} from "
                f"{len(basis)} and {len(other)} basis vectors; pass num_angles={len(angles)}."
            )
        self._add(angles)
