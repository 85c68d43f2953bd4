"""`lightning` and `pytorch_lightning`: one callback class in both Trainers and both command lines."""

import importlib
import sys

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace._lightning import Callback, MisconfigurationException
from tests.processes import run
from tests.thorough import covering, usual

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
ARGUMENTS = ("k", "every_n_steps", "max_overhead", "sample", "dtype", "curvature", "on_check_fail", "measurements")


@pytest.fixture(params=NAMESPACES)
def pl(request):
    pytest.importorskip(request.param.split(".")[0])
    return importlib.import_module(request.param)


def sub(pl, name):
    return importlib.import_module(f"{pl.__name__}.{name}")


def net(pl):
    torch.manual_seed(0)

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

        def training_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Net()


def loader():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(32) % 3
    return DataLoader(TensorDataset(torch.randn(32, 4, generator=generator) + torch.eye(3, 4)[labels], labels), 8)


def monitor(**arguments):
    settings = {"k": 2, "every_n_steps": 2, "max_overhead": None, "sample": 32, "gradient_sample": 32}
    return SubspaceMonitor(**{**settings, "on_failure": "raise", **arguments})


def train(pl, *callbacks, **settings):
    module = net(pl)
    trainer = pl.Trainer(**{"max_steps": 6, "enable_checkpointing": False, **QUIET, **settings}, callbacks=[*callbacks])
    trainer.fit(module, loader())
    return trainer, module


