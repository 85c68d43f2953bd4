"""A function in several processes that talk over gloo, on this machine and without a launcher.

The processes are forked, so nothing is imported again and a function may be a closure. They find the environment that
`torchrun` gives: Lightning then takes them for processes started by somebody else and starts none itself.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

TIMEOUT = 30.0  # seconds
# A process that fails takes the others along, over their broken connections. This is how long they may take.
GRACE = 2.0


class RankErrorsError(RuntimeError):
    """What every process of a failed run says."""


def run(
    function: Callable[..., Any], world_size: int, *args: Any, group: bool = True, timeout: float = TIMEOUT
) -> list[Any]:
    """`function(*args)` in `world_size` processes; what it returned, by rank.

    Inside, `torch.distributed.get_rank()` tells the processes apart, and so does the variable RANK.

    Args:
        function: what to run; it returns something that can be pickled.
        world_size: number of processes.
        args: of the function.
        group: make the default process group before and destroy it after; without, it is left to a Trainer.
        timeout: seconds until all processes are killed.

    Raises:
        Exception: what the function raised in the first process that failed, caused by a `RankErrorsError` with the
            tracebacks of all of them.
        TimeoutError: with the place where every process stood.
    """
    context = multiprocessing.get_context("fork")
    processes, pipes = [], []
    port, is_open = context.Value("i"), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, str(rank)) for rank in range(world_size)]
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                task = (function, args, group, sender, stacks[rank], environment(rank, world_size), port, is_open)
                process = context.Process(target=_child, args=task)  # no daemon: loaders start workers
                with warnings.catch_warnings():
                    # Python 3.12 on forking a process that has threads; the process goes on with the other filters
                    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                    process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            # The store lives here: its port is free because it is in use, and no process has to be the first. It comes
            # behind the forks, since it has a thread: of processes forked beside it some hung when they connected.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port.value = store.port
            is_open.set()
            answers = _collect(pipes, timeout)
            if any(answer is None for answer in answers):
                where = "\n".join(_stack_of(*pair) for pair in zip(processes, stacks, strict=True))
                if not any(answer is not None and answer[3] for answer in answers):
                    raise TimeoutError(f"{world_size} processes did not finish in {timeout:.0f} s:\n{where}")
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            # A traceback may keep this frame. If a process that is forked later parts with a store, it joins the
            # store's thread, which it has not got, and crashes.
            store = None
    return _unpacked(answers)


def environment(rank: int, world_size: int) -> dict[str, str]:
    """What `torchrun` gives to a process, but for MASTER_PORT."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # every process is a client of the store
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }
    return {name: str(value) for name, value in values.items()}


def _child(function, args, group, sender, stack, environment, port, is_open) -> None:
    is_open.wait()
    os.environ.update(environment, MASTER_PORT=str(port.value))
    rank_zero_only.rank = int(environment["RANK"])  # lightning reads the variable when it is imported
    torch.set_num_threads(1)
    with stack.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        try:
            if group:
                dist.init_process_group("gloo")
            answer = pickle.dumps(function(*args)), None, None
            if group:  # after a failure it stays, or the others would fail of that, and seem to be first
                dist.destroy_process_group()
        except BaseException as error:
            answer = None, _picklable(error), traceback.format_exc()
        # not `send`, which would hand tensors over in shared memory of a process that is about to end
        sender.send_bytes(pickle.dumps((time.monotonic(), *answer)))
        sender.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # whatever pytest and Lightning have registered for the end is the parent's business


def _picklable(error: BaseException) -> bytes | None:
    with contextlib.suppress(Exception):
        packed = pickle.dumps(error)
        pickle.loads(packed)
        return packed
    return None


def _collect(pipes: list[Any], timeout: float) -> list[Any]:
    """What the processes sent, by rank: when, the result, the exception, its traceback; None where nothing came."""
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(pipes):
        waiting = [pipe for i, pipe in enumerate(pipes) if i not in answers]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            try:
                answer = pickle.loads(pipe.recv_bytes())
            except EOFError:
                answer = (time.monotonic(), None, None, "the process ended without a word")
            answers[pipes.index(pipe)] = answer
            if answer[3] is not None:
                deadline = min(deadline, time.monotonic() + GRACE)
    return [answers.get(rank) for rank in range(len(pipes))]


def _stack_of(process: Any, stack: Path) -> str:
    """Where a process is."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
    return f"{process.name}:\n{stack.read_text()}"


def _unpacked(answers: list[Any]) -> list[Any]:
    failures = sorted((a[0], rank) for rank, a in enumerate(answers) if a is not None and a[3] is not None)
    if not failures:
        return [pickle.loads(answer[1]) for answer in answers]
    texts = [
        f"rank {rank}: " + ("killed, since another one had failed" if a is None else a[3] or "finished")
        for rank, a in enumerate(answers)
    ]
    cause = RankErrorsError("\n".join(texts))
    packed = answers[failures[0][1]][2]
    if packed is None:
        raise cause
    raise pickle.loads(packed) from cause
