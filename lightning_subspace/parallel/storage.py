"""Storage that two parameters share.

An optimizer that updates one of two overlapping parameters updates the other, too, so that they are no independent
coordinates: training follows neither the gradient by one of them nor that by both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def overlapping(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Names of two tensors that have memory in common, or None.

    Parts of one flat buffer that lie beside each other have none. A tensor without a storage of its own (sparse, meta,
    sharded, not initialised) is left out.

    Example:
        >>> flat = torch.zeros(6)
        >>> overlapping({"a": flat[:3], "b": flat[3:]}) is None
        True
        >>> overlapping({"a": flat[:3], "b": flat[3:], "c": flat[2:3]})
        ('a', 'c')
    """
    spans = sorted((*_span(tensor), name) for name, tensor in tensors.items() if _has_storage(tensor))
    open_spans: list[tuple[int, str]] = []  # those that reach beyond the present begin
    for begin, end, name in spans:
        open_spans = [(other_end, other) for other_end, other in open_spans if other_end > begin]
        for _, other in open_spans:
            if _have_common_bytes(tensors[other], tensors[name]):
                return other, name
        open_spans.append((end, name))
    return None


def _has_storage(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return is_plain and tensor.device.type != "meta" and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one behind the last."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.itemsize


def _have_common_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors with overlapping spans do overlap."""
    (begin, end), (other_begin, other_end) = _span(one), _span(other)
    if end - begin == one.numel() * one.itemsize and other_end - other_begin == other.numel() * other.itemsize:
        return True  # both without holes
    start = min(begin, other_begin)
    taken = torch.zeros(max(end, other_end) - start, dtype=torch.bool)
    for tensor, first in ((one, begin), (other, other_begin)):
        for byte in range(tensor.itemsize):
            strides = [stride * tensor.itemsize for stride in tensor.stride()]
            place = taken.as_strided(tensor.shape, strides, first - start + byte)
            if tensor is other and bool(place.any()):
                return True
            place.fill_(True)
    return False
