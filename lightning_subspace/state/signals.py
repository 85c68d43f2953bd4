"""Signals whose handlers wait while a module holds copies.

Python runs the handler of a signal between any two instructions of the main thread. One that saves a checkpoint, as
Lightning's for SLURM does, would save a probe's copies. So within `waiting_signals` a stand-in takes the place of every
handler and keeps what comes. The probe asks at each evaluation and each product, gives up where something has come, and
puts everything back; then the handlers run, in the order and with the arguments that the signals came with.

SIGINT raises KeyboardInterrupt at once, as ever. Handlers that are not Python's are left alone, and signals that ask
nothing of a program: of its children, of profilers, of its terminal, of faults. In another thread than the main one
nothing can be done: Python lets the main thread alone set handlers, and runs them there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Named, since not every system has all of them.
NOT_HELD = (
    *("SIGINT", "SIGCHLD", "SIGCLD", "SIGPIPE", "SIGURG", "SIGIO", "SIGPOLL", "SIGKILL", "SIGSTOP"),
    *("SIGPROF", "SIGVTALRM", "SIGWINCH", "SIGTSTP", "SIGTTIN", "SIGTTOU"),
    *("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGIOT", "SIGTRAP", "SIGSYS", "SIGEMT", "SIGSTKFLT"),
)


class SignalError(RuntimeError):
    """A signal has come: a measurement gives up, and its handler runs.

    Attributes:
        signals: the names of what has come, in order.
    """

    def __init__(self, *signals: str) -> None:
        super().__init__(*signals)
        self.signals = signals

    def __str__(self) -> str:
        return f"gave up since signal {', '.join(self.signals)} arrived"


@contextmanager
def waiting_signals() -> Iterator[None]:
    """Context in which handlers wait; they run at its end.

    One inside of another is part of that. What a handler raises is raised here.

    Example:
        >>> heard = []
        >>> before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
        >>> with waiting_signals():
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(len(heard))
        0
        >>> len(heard)
        1
        >>> _ = signal.signal(signal.SIGTERM, before)
    """
    global _waiting  # handlers belong to the process
    if not _is_main_thread() or _here() is not None:
        yield
        return
    waiting = _Waiting()
    try:
        _waiting = waiting  # before the first stand-in, which looks here
        waiting.install()
        yield
    finally:
        _waiting = None
        waiting.put_back()
        waiting.deliver()


def give_up_if_signalled() -> None:
    """Raise where a signal waits.

    Raises:
        SignalError: naming it.
    """
    if (waiting := _here()) is not None and _is_main_thread():
        waiting.install_again()  # a training step may have set a handler of its own
        if waiting.arrived:
            waiting.has_raised = True
            # A copy, made between two instructions: the next signal may come while the names are looked up.
            raise SignalError(*(_name(signum) for signum, _ in tuple(waiting.arrived)))


def give_up_again() -> None:
    """Raise anew what `give_up_if_signalled` raised and somebody has swallowed.

    Raises:
        SignalError: naming the signals.
    """
    if (waiting := _here()) is not None and waiting.has_raised:
        give_up_if_signalled()


class _Waiting:
    """Stand-in for the handlers of a process; keeps what comes."""

    def __init__(self) -> None:
        self.arrived: deque[tuple[int, FrameType | None]] = deque()
        self.has_raised = False
        self.pid = os.getpid()
        found = {signum: signal.getsignal(signum) for signum in signal.valid_signals() if _name(signum) not in NOT_HELD}
        # None: set by somebody else than Python, who could not set it again.
        self._before: dict[int, Any] = {signum: handler for signum, handler in found.items() if handler is not None}
        self._held = [signum for signum, handler in self._before.items() if _acts(handler)]

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Keep a signal; pass it on where nothing waits, as in forks."""
        if _here() is self:
            self.arrived.append((signum, frame))
        elif callable(handler := self._before[signum]):
            handler(signum, frame)

    def install(self) -> None:
        """Take the place of the handlers."""
        for signum in self._held:
            # Read once more: the handler of a signal that came since may have set another one.
            self._before[signum] = signal.signal(signum, self)

    def install_again(self) -> None:
        """Take the place of handlers set meanwhile; `put_back` drops them."""
        for signum in self._held:
            if signal.getsignal(signum) is not self:
                signal.signal(signum, self)

    def put_back(self) -> None:
        """Set all handlers as they were, whatever a training step has set."""
        for signum, handler in self._before.items():
            if signal.getsignal(signum) is not handler:
                signal.signal(signum, handler)

    def deliver(self) -> None:
        """Run the handlers of what has come, also behind one that raises."""
        while self.arrived:
            signum, frame = self.arrived.popleft()
            try:
                _run(signum, frame)
            except BaseException:
                self.deliver()
                raise


_waiting: _Waiting | None = None


def _here() -> _Waiting | None:
    """What waits in this process, not in one it was forked from."""
    return _waiting if _waiting is not None and _waiting.pid == os.getpid() else None


def _run(signum: int, frame: FrameType | None) -> None:
    """Do what a signal does now: its handler may be another."""
    handler = signal.getsignal(signum)
    if callable(handler):
        handler(signum, frame)
    elif handler is signal.SIG_DFL:
        signal.raise_signal(signum)


def _acts(handler: Any) -> bool:
    """Whether a handler is Python's and acts at once; asyncio's does not."""
    return callable(handler) and not (getattr(handler, "__module__", None) or "").startswith("asyncio.")


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # one of the real-time signals between the first and the last
        return f"signal {int(signum)}"


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
