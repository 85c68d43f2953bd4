"""The installed package as its README shows it: the quick start, then TensorBoard with the tab.

    EMPTY/bin/python tests/package/tried.py

Run by the Python of an environment that has the wheel and what it asks for, and nothing else, in an empty folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TAB = "data/plugin/lightning_subspace"
PATIENCE = 90.0  # seconds until the server answers
NOT_ASKED_FOR = ("pytest", "sklearn", "jsonargparse", "wandb")  # of the extras


def main() -> None:
    import lightning_subspace

    place = Path(lightning_subspace.__file__)
    assert ROOT not in place.parents, f"{place} is the checkout, not what was installed"
    present = [name for name in NOT_ASKED_FOR if importlib.util.find_spec(name)]
    assert not present, f"the environment is not empty: {present}"
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert code is not None
    names: dict[str, Any] = {"__name__": "__readme__"}
    exec(compile(code[1], "README.md", "exec"), names)
    steps = [row["step"] for row in names["monitor"].to_rows()]
    assert Path("subspace.png").stat().st_size > 0
    with served(Path("lightning_logs")) as url:
        ((run, (tag,)),) = answer(f"{url}/{TAB}/runs")["runs"].items()
        probes = answer(f"{url}/{TAB}/probes?{urllib.parse.urlencode({'run': run, 'tag': tag})}")["probes"]
        page = read(f"{url}/{TAB}/static/index.js")
    assert [probe["step"] for probe in probes] == steps
    print(f"{place.parent}: {len(steps)} probes in the tab, whose page begins with {len(page):,} bytes")


@contextlib.contextmanager
def served(logs: Path) -> Any:
    """TensorBoard as its own command starts it; the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logs),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
        while not has_runs(url):
            assert server.poll() is None, "TensorBoard has ended"
            assert time.monotonic() < end, f"no probes within {PATIENCE:.0f} s"
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(20)


def has_runs(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(answer(f"{url}/{TAB}/runs")["runs"])
    return False


def answer(url: str) -> Any:
    return json.loads(read(url))


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as response:
        return bytes(response.read())


if __name__ == "__main__":
    main()
