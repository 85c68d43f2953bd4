"""Views: tensors and arrays that lie within another one of the module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def owners(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """The owners of views in the list, by the view's id."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    found: dict[int, Tensor] = {}
    for group in by_storage.values():
        owner = max(group, key=lambda tensor: (tensor.numel(), isinstance(tensor, nn.Parameter)))
        found.update({id(tensor): owner for tensor in group if tensor is not owner and _is_part(tensor, owner)})
    return found


def _is_part(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor lies within another one of the same storage."""
    if isinstance(tensor, nn.Parameter) or tensor.dtype != whole.dtype or not whole.is_contiguous():
        return False
    start = tensor.storage_offset() - whole.storage_offset()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(start >= 0 and start + extent <= whole.numel())


def array_owners(arrays: Iterable[np.ndarray[Any, Any]]) -> dict[int, np.ndarray[Any, Any]]:
    """The owners of views in the list, by the view's id.

    Example:
        >>> table = np.zeros(4)
        >>> row = table[1:3]
        >>> array_owners([table, row])[id(row)] is table
        True
    """
    known = {id(array): array for array in arrays}
    found: dict[int, np.ndarray[Any, Any]] = {}
    for array in known.values():
        base, owner = array.base, None
        while isinstance(base, np.ndarray):
            owner = base if id(base) in known else owner
            base = base.base
        if owner is not None and owner.flags.c_contiguous and type(array) is np.ndarray:
            found[id(array)] = owner
    return found
