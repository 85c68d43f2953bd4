"""Progress of a long probe, in a line on the progress bar.

A probe may take as long as hundreds of training steps, and a bar that stands still looks like a hang. Each display
below borrows a place on the screen and gives it back. Lightning's bars are recognised by the names of their classes, so
that both of its namespaces work and neither tqdm nor rich is imported.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from lightning_subspace._lightning import Trainer

PATIENCE = 1.0  # seconds before the line appears: that of a short probe would only flicker
INTERVAL = 0.25  # seconds between two refreshes


class ProgressLine:
    """A context manager around a probe that shows its progress.

    The line appears after a second, on rank 0 only, and is erased at the end. Never raises: a display that fails is not
    used again.

    Args:
        trainer: anything with a `progress_bar_callback`; None where there is no trainer.
        clock: seconds from any origin.
        stream: where the line goes when there is no progress bar; by default what `sys.stderr` is at that time.

    Example:
        >>> with ProgressLine(trainer) as line:  # doctest: +SKIP
        ...     line.update("subspace: 12 Hessian products")
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._trainer = trainer
        self._clock = clock
        self._stream = stream
        self._display: _Display | None = None
        self._due = float("inf")

    def __enter__(self) -> ProgressLine:
        """Start the wait of a second."""
        self._due = self._clock() + PATIENCE
        return self

    def update(self, text: str) -> None:
        """Show a short text, at most every quarter of a second."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + INTERVAL
        try:
            if self._display is None:
                self._display = _find_display(self._trainer, self._stream or sys.stderr)
            self._display.show(" ".join(text.split()))
        except Exception:
            self._due = float("inf")

    def __exit__(self, *error: object) -> None:
        """Erase the line."""
        self._due = float("inf")
        display, self._display = self._display, None
        if display is not None:
            with suppress(Exception):
                display.erase()


class _Display:
    """A display that shows nothing."""

    def show(self, text: str) -> None:
        """Replace the text that is shown."""

    def erase(self) -> None:
        """Restore what was there before."""


class _TerminalLine(_Display):
    """A line of its own, overwritten in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._length = 0

    def show(self, text: str) -> None:
        # A line that wraps cannot be erased by a carriage return.
        text = text[: shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(self._length), end="", file=self._stream, flush=True)
        self._length = len(text)

    def erase(self) -> None:
        print("\r" + " " * self._length, end="\r", file=self._stream, flush=True)


class _TqdmPostfix(_Display):
    """The place of the metrics, to the right of a tqdm bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._postfix = bar.postfix

    def show(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def erase(self) -> None:
        self._bar.postfix = self._postfix
        self._bar.refresh()


class _RichDescription(_Display):
    """The description of a rich task, to the left of its bar.

    Not a task of its own: Lightning uses the ids of its tasks as positions in the list of tasks, and another task would
    shift them. Not a print to the console: above a live display that cannot be erased.
    """

    def __init__(self, progress: Any, task_id: Any) -> None:
        self._progress = progress
        self._task_id = task_id
        self._description = next(task.description for task in progress.tasks if task.id == task_id)

    def show(self, text: str) -> None:
        escaped = text.replace("[", r"\[")  # Rich reads square brackets as markup
        self._describe(f"{self._description} · {escaped}")

    def erase(self) -> None:
        self._describe(self._description)

    def _describe(self, description: str) -> None:
        self._progress.update(self._task_id, description=description)
        self._progress.refresh()


def _find_display(trainer: Trainer | None, stream: TextIO) -> _Display:
    """The display for the trainer's progress bar as it is now."""
    callback: Any = getattr(trainer, "progress_bar_callback", None)
    if not getattr(trainer, "is_global_zero", True) or getattr(callback, "is_disabled", False):
        return _Display()
    names = {base.__name__ for base in type(callback).__mro__}
    if "TQDMProgressBar" in names:
        from lightning_subspace._lightning import training_bar  # Lightning takes a while to import

        bar = training_bar(callback)
        if bar is not None and not bar.disable:
            return _TqdmPostfix(bar)
    elif "RichProgressBar" in names:
        progress, task_id = callback.progress, callback.train_progress_bar_id
        if progress is not None:
            # Rich redirects the streams while its display lives: a line without a task would never be erased.
            return _Display() if task_id is None else _RichDescription(progress, task_id)
    elif callback is not None:
        return _Display()  # the user's own bar may be on the terminal's current line
    return _TerminalLine(stream) if stream.isatty() else _Display()
