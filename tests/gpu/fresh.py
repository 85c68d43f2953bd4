"""A function in fresh processes: CUDA cannot be used in forked ones, and some of its state is one for a process.

A process reads from a file which function to call, imports it, and writes what it returned to another one.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gpu.device import IS_CARD

ROOT = Path(__file__).parents[2]
TIMEOUT = 240.0 if IS_CARD else 1200.0  # seconds; a rehearsal may share few cores with much else


def run(function: Callable[..., Any], *args: Any, ranks: int | None = None, timeout: float = TIMEOUT) -> list[Any]:
    """`function(*args)` in one process, or in `ranks` that find the environment of `torchrun`; what it returned.

    Raises:
        RuntimeError: when a process fails or takes too long, with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").write_bytes(pickle.dumps((function, args)))
        store, environments = _environments(ranks)
        processes = []
        try:
            for i, environment in enumerate(environments):
                command = [sys.executable, "-m", "tests.gpu.fresh", str(folder), str(i)]
                with (folder / f"output {i}").open("w") as output:
                    process = subprocess.Popen(
                        command, cwd=ROOT, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
                    )
                processes.append(process)
            _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            del store
        if any(process.returncode for process in processes):
            texts = [f"process {i}:\n{(folder / f'output {i}').read_text()[-4000:]}" for i in range(len(processes))]
            raise RuntimeError("\n".join(texts))
        return [pickle.loads((folder / f"result {i}").read_bytes()) for i in range(len(processes))]


def _environments(ranks: int | None) -> tuple[Any, list[dict[str, str]]]:
    """The store that the ranks meet at, which lives as long as it is held, and the variables of each."""
    if ranks is None:
        return None, [{}]
    import torch.distributed as dist

    from tests.processes import environment

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = {"MASTER_PORT": str(store.port), "NCCL_SOCKET_IFNAME": "lo"}  # one machine, which may have no network
    return store, [environment(rank, ranks) | here for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> None:
    """Until all have ended, one has failed, or time is up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.05)


def main(folder: Path, number: str) -> None:
    function, args = pickle.loads((folder / "task").read_bytes())
    (folder / f"result {number}").write_bytes(pickle.dumps(function(*args)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
