"""What is printed for an issue."""

import sys
from importlib.metadata import version

import torch

import lightning_subspace
from lightning_subspace.command.environment import facts
from lightning_subspace.command.main import main


def test_versions_and_devices_are_told(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_PASSWORD", "secret")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    told = dict(line.split(": ", 1) for line in printed.splitlines())
    assert told["lightning_subspace"] == lightning_subspace.__version__
    assert told["torch"] == version("torch")
    assert told["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert told["threads of torch"] == str(torch.get_num_threads())
    assert ("GPU 0" in told) == torch.cuda.is_available()
    assert told["OMP_NUM_THREADS"] == "3"
    assert "secret" not in printed


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = [value for name, value in facts() if name == "torch"]
    assert found[-1].startswith("cannot be imported (ModuleNotFoundError")
