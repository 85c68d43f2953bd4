"""Vectors between dealt and whole, in memory that is taken in advance.

In the eigensolver's inner loop a rank cannot leave before the others (`Ranks.unchecked`). So nothing that can fail on
one rank alone may stand between it and its collective. Taking memory can; here that is done once an operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace.parallel.partition import Partition


class VectorBuffers:
    """What moves vectors of one type for one operator.

    Holds 2 n + 2 n / W numbers for a flat cut, and 4 n + 2 n / W where ranks have several ranges; n in a process alone.

    Args:
        partition: how vectors are dealt to ranks.
        dtype: of the vectors.
        device: of the vectors.

    Attributes:
        total: (n,), to be filled with what this rank adds to a sum.
    """

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> None:
        self._partition = partition
        count, longest, n = partition.ranks.count, partition.longest, partition.n
        self._is_alone = count == 1

        def room(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        in_line = room(count * longest)
        self.total = in_line[:n] if partition.is_in_order else room(n)
        self._laid = in_line  # the parts of all ranks one after another, each padded with zeros to one length
        if not self._is_alone:
            self._own, self._part, self._gathered = room(longest), room(longest), room(count * longest)
            self._whole = self._gathered[:n] if partition.is_in_order else room(n)

    def gather(
        self,
        local: Tensor,  # (local_n,)
    ) -> Tensor:  # (n,)
        """The whole of a vector, until the next call: one all-gather. Alone, the vector itself."""
        if self._is_alone:
            return (
                self._partition.assemble(local, torch.empty_like(local)) if not self._partition.is_in_order else local
            )
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
