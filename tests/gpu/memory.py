"""A limit on the memory of this process, and what is taken of it: of the allocator on a card.

In a rehearsal there is no such limit. There, activations are counted that a network has announced by `noted` and whose
storage is still alive, and announcing one beyond the limit raises what torch raises on a card.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from tests.gpu.device import IS_CARD

_alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # with its size, in the order of announcement
_count, _limit, _peak = 0, math.inf, 0


def noted(tensor: Tensor) -> Tensor:
    """Announce an activation; on a card the allocator knows.

    Raises:
        OutOfMemoryError: beyond the limit of a rehearsal.
    """
    global _count, _peak
    if not IS_CARD:
        _count += 1
        _alive[_count] = weakref.ref(tensor.untyped_storage()), tensor.nbytes
        _peak = max(_peak, taken())
        if taken() > _limit:
            raise torch.OutOfMemoryError("CUDA out of memory. (A rehearsal.)")
    return tensor


def taken() -> int:
    """Bytes in use now."""
    if IS_CARD:
        return torch.cuda.memory_allocated()
    for number in [number for number, (ref, _) in _alive.items() if ref() is None]:
        del _alive[number]
    return sum(size for _, size in _alive.values())


def peak() -> int:
    """Most bytes that were taken since `forget_peak`, with what the allocator had beside."""
    return torch.cuda.max_memory_reserved() if IS_CARD else _peak


def forget_peak() -> None:
    global _peak
    if IS_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        _peak = taken()


def limit(size: float) -> None:
    """Allow this process so many bytes from now on."""
    global _limit
    if IS_CARD:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))
    else:
        _limit = size
