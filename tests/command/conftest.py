"""A run without a monitor, made once, and the command as a test gives it."""

import contextlib
import io
import warnings

import pytest

from lightning_subspace.command.main import main
from tests.command import small_project
from tests.left_out import leave_self_check_out

MEASURE = ["--k", "2", "--sample", "all", "--gradient-sample", "all", "--dtype", "float64", "--tol", "1e-10"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run with config.yaml and three checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return small_project.train(tmp_path_factory.mktemp("trained"))


def command(run, out, *options, ckpt="*.ckpt"):
    """The command line that measures the checkpoints of a run."""
    files = ["--config", str(run / "config.yaml"), "--ckpt", str(run / ckpt), "--out", str(out)]
    return ["measure", *files, *MEASURE, *options]


@pytest.fixture(scope="session")
def straight(trained, tmp_path_factory):
    """The folder of its results, measured in one go, and what was printed."""
    out = tmp_path_factory.mktemp("straight")
    printed = io.StringIO()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        patch.setattr(small_project, "IS_MEASURED", True)
        assert main(command(trained, out)) == 0
    return out, printed.getvalue()


@pytest.fixture
def measure(trained, tmp_path, monkeypatch):
    """Runs `measure`, without the self-check that `straight` has made; its exit code."""
    leave_self_check_out(monkeypatch)
    monkeypatch.setattr(small_project, "IS_MEASURED", True)
    monkeypatch.chdir(tmp_path)

    def run(*options, folder=trained, out="out", ckpt="*.ckpt"):
        return main(command(folder, tmp_path / out, *options, ckpt=ckpt))

    return run
