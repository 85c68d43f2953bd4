"""Projection of an update or a gradient into a subspace, or out.

    keep="top":   theta_{t+1} <- theta_t + P u        u = theta_{t+1} - theta_t,  P = V^T V
    keep="bulk":  theta_{t+1} <- theta_t + (I - P) u

The rule asks nothing about where u comes from. For plain gradient descent, u = -lr g, it is descent along the projected
gradient: Dom-SGD and Bulk-SGD of Song, Ahn and Yun, "Does SGD really happen in tiny subspaces?", arXiv 2405.16002. The
gradient itself is projected by g <- P g or g <- (I - P) g; what an optimizer with momentum or preconditioning makes of
that is in the space no longer.

Under ranks each one has its part of V and of u. V u, k numbers, is summed over ranks; each projects its part, and all
gather the whole, so that the parameters are equal to the bit on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.subspace.subspace import inner_products

Keep = Literal["top", "bulk"]


class Projector:
    """Projects updates or gradients of a module's parameters, in place.

    Args:
        basis: (k, n) orthonormal rows, this rank's columns.
        partition: which parameters n counts, and how they are dealt to ranks.
        keep: "top" for the part in the space of the rows, "bulk" for the rest.
        gradient: (n,), this rank's part of one that updates are compared with; None: they are not.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> module = nn.Linear(2, 1, bias=False)
        >>> projector = Projector(torch.tensor([[1.0, 0.0]]), Partition.even(ParameterSpace.of(module)), keep="top")
        >>> with torch.no_grad():
        ...     _ = module.weight.fill_(1.0)
        ...     theta = projector.theta(module)
        ...     _ = module.weight.add_(torch.tensor([[3.0, 4.0]]))
        >>> projector.project(module, theta, measured=True), module.weight.tolist()
        ({'removed': 0.64}, [[4.0, 1.0]])
    """

    def __init__(self, basis: Tensor, partition: Partition, *, keep: Keep, gradient: Tensor | None = None) -> None:
        self._basis = basis
        self._partition = partition
        self._keep = keep
        self._gradient = gradient

    @property
    def compares(self) -> bool:
        """Whether updates are compared with a gradient."""
        return self._gradient is not None

    def rebind(self, ranks: Ranks) -> None:
        """Continue in a new process group of as many ranks."""
        self._partition = replace(self._partition, ranks=ranks)

    def theta(self, module: nn.Module) -> Tensor:  # (n,)
        """This rank's part of the parameters, copied, in float32 at least."""
        return self._flat(module, self._partition.space.tensors(module))

    @torch.no_grad()
    def project(
        self,
        module: nn.Module,
        theta: Tensor,  # (n,)
        *,
        measured: bool = False,
    ) -> dict[str, float]:
        """Undo the part of an update that is not kept. A collective.

        Args:
            module: after the update.
            theta: what `theta` returned before it.
            measured: whether to say what was done, for which the device is waited for.

        Returns:
            If measured: `removed`, the share |u - u'|^2 / |u|^2 in [0, 1] with u' what is left of u, nan where u = 0;
            and what `compared` says of u'.
        """
        partition = self._partition
        after = self.theta(module)
        update = after - theta
        coordinates, inside = self._inside(update)
        kept = theta.add(inside) if self._keep == "top" else after.sub_(inside)
        whole = partition.gather(kept)
        for parameter, values in zip(partition.space.tensors(module), partition.space.unflatten(whole), strict=True):
            parameter.copy_(values)
        if not measured:
            return {}
        return {"removed": self._removed(coordinates, update), **self._compared(kept.sub_(theta))}

    @torch.no_grad()
    def project_gradient(self, module: nn.Module, held: Container[int], *, measured: bool = False) -> dict[str, float]:
        """Take what is not kept out of the gradient. A collective.

        A parameter without a gradient gets one if any other has one: it has its part in the space.

        Args:
            module: with the gradient of a step.
            held: identities of the parameters that the optimizer moves; the others have no part in the gradient.
            measured: as for `project`.

        Returns:
            If measured, `removed`, as there; nan where the gradient is 0.
        """
        partition = self._partition
        parameters = partition.space.tensors(module)
        gradients = [parameter.grad if id(parameter) in held else None for parameter in parameters]
        if all(gradient is None for gradient in gradients):
            return {}
        gradient = self._flat(module, gradients)
        coordinates, inside = self._inside(gradient)
        whole = partition.gather(inside if self._keep == "top" else gradient - inside)
        for parameter, values in zip(parameters, partition.space.unflatten(whole), strict=True):
            if id(parameter) not in held:
                continue
            if parameter.grad is None or parameter.grad.layout != torch.strided:
                parameter.grad = values.to(parameter, copy=True)
            else:
                parameter.grad.copy_(values)
        return {"removed": self._removed(coordinates, gradient)} if measured else {}

    @torch.no_grad()
    def compared(
        self,
        module: nn.Module,
        theta: Tensor,  # (n,)
    ) -> dict[str, float]:
        """The update since `theta` beside the gradient g. A collective.

        Returns:
            `change`, g . u, and `cosine`, g . u over |g| |u|, nan where one is 0; nothing where there is no g.
        """
        return self._compared(self.theta(module) - theta)

    def _flat(self, module: nn.Module, tensors: list[Tensor | None] | list[Tensor]) -> Tensor:  # (n,)
        space = self._partition.space
        device = space.tensors(module)[0].device
        like = torch.empty(0, dtype=space.widest_dtype(module, torch.float32), device=device)
        return self._partition.flatten(tensors, like)

    def _inside(self, vector: Tensor) -> tuple[Tensor, Tensor]:  # (n,) -> (k,), (n,)
        """V v in float64, and P v."""
        coordinates = inner_products(self._basis, vector[None], self._partition.ranks)[:, 0]
        return coordinates, (coordinates.to(self._basis) @ self._basis).to(vector)

    def _removed(self, coordinates: Tensor, vector: Tensor) -> float:
        square = float(inner_products(vector[None], vector[None], self._partition.ranks))
        if not 0.0 < square < math.inf:
            return math.nan
        inside = min(float(coordinates.square().sum()) / square, 1.0)  # more is the rounding of the basis
        return 1.0 - inside if self._keep == "top" else inside

    def _compared(self, update: Tensor) -> dict[str, float]:
        if self._gradient is None:
            return {}
        both = torch.stack([self._gradient.to(update), update])
        (own, change), (_, square) = inner_products(both, both, self._partition.ranks).tolist()
        lengths = math.sqrt(own * square)
        return {"change": change, "cosine": change / lengths if lengths > 0.0 else math.nan}
