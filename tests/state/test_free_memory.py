"""Memory that is free: what the host has available and what the limit of a container leaves, whichever is less.

On a GPU: what the driver and the limit of the process leave, and what torch's allocator holds free. The numbers are
those of a fake in place of `torch.cuda`.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from lightning_subspace.state import free_memory as module
from lightning_subspace.state.free_memory import free_memory, remember_limits
from lightning_subspace.state.peak_memory import PeakMemory

CPU = torch.device("cpu")
HOST = 1 << 20


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A folder in place of the files of a container, which has none yet; the host has `HOST` bytes."""
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    monkeypatch.setattr(module, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 3 kB\nMemAvailable: {HOST // 1024} kB\n")
    return tmp_path


def test_the_host_gives_what_is_available_with_the_cache_of_files(host):
    assert free_memory(CPU) == HOST  # not MemFree: the kernel gives the cache up


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: many kB\n", "MemFree: 3 kB\n", "no colon\n"])
def test_a_host_that_does_not_say_has_its_free_pages(host, text, monkeypatch):
    (host / "meminfo").write_text(text)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory(CPU) == 5 * 4096
    (host / "meminfo").unlink()
    assert free_memory(CPU) == 5 * 4096


def test_a_host_that_knows_no_free_pages_has_half_of_all(host, monkeypatch):
    (host / "meminfo").unlink()

    def sysconf(name):
        if name == "SC_AVPHYS_PAGES":
            raise ValueError("unrecognized configuration name")
        return {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert free_memory(CPU) == 5 * 4096


def test_the_limit_of_a_container_leaves_what_is_not_taken(host):
    (host / "memory.current").write_text("1000\n")
    assert free_memory(CPU) == HOST
    (host / "memory.max").write_text("max\n")
    assert free_memory(CPU) == HOST
    (host / "memory.max").write_text("7000\n")
    assert free_memory(CPU) == 6_000
    (host / "memory.max").write_text("500\n")
    assert free_memory(CPU) == 0
    (host / "memory.max").write_text(f"{2 * HOST}\n")
    assert free_memory(CPU) == HOST


def test_the_cache_of_files_in_a_container_counts_as_free(host):
    (host / "memory.max").write_text("7000\n")
    (host / "memory.current").write_text("6500\n")
    (host / "memory.stat").write_text("anon 500\nactive_file 1000\ninactive_file 5000\n")
    assert free_memory(CPU) == 5_500
    for other in ("anon 500\n", "inactive_file many\n", "three words here\n"):
        (host / "memory.stat").write_text(other)
        assert free_memory(CPU) == 500


# A GPU

GPU, GB = torch.device("cuda", 1), 10**9


class FakeGPU:
    """A card of 80 GB, of which others have taken some; allocations of this process go up to a limit."""

    def __init__(self, fraction=1.0, others=0):
        self.fraction, self.others = fraction, others
        self.allocated = self.reserved = self.peak = 0

    def allocate(self, size):
        """What torch's allocator does: it takes from what it holds free, else asks the driver up to the limit."""
        needed = max(0, self.allocated + size - self.reserved)
        if self.reserved + needed > min(self.fraction * 80 * GB, 80 * GB - self.others):
            raise torch.OutOfMemoryError
        self.allocated += size
        self.reserved += needed
        self.peak = max(self.peak, self.allocated)

    def install(self, monkeypatch, *, tells_limit=True):
        functions = {
            "mem_get_info": lambda device=None: (80 * GB - self.others - self.reserved, 80 * GB),
            "memory_reserved": lambda device=None: self.reserved,
            "memory_allocated": lambda device=None: self.allocated,
            "max_memory_allocated": lambda device=None: self.peak,
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: 1,
            "get_per_process_memory_fraction": lambda device=None: self.fraction,
        }
        if not tells_limit:
            del functions["get_per_process_memory_fraction"]
        # Without `reset_peak_memory_stats` and `empty_cache`: what is a user's stays as it is.
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(**functions))
        monkeypatch.setattr(module, "_limits", {})
        return self


def fills(gpu):
    """Whether all that is free can be allocated, and no byte more."""
    free = int(free_memory(GPU))
    before = gpu.allocated, gpu.reserved
    gpu.allocate(free)
    gpu.allocated, gpu.reserved = before
    with pytest.raises(torch.OutOfMemoryError):
        gpu.allocate(free + 1)
    return free


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("others", [0, 50 * GB])
def test_a_gpu_gives_what_its_allocator_would(fraction, others, monkeypatch):
    gpu = FakeGPU(fraction, others).install(monkeypatch)
    limit = int(min(fraction * 80 * GB, 80 * GB - others))
    assert fills(gpu) == limit
    gpu.allocate(15 * GB)
    gpu.allocated -= 10 * GB  # which the allocator keeps
    assert fills(gpu) == limit - 5 * GB
    assert free_memory(torch.device("cuda")) == limit - 5 * GB


def test_a_limit_that_was_lowered_leaves_what_is_held(monkeypatch):
    gpu = FakeGPU().install(monkeypatch)
    gpu.allocate(40 * GB)
    gpu.allocated, gpu.fraction = 10 * GB, 0.25
    assert free_memory(GPU) == 30 * GB


def out_of_memory(gpu, size):
    """What torch says, at most 2.7: of a limit of the process where one is set."""
    with pytest.raises(torch.OutOfMemoryError):
        gpu.allocate(size)
    allowed = f"{gpu.fraction * 80 * GB / 2**30:.2f} GiB allowed; " if gpu.fraction < 1 else ""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {size / 2**30:.2f} GiB. GPU 1 has a total capacity of 74.51 GiB of "
        f"which 57.74 GiB is free. Including non-PyTorch memory, this process has 16.76 GiB memory in use. {allowed}"
        "Of the allocated memory 13.04 GiB is allocated by PyTorch, and 3.73 GiB is reserved by PyTorch."
    )


def wrapped(error):
    new = RuntimeError("a wrapper")
    new.__cause__ = error
    return new


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
def test_a_limit_that_torch_does_not_tell_is_known_from_the_first_failure(wrap, monkeypatch):
    gpu = FakeGPU(0.25).install(monkeypatch, tells_limit=False)
    gpu.allocate(18 * GB)
    gpu.allocated -= 4 * GB
    assert free_memory(GPU) == (80 - 18 + 4) * GB  # nothing is known yet
    remember_limits(wrap(out_of_memory(gpu, 7 * GB)))
    hundredth = 2**30 / 100  # the text has two decimals
    assert 6 * GB - hundredth <= free_memory(GPU) <= 6 * GB
    assert free_memory(torch.device("cuda", 0)) == (80 - 18 + 4) * GB  # another card


def test_a_limit_is_forgotten_once_more_is_reserved(monkeypatch):
    gpu = FakeGPU(0.25).install(monkeypatch, tells_limit=False)
    remember_limits(out_of_memory(gpu, 21 * GB))
    gpu.allocate(20 * GB)
    assert free_memory(GPU) == 0  # exactly the limit: not more
    gpu.fraction = 1.0
    gpu.allocate(GB)
    assert free_memory(GPU) == 59 * GB


@pytest.mark.parametrize("others", [0, 60 * GB])
def test_another_lack_of_memory_teaches_no_limit(others, monkeypatch):
    """Of the host; of a full card; for one request that is larger than all that is free."""
    gpu = FakeGPU(others=others).install(monkeypatch, tells_limit=False)
    gpu.allocate(2 * GB)
    remember_limits(MemoryError())
    remember_limits(RuntimeError("DefaultCPUAllocator: not enough memory"))
    remember_limits(out_of_memory(gpu, 79 * GB))
    gpu.others = 0
    assert free_memory(GPU) == 78 * GB


def test_an_allocator_without_statistics_has_what_the_driver_has(monkeypatch):
    FakeGPU(others=60 * GB).install(monkeypatch)

    def refuse(device=None):
        raise RuntimeError("the allocator does not support it")

    for name in ("memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert free_memory(GPU) == 20 * GB
    assert PeakMemory(GPU).text is None


def test_a_peak_is_read_and_never_reset(monkeypatch):
    gpu = FakeGPU().install(monkeypatch)
    gpu.allocate(3 * GB)
    gpu.allocated = GB
    peak = PeakMemory(GPU)
    gpu.allocate(GB)
    assert peak.text == "at most the peak of 3000.0 MB that the GPU has had before (measured)"
    gpu.allocate(2 * GB)
    assert peak.text == "a peak of 4000.0 MB with all else on the GPU (measured)"
    assert PeakMemory(CPU).text is None
