"""Products with long vectors as rows, a few columns at a time.

That bounds the memory of float64 copies, and the rounding of inner products: a CPU adds float32 one after the other,
and loses 1e-4 of |v|^2 in vectors of a million. Autocast and TF32 do not touch float64. Apple's devices have none, and
stay in their own precision.

On a CUDA device every call costs as much as a product of thousands of columns, so that there all pieces are one call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 13  # columns; on a CPU a block of them fits a cache
_PARTS, _SMALLEST_CHUNK = 32, 256  # of float64 copies: so many parts at least, that they are small beside the basis
_PIECE = 1 << 15  # columns whose products are added in float32, where all pieces are one call


def products(rows: Tensor, *, normed: bool) -> Tensor:  # (m + 1, n) -> (m + 1,) or (m,)
    """Inner products of the last row with those before it.

    If `normed`, with itself, too.
    """
    with torch.autocast(rows.device.type, enabled=False):  # it would round these to half precision
        return (_in_one_call if is_one_call(rows) else _in_blocks)(rows, normed=normed)


def is_one_call(rows: Tensor) -> bool:
    """Whether the device is a CUDA one, and multiplies float32 as float32."""
    # The batched product may use TF32, which has three digits; matrix times vector does not.
    return rows.device.type == "cuda" and (rows.dtype != torch.float32 or not _allows_tf32())


def _in_blocks(rows: Tensor, *, normed: bool) -> Tensor:
    """Block after block, in their own precision, added in the widest."""
    rows, vector = rows[:-1], rows[-1]
    found = torch.zeros(len(rows) + normed, dtype=exact(rows), device=rows.device)
    pieces = zip(rows.split(_chunk(rows), dim=1), vector.split(_chunk(rows)), strict=True)
    found[: len(rows)] = torch.stack([torch.mv(*piece) for piece in pieces]).sum(dim=0, dtype=found.dtype)
    if normed:
        found[-1] = torch.linalg.vector_norm(vector, dtype=found.dtype).square()
    return found


def _in_one_call(rows: Tensor, *, normed: bool) -> Tensor:
    """All pieces in one batched product; columns left over in another."""
    vector, rows = rows[-1], rows if normed else rows[:-1]
    count, length = rows.shape[1] // _PIECE, rows.shape[1] // _PIECE * _PIECE
    # Views: piece by piece, the rows keep their distance in memory.
    pieces = rows[:, :length].unflatten(1, (count, _PIECE)).transpose(0, 1)
    found = torch.bmm(pieces, vector[:length].view(count, _PIECE, 1)).sum(dim=(0, 2), dtype=torch.float64)
    return found if length == rows.shape[1] else found.add_(torch.mv(rows[:, length:], vector[length:]))


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


def _allows_tf32() -> bool:
    """Whether CUDA may multiply float32 as TF32, by either interface of torch."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # torch >= 2.9, where the older one raises if both were used
    return bool(matmul.allow_tf32) if precision is None else precision not in ("none", "ieee")
