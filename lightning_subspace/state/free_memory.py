"""Memory that this process may still take."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # the limit and the use of a container (cgroup v2)
MEMINFO = Path("/proc/meminfo")
# A block of torch's allocator for large tensors has 20 MiB or more: where less is free, the GPU itself is full.
SMALLEST_LEFT = 20 << 20
_limits: dict[int, int] = {}  # bytes by the index of the GPU, where memory has run out before


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device now.

    On a GPU, what torch's allocator holds free counts, too, and a limit of this process bounds it; on a CPU that of its
    container does. The cache of files counts as free: the kernel gives it up where
    memory is asked for.
    """
    if device.type == "cuda":
        return _left_on_gpu(device)
    return min(_left_on_host(), _left_in_container())


def remember_limits() -> None:
    """Remember what this process has of GPUs, as memory has run out.

    None gives it more. For versions of torch that cannot tell the limit of a process; that one has been raised since
    is not noticed.
    """
    if _tells_limit() or not torch.cuda.is_initialized():
        return
    for index in range(torch.cuda.device_count()):
        free = torch.cuda.mem_get_info(index)[0]
        with suppress(RuntimeError):  # an allocator of somebody else's has no statistics
            reserved = torch.cuda.memory_reserved(index)
            if reserved and free > SMALLEST_LEFT:  # otherwise the GPU is full, which it may not be later
                _limits[index] = reserved


def _left_on_gpu(device: torch.device) -> float:
    """Bytes that a GPU's driver would give, and that torch holds free.

    Untested on a GPU so far: the rules are those of its allocator, which takes the limit for what it has reserved.
    """
    free, total = torch.cuda.mem_get_info(device)
    try:
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    except RuntimeError:  # an allocator of somebody else's has no statistics
        return float(free)
    limit = float(_limits.get(_index(device), total))
    if _tells_limit():
        limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return max(0.0, min(free, limit - reserved)) + reserved - allocated


def _tells_limit() -> bool:
    return hasattr(torch.cuda, "get_per_process_memory_fraction")  # torch 2.8


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _left_on_host() -> float:
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):  # not Linux
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float(4 << 30)


def _left_in_container() -> float:
    """Bytes that the limit of this process's container leaves; infinite without one."""
    try:
        limit, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or no limit: "max"
        return math.inf
    try:
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        taken -= int(counts["inactive_file"])
    except (OSError, ValueError, KeyError):
        pass
    return float(max(limit - taken, 0))
