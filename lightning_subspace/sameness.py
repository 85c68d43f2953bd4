"""Do all ranks read the same examples? They have to: each evaluates its share of one sample."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_subspace._lightning import rank_zero_warn
from lightning_subspace.collectives import Ranks
from lightning_subspace.pool import SampleError
from lightning_subspace.training_loss import MicroBatch


def checksum(data: Any) -> int:
    """Of the dense tensors in a batch.

    Example:
        >>> checksum([torch.zeros(2), "a"]) == checksum({"x": torch.zeros(2)}), checksum(torch.ones(2)) == 0
        (True, False)
    """
    sums: list[int] = []

    def add(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and tensor.numel():
            values = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
            sums.append(zlib.crc32(values.numpy().tobytes()))
        return tensor

    apply_to_collection(data, Tensor, add)
    return zlib.crc32(repr(sums).encode())


def compare(batches: Sequence[MicroBatch], ranks: Ranks) -> None:
    """Warn where ranks have read different examples. A collective.

    Raises:
        SampleError: when they have different numbers of micro-batches, or give them different weights.
    """
    if ranks.count == 1:
        return
    own = [(batch.index, batch.weight, batch.checksum) for batch in batches]
    everybody = ranks.listed(own)
    if any([entry[:2] for entry in other] != [entry[:2] for entry in own] for other in everybody):
        raise SampleError(
            f"sample: every rank has to read the same batches, but they differ in number or in weight: "
            f"{[len(other) for other in everybody]} batches on ranks 0 to {ranks.count - 1}."
        )
    if any(other != own for other in everybody):
        rank_zero_warn(
            "SubspaceMonitor: ranks have read different examples for the same sample, so that some are counted twice "
            "and others not at all; is the dataset in another order on each rank, or is what it adds at random not "
            "seeded? Make it the same on all ranks, or pass the batches themselves, sample=[batch, ...]."
        )
