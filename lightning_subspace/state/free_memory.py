"""Memory that this process may still take."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")  # the limit and the use of a container (cgroup v2)
MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device now.

    On a CPU the limit of this container counts, too. The cache of files counts as free: the kernel gives it up where
    memory is asked for.
    """
    if device.type == "cuda":  # untested: no GPU was available
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_left_on_host(), _left_in_container())


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
