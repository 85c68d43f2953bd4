"""Memory that this process may still take."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import torch

from lightning_subspace.state.failure import chain

CGROUP = Path("/sys/fs/cgroup")  # the limit and the use of a container (cgroup v2)
MEMINFO = Path("/proc/meminfo")
# How torch's allocator tells the limit of a process where memory runs out: it names one only where one was set.
ALLOWED = re.compile(
    r"^(?:CUDA|HIP) out of memory\..*?GPU (\d+) .*?(\d+(?:\.\d+)?) (bytes|KiB|MiB|GiB) allowed;", re.DOTALL
)
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ROUNDING = 0.005  # of a unit, as the text has two decimals
_limits: dict[int, tuple[float, float]] = {}  # by the index of the GPU: bytes between which its limit is


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device now.

    On a GPU, what torch's allocator holds free counts, too, and a limit of this process bounds it; on a CPU that of its
    container does. The cache of files counts as free: the kernel gives it up where
    memory is asked for.
    """
    if device.type == "cuda":
        return _left_on_gpu(device)
    return min(_left_on_host(), _left_in_container())


def remember_limits(error: BaseException) -> None:
    """Remember the limit on a GPU that an exception tells.

    That of this process, for versions of torch that do not tell it otherwise. It is forgotten once more is reserved: it
    has been raised.
    """
    for one in chain(error):
        if isinstance(one, torch.OutOfMemoryError) and (found := ALLOWED.search(str(one))):
            limit, unit = float(found[2]), UNITS[found[3]]
            _limits[int(found[1])] = (limit - ROUNDING) * unit, (limit + ROUNDING) * unit


def _left_on_gpu(device: torch.device) -> float:
    """Bytes that a GPU's driver would give, and that torch holds free.

    Untested on a GPU so far: the rules are those of its allocator, which takes the limit for what it has reserved.
    """
    free, total = torch.cuda.mem_get_info(device)
    try:
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    except RuntimeError:  # an allocator of somebody else's has no statistics
        return float(free)
    if _tells_limit():
        limit = torch.cuda.get_per_process_memory_fraction(device) * total
    else:
        limit = _remembered_limit(_index(device), reserved, total)
    return max(0.0, min(free, limit - reserved)) + reserved - allocated


def _remembered_limit(index: int, reserved: int, total: int) -> float:
    """Bytes of a remembered limit at least; otherwise all there are."""
    least, most = _limits.get(index, (total, total))
    if reserved > most:
        _limits.pop(index, None)
        return float(total)
    return float(least)


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
    for pages, share in (("SC_AVPHYS_PAGES", 1.0), ("SC_PHYS_PAGES", 0.5)):  # macOS says how many there are at all
        try:
            return share * os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            pass
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
