"""Transfers of vectors in buffers that are allocated once an operator.

In the eigensolver's inner loop a rank cannot leave before the others (`Ranks.unchecked`). An allocation can fail on one
rank alone, so none may stand between a rank and its collective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace.parallel.partition import Partition


class VectorBuffers:
    """Buffers for the vectors of one operator.

    They hold 2 n + 2 n / W numbers for a flat cut, 4 n + 2 n / W where ranks have several ranges, n in one process.

    Args:
        partition: of the vectors over ranks.
        dtype: of the vectors.
        device: of the vectors.

    Attributes:
        total: (n,), to be filled with this rank's summand.
    """

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> None:
        self._partition = partition
        count, longest, n = partition.ranks.count, partition.longest, partition.n
        self._is_alone = count == 1

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._laid = zeros(count * longest)  # the parts of all ranks, each padded with zeros to one length
        self.total = self._laid[:n] if partition.is_in_order else zeros(n)
        if not self._is_alone:
            self._own, self._part, self._gathered = zeros(longest), zeros(longest), zeros(count * longest)
            self._whole = self._gathered[:n] if partition.is_in_order else zeros(n)

    def gather(self, local: Tensor) -> Tensor:  # (local_n,) to (n,)
        """The whole of a vector, valid until the next call: one all-gather. In one process, the vector itself."""
        if self._is_alone:
            return self._partition.gather(local)
        self._own[: len(local)] = local
        self._partition.ranks.all_gather(self._own, self._gathered)
        return self._partition.assemble(self._gathered, self._whole)

    def sum_scatter(self) -> Tensor:  # (local_n,)
        """This rank's part of the sum of the `total` of all ranks: one reduce-scatter."""
        partition = self._partition
        if self._is_alone:
            return partition.cut(self.total)
        partition.lay_out(self.total, self._laid)
        partition.ranks.reduce_scatter(self._laid, self._part)
        return self._part[: partition.local_n].clone()
