"""Loggers: real ones, several at once, none, and one that throws."""

import csv
import importlib.util
import os
import time

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_subspace import SubspaceMonitor
from tests.left_out import leave_figures_out
from tests.thorough import usual

KEY = "subspace/sharpness"
STEPS = [0, 2, 4, 5]


def missing(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}")


class Throwing(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if KEY in metrics:
            raise OSError("the disk is full")
        super().log_metrics(metrics, step)


def read_tensorboard(logger, folder):
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == events.Tags()["distributions"] == []
    assert [event.step for event in events.Tensors("subspace/probes")] == STEPS
    return {e.step: e.value for e in events.Scalars(KEY)}


def values_of_csv(logger):
    with open(os.path.join(logger.log_dir, "metrics.csv")) as file:
        return {int(row["step"]): float(row[KEY]) for row in csv.DictReader(file) if row.get(KEY)}


def read_csv(logger, folder):
    drawn = {name.rpartition("_")[0] for name in os.listdir(os.path.join(logger.log_dir, "figures"))}
    assert drawn == {"subspace_layers", "subspace_overlaps", "subspace_spectrum"}
    assert os.path.exists(os.path.join(logger.log_dir, "subspace_probes.json"))
    return values_of_csv(logger)


def read_mlflow(logger, folder):
    client = logger.experiment
    names = {item.path for item in client.list_artifacts(logger.run_id, "subspace")}
    assert any(name.startswith("subspace/spectrum") for name in names), names
    assert "subspace_probes.json" in {item.path for item in client.list_artifacts(logger.run_id)}
    return {m.step: m.value for m in client.get_metric_history(logger.run_id, KEY)}


def read_wandb(logger, folder):
    """Its offline file has no public reader: that the values have arrived there, all of them, is all that is seen."""
    logger.experiment.finish()
    [path] = folder.rglob("*.wandb")
    deadline = time.monotonic() + 60.0  # its service process writes when it likes
    while path.read_bytes().count(KEY.encode()) < len(STEPS) and time.monotonic() < deadline:
        time.sleep(0.1)
    content = path.read_bytes()
    assert content.count(KEY.encode()) >= len(STEPS)
    assert content.count(b"trainer/global_step") >= len(STEPS)


def make_wandb(folder):
    return WandbLogger(save_dir=folder, offline=True, project="test")


LOGGERS = {
    "TensorBoardLogger": (lambda folder: TensorBoardLogger(folder), read_tensorboard, ()),
    "CSVLogger": (lambda folder: CSVLogger(folder), read_csv, ()),
    "WandbLogger, offline": (make_wandb, read_wandb, missing("wandb")),
    "MLFlowLogger, file store": (
        lambda folder: MLFlowLogger("test", tracking_uri=f"file:{folder}/mlruns"),
        read_mlflow,
        missing("mlflow"),
    ),
}
CASES = [pytest.param(make, read, marks=marks, id=name) for name, (make, read, marks) in LOGGERS.items()]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DISABLE_GIT": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def train(logger, *callbacks):
    seed_everything(0, verbose=False)
    module = BoringModel()
    trainer = Trainer(
        max_steps=5,
        logger=logger,
        callbacks=list(callbacks),
        limit_val_batches=0,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module


def monitor():
    return SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, sample="all", batch_size=16, on_failure="raise")


def check(one, found):
    if found is None:
        return
    assert list(found) == STEPS
    for record in one.history:
        assert found[record.step] == pytest.approx(record.metrics["sharpness"], rel=1e-6)


# The first two are wandb's and MLflow's own.
OWN = (
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
)
pytestmark = list(OWN)


ALONE = [case for case in CASES if case.id[0] == "W"]  # the others are read in the next test as well


@pytest.mark.parametrize(("make", "read"), usual(ALONE, thorough=[case for case in CASES if case not in ALONE]))
def test_each_value_is_logged_once_at_its_step(make, read, tmp_path):
    one, logger = monitor(), make(tmp_path)
    train(logger, one)
    check(one, read(logger, tmp_path))


def test_several_at_once(tmp_path):
    available = [case for case in CASES if not (case.marks and case.marks[0].args[0]) and case.id[0] != "W"]
    loggers, one = [case.values[0](tmp_path) for case in available], monitor()
    train(loggers, one)
    for case, logger in zip(available, loggers, strict=True):
        check(one, case.values[1](logger, tmp_path))


def test_none_at_all():
    one = monitor()
    train(False, one)
    assert [r.step for r in one.history] == STEPS
    assert len(one.to_rows()) == len(STEPS)


def test_one_that_throws_stops_neither_training_nor_the_others(tmp_path, monkeypatch):
    leave_figures_out(monkeypatch)
    good, one = CSVLogger(tmp_path / "good"), monitor()
    with pytest.warns(UserWarning, match="Throwing raised OSError: the disk is full. Lost: "):
        module = train([Throwing(tmp_path / "bad"), good], one)
    check(one, values_of_csv(good))
    for a, b in zip(module.parameters(), train(False).parameters(), strict=True):
        assert torch.equal(a, b)
