"""Exceptions that wait, what their frames hold, and which of them are of memory."""

import contextlib
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


def handled(kind, call):
    """What a call gives inside of the handler of another exception, and the names that its frame has left."""
    try:
        fail([], kind)
    except kind as mine:
        frame = mine.__traceback__.tb_next.tb_frame
        return call(), list(frame.f_locals)


def own(kind):
    """A failure and one that comes of it, caught: whether it is of memory."""
    try:
        try:
            raise kind
        except kind:
            raise RuntimeError("a wrapper") from None
    except RuntimeError as error:
        free_frames(error)
        return is_out_of_memory(error)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("around", [torch.OutOfMemoryError, ValueError])
def test_what_a_caller_handles_is_its_own(kind, around):
    assert handled(around, lambda: own(kind)) == (kind is torch.OutOfMemoryError, ["seen", "kind", "local"])


def test_what_left_a_context_manager_is_no_callers():
    """Its frame catches the exception: the one of the `with` calls it, and has handled the cause."""

    @contextlib.contextmanager
    def asks():
        try:
            yield
        except RuntimeError as error:
            answers.append(is_out_of_memory(error))

    answers = []
    with asks():
        try:
            raise MemoryError
        except MemoryError:
            raise RuntimeError("a wrapper") from None
    assert answers == [True]


@pytest.mark.parametrize("raises", ["it", "another"])
def test_a_generator_that_has_kept_its_failure_goes_on(raises):
    def batches():
        for index in range(4):
            local = Large()
            try:
                if index == 1:
                    raise ValueError("a bad record, passed over")
            except ValueError as error:
                kept.append(error)
            yield index
        del local

    kept, iterator = [], batches()
    assert [next(iterator), next(iterator)] == [0, 1]
    try:
        if raises == "it":
            raise kept[0]
        raise KeyError("another") from kept[0]
    except (KeyError, ValueError) as error:
        free_frames(error)
    assert list(iterator) == [2, 3]


def test_the_frame_of_a_generator_that_has_ended_is_freed():
    def batches():
        local = Large()
        seen.append(weakref.ref(local))
        yield 0
        raise ValueError("of its time")

    seen = []
    with pytest.raises(ValueError, match="of its time") as caught:
        list(batches())
    assert seen[0]() is not None
    free_frames(caught.value)
    assert seen[0]() is None
