"""Dense tensors that tensors of other layouts are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace._torch import storages_of

COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
COMPRESSED_COLUMNS = (torch.sparse_csc, torch.sparse_bsc)


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Strided tensors of the data: itself, indices and values, or nested ones.

    Example:
        >>> [tuple(part.shape) for part in dense_parts(torch.eye(3).to_sparse())]
        [(2, 3), (3,)]
    """
    if tensor.is_nested:
        return tuple(tensor.unbind())
    if tensor.is_quantized:
        return (tensor.int_repr(),)
    if tensor.layout in COMPRESSED_ROWS:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in COMPRESSED_COLUMNS:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return storages_of(tensor) if tensor.layout in (torch.strided, torch.sparse_coo) else (tensor.to_dense(),)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's data, indices included."""
    return sum(part.numel() * part.element_size() for part in dense_parts(tensor))
