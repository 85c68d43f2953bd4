"""Projection of a parameter update into a subspace, or out of it.

    keep="top":   theta_{t+1} <- theta_t + P u        u = theta_{t+1} - theta_t,  P = V^T V
    keep="bulk":  theta_{t+1} <- theta_t + (I - P) u

The rule asks nothing about where u comes from. For plain gradient descent, u = -lr g, it is descent along the projected
gradient: Dom-SGD and Bulk-SGD of Song, Ahn and Yun, "Does SGD really happen in tiny subspaces?", arXiv 2405.16002.

Under ranks each one has its part of V and of u. V u, k numbers, is summed over ranks; each projects its part, and all
gather the whole, so that the parameters are equal to the bit on all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.subspace.subspace import inner_products

Keep = Literal["top", "bulk"]


class Projector:
    """Projects the updates of the parameters of a module, in place.

    Args:
        basis: (k, n) orthonormal rows, this rank's columns.
        partition: which parameters n counts, and how they are dealt to ranks.
        keep: "top" for the part of an update in the space of the rows, "bulk" for the rest.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> module = nn.Linear(2, 1, bias=False)
        >>> projector = Projector(torch.tensor([[1.0, 0.0]]), Partition.even(ParameterSpace.of(module)), keep="top")
        >>> with torch.no_grad():
        ...     _ = module.weight.fill_(1.0)
        ...     theta = projector.theta(module)
        ...     _ = module.weight.add_(torch.tensor([[3.0, 4.0]]))
        >>> projector.project(module, theta, measured=True), module.weight.tolist()
        (0.64, [[4.0, 1.0]])
    """

    def __init__(self, basis: Tensor, partition: Partition, *, keep: Keep) -> None:
        self._basis = basis
        self._partition = partition
        self._keep = keep

    def rebind(self, ranks: Ranks) -> None:
        """Continue in a new process group of as many ranks."""
        self._partition = replace(self._partition, ranks=ranks)

    def theta(self, module: nn.Module) -> Tensor:  # (n,)
        """This rank's part of the parameters, copied, in float32 at least."""
        space = self._partition.space
        tensors = space.tensors(module)
        like = torch.empty(0, dtype=space.widest_dtype(module, torch.float32), device=tensors[0].device)
        return self._partition.flatten(tensors, like)

    @torch.no_grad()
    def project(
        self,
        module: nn.Module,
        theta: Tensor,  # (n,)
        *,
        measured: bool = False,
    ) -> float:
        """Undo the part of an update that is not kept. A collective.

        Args:
            module: after the update.
            theta: what `theta` returned before it.
            measured: whether to say how much was removed, for which the device is waited for.

        Returns:
            The share removed, |u - u'|^2 / |u|^2 in [0, 1] with u' what is left of u; nan where u = 0, or not measured.
        """
        partition, basis = self._partition, self._basis
        after = self.theta(module)
        update = after - theta
        coordinates = inner_products(basis, update[None], partition.ranks)[:, 0]  # V u
        inside = (coordinates.to(basis) @ basis).to(update)
        kept = theta.add(inside) if self._keep == "top" else after.sub_(inside)
        whole = partition.gather(kept)
        for parameter, values in zip(partition.space.tensors(module), partition.space.unflatten(whole), strict=True):
            parameter.copy_(values)
        return self._removed(coordinates, update) if measured else math.nan

    def _removed(self, coordinates: Tensor, update: Tensor) -> float:
        square = float(inner_products(update[None], update[None], self._partition.ranks))
        if not 0.0 < square < math.inf:
            return math.nan
        inside = min(float(coordinates.square().sum()) / square, 1.0)  # more is the rounding of the basis
        return 1.0 - inside if self._keep == "top" else inside
