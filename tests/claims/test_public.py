"""The public names, what they cost to import, and that the callback and the function measure the same."""

import builtins
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_subspace
from lightning_subspace import SubspaceMonitor, measure_subspace

PACKAGE = Path(lightning_subspace.__file__).parent

# The first is raised by torch's own pytree, in Lightning's CombinedLoader; the second depends on the machine.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers:UserWarning"),
]


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_every_public_name_resolves_and_is_listed():
    assert lightning_subspace.__all__ == sorted(set(lightning_subspace.__all__))
    for name in lightning_subspace.__all__:
        assert getattr(lightning_subspace, name) is not None
        assert name in dir(lightning_subspace)


def test_type_checkers_see_the_names_that_are_loaded_lazily():
    source = (PACKAGE / "__init__.py").read_text()
    for name in lightning_subspace.__all__:
        assert f"import {name} as {name}\n" in source


def documented_errors(item):
    """The exceptions under `Raises` of an object, and of its public methods if it is a class."""
    members = [getattr(item, name) for name in vars(item) if not name.startswith("_")] if isinstance(item, type) else []
    for text in filter(None, map(inspect.getdoc, [item, *members])):
        for section in re.findall(r"^Raises:\n((?:    .*\n?|\n)*)", text, flags=re.MULTILINE):
            yield from re.findall(r"^    (\w+):", section, flags=re.MULTILINE)


def test_all_errors_that_public_names_document_can_be_imported():
    found = {
        name for item in lightning_subspace.__all__ for name in documented_errors(getattr(lightning_subspace, item))
    }
    assert {"LossError", "SampleError", "CheckError", "PeerError", "CheckpointError", "ValueError"} <= found
    of_lightning = {"MisconfigurationException"}
    assert found - of_lightning - set(dir(builtins)) <= set(lightning_subspace.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_subspace' has no attribute 'monitor_subspace'"):
        _ = lightning_subspace.monitor_subspace


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_subspace; print(sorted({'torch', 'lightning', 'numpy'} & sys.modules.keys()))"
    assert run_python(code).strip() == "[]"


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()
    assert importlib.util.find_spec("lightning_subspace").origin == str(PACKAGE / "__init__.py")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


def test_the_function_finds_what_the_callback_found_at_the_same_point():
    torch.manual_seed(0)
    module = Classifier()
    data = TensorDataset(torch.randn(64, 6), torch.randint(3, (64,)))
    monitor = SubspaceMonitor(k=3, every_n_steps=[8], max_overhead=None, sample="all")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    trainer.fit(module, DataLoader(data, batch_size=16))
    (record,) = monitor.history
    alone = measure_subspace(module, DataLoader(data, batch_size=16), k=3, optimizer=trainer.optimizers[0])
    assert record.step == 8
    assert alone.subspace.trusted
    assert record.subspace.eigenvalues == pytest.approx(alone.subspace.eigenvalues, abs=1e-6)
    # the monitor alone knows what training returned
    # and how large the training set is, against which the noise is held
    apart = ("solver/", "training_loss", "noise/")
    measured = {key for key in record.metrics if not key.startswith(apart)}
    assert measured >= {"gradient_fraction", "gradient_hessian_cosine", "sharpness_over_threshold", "eigenvalues/03"}
    assert "sample_loss" in measured
    for key in measured:
        assert record.metrics[key] == pytest.approx(alone.metrics[key], abs=1e-6), key
