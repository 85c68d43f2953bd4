"""Exceptions that wait to be raised, and what their frames hold.

A traceback refers to the frames that an exception came through, and they to all that is local in them: batches,
activations, graphs. So an exception that is kept keeps the memory of what has failed. And where one of its frames
refers to the exception, the two are a cycle, which waits for a garbage collection. Nobody runs one where a GPU is full.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import torch

# What torch says where an allocation fails without an exception class of its own: on a CPU, and in CUDA's libraries.
NO_MEMORY = ("not enough memory", "DefaultCPUAllocator", "out of memory", "_STATUS_ALLOC_FAILED")


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

    Lines and messages stay, and what functions close over. Frames that still run are left as they are.

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
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a device or of the host.

    Also where somebody has made another exception of it.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")), is_out_of_memory(ValueError("memory"))
        (True, False)
    """
    return any(
        isinstance(one, (MemoryError, torch.OutOfMemoryError))
        or (isinstance(one, RuntimeError) and any(text in str(one) for text in NO_MEMORY))
        for one in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, and all that it came of."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
