"""Threads of the user's, which see a probe's random numbers.

The global random generators of torch, NumPy and Python belong to all threads. A probe seeds them and puts them back: a
thread that draws from them meanwhile gets the probe's numbers, and training then draws as if it had not. Nothing can
keep a thread from that, so such threads are looked for, to be told.

A thread is the user's where code of another package than these runs in it at this moment. Threads that wait in
Python's own code do nothing of their own: an idle worker of an executor, the feeder of a queue.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType

# Packages whose threads draw no random numbers that training would miss: writers, monitors, transfers to a device.
HARMLESS = frozenset({
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "lightning_subspace"),
    *("tensorboard", "tensorboardX", "torchmetrics", "tqdm", "rich", "matplotlib", "numpy"),
    *("wandb", "mlflow", "comet_ml", "neptune", "aim", "clearml", "litlogger", "sentry_sdk"),
    *("fsspec", "urllib3", "requests", "aiohttp", "grpc", "zmq", "tornado"),
    *("ipykernel", "IPython", "jupyter_core", "jupyter_client", "nbclient", "debugpy", "pydevd"),
    *("psutil", "pynvml", "watchdog", "_pytest", "pytest", "xdist", "execnet"),
})  # fmt: skip


def other_threads() -> list[str]:
    """Names of threads that run the user's code, but this and main.

    Example:
        >>> other_threads()
        []
    """
    frames = frames_of_others()
    own = {threading.main_thread().ident, threading.get_ident()}
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.ident not in own and any(map(_is_of_user, _packages(thread, frames.get(thread.ident or 0))))
    ]


def frames_of_others() -> dict[int, FrameType]:
    """Frames of all threads but this one, by the thread.

    A variable that had this thread's own would be a cycle, which keeps the locals of all callers until a garbage
    collection: of a probe, say.
    """
    own = threading.get_ident()
    # Documented, with the underscore, as the one way to the frames of other threads.
    return {ident: frame for ident, frame in sys._current_frames().items() if ident != own}


def _packages(thread: threading.Thread, frame: FrameType | None) -> Iterator[str]:
    """Packages whose code runs in a thread, or will after a time."""
    if isinstance(thread, threading.Timer):
        yield (getattr(thread.function, "__module__", None) or "").partition(".")[0]
    while frame is not None:
        yield str(frame.f_globals.get("__name__", "")).partition(".")[0]
        frame = frame.f_back


def _is_of_user(package: str) -> bool:
    return bool(package) and package not in HARMLESS and package not in sys.stdlib_module_names
