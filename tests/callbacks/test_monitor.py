"""The callback in a Trainer: what reaches loggers and callbacks, what a failure does, how runs end and go on."""

import copy
import csv
import logging
import pickle
import re
import signal
import warnings
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, Needs, NoiseScale, Step, SubspaceMonitor
from lightning_subspace.callbacks.failed_probes import FailedProbes
from lightning_subspace.command.runs import read_runs
from lightning_subspace.probe import forecast
from lightning_subspace.report import figures, layer_figure, logged_name, progress, select
from lightning_subspace.report.loggers import Reporter
from lightning_subspace.tensorboard_tab.schema import from_json
from tests.left_out import leave_figures_out, leave_self_check_out
from tests.thorough import covering, how_many, usual

# The first is raised by torch's own pytree, in Lightning's CombinedLoader; the second depends on the machine, the third
# on the length of the run.
# Of the keys that are logged by default, those that every later probe of a short SGD run with a trusted space has.
DEFAULT = {
    "subspace/sharpness",
    "subspace/sharpness_over_threshold",
    "subspace/gradient_fraction",
    "subspace/gradient_hessian_cosine",
    "subspace/overlap_previous",
    "subspace/update_fraction",
    "subspace/solver/subspace_error",
    "subspace/solver/overhead",
    "subspace/step/edge_ratio",
    "subspace/step/curvature",
    "subspace/noise/scale",
    *(f"subspace_eigenvalues/{i:02d}" for i in range(1, 4)),
}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class Weights(pl.Callback):
    """Saves the weights at every step, and the values that callbacks can see then."""

    def __init__(self):
        self.at, self.metrics, self.random_states = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        step = trainer.global_step
        self.at[step] = [parameter.detach().clone() for parameter in pl_module.parameters()]
        self.metrics[step] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.random_states[step] = torch.get_rng_state()


def net(kind=Net):
    torch.manual_seed(0)
    return kind()


def data(count=64):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    inputs = torch.randn(count, 5, generator=generator) + torch.eye(3, 5)[labels]
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def probing(every=4, **kwargs):
    return SubspaceMonitor(**{"k": 3, "every_n_steps": every, "max_overhead": None, "sample": "all", **kwargs})


def make(*callbacks, **kwargs):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    if "max_epochs" not in kwargs:
        settings["max_steps"] = 12
    return pl.Trainer(**{**settings, **quiet, **kwargs}, callbacks=list(callbacks))


def fit(*callbacks, module=None, **kwargs):
    trainer = make(*callbacks, **kwargs)
    trainer.fit(net() if module is None else module, data())
    return trainer


def steps(monitor):
    return [record.step for record in monitor.history]


def told(caught):
    """Of the warnings caught, those of this package; pytest.warns records what the filters ignore, too."""
    return [str(w.message) for w in caught if str(w.message).startswith(("SubspaceMonitor", "ThrowingLogger"))]


def is_usable(monitor):
    rows = monitor.to_rows()
    assert [row["step"] for row in rows] == steps(monitor)
    matrix_steps, matrix = monitor.overlap_matrix()
    assert matrix.shape == (len(matrix_steps), len(matrix_steps))
    assert isinstance(monitor.plot(), Figure)
    assert 0.0 <= monitor.later_overhead <= 1.0
    assert 0.0 <= monitor.overhead <= 1.0
    return True