def test_trainers_of_both_namespaces_are_left_alone_and_measured_alike(pl):
    one = monitor()
    _, with_monitor = train(pl, one)
    _, without = train(pl)
    for a, b in zip(with_monitor.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [r.step for r in one.history] == [0, 2, 4, 6]
    if pl.__name__ != NAMESPACES[0]:
        reference = monitor()
        train(importlib.import_module(NAMESPACES[0]), reference)
        for a, b in zip(one.history, reference.history, strict=True):
            torch.testing.assert_close(a.subspace.eigenvalues, b.subspace.eigenvalues, rtol=0.0, atol=0.0)


def test_a_lone_callback_need_not_be_in_a_list(pl):
    pl.Trainer(callbacks=monitor(), enable_checkpointing=False, **QUIET)


def test_it_is_a_callback_of_both_and_its_errors_are_those_of_both(pl):
    assert issubclass(Callback, pl.Callback)
    assert isinstance(monitor(), pl.Callback)
    error = sub(pl, "utilities.exceptions").MisconfigurationException
    assert issubclass(MisconfigurationException, error)
    with pytest.raises(error, match="k: expected an integer"):
        SubspaceMonitor(k="2")
    with pytest.raises(error, match="k: expected 0"):
        train(pl, monitor(k=1000, max_matvecs=2000))


def test_checkpoints_and_early_stopping_can_wait_for_a_value(pl, tmp_path):
    callbacks = sub(pl, "callbacks")
    keep = callbacks.ModelCheckpoint(
        tmp_path, monitor="subspace/sharpness", mode="max", every_n_train_steps=1, filename="{step}"
    )
    stop = callbacks.EarlyStopping("subspace/sharpness", mode="max", stopping_threshold=-1.0, strict=False)
    stop._run_on_train_epoch_end = True
    one = monitor()
    with pytest.warns(UserWarning, match="saves nothing before a probe"):
        trainer, _ = train(pl, one, keep, stop, enable_checkpointing=True, check_val_every_n_epoch=1)
    assert trainer.global_step == 4  # the end of the first epoch: any sharpness is above the threshold
    best = max(one.history, key=lambda r: r.metrics["sharpness"])
    assert float(keep.best_model_score) == pytest.approx(best.metrics["sharpness"])
    state = torch.load(keep.best_model_path, weights_only=True)["callbacks"]
    assert "SubspaceMonitor{'name': 'subspace'}" in state


def test_strict_early_stopping_is_told(pl):
    with pytest.warns(UserWarning, match="strict=True.* will end the run with an error"):
        train(pl, monitor(), sub(pl, "callbacks").EarlyStopping("subspace/sharpness", strict=True))


def config(folder, pl, **arguments):
    callback = {"class_path": "lightning_subspace.SubspaceMonitor", "init_args": arguments}
    trainer = {"max_steps": 3, "enable_checkpointing": False, **QUIET, "callbacks": [callback]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    return str(path)


YAML = {
    "nested measurements": {
        "measurements": [
            {"class_path": "lightning_subspace.measurements.Reliability", "init_args": {"every": 3}},
            {"class_path": "lightning_subspace.measurements.GradientCurvature"},
        ]
    },
    "measurements on request": {
        "measurements": [
            {"class_path": "lightning_subspace.Density", "init_args": {"steps": 5, "vectors": 1, "every": 2}},
            {"class_path": "lightning_subspace.Trace", "init_args": {"vectors": 2}},
            {"class_path": "lightning_subspace.CriticalSharpness", "init_args": {"along": "gradient"}},
            {"class_path": "lightning_subspace.Control", "init_args": {"reference_step": 1}},
            {"class_path": "lightning_subspace.BatchSharpness", "init_args": {"batches": 2}},
            {"class_path": "lightning_subspace.GradientNoise", "init_args": {"batches": 2}},
            {"class_path": "lightning_subspace.Stability"},
            {"class_path": "lightning_subspace.Chi"},
            {"class_path": "lightning_subspace.LossChange"},
        ]
    },
    "sample by number": {"sample": 16, "gradient_sample": 32},
    "sample by word": {"sample": "all", "gradient_sample": "all"},
    "list of steps": {"every_n_steps": [0, 2], "max_overhead": None},
    "patterns": {"params": ["layer.*"]},
    "loss by name": {"loss_fn": "tests.works_with.test_namespaces.boring_loss"},
    "weight by name": {"weight": "builtins.len"},
    "words": {
        **{"dtype": "float64", "curvature": "finite-difference", "on_check_fail": "raise", "mode": "eval"},
        **{"sample": 16, "gradient_sample": 16},  # less work
    },
    "current batch": {"sample": "current"},
}


def boring_loss(module, batch, batch_idx):
    return module(batch).square().mean()


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about Lightning's use of it
@pytest.mark.parametrize(("case", "pl"), covering(list(YAML), NAMESPACES), indirect=["pl"])
def test_the_command_line_reads_it_from_yaml(case, pl, tmp_path, monkeypatch):
    arguments = YAML[case]
    monkeypatch.syspath_prepend(".")
    cli = sub(pl, "cli").LightningCLI(
        sub(pl, "demos.boring_classes").BoringModel,
        save_config_callback=None,
        run=False,
        seed_everything_default=0,
        args=["--config", config(tmp_path, pl, k=2, **{"sample": "all", **arguments})],
    )
    [one] = [c for c in cli.trainer.callbacks if isinstance(c, SubspaceMonitor)]
    cli.trainer.limit_val_batches = 0
    cli.trainer.fit(cli.model)
    is_gathered = arguments.get("sample") == 16  # from three batches of one
    assert one.history[0].step == (3 if is_gathered else 0)
    assert all(r.subspace.converged for r in one.history)


def test_the_command_line_explains_the_arguments(pl, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["main.py", "fit", "--trainer.callbacks.help", "lightning_subspace.SubspaceMonitor"]
    )
    with pytest.raises(SystemExit) as end:
        sub(pl, "cli").LightningCLI(sub(pl, "demos.boring_classes").BoringModel, save_config_callback=None)
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in ARGUMENTS:
        assert f"--trainer.callbacks.{name} " in text, name
    assert "optimizer steps between probes" in " ".join(text.split())


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter:UserWarning")
def test_a_wrong_argument_in_yaml_is_named(pl, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sub(pl, "cli").LightningCLI(
            sub(pl, "demos.boring_classes").BoringModel,
            save_config_callback=None,
            run=False,
            args=["--config", config(tmp_path, pl, on_check_fail="ignore")],
        )
    assert "on_check_fail" in capsys.readouterr().err


IMPORTED = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "lightning_subspace"}


def name_of_logger(first):
    """In a process where none of them is imported any more, but what they import beside each other is."""
    for name in [name for name in sys.modules if name.partition(".")[0] in IMPORTED]:
        del sys.modules[name]
    importlib.import_module(first)
    importlib.import_module("lightning_subspace.callbacks.monitor")
    return importlib.import_module("lightning_utilities.core.rank_zero").log.name.partition(".")[0]


def test_the_logger_of_lightnings_messages_stays_with_the_users_namespace():
    expected = {"pytorch_lightning": "pytorch_lightning", "torch": "lightning"}
    expected |= dict(usual([], thorough=[("lightning.pytorch", "lightning")]))
    assert {first: run(name_of_logger, 1, first, group=False, timeout=120)[0] for first in expected} == expected
