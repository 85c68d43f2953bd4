"""A TensorBoard in a process of its own, and what it answers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVE = Path(__file__).with_name("serve.py")
PREFIX = "/data/plugin/lightning_subspace"
PATIENCE = 60.0  # seconds for a start on a machine that has other work


def environment(root):
    """One in which the package is imported from a folder."""
    return {**os.environ, "PYTHONPATH": str(root)}


class Server:
    """TensorBoard over a folder of logs.

    `broken` names what is wrong on purpose, see `serve.py`; `root` is where the package is imported from.
    """

    def __init__(self, logdir, *flags, broken="none", root=ROOT, has_data=True, prefix=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}{prefix}"
        self._told = Path(logdir).with_name(f"tensorboard_{port}.log")
        where = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", str(port), "--reload_interval", "1"]
        where += ["--path_prefix", prefix] if prefix else []
        with self._told.open("w") as told:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVE), broken, *where, *flags],
                stdout=told,
                stderr=told,
                env=environment(root),
            )
        self.wait_for(self._has_begun if not has_data else lambda: self._has_begun() and bool(self.runs()))

    @property
    def told(self):
        return self._told.read_text()

    def _has_begun(self):
        assert self.process.poll() is None, self.told
        try:
            self.get("/data/plugins_listing")
        except OSError:
            return False
        return True

    def wait_for(self, holds):
        """Ask until something holds."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, self.told
            time.sleep(0.05)

    def fetch(self, path, **query):
        """Status, content type and bytes of an answer."""
        request = f"{self.url}{path}?{urllib.parse.urlencode(query)}" if query else f"{self.url}{path}"
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read()

    def get(self, path, **query):
        status, _, body = self.fetch(path, **query)
        assert status == 200, (status, body)
        return json.loads(body)

    def runs(self):
        return self.get(f"{PREFIX}/runs")["runs"]

    def probes(self, run, tag="subspace/probes", **query):
        return self.get(f"{PREFIX}/probes", run=run, tag=tag, **query)["probes"]

    def steps(self, run, **query):
        return [probe["step"] for probe in self.probes(run, **query)]

    def close(self):
        self.process.terminate()
        self.process.wait(20)
