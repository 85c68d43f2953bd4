"""Bytes of the copies that a probe works on."""

from __future__ import annotations

import torch
from torch import nn

from lightning_subspace.loss.precision import widened
from lightning_subspace.parallel.fsdp import local_part


def copied_bytes(module: nn.Module, narrowest: torch.dtype | None, *, whole: bool = True) -> int:
    """Bytes of the copies of parameters and buffers.

    Args:
        module: what is copied; attributes beside these, such as states of metrics, are not counted.
        narrowest: floating-point type of the copies, unless the original is wider; None keeps all types.
        whole: of sharded parameters, whether the whole is copied, or this rank's part.

    Example:
        >>> copied_bytes(nn.Linear(9, 10), torch.float64)
        800
    """
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        numel = tensor.numel() if whole else local_part(tensor).numel()
        total += numel * widened(torch.empty(0, dtype=tensor.dtype), narrowest, copy=False).dtype.itemsize
    return total
