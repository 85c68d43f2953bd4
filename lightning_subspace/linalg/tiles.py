"""Long vectors as rows, in tiles, on the device or the host.

Every operation goes tile by tile, and adds what it finds in their order. Where the tiles lie in host memory, each is
copied to the device for it, the next one meanwhile, and what has changed is copied back. A tile has the same shape and
strides in both places, so that the same kernels run on it and the numbers are the same to the bit. What it costs is the
transfer: every pass of an orthogonalisation moves the rows twice.

The host's memory is pinned for a CUDA device, as it is needed, and given back; where that fails, copies are slower.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_subspace.linalg import blocked

BasisPlace = Literal["device", "cpu"]

WIDTH = 1 << 20  # columns of a tile: a transfer of some MB, and thousands of columns for each processor of a device
# Columns between the rows of a tile, if there are several: rows a power of two apart would share the lines of a cache.
_SKEW = 80


class Tiles:
    """A matrix of a few long rows.

    Args:
        num_rows: the rows.
        n: their length.
        dtype: of the numbers.
        device: where they are computed with.
        place: where they lie: on that device, or in host memory. On a CPU both are the same.

    Raises:
        MemoryError, RuntimeError: from torch, where there is no memory.

    Example:
        >>> rows = Tiles(2, 3, dtype=torch.float32, device=torch.device("cpu"))
        >>> rows.write(0, torch.tensor([0.0, 4.0, 0.0]))
        >>> rows.divide(0, 4.0)
        >>> rows.products(0, 0, normed=True)
        tensor([1.], dtype=torch.float64)
    """

    def __init__(
        self, num_rows: int, n: int, *, dtype: torch.dtype, device: torch.device, place: BasisPlace = "device"
    ) -> None:
        self._n, self._device = n, device
        self._starts = range(0, max(n, 1), WIDTH)
        skew = _SKEW if len(self._starts) > 1 else 0
        home = device if place == "device" else torch.device("cpu")
        self._tiles = [
            # Not zeros: they are read where they were written.
            torch.empty(num_rows, min(WIDTH, n - start) + skew, dtype=dtype, device=home)
            for start in self._starts
        ]
        self._skew = skew
        self._stage = _Stage(self._tiles, device) if is_staged(place, device) else None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and their length."""
        return self._tiles[0].shape[0], self._n

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self._tiles[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, wherever they lie."""
        return sum(tile.nbytes for tile in self._tiles)

    def read(self, row: int) -> Tensor:  # (n,)
        """A row on the device: a view, or a copy."""
        if self._stage is None and len(self._tiles) == 1:
            return self._view(self._tiles[0])[row]
        vector = torch.empty(self._n, dtype=self.dtype, device=self._device)
        for tile, part in zip(self._tiles, vector.split(WIDTH), strict=True):
            part.copy_(self._view(tile)[row], non_blocking=self._is_queued)
        return vector

    def write(self, row: int, vector: Tensor) -> None:  # (n,)
        """Copy a vector into a row.

        Raises:
            RuntimeError: from torch, for a vector of another length.
        """
        if self._stage is not None and vector.device.type != self._device.type:
            vector = vector.to(self._device)  # the device's queue alone touches tiles that lie on the host
        for tile, part in zip(self._tiles, vector.expand(self._n).split(WIDTH), strict=True):
            self._view(tile)[row].copy_(part, non_blocking=self._is_queued)

    def divide(self, row: int, divisor: float) -> None:
        """Divide a row by a number."""
        for tile in self._on_device(row, row + 1, changed=(row, row + 1)):
            tile[row].div_(divisor)

    def products(self, first: int, last: int, *, normed: bool) -> Tensor:  # (last - first,) or one more
        """Inner products of row `last` with those from `first` on.

        If `normed`, with itself, too. In float64 on the device, unread.
        """
        found = [blocked.products(tile[first : last + 1], normed=normed) for tile in self._on_device(first, last + 1)]
        return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0)

    def subtract(self, first: int, last: int, coefficients: Tensor) -> None:  # (last - first,)
        """Subtract from row `last` a sum of those from `first` on."""
        for tile in self._on_device(first, last + 1, changed=(last, last + 1)):
            coefficients = coefficients.to(tile)
            tile[last].addmv_(tile[first:last].T, coefficients, alpha=-1)

    def contract(self, rotation: Tensor) -> None:  # (m, kept)
        """Replace the first m rows V by rotation^T V.

        Row m, the pending one, moves up behind them.
        """
        m, kept = rotation.shape
        for tile in self._on_device(0, m + 1, changed=(0, kept + 1)):
            blocked.rotate(tile[:m], rotation, tile[:kept])
            if kept < m:
                tile[kept].copy_(tile[m])

    def rotated(self, rotation: Tensor) -> Tensor:  # (m, c) to (c, n)
        """rotation^T times the first m rows, on the device."""
        m, count = rotation.shape
        found = torch.empty(count, self._n, dtype=self.dtype, device=self._device)
        for tile, part in zip(self._on_device(0, m), found.split(WIDTH, dim=1), strict=True):
            blocked.rotate(tile[:m], rotation, part)
        return found

    def whole(self, count: int) -> Tensor:  # (count, n)
        """The first rows: a view, or a copy on the device."""
        if self._stage is None and len(self._tiles) == 1:
            return self._view(self._tiles[0])[:count]
        return torch.stack([self.read(row) for row in range(count)])

    @property
    def _is_queued(self) -> bool:
        """Whether all that touches the tiles is in the device's queue."""
        return self._stage is not None and self._stage.is_queued

    def _on_device(self, first: int, last: int, changed: tuple[int, int] = (0, 0)) -> Iterator[Tensor]:
        """Each tile, with these rows on the device; `changed` ones stay."""
        tiles = self._tiles if self._stage is None else self._stage.run(first, last, changed)
        return map(self._view, tiles)

    def _view(self, tile: Tensor) -> Tensor:
        return tile[:, : tile.shape[1] - self._skew]


def is_staged(place: BasisPlace, device: torch.device) -> bool:
    """Whether what lies there is copied to a device for computations."""
    return place == "cpu" and device.type != "cpu"


class _Stage:
    """Two buffers on a device, which take turns.

    On CUDA transfers have a stream of their own: one tile is fetched while another is computed with. All that touches
    the tiles is in the order of streams; the host never waits.
    """

    def __init__(self, tiles: list[Tensor], device: torch.device) -> None:
        self._tiles, self._device = tiles, device
        self._buffers = [torch.empty_like(tile, device=device) for tile in tiles[:2]]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_queued = self._stream is not None
        if self.is_queued:
            _pin(self, tiles, device)

    def run(self, first: int, last: int, changed: tuple[int, int]) -> Iterator[Tensor]:
        """Each tile, with these rows on the device; `changed` ones go back."""
        stream, current = self._stream, self._current
        _follow(stream, current)
        ahead = self._fetch(0, first, last)
        for number, tile in enumerate(self._tiles):
            buffer, arrival = ahead
            if number + 1 < len(self._tiles):
                ahead = self._fetch(number + 1, first, last)
            if current is not None and arrival is not None:
                current.wait_event(arrival)
            yield buffer
            _follow(stream, current)
            with torch.cuda.stream(stream):  # nothing where there is none
                rows = slice(*changed)
                tile[rows].copy_(buffer[rows], non_blocking=self.is_queued)
        _follow(current, stream)

    def _fetch(self, number: int, first: int, last: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy rows of a tile: where to, and their arrival."""
        tile = self._tiles[number]
        # The last tile may be narrower: its copy begins in the same place and has its own strides.
        buffer = self._buffers[number % 2].view(-1)[: tile.numel()].view(tile.shape)
        with torch.cuda.stream(self._stream):
            buffer[first:last].copy_(tile[first:last], non_blocking=self.is_queued)
            return buffer, None if self._stream is None else self._stream.record_event()

    @property
    def _current(self) -> torch.cuda.Stream | None:
        return None if self._stream is None else torch.cuda.current_stream(self._device)


def _follow(stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
    """Have a stream wait for what another one has to do."""
    if stream is not None and other is not None:
        stream.wait_stream(other)


def _pin(owner: object, tiles: list[Tensor], device: torch.device) -> None:
    """Pin the memory of tiles as long as their owner lives.

    Not by torch's own allocator, which takes the next power of two, and keeps it when this is over.
    """
    runtime = torch.cuda.cudart()
    pinned = [
        tile for tile in tiles if tile.nbytes and not int(runtime.cudaHostRegister(tile.data_ptr(), tile.nbytes, 0))
    ]

    def unpin() -> None:  # holds the tiles, too, until then
        torch.cuda.synchronize(device)
        for tile in pinned:
            runtime.cudaHostUnregister(tile.data_ptr())

    weakref.finalize(owner, unpin).atexit = False  # the process gives its memory back itself
