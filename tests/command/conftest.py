"""A run without a monitor, made once, and the command as a test gives it."""

import warnings

import pytest

from lightning_subspace.command.main import main
from tests.command import small_project

MEASURE = ["--k", "3", "--sample", "all", "--gradient-sample", "all", "--dtype", "float64", "--tol", "1e-10"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run with config.yaml and four checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return small_project.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def measure(trained, tmp_path, monkeypatch):
    """Runs `measure`; its exit code."""
    monkeypatch.setattr(small_project, "IS_MEASURED", True)
    monkeypatch.chdir(tmp_path)

    def run(*options, folder=trained, out="out", ckpt="*.ckpt"):
        files = ["--config", str(folder / "config.yaml"), "--ckpt", str(folder / ckpt), "--out", str(tmp_path / out)]
        return main(["measure", *files, *MEASURE, *options])

    return run
