"""Products with long vectors as rows, a few columns at a time.

That bounds the memory of float64 copies, and the rounding of inner products: a CPU adds float32 one after the other,
and loses 1e-4 of |v|^2 in vectors of a million. Autocast and TF32 do not touch float64. Apple's devices have none, and
stay in their own precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 13  # columns; on a CPU a block of them fits a cache
_PARTS, _SMALLEST_CHUNK = 32, 256  # of float64 copies: so many parts at least, that they are small beside the basis


def products(rows: Tensor, vector: Tensor, *, normed: bool) -> Tensor:  # (m, n), (n,) -> (m + 1,)
    """Inner products with all rows, then |vector|^2 (zero if not `normed`)."""
    found = torch.zeros(rows.shape[0] + 1, dtype=exact(rows), device=rows.device)
    with torch.autocast(vector.device.type, enabled=False):  # it would round these to half precision
        pieces = zip(rows.split(_chunk(rows), dim=1), vector.split(_chunk(rows)), strict=True)
        found[:-1] = torch.stack([torch.mv(*piece) for piece in pieces]).sum(dim=0, dtype=found.dtype)
        if normed:
            found[-1] = torch.linalg.vector_norm(vector, dtype=found.dtype).square()
    return found


def rotate(rows: Tensor, rotation: Tensor, out: Tensor) -> None:  # (m, n), (m, c), (c, n)
    """Write rotation^T rows into `out`, possibly the first rows themselves."""
    weights = rotation.T.to(out.device, exact(out))
    for block in _blocks(out):
        out[:, block] = weights @ rows[:, block].to(weights.dtype)


def gram(rows: Tensor) -> Tensor:  # (m, n) -> (m, m)
    """All inner products of the rows."""
    total = torch.zeros(rows.shape[0], rows.shape[0], dtype=exact(rows), device=rows.device)
    for block in _blocks(rows):
        columns = rows[:, block].to(total.dtype)
        total += columns @ columns.T
    return total


def exact(tensor: Tensor) -> torch.dtype:
    """The widest type that the tensor's device has."""
    return tensor.dtype if tensor.device.type == "mps" else torch.float64


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of columns that are small beside the matrix."""
    chunk = min(_chunk(matrix), max(_SMALLEST_CHUNK, matrix.shape[1] // _PARTS))
    for start in range(0, matrix.shape[1], chunk):
        yield slice(start, start + chunk)


def _chunk(matrix: Tensor) -> int:
    return _CHUNK if matrix.is_cpu else 8 * _CHUNK  # other devices add in parallel, but are slow to begin
