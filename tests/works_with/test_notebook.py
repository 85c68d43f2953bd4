"""A project in the cells of a notebook, run by a real kernel, whose threads hold the namespace of the cells."""

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

ROOT = Path(__file__).parents[2]
PROJECT = """
from collections import Counter, deque
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_subspace import SubspaceMonitor

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        history.append(batch_idx)
        recent.append(batch_idx)
        counts["calls"] += 1
        state["last"] = {"batch": batch_idx}
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""
TRAIN = """
history, recent, counts, state = [], deque(maxlen=3), Counter(), dict()
torch.manual_seed(0)
net = Net()
loader = DataLoader(TensorDataset(torch.randn(32, 3), torch.arange(32) % 2), batch_size=8)
quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
monitors = {monitors}
Trainer(max_epochs=2, accelerator="cpu", callbacks=monitors, **quiet).fit(net, loader)
print(repr((history, list(recent), dict(counts), state, [p.tolist() for p in net.parameters()])))
"""
MONITOR = "SubspaceMonitor(k=1, every_n_steps=2, max_overhead=None, on_failure='raise')"


def test_what_cells_have_defined_is_left_as_training_leaves_it(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    steps = "print([record.step for record in monitors[0].history])"
    sources = [PROJECT, TRAIN.format(monitors="[]"), TRAIN.format(monitors=f"[{MONITOR}]"), steps]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", shutdown_kernel="immediate").execute()
    alone, watched, steps = (printed(cell) for cell in notebook.cells[1:])
    assert alone[0] == [0, 1, 2, 3] * 2
    assert watched == alone
    assert steps == [0, 2, 4, 6, 8]


def printed(cell):
    """The value that a cell has printed last."""
    texts = [output.text for output in cell.outputs if output.get("name") == "stdout"]
    return ast.literal_eval("".join(texts).strip().splitlines()[-1])