def expected_scalars(monitor, name="subspace", log="default"):
    """(tag, step) -> value of all that should have been logged."""
    extra = {"batch_gradient_fraction", "gap_index", "gradient_norm", "gradient_curvature"}
    extra |= {"sample_loss", "training_loss"} | NoiseScale.extra | Step.extra
    return {
        (logged_name(name, key), record.step): value
        for record in monitor.history
        for key, value in select(record.metrics, log, extra).items()
    }


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def tensorboard_scalars(folder, prefix="subspace"):
    events = read_events(folder)
    found = [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    found = [row for row in found if row[0].startswith((f"{prefix}/", f"{prefix}_"))]
    assert len({row[:2] for row in found}) == len(found), "a value was logged twice"
    return {row[:2]: row[2] for row in found}


def csv_scalars(folder, prefix="subspace"):
    found = {}
    with open(f"{folder}/metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key.startswith((f"{prefix}/", f"{prefix}_")) and value:
                    assert (key, int(row["step"])) not in found, "a value was logged twice"
                    found[key, int(row["step"])] = float(value)
    return found


@pytest.fixture(autouse=True)
def _left_out(request, monkeypatch):
    """Figures, but where a test's name says so; self-checks, but in tests of the whole and in runs that tests share."""
    if "figure" not in request.node.name:
        leave_figures_out(monkeypatch)
    if "without_the_monitor" not in request.node.name:
        leave_self_check_out(monkeypatch)


@pytest.fixture(scope="module")
def bare_run():
    """The weights of a run without a monitor."""
    weights = Weights()
    fit(weights)
    return weights


@pytest.fixture(scope="module")
def usual_run():
    """A monitor after its run, and what callbacks saw in it."""
    weights, monitor = Weights(), probing()
    fit(monitor, weights)
    return monitor, weights


LAST_DRAWN = how_many(4, thorough=10)


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory):
    """A monitor after a run of some probes, and the folder where two loggers have written."""
    folder, monitor = tmp_path_factory.mktemp("drawn"), probing(1)
    fit(monitor, logger=[CSVLogger(folder), TensorBoardLogger(folder, name="board")], max_steps=LAST_DRAWN)
    return monitor, folder


# Loggers


@pytest.mark.parametrize(("log", "log_every_n_steps"), covering(["default", "all"], [1, 50]))
def test_tensorboard_has_every_value_once_at_the_step_of_its_point(tmp_path, log_every_n_steps, log):
    monitor = probing(log=log)
    fit(monitor, logger=TensorBoardLogger(tmp_path), log_every_n_steps=log_every_n_steps)
    assert steps(monitor) == [0, 4, 8, 12]
    expected = expected_scalars(monitor, log=log)
    found = tensorboard_scalars(tmp_path / "lightning_logs/version_0")
    assert found.keys() == expected.keys()
    assert {tag for tag, step in found if step == 4} >= DEFAULT
    for place, value in found.items():
        assert value == pytest.approx(expected[place], rel=1e-6)


def test_the_default_set_is_what_a_person_can_look_at(usual_run):
    monitor, _ = usual_run
    logged = {tag for tag, step in expected_scalars(monitor) if step == 4}
    # The eigenvalue behind the k-th is an estimate, which a probe may withhold.
    beside = {"subspace/gradient_norm", "subspace/gradient_curvature", "subspace_eigenvalues/04"}
    assert DEFAULT <= logged <= DEFAULT | beside


class WithExtra(Measurement):
    needs = Needs.NOTHING
    extra = frozenset({"aside"})

    def measure(self, probe):
        return {"shown": 1.0, "aside": 2.0}


@pytest.mark.parametrize(
    ("options", "is_logged"), usual([({}, False), ({"k": 0}, True)], thorough=[({"log": "all"}, True)])
)
def test_a_measurement_declares_which_of_its_keys_are_extra(tmp_path, options, is_logged):
    monitor = probing(measurements=[WithExtra()], **options)
    fit(monitor, logger=CSVLogger(tmp_path), max_steps=1)
    logged = {tag for tag, _ in csv_scalars(tmp_path / "lightning_logs/version_0")}
    assert "subspace/shown" in logged
    assert ("subspace/aside" in logged) == is_logged
    assert all(record.metrics["aside"] == 2.0 for record in monitor.history)


def pictures(folder):
    return sorted(file.stem for file in (folder / "lightning_logs/version_0/figures").iterdir())


def test_figures_at_probes_1_2_4_8_and_at_the_end(drawn_run):
    _, folder = drawn_run
    drawn = [step for step in (0, 1, 3, 7, LAST_DRAWN) if step <= LAST_DRAWN]
    spectra = [f"subspace_spectrum_{step:06d}" for step in drawn]
    layers = [name.replace("spectrum", "layers") for name in spectra]
    assert pictures(folder) == [*layers, *(f"subspace_overlaps_{step:06d}" for step in drawn[1:]), *spectra]


def test_tensorboard_gets_an_entry_a_probe_and_no_pictures(drawn_run):
    _, folder = drawn_run
    tags = read_events(folder / "board/version_0").Tags()
    assert tags["tensors"] == ["subspace/probes"]
    assert tags["images"] == tags["histograms"] == []


def test_other_loggers_keep_all_entries_in_a_file_at_the_end(drawn_run):
    monitor, folder = drawn_run
    kept = from_json((folder / "lightning_logs/version_0/subspace_probes.json").read_text())
    probes = kept["subspace"]["subspace/probes"]
    assert [probe["step"] for probe in probes] == list(range(LAST_DRAWN + 1))
    for probe, record in zip(probes, monitor.history, strict=True):
        assert probe["metrics"] == pytest.approx(
            {key: value for key, value in record.metrics.items() if not key.startswith("eigenvalues/")}, rel=1e-4
        )


def test_a_figure_is_not_drawn_twice_when_the_run_ends_at_a_power_of_two(tmp_path, monkeypatch):
    drawn = []
    # in place of a file, which a second one of the same name would overwrite
    monkeypatch.setattr(Reporter, "figure", lambda self, loggers, tag, figure, step: drawn.append((tag, step)))
    for module, name in ((figures, "spectrum_figure"), (figures, "overlap_figure"), (layer_figure, "layers_figure")):
        monkeypatch.setattr(module, name, lambda *args: None)
    fit(probing(1), logger=CSVLogger(tmp_path), max_steps=3)
    assert [step for tag, step in drawn if tag == "subspace/spectrum"] == [0, 1, 3]


class ThrowingLogger(TensorBoardLogger):
    def log_metrics(self, metrics, step=None):
        if any(key.startswith("subspace") for key in metrics):
            raise OSError("disk full")
        super().log_metrics(metrics, step)


def test_several_loggers_get_the_same_and_one_that_throws_stops_nothing(tmp_path):
    monitor = probing()
    loggers = [
        ThrowingLogger(tmp_path, name="thrower"),
        CSVLogger(tmp_path, name="csv"),
        TensorBoardLogger(tmp_path, name="board"),
    ]
    with pytest.warns(UserWarning, match="ThrowingLogger raised OSError: disk full") as caught:
        trainer = fit(monitor, logger=loggers, log_every_n_steps=5)
    assert len(told(caught)) == 1
    assert trainer.global_step == 12
    expected = expected_scalars(monitor)
    assert csv_scalars(tmp_path / "csv/version_0") == pytest.approx(expected)
    assert tensorboard_scalars(tmp_path / "board/version_0") == pytest.approx(expected, rel=1e-6)
    assert not tensorboard_scalars(tmp_path / "thrower/version_0")


def test_no_logger_is_needed(tmp_path, usual_run):
    (plain, _), logged, bare = usual_run, probing(), probing()
    fit(logged, logger=CSVLogger(tmp_path))
    fit(bare, module=net(Silent), barebones=True, enable_checkpointing=None, logger=None, max_steps=4)
    assert steps(plain) == steps(logged)
    assert steps(bare) == [0, 4]
    for a, b in zip(plain.history, logged.history, strict=True):
        numbers = {key for key in a.metrics if not key.startswith("solver/")}
        assert {key: a.metrics[key] for key in numbers} == {key: b.metrics[key] for key in numbers}


class Silent(Net):
    """For a barebones Trainer, which refuses `self.log`."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


# Callbacks that follow a value


def test_callbacks_see_a_value_right_at_the_probe_and_until_the_next(usual_run):
    monitor, weights = usual_run
    for step, seen in weights.metrics.items():
        current = monitor.history[step // 4].metrics
        for key in ("sharpness", "gradient_fraction", "eigenvalues/01", "solver/subspace_error"):
            assert seen[logged_name("subspace", key)] == pytest.approx(current[key], rel=1e-6)
        # What the next step tells comes with that step.
        earlier = monitor.history[(step - 1) // 4].metrics
        assert seen["subspace/update_fraction"] == pytest.approx(earlier["update_fraction"], rel=1e-6)


def test_the_checkpoint_of_the_lowest_sharpness_is_that_of_its_step(tmp_path):
    weights, monitor = Weights(), probing()
    checkpoint = ModelCheckpoint(tmp_path, monitor="subspace/sharpness", mode="min", every_n_train_steps=4)
    with pytest.warns(UserWarning, match="saves nothing before a probe has logged"):
        fit(monitor, weights, checkpoint, enable_checkpointing=True)
    sharpness = {record.step: record.metrics["sharpness"] for record in monitor.history if record.step > 0}
    best = min(sharpness, key=sharpness.get)
    assert float(checkpoint.best_model_score) == pytest.approx(sharpness[best], rel=1e-6)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert saved["global_step"] == best
    assert all(torch.equal(a, b) for a, b in zip(saved["state_dict"].values(), weights.at[best], strict=True))


def test_early_stopping_stops_at_the_value():
    monitor = probing(8)  # once an epoch
    stop = EarlyStopping("subspace/sharpness", mode="max", stopping_threshold=0.0, strict=False)
    trainer = fit(monitor, stop, max_steps=80)
    assert stop.stopped_epoch == 0
    assert trainer.global_step == 8
    assert steps(monitor) == [0, 8]


def test_validation_and_its_sanity_check_disturb_nothing(usual_run):
    (plain, _), validated, weights = usual_run, probing(), Weights()
    trainer = make(validated, weights, num_sanity_val_steps=2, val_check_interval=3)
    trainer.fit(net(Validated), data(), data())
    assert steps(plain) == steps(validated)
    for a, b in zip(plain.history, validated.history, strict=True):
        assert a.metrics["gradient_fraction"] == b.metrics["gradient_fraction"]
        assert a.metrics.get("update_fraction") == b.metrics.get("update_fraction")
    assert "subspace/sharpness" in weights.metrics[11]
    assert "val_loss" in weights.metrics[11]


def test_two_monitors_measure_side_by_side(tmp_path):
    one, two = probing(), probing(6, k=2, name="other", params=["net.2.*"])
    fit(one, two, logger=CSVLogger(tmp_path), max_steps=6)
    assert steps(one) == [0, 4, 6]
    assert steps(two) == [0, 6]
    found = (
        csv_scalars(tmp_path / "lightning_logs/version_0"),
        csv_scalars(tmp_path / "lightning_logs/version_0", "other"),
    )
    assert found[0] == pytest.approx(expected_scalars(one))
    assert found[1] == pytest.approx(expected_scalars(two, "other"))


@pytest.mark.thorough  # two monitors, and all kinds of samples, in claims/test_untouched.py
def test_training_is_what_it_is_without_the_monitor(bare_run):
    bare, watched = bare_run, Weights()
    fit(probing(sample=16, gradient_sample=32), probing(name="current", sample="current"), watched)
    for step in bare.at:
        assert all(torch.equal(a, b) for a, b in zip(bare.at[step], watched.at[step], strict=True))
        assert torch.equal(bare.random_states[step], watched.random_states[step])
        assert bare.metrics[step]["loss"] == watched.metrics[step]["loss"]


# What cannot be stood behind


WITHHELD = re.compile("fraction|overlap|eigenvalue|sharpness|gap|reliability|spectrum")


def test_what_is_not_converged_appears_nowhere_and_one_warning_says_so(tmp_path):
    weights, monitor = Weights(), probing(max_matvecs=3, log="all")
    with pytest.warns(UserWarning, match=r"at step 0, eigenvalues, fractions and overlaps are left out\.") as caught:
        fit(monitor, weights, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    assert len(told(caught)) == 1
    assert steps(monitor) == [0, 4, 8, 12]
    events = read_events(tmp_path / "lightning_logs/version_0")
    keys = {tag for kind in ("scalars", "images", "histograms") for tag in events.Tags()[kind]}
    keys |= {key for record in monitor.history for key in record.metrics}
    keys |= {key for seen in weights.metrics.values() for key in seen}
    assert not [key for key in keys if WITHHELD.search(key)]
    assert {"subspace/solver/residual", "subspace/solver/converged", "solver/converged"} <= keys
    assert all(record.metrics["solver/converged"] == 0.0 for record in monitor.history)
    assert monitor.overlap_matrix()[0] == []
    assert is_usable(monitor)


def nan_at_first(module, batch, batch_idx):
    loss = nn.functional.cross_entropy(module.net(batch[0]), batch[1])
    return loss * float("nan") if module.global_step < 4 else loss


# Lightning's word, and ours, to a checkpoint whose value is not there yet
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
@pytest.mark.filterwarnings(r"ignore:ModelCheckpoint\(monitor='subspace/sharpness'\) saves nothing before:UserWarning")
def test_a_run_whose_first_probe_fails_goes_on_under_callbacks_that_wait_for_it(tmp_path):
    monitor = probing(loss_fn=nan_at_first)
    checkpoint = ModelCheckpoint(tmp_path, monitor="subspace/sharpness", every_n_train_steps=2)
    stop = EarlyStopping("subspace/sharpness", strict=False, patience=100)
    with pytest.warns(UserWarning, match="the probe at step 0 failed") as caught:
        trainer = fit(monitor, checkpoint, stop, enable_checkpointing=True)
    failures = [text for text in told(caught) if "failed and is left out" in text]
    assert len(failures) == 1
    assert (
        "the probe at step 0 failed and is left out, training goes on. LossError: the loss of Net is nan" in failures[0]
    )
    assert trainer.global_step == 12
    assert steps(monitor) == [4, 8, 12]
    first = monitor.history[0].metrics
    assert first["solver/verified"] == 1.0
    assert "overlap_previous" not in first
    assert float(checkpoint.best_model_score) == pytest.approx(
        min(record.metrics["sharpness"] for record in monitor.history), rel=1e-6
    )


def test_early_stopping_that_insists_was_told_before():
    monitor = probing(max_matvecs=3)
    stop = EarlyStopping("subspace/sharpness", strict=True)
    with (
        pytest.warns(UserWarning, match="strict=True. will end the run with an error"),
        pytest.warns(UserWarning, match="at step 0, eigenvalues, fractions and overlaps are left out"),
        pytest.raises(
            RuntimeError, match=r"Early stopping conditioned on metric .subspace/sharpness. which is not available"
        ),
    ):
        fit(monitor, stop, max_epochs=1)
    assert is_usable(monitor)


class Returning(Net):
    """A training step that returns something else while probed in the second half of the run."""

    value = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        is_probed = self.net[0].weight.data_ptr() != self.address
        if not is_probed or self.global_step < 8:
            return loss
        return {"none": None, "nan": loss * float("nan"), "vector": loss.expand(3), "detached": loss.detach()}[
            self.value
        ]

    def setup(self, stage):
        self.address = self.net[0].weight.data_ptr()


@pytest.mark.parametrize(
    ("value", "words"),
    usual(
        [("none", "got none for this batch"), ("detached", "does not depend on the parameters")],
        thorough=[("nan", "is nan on the fixed sample"), ("vector", r"expected a scalar tensor, got \(3,\)")],
    ),
)
def test_a_training_step_that_gives_no_loss_costs_a_probe_and_nothing_else(value, words, bare_run, caplog):
    module, weights = net(Returning), Weights()
    module.value = value
    monitor = probing()
    infos = caplog.at_level(logging.INFO, "lightning.pytorch")
    with infos, pytest.warns(UserWarning, match=f"(?s)the probe at step 8 failed.*{words}") as caught:
        fit(monitor, weights, module=module)
    assert len(told(caught)) == 1  # the one at step 12 fails alike
    assert re.search(f"(?s)2 of 4 probes failed and are left out.*{words}", caplog.text)
    assert steps(monitor) == [0, 4]
    assert all(torch.equal(a, b) for a, b in zip(weights.at[12], bare_run.at[12], strict=True))
    assert is_usable(monitor)


def always_nan(module, batch, batch_idx):
    return nan_at_first(module, batch, batch_idx) * float("nan")


class Ending(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise ZeroDivisionError("mine")


@pytest.mark.parametrize("last", [12, 9])
def test_where_every_probe_fails_the_end_says_so_and_every_reason_is_kept(tmp_path, caplog, last):
    """Also where training ends by an exception: there is no file then."""
    reason = "LossError: the loss of Net is nan on the fixed sample; nothing can be measured here."
    monitor, logger = probing(loss_fn=always_nan), CSVLogger(tmp_path)
    ends = nullcontext() if last == 12 else pytest.raises(ZeroDivisionError)
    with caplog.at_level(logging.INFO, "lightning.pytorch"), pytest.warns(UserWarning, match=reason) as caught, ends:
        fit(monitor, Ending(last), logger=logger)
    assert len(told(caught)) == 1
    count = 4 if last == 12 else 3
    summary = [text for text in caplog.messages if text.startswith("SubspaceMonitor: ")]
    assert summary == [f"SubspaceMonitor: {count} of {count} probes failed and are left out. {reason}"]
    file = tmp_path / "lightning_logs/version_0/subspace_probes.json"
    assert file.exists() == (last == 12)
    if file.exists():
        probes = from_json(file.read_text())["subspace"]["subspace/probes"]
        assert [(probe["step"], probe["failed"]) for probe in probes] == [(step, reason) for step in (0, 4, 8, 12)]
    assert is_usable(monitor)


def nan_between(module, batch, batch_idx):
    return nan_at_first(module, batch, batch_idx) * (float("nan") if 4 <= module.global_step < 12 else 1.0)


# Of ModelCheckpoint, which a resumed run does not have here.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning")
def test_a_resumed_run_counts_the_probes_that_failed_before(tmp_path, caplog):
    """At steps 0, 4 and 8 of 0, 4, 8, 12; a checkpoint of step 6 has the first two, which `show` finds there."""
    keep, path = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=6, save_top_k=-1), None
    reason = "LossError: the loss of Net is nan on the fixed sample; nothing can be measured here."
    for callbacks in ([keep], []):
        logger = CSVLogger(tmp_path / "logs")
        trainer = make(probing(loss_fn=nan_between), *callbacks, logger=logger, enable_checkpointing=path is None)
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch"), pytest.warns(UserWarning, match="probe at step"):
            trainer.fit(net(), data(), ckpt_path=path)
        said = [text for text in caplog.messages if "probes failed" in text]
        assert said == [f"SubspaceMonitor: 3 of 4 probes failed and are left out. {reason}"]
        (probes,) = from_json(Path(logger.log_dir, "subspace_probes.json").read_text())["subspace"].values()
        assert [(probe["step"], probe.get("failed")) for probe in probes] == [
            *((step, reason) for step in (0, 4, 8)), (12, None),
        ]  # fmt: skip
        path = tmp_path / "kept/step=6.ckpt"
    (tags,) = read_runs(path).values()
    assert [(probe["step"], probe["failed"]) for probe in tags["subspace/probes"]] == [(0, reason), (4, reason)]


def test_of_several_causes_the_most_frequent_are_told():
    probes = FailedProbes()
    for step, reason in enumerate(["A: a.", None, "B: b.", "B: b.", "C: c.", "D: d."]):
        probes.see(step, reason)
    assert probes.text == "5 of 6 probes failed and are left out: 2 by B: b; 1 by A: a; 2 by other causes."
    probes.see(6, "C: c.")
    probes.see(7, "A: a.")
    assert probes.text.startswith("7 of 8 probes failed and are left out: 2 by A: a; 2 by B: b; ")


def test_reasons_that_differ_in_numbers_are_one_cause():
    probes = FailedProbes()
    for step, reason in enumerate(["A: 1.5 on rank 0.", "A: 2e-3 on rank 1.", None, "B: b.", "A: -7 on rank 0."]):
        probes.see(step, reason)
    assert probes.text == "4 of 5 probes failed and are left out: 3 by A: 1.5 on rank 0; 1 by B: b."


def test_they_go_on_with_a_run_and_not_without():
    probes = FailedProbes()
    for step, reason in enumerate(["A: a.", "A: a.", None]):
        probes.see(step, reason)
    probes.begin(goes_on=True)
    probes.see(6, None)
    assert probes.text == "2 of 4 probes failed and are left out. A: a."
    probes.see(1, None)  # again
    assert probes.text == "1 of 4 probes failed and is left out. A: a."
    probes.resume({0: "B: b.", 1: "B: b."}, 2)
    assert probes.text == "2 of 4 probes failed and are left out. B: b."
    probes.begin(goes_on=False)
    probes.see(0, None)
    assert probes.text is None


def of_monitor(caplog):
    return [text.removeprefix("SubspaceMonitor: ") for text in caplog.messages if text.startswith("SubspaceMonitor: ")]


def test_probes_without_a_trusted_space_are_counted_at_the_end(tmp_path, caplog):
    """Of a run that is resumed all of them, and of a single one its warning has told."""
    keep, path = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1), None
    for callbacks in ([keep], []):
        trainer = make(probing(max_matvecs=4), *callbacks, enable_checkpointing=path is None)
        caplog.clear()
        with warnings.catch_warnings(), caplog.at_level(logging.INFO, "lightning.pytorch"):
            warnings.simplefilter("ignore")
            trainer.fit(net(), data(), ckpt_path=path)
        (text,) = [text for text in of_monitor(caplog) if "no trusted eigenspace" in text]
        assert text.startswith("4 of 4 probes have no trusted eigenspace. Eigenvalues, fractions and overlaps are left")
        path = tmp_path / "step=6.ckpt"
    caplog.clear()
    with pytest.warns(UserWarning, match="are left out"), caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(probing([4], max_matvecs=4))
    assert not [text for text in of_monitor(caplog) if "no trusted eigenspace" in text]


@pytest.mark.parametrize(
    ("every", "arguments", "text"),
    [
        ([50], {}, "no probe was taken by step 12, where training ended; every_n_steps=[50]."),
        (4, {"reference_step": 50}, "no reference was taken by step 12, where training ended; reference_step=50."),
        (4, {"reference_step": 8}, None),
        (4, {"loss_fn": always_nan}, None),  # of which there is a count
    ],
)
def test_what_was_asked_for_later_than_training_went_is_told(every, arguments, text, caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "lightning.pytorch"):
        warnings.simplefilter("ignore")
        fit(probing(every, **arguments))
    assert [said for said in of_monitor(caplog) if "where training ended" in said] == [text] * (text is not None)


def test_a_failure_is_raised_on_request():
    monitor = probing(loss_fn=nan_at_first, on_failure="raise")
    with pytest.raises(RuntimeError, match="the loss of Net is nan"):
        fit(monitor)
    assert is_usable(monitor)


class Broken(Measurement):
    needs = Needs.NOTHING

    def after_step(self, probe, gradient, update):
        raise ZeroDivisionError("mine")


def test_a_measurement_that_fails_after_the_step_costs_what_the_step_tells():
    monitor = probing(measurements=[Broken()])
    with pytest.warns(UserWarning, match="the step from 0 are left out.*ZeroDivisionError: mine") as caught:
        fit(monitor)
    assert len(told(caught)) == 1
    assert steps(monitor) == [0, 4, 8, 12]
    assert all("gradient_fraction" in record.metrics for record in monitor.history)
    assert not any("update_fraction" in record.metrics for record in monitor.history)
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(probing(measurements=[Broken()], on_failure="raise"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"tol": 1e-4, "verify": 10, "ncv": 9},
            "tol, ncv, verify without effect: no eigenpairs are computed with k=0.",
        ),
        (
            {"curvature": "none", "which": "SA"},
            "which without effect: no eigenpairs are computed with curvature='none'.",
        ),
        ({}, None),
    ],
)
def test_arguments_of_the_eigensolver_without_eigenpairs_are_told_of(arguments, text, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(probing(k=0, **arguments))
    said = [message for message in caplog.messages if "without effect" in message]
    assert said == ([] if text is None else [f"SubspaceMonitor: {text}"])


class Freezing(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 6:
            pl_module.net[0].requires_grad_(False)


def test_parameters_that_are_frozen_on_the_way_start_the_overlaps_anew():
    monitor = probing()
    with pytest.warns(UserWarning, match="the set of measured parameters has changed by step 8; overlaps start anew"):
        fit(monitor, Freezing())
    assert ["overlap_previous" in record.metrics for record in monitor.history] == [False, True, False, True]
    assert monitor.overlap_matrix()[0] == [8, 12]


# Steps and budget


class Odd(SubspaceMonitor):
    def should_measure(self, step):
        return step % 5 == 0


def test_the_schedule_is_one_method():
    monitor = Odd(k=3, max_overhead=None, sample="all")
    fit(monitor)
    assert steps(monitor) == [0, 5, 10, 12]


def test_a_list_of_steps_is_taken_as_it_is():
    monitor = probing([3, 11])
    fit(monitor)
    assert steps(monitor) == [3, 11]


def test_listed_steps_that_the_budget_forbids_are_told():
    monitor = probing([0, 2, 3], max_overhead=0.001)
    with pytest.warns(UserWarning, match=r"2 steps \(2, 3\) were passed over to keep max_overhead=0.001"):
        fit(monitor)
    assert steps(monitor) == [0]


def test_accumulated_batches_are_one_step():
    monitor = probing(1)
    fit(monitor, accumulate_grad_batches=4, max_steps=3)
    assert steps(monitor) == [0, 1, 2, 3]


def test_the_current_batch_is_the_sample():
    seen = {}

    def loss_fn(module, batch, batch_idx):
        seen[module.global_step] = batch[0].float()  # also behind the step that was taken from there
        return module.training_step(batch, batch_idx)

    monitor = probing(sample="current", loss_fn=loss_fn, weight=lambda batch: 0.0)  # one batch needs no weight
    batches = [batch[0] for batch in data()]
    for _ in range(2):
        fit(monitor, max_steps=8)
        assert steps(monitor) == [0, 4, 8]
        for step, batch in seen.items():  # the batch of the step behind; at the start the one to come
            probed = step - step % 4
            assert torch.equal(batch, batches[max(probed - 1, 0) % 8])
        assert set(seen) == {0, 1, 4, 5, 8}
        seen.clear()


# The forecast and the line of progress


def test_the_forecast_is_printed_once(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(probing(1), max_steps=1)
    (line,) = [message for message in caplog.messages if "s a probe, " in message]
    seconds = float(re.fullmatch(r"SubspaceMonitor: n = 57, k = 3: about (\S+) s a probe, .*", line)[1])
    assert 0.0 < seconds < 60.0


def test_the_forecast_is_made_of_several_products(monkeypatch):
    moments = iter([0.0, 5.0, 6.0, 9.0])  # until the first product, and until two behind it
    told = []
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: next(moments, 100.0)))
    monkeypatch.setattr(forecast, "forecast", lambda *, first, seconds, **rest: told.append((first, seconds)) or "told")
    monkeypatch.setattr(forecast, "expected_products", lambda settings, prospect: (100.0 * prospect.number + 10.0, 3.0))
    fit(probing(1), max_steps=1)
    assert told == [(5.0 + 2.0 * 10.0, 5.0 + 2.0 * 3.0)]


@pytest.mark.parametrize("answer", usual(["raises"], thorough=[None]))
def test_a_measurement_that_cannot_tell_what_it_takes_costs_the_forecast_alone(answer, caplog):
    class Vague(Measurement):
        def expected_products(self, prospect):
            if answer == "raises":
                raise ValueError("on purpose")
            return answer

        def measure(self, probe):
            return {"vague": 1.0}

    monitor = probing(1, measurements=[Vague()])
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(monitor, max_steps=1)
    assert [record.metrics["vague"] for record in monitor.history] == [1.0, 1.0]
    (line,) = [message for message in caplog.messages if "forecast" in message]
    assert ("ValueError: on purpose" if answer else "Vague.expected_products: expected a number, got None") in line
    assert not any("s a probe, " in message for message in caplog.messages)


def test_a_run_that_goes_on_has_a_forecast_of_its_own(tmp_path, caplog):
    monitor, again = probing(8), probing(8)
    fit(monitor, max_epochs=1).save_checkpoint(tmp_path / "epoch.ckpt")
    trainer = make(again, max_epochs=2)
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(net(), data(), ckpt_path=tmp_path / "epoch.ckpt")
    assert len(again.history) > len(monitor.history)
    assert len([message for message in caplog.messages if "s a probe, " in message]) == 1


def test_as_many_products_are_enough_as_every_solve_takes_or_two_that_take_long():
    for k, enough in ((1, 2), (2, 2), (3, 3), (10, 10), (50, 10)):
        assert [forecast.is_enough(count, k, 0.1) for count in range(1, 60)].index(True) + 1 == enough
        assert forecast.is_enough(2, k, 10.0)
        assert not forecast.is_enough(1, k, 10.0)


def test_a_long_probe_shows_its_progress(monkeypatch):
    shown = []
    monkeypatch.setattr(progress.ProgressLine, "update", lambda self, text: shown.append(text))
    monitor = probing()
    fit(monitor, max_steps=1)
    counts = [int(re.fullmatch(r"subspace: (\d+) Hessian products, residual .+", text)[1]) for text in shown]
    products = [int(record.metrics["solver/matvecs"]) for record in monitor.history]
    assert counts == [i for n in products for i in range(1, n + 1)]


# How runs end, and go on


def test_a_fresh_run_starts_a_new_history():
    monitor = probing()
    fit(monitor, max_steps=4)
    first = monitor.to_rows()
    fit(monitor, max_steps=4)
    again = monitor.to_rows()
    assert steps(monitor) == [0, 4]
    for a, b in zip(first, again, strict=True):
        assert a["gradient_fraction"] == b["gradient_fraction"]
    assert monitor.overlap_matrix()[0] == [0, 4]


def test_a_run_that_goes_on_continues_the_history():
    whole, parts = probing(5), probing(5)
    fit(whole, max_epochs=2)
    trainer, module = make(parts, max_epochs=1), net(Validated)
    trainer.fit(module, data(), data())
    assert steps(parts) == [0, 5, 8]  # the end is probed
    trainer.validate(module, data(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data(), data())
    assert steps(parts) == [0, 5, 8, 10, 15, 16]
    assert steps(whole) == [0, 5, 10, 15, 16]
    straight = {record.step: record.metrics for record in whole.history}
    for record in parts.history:
        if record.step in straight:
            expected = straight[record.step]["gradient_fraction"]
            assert record.metrics["gradient_fraction"] == pytest.approx(expected, abs=1e-4)
    assert all("overlap_previous" in record.metrics for record in parts.history[1:])
    assert parts.overlap_matrix()[0] == steps(parts)
    assert is_usable(parts)


class Interrupting(pl.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 4:
            raise KeyboardInterrupt


def interrupt_at_4(module, batch, batch_idx):
    if module.global_step == 4:
        raise KeyboardInterrupt
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1])


@pytest.fixture
def _sigint():
    """Lightning ignores the signal from the first interrupt on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("inside", [False, True])
def test_an_interrupted_run_leaves_what_was_measured(inside, tmp_path):
    monitor = probing(loss_fn=interrupt_at_4) if inside else probing()
    callbacks = [monitor] if inside else [Interrupting(), monitor]
    module = net()
    trainer = make(*callbacks, logger=CSVLogger(tmp_path))
    with pytest.raises(SystemExit):
        trainer.fit(module, data())
    assert trainer.global_step == 4
    assert steps(monitor) == ([0] if inside else [0, 4])
    assert csv_scalars(tmp_path / "lightning_logs/version_0") == pytest.approx(expected_scalars(monitor))
    if not inside:
        assert "update_fraction" not in monitor.history[-1].metrics
    assert all(parameter.is_leaf and isinstance(parameter, nn.Parameter) for parameter in module.parameters())
    assert "log" not in vars(module)
    assert is_usable(monitor)
    share = monitor.overhead
    assert monitor.overhead == share  # the clock has stopped


def test_a_run_that_ends_at_a_probe_is_not_probed_twice():
    monitor = probing()
    fit(monitor, max_steps=8)
    assert steps(monitor) == [0, 4, 8]
    assert "update_fraction" in monitor.history[1].metrics
    assert "update_fraction" not in monitor.history[2].metrics
    assert is_usable(monitor)


def test_a_time_limit_ends_a_run_with_a_last_probe():
    monitor = probing(10_000)
    trainer = fit(monitor, max_epochs=-1, max_time=timedelta(milliseconds=300))
    assert steps(monitor) == [0, trainer.global_step]
    assert is_usable(monitor)


def test_a_fast_development_run_works():
    monitor = probing()
    trainer = make(monitor, fast_dev_run=True)
    trainer.fit(net(Validated), data(), data())
    assert steps(monitor) == [0, 1]
    assert is_usable(monitor)


@pytest.mark.parametrize(
    ("copied", "used"), covering([copy.deepcopy, lambda monitor: pickle.loads(pickle.dumps(monitor))], [False, True])
)
def test_a_copy_has_the_history_and_can_be_used(copied, used, usual_run):
    monitor = usual_run[0] if used else probing()
    twin = copied(monitor)
    assert str(twin.to_rows()) == str(monitor.to_rows())  # nan is not equal to itself
    assert not {"log", "log_dict"} & vars(twin).keys()  # Lightning's, bound to the module of the run
    assert is_usable(twin)
    fit(twin, max_steps=4)
    assert steps(twin) == [0, 4]


def test_a_copy_during_the_run_leaves_out_what_is_open():
    class Copying(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            self.pickled = pickle.dumps(monitor)

    monitor, copying = probing(1), Copying()
    fit(monitor, copying, max_steps=2)
    twin = pickle.loads(copying.pickled)
    assert twin._recorder.open is None
    assert steps(twin) == [0, 1]
    assert steps(monitor) == [0, 1, 2]


def test_there_is_nothing_before_a_run():
    monitor = SubspaceMonitor()
    assert monitor.history == []
    assert monitor.overhead == monitor.later_overhead == 0.0
    assert is_usable(monitor)
