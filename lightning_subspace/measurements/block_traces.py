"""Traces of diagonal blocks, from the random vectors of a quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_subspace.measurements.grouping import Grouping
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.subspace import Subspace, inner_products


class BlockTraces:
    """Sums of u_l.(Au)_l by group l, from watched products.

    Watched is the first product from each random vector u. For u uniform on the unit sphere outside of k known
    eigenvectors, (n - k) E[u_l.(Au)_l] is the trace of the block of A - sum_i lambda_i v_i v_i^T (Hutchinson 1990).

    Args:
        grouping: of the parameters.
        partition: of the coordinates over ranks.
    """

    def __init__(self, grouping: Grouping, partition: Partition) -> None:
        self._grouping = grouping
        self._partition = partition
        self._is_first = False
        self._seen: list[Tensor] = []  # of each vector: this rank's sums by group, (groups,)

    def drawing(self, random: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
        """A source of random vectors, watched; a product follows each."""

        def drawn(seed: int, number: int) -> Tensor:
            self._is_first = True
            return random(seed, number)

        return drawn

    def watching(self, matvec: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same product, watched."""

        def product(u: Tensor) -> Tensor:
            image = matvec(u)
            if self._is_first:
                self._is_first = False
                self._seen.append(self._local_sums(u, image))
            return image

        return product

    def metrics(self, known: Subspace | None) -> dict[str, float]:
        """`trace/<group>` and `trace_error/<group>`. A collective.

        `known` are the pairs that were taken out.
        """
        names, partition = self._grouping.names, self._partition
        traces = torch.zeros(len(names), dtype=torch.float64)
        errors = torch.zeros_like(traces)
        if known is not None:
            basis = known.basis
            shares = self._grouping.sums(
                partition, lambda part: inner_products(basis[:, part], basis[:, part]).diagonal()
            )
            traces += shares @ known.eigenvalues
        if self._seen:  # there are none where all eigenvalues are known
            rest = partition.n - (0 if known is None else known.k)
            each = rest * partition.ranks.all_reduce(torch.stack(self._seen)).cpu()  # (vectors, groups)
            traces += each.mean(dim=0)
            errors = each.std(dim=0) / math.sqrt(len(each)) if len(each) > 1 else errors * math.nan
        found = {f"trace/{name}": float(value) for name, value in zip(names, traces, strict=True)}
        return found | {f"trace_error/{name}": float(value) for name, value in zip(names, errors, strict=True)}

    def _local_sums(self, u: Tensor, image: Tensor) -> Tensor:
        def values(part: slice) -> Tensor:
            return inner_products(u[None, part], image[None, part])[0]

        return self._grouping.local_sums(self._partition, values)[:, 0]
