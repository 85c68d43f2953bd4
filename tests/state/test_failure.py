"""Exceptions that wait, what their frames hold, and which of them are of memory."""

import gc
import weakref

import pytest
import torch

from lightning_subspace.state.failure import Waiting, free_frames, is_out_of_memory


class Large:
    pass


def fail(seen, kind=ValueError):
    local = Large()
    seen.append(weakref.ref(local))
    raise kind("of its time")


def chained(seen):
    try:
        fail(seen)
    except ValueError as error:
        local = Large()
        seen.append(weakref.ref(local))
        raise KeyError("another") from error


def test_an_exception_that_waits_keeps_nothing_and_leaves_no_cycle():
    seen, waiting = [], Waiting()
    gc.collect()
    gc.disable()
    try:
        for step in (chained, fail):
            try:
                step(seen)
            except Exception as error:
                waiting.keep(error)
        assert [reference() for reference in seen] == [None] * 3
        with pytest.raises(KeyError, match="another") as caught:  # the first
            waiting.end(keeps=True)
        assert waiting
        free_frames(caught.value)
        reference = weakref.ref(caught)
        del caught
        with pytest.raises(KeyError, match="another"):
            waiting.end()
        assert not waiting
        assert reference() is None
        waiting.end()
        waiting.keep(ValueError())
        waiting.drop()
        assert not waiting
    finally:
        gc.enable()


def test_lines_stay_where_frames_are_freed():
    seen = []
    with pytest.raises(KeyError) as caught:
        chained(seen)
    free_frames(caught.value)
    names = [entry.frame.code.name for entry in caught.traceback]
    assert names[-1] == "chained"
    assert [reference() for reference in seen] == [None, None]


def raised(kind, *, cause=None):
    error = kind
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (raised(ValueError("a wrapper"), cause=MemoryError()), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),  # no RuntimeError
    ],
)
def test_memory_that_has_run_out_is_known(error, is_short):
    assert is_out_of_memory(error) is is_short
