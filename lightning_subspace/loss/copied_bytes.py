"""Bytes of the copies that a probe works on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    tensors = (*module.parameters(), *module.buffers())
    return sum(bytes_of_copy(tensor if whole else local_part(tensor), narrowest) for tensor in tensors)


def bytes_of_copy(tensor: Tensor, narrowest: torch.dtype | None) -> int:
    """Bytes of the copy of one tensor, as above."""
    return tensor.numel() * widened(torch.empty(0, dtype=tensor.dtype), narrowest, copy=False).dtype.itemsize
