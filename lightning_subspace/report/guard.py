"""Guard around output: what goes wrong is told, and stays there."""

from __future__ import annotations

from types import TracebackType

from lightning_subspace.parallel.ranks import in_words
from lightning_subspace.state.notice import warn


class Guard:
    """A context manager that turns an exception into a warning.

    Every `Exception` counts, `MemoryError` and `RecursionError` among them; `KeyboardInterrupt` and `SystemExit` pass.
    Each kind of failure is told once.

    Example:
        >>> import warnings
        >>> guard = Guard()
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     with guard.of("the figure"):
        ...         raise MemoryError("no room")
        >>> [str(warning.message) for warning in told]
        ['the figure: MemoryError: no room; training goes on, and later failures like it are not told.']
    """

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def of(self, lost: str) -> _Guarded:
        """Guard a block; `lost` says what is not there if it fails."""
        return _Guarded(lost, self._told)


class _Guarded:
    def __init__(self, lost: str, told: set[tuple[str, str]]) -> None:
        self._lost = lost
        self._told = told

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if kind is None or not isinstance(error, Exception):
            return False
        cause = (self._lost, kind.__name__)
        if cause not in self._told:
            self._told.add(cause)
            warn(
                f"{self._lost}: {in_words(error)}; training goes on, and later failures like it are not told.",
                stacklevel=3,
            )
        return True
