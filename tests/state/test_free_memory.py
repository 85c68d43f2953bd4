"""Memory that is free: what the host has available and what the limit of a container leaves, whichever is less."""

import os

import pytest
import torch

from lightning_subspace.state import free_memory as module
from lightning_subspace.state.free_memory import free_memory

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
