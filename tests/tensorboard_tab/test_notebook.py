"""A cell of a notebook with %tensorboard, run by a real kernel, and what it shows in a browser."""

import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tensorboard_tab.browser import PATIENCE, Tab
from tests.tensorboard_tab.runs import write
from tests.tensorboard_tab.server import SERVE

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

CELLS = (
    "%load_ext tensorboard",
    "%tensorboard --logdir {logs} --port 0 --reload_interval 1",
    "from tensorboard import manager\nprint(*(info.pid for info in manager.get_all()))",
)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and does not say so."""

    def log_message(self, *what):
        pass


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The cells after they were run, while their kernel is there; the TensorBoard that they start is ended."""
    write(tmp_path / "logs" / "a", range(0, 1100, 100)).close()
    # The TensorBoard that the cell starts, from this copy of the package; and its own folder for what it notes of it.
    binary = tmp_path / "board"
    start = f"import runpy, sys\nsys.argv[1:1] = ['none']\nrunpy.run_path({str(SERVE)!r}, run_name='__main__')\n"
    binary.write_text(f"#!{sys.executable}\n{start}")
    binary.chmod(0o755)
    root = Path(SERVE).parents[2]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    for name, value in {"TENSORBOARD_BINARY": str(binary), "TMPDIR": str(tmp_path), "PYTHONPATH": paths}.items():
        monkeypatch.setenv(name, value)
    cells = [nbformat.v4.new_code_cell(cell.format(logs=tmp_path / "logs")) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=PATIENCE // 500, kernel_name="python3")
    with client.setup_kernel():
        for number, cell in enumerate(notebook.cells):
            client.execute_cell(cell, number)
        yield notebook
    for pid in map(int, notebook.cells[-1].outputs[0].text.split()):
        with suppress(ProcessLookupError):  # it may have ended with its kernel
            os.kill(pid, signal.SIGTERM)


# `test_tensorboard_may_be_in_a_frame_of_another_page` has what this package has to do with it.
@pytest.mark.thorough
def test_a_cell_shows_the_tab(ran, tmp_path, browser):
    [html] = [output["data"]["text/html"] for output in ran.cells[1].outputs if "data" in output]
    (tmp_path / "notebook").mkdir()
    (tmp_path / "notebook" / "index.html").write_text(f"<!doctype html><body>{html}</body>")
    handler = partial(Quiet, directory=str(tmp_path / "notebook"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = Tab(browser, f"http://127.0.0.1:{server.server_port}/index.html")
        try:
            board = tab.page.frame_locator("iframe")
            board.get_by_role("tab", name="Subspace").click()
            inside = board.frame_locator("iframe[src*=lightning_subspace]")
            inside.locator("body[data-ready='1']").wait_for()
            tab.shot("notebook")
            assert inside.locator("#at").inner_text() == "1,000 (11 of 11)"
            inside.locator(".shares .hit").click()
            inside.locator("h3", has_text="Spectrum at step 500").wait_for()
        finally:
            tab.close()
            server.shutdown()
