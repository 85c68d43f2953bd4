"""Exceptions that wait to be raised, and what their frames hold.

A traceback refers to the frames that an exception came through, and they to all that is local in them: batches,
activations, graphs. So an exception that is kept keeps the memory of what has failed. And where one of its frames
refers to the exception, the two are a cycle, which waits for a garbage collection. Nobody runs one where a GPU is full.

Python makes what is being handled the context of all that is raised meanwhile: also of a failure here, where the user
calls this in a handler of their own. That exception and its frames are theirs, and a chain ends before it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import FrameType

import torch

# What torch says where an allocation fails without an exception class of its own: on a CPU, and in CUDA's libraries.
NO_MEMORY = ("not enough memory", "DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED")
OF_GENERATOR = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


class Waiting:
    """An exception that is raised later; false while there is none.

    Example:
        >>> waiting = Waiting()
        >>> try:
        ...     raise ValueError("of its time")
        ... except ValueError as error:
        ...     waiting.keep(error)
        >>> bool(waiting)
        True
        >>> waiting.end()
        Traceback (most recent call last):
        ...
        ValueError: of its time
        >>> bool(waiting)
        False
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def __bool__(self) -> bool:
        return self._error is not None

    def keep(self, error: Exception) -> None:
        """Keep the first exception, without what its frames hold.

        Later ones are consequences of it.
        """
        free_frames(error)
        if self._error is None:
            self._error = error

    def drop(self) -> None:
        """Forget the exception."""
        self._error = None

    def end(self, *, keeps: bool = False) -> None:
        """Raise what was kept, if anything, and forget it.

        Args:
            keeps: whether it is to be raised again. Whoever catches it has to free its frames, which lead back here.

        Raises:
            Exception: the one that was kept.
        """
        error, self._error = self._error, self._error if keeps else None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame


def free_frames(error: BaseException) -> None:
    """Free the locals of finished frames, of an exception and its causes.

    Lines and messages stay, and what functions close over. Frames that still run are left as they are, and those of
    generators and coroutines that wait to go on, which `traceback.clear_frames` would close before Python 3.13.

    Example:
        >>> import weakref
        >>> def fail():
        ...     local = torch.ones(2)
        ...     seen.append(weakref.ref(local))
        ...     raise ValueError
        >>> seen = []
        >>> try:
        ...     fail()
        ... except ValueError as error:
        ...     free_frames(error)
        ...     print(seen[0]() is None)
        True
    """
    for frame in [frame for one in chain(error) for frame in _frames(one)]:
        if not _waits(frame):
            with suppress(RuntimeError):  # it still runs
                frame.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a device or of the host.

    Also where somebody has made another exception of it; not where a handler of such an exception has called this.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")), is_out_of_memory(ValueError("memory"))
        (True, False)
    """
    return any(
        isinstance(one, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(one, RuntimeError) and any(text in str(one) for text in NO_MEMORY))
        for one in chain(error)
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and all that it came of.

    Without what a caller of the code that caught it was handling already.

    Yields:
        Each exception once, the given one first.

    Example:
        >>> def handle():
        ...     try:
        ...         int("x")
        ...     except ValueError as error:
        ...         return len(list(chain(error)))
        >>> try:
        ...     1 / 0
        ... except ZeroDivisionError:
        ...     handle()
        1
    """
    around = _callers(error)
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        # A traceback begins with the frame that caught the exception.
        if one is error or one.__traceback__ is None or id(one.__traceback__.tb_frame) not in around:
            yield one
            left += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


def _callers(error: BaseException) -> set[int]:
    """Ids of the frames that have called those of an exception."""
    frame = None if error.__traceback__ is None else error.__traceback__.tb_frame
    found: set[int] = set()
    while frame is not None:
        found.add(id(frame))
        frame = frame.f_back
    return found - set(map(id, _frames(error)))  # a context manager's frame catches what has left its caller's


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an exception came through."""
    entry = error.__traceback__
    while entry is not None:
        yield entry.tb_frame
        entry = entry.tb_next


def _waits(frame: FrameType) -> bool:
    """Whether a frame is that of a generator that has not ended.

    Or of a coroutine. Until then its variables are the generator's; it takes them over as that ends, with the code.
    """
    is_of_generator = frame.f_code.co_flags & OF_GENERATOR
    return bool(is_of_generator) and not any(one is frame.f_code for one in gc.get_referents(frame))
