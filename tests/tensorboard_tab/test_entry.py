"""What a monitor writes for the tab: all that its records hold, once a probe, to TensorBoard alone."""

import inspect
import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_subspace import SubspaceMonitor
from lightning_subspace.measurements import Density
from lightning_subspace.probe.checkpoint import decode
from lightning_subspace.report.tab_entry import tab_entry
from lightning_subspace.tensorboard_tab.event_files import read_probes
from lightning_subspace.tensorboard_tab.schema import to_json
from tests.left_out import leave_error_bar_out, leave_figures_out
from tests.processes import run as run_in_processes
from tests.tensorboard_tab.fits import DECAY, EXAMPLES, LR, Net, data, fit, trainer_of

DIGITS = 5e-5  # relative error of a number that is written with five digits
N = sum(parameter.numel() for parameter in Net().parameters())


def entries(folder, name="subspace"):
    [run] = read_probes(folder).values()
    return run[f"{name}/probes"]


def near(value):
    return pytest.approx(value, rel=DIGITS, abs=1e-300)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    density = Density(vectors=2)
    monitor = SubspaceMonitor(k=3, every_n_steps=2, dtype="float64", max_overhead=None, measurements=[density])
    fit(folder, monitor, steps=8)
    return monitor, density, entries(folder)


def test_there_is_an_entry_for_every_record(run):
    monitor, _, found = run
    assert [entry["step"] for entry in found] == [record.step for record in monitor.history] == [0, 2, 4, 6, 8]


def test_every_metric_is_there_whatever_is_logged(run):
    monitor, _, found = run
    for entry, record in zip(found, monitor.history, strict=True):
        expected = {key: value for key, value in record.metrics.items() if not key.startswith("eigenvalues/")}
        expected = {key: value for key, value in expected.items() if math.isfinite(value)}
        assert entry["metrics"] == {key: near(value) for key, value in expected.items()}


def test_eigenvalues_come_with_their_residuals_and_the_next_one(run):
    monitor, _, found = run
    for entry, record in zip(found, monitor.history, strict=True):
        space = record.subspace
        assert entry["eigenvalues"] == [near(value) for value in space.eigenvalues.tolist()]
        # Of bounds two digits are written.
        assert entry["residuals"] == [pytest.approx(value, rel=5e-2) for value in space.residuals.tolist()]
        assert entry.get("next") == (near(record.metrics[key]) if (key := "eigenvalues/04") in record.metrics else None)
        assert (entry["outcome"], entry["trusted"]) == (space.outcome.name, space.trusted)
        assert entry["verified"] == space.verified


def test_overlaps_are_a_row_of_the_matrix(run):
    monitor, _, found = run
    steps, matrix = decode(monitor.state_dict()).overlaps.matrix()
    known = 0
    for entry in found:
        if "overlaps" not in entry:
            continue
        for other, value in zip(*entry["overlaps"], strict=True):
            assert value == pytest.approx(matrix[steps.index(entry["step"]), steps.index(other)], abs=5e-4)
            assert other < entry["step"]
            known += 1
    trusted = sum(record.subspace.trusted for record in monitor.history)
    assert known == trusted * (trusted - 1) // 2 > 0


def test_the_density_is_that_of_the_measurement(run):
    _, density, found = run
    for entry, record in zip(found, density.history, strict=True):
        nodes, values = (np.array(part) for part in entry["density"])
        low, high = record.spectrum.ends
        assert nodes[0] < low < high < nodes[-1]
        exact = record.spectrum.density(torch.tensor(nodes), 1e-2 * (high - low))
        np.testing.assert_allclose(values, exact, rtol=1e-3, atol=1e-3 * float(exact.max()))
        assert np.trapezoid(values, nodes) == pytest.approx(1.0, abs=0.1)  # 60 points, and tails that are cut off


def test_rate_and_threshold_are_those_of_the_step_under_a_scheduler(run):
    for entry in run[2]:
        rate = LR * DECAY ** entry["step"]
        assert entry["lr"] == near(rate)
        assert entry["threshold"] == near(2 / rate)
        ratio = entry["metrics"].get("sharpness_over_threshold")
        assert ratio == pytest.approx(entry["eigenvalues"][0] * rate / 2, rel=3 * DIGITS)


def test_the_header_says_what_was_asked_for_once_a_fit(tmp_path):
    monitor = SubspaceMonitor(k=3, every_n_steps=2, max_overhead=None, dtype="float64")
    logger = TensorBoardLogger(str(tmp_path), name="logs", version="")
    net = Net()
    for steps in (1, 2):
        trainer_of(monitor, logger, steps).fit(net, data())
    found = entries(tmp_path)
    headers = {entry["step"]: entry["run"] for entry in found if "run" in entry}
    assert [entry["step"] for entry in found if "run" in entry] == [0, 0]
    for header in headers.values():
        assert (header["k"], header["n"], header["optimizer"], header["ranks"]) == (3, N, "SGD", 1)
        assert (header["dtype"], header["tol"], header["which"]) == ("float64", 1e-3, "LA")
        assert (header["curvature"], header["mode"], header["precision"]) == ("hessian", "train", "64-true")
        assert header["sample"] <= header["gradient_sample"] == EXAMPLES
        assert header["versions"]["torch"] == torch.__version__
        assert "max_overhead" not in header  # None: no bound was asked for


def test_a_space_that_is_not_determined_comes_with_its_reason(tmp_path):
    net = Net()
    # Equal rows in the last layer, with outputs that are not told apart: its curvature has equal eigenvalues.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    monitor = SubspaceMonitor(k=1, every_n_steps=1, max_overhead=None, dtype="float64")
    with pytest.warns(UserWarning, match="not determined"):
        fit(tmp_path, monitor, steps=1, net=net)
    entry, record = entries(tmp_path)[0], monitor.history[0]
    assert record.subspace.trusted is entry["trusted"] is False
    assert entry["reason"] == record.subspace.verdict
    assert "overlaps" not in entry
    assert "gradient_fraction" not in entry["metrics"]


def test_without_convergence_there_are_no_eigenvalues(tmp_path):
    monitor = SubspaceMonitor(k=5, every_n_steps=1, tol=1e-12, max_matvecs=7, max_overhead=None, dtype="float64")
    with pytest.warns(UserWarning, match="products were spent"):
        fit(tmp_path, monitor, steps=1)
    entry, record = entries(tmp_path)[0], monitor.history[0]
    assert not record.subspace.converged
    assert entry["outcome"] == record.subspace.outcome.name != "CONVERGED"
    assert entry["reason"] == record.subspace.verdict
    assert not {"eigenvalues", "residuals", "next", "overlaps"} & entry.keys()


class Stumbling(Net):
    """A net whose loss cannot be had by the probe at step 2."""

    def training_step(self, batch, index):
        if torch.is_grad_enabled() and self.trainer.global_step == 2 and self.fails():
            raise RuntimeError("no memory for λ, says the device")
        return super().training_step(batch, index)

    def fails(self):
        # Training itself goes on: it is not called from the package.
        return any("lightning_subspace/probe/" in frame.filename for frame in inspect.stack())


def test_a_probe_that_fails_leaves_its_text(tmp_path):
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, dtype="float64")
    with pytest.warns(UserWarning, match="no memory for λ"):
        fit(tmp_path, monitor, steps=6, net=Stumbling())
    found = entries(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 4, 6]
    assert found[1] == {"v": 1, "step": 2, "failed": "RuntimeError: no memory for λ, says the device"}
    assert [record.step for record in monitor.history] == [0, 4, 6]
    assert "failed" not in found[2]


def test_steps_that_were_passed_over_are_counted(tmp_path, logged):
    monitor = SubspaceMonitor(k=2, every_n_steps=1, max_overhead=0.01, dtype="float64")
    fit(tmp_path, monitor, steps=12)
    found = entries(tmp_path)
    assert len(logged) == 1  # which the page says again, with their number
    assert "passed_over" not in found[0]
    counts = [entry.get("passed_over", 0) for entry in found]
    assert counts == sorted(counts)
    # Between two probes every step was passed over.
    gaps = [b["step"] - a["step"] - 1 for a, b in pairwise(found)]
    assert np.diff(counts).tolist() == gaps


def test_a_monitor_of_no_space_writes_its_numbers(tmp_path):
    monitor = SubspaceMonitor(k=0, every_n_steps=2, max_overhead=None, dtype="float64")
    fit(tmp_path, monitor, steps=4)
    found = entries(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2, 4]
    assert found[0]["run"]["k"] == 0
    assert found[0]["metrics"].keys() == monitor.history[0].metrics.keys()
    assert not {"eigenvalues", "trusted", "overlaps"} & found[0].keys()


def test_an_entry_of_ten_eigenvalues_is_at_most_two_kilobytes(tmp_path, logged):
    monitor = SubspaceMonitor(k=10, every_n_steps=1, max_overhead=None)
    fit(tmp_path, monitor, steps=4)
    state = decode(monitor.state_dict())
    # As late in a long run, with as many spaces held as ever are, and steps and overlaps of many digits.
    for step in range(123_456, 999_999, 10_000):
        state.overlaps.add(step, next(iter(state.overlaps.sketches.values())))
    last = state.overlaps.steps[-1]
    state.overlaps.pairs = dict.fromkeys(state.overlaps.pairs, 0.12344)
    # Whether ten are a space of this net is another question: a record that leaves nothing out is the longest.
    fine = next(record for record in monitor.history if record.subspace.trusted)
    record = replace(fine, step=last)
    written = entries(tmp_path)
    beside = {key: written[1][key] for key in ("lr", "threshold")}
    entry = tab_entry(record, state.overlaps, **beside, passed_over=123_456)
    assert (len(entry["eigenvalues"]), len(entry["overlaps"][0])) == (10, 63)
    layers = entry.pop("layers")
    assert len(to_json(entry)) <= 2000
    assert len(to_json({"layers": layers})) <= 100 * len(layers["groups"])
    del written[0]["layers"]
    assert len(to_json(written[0])) <= 2000  # with the header


def test_other_loggers_get_nothing(tmp_path, monkeypatch):
    leave_figures_out(monkeypatch)
    loggers = [CSVLogger(str(tmp_path), name="csv", version=""), TensorBoardLogger(str(tmp_path), "logs", "")]
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, dtype="float64")
    fit(tmp_path, monitor, steps=4, loggers=loggers)
    assert "probes" not in (tmp_path / "csv" / "metrics.csv").read_text()
    assert len(entries(tmp_path)) == 3
    assert [path.name for path in (tmp_path / "csv").rglob("*tfevents*")] == []


def fit_in_two_processes(folder):
    logger = TensorBoardLogger(str(folder), name="logs", version="")
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, dtype="float64")
    fit(folder, monitor, steps=2, loggers=logger, strategy="ddp", devices=2)
    return [record.step for record in monitor.history]


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    leave_error_bar_out(monkeypatch)
    assert run_in_processes(fit_in_two_processes, 2, tmp_path, group=False, timeout=120.0) == [[0, 2]] * 2
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1
    found = entries(tmp_path)
    assert [entry["step"] for entry in found] == [0, 2]
    assert found[0]["run"]["ranks"] == 2


def test_a_writer_that_raises_reaches_nobody(tmp_path, monkeypatch):
    def broken(self, summary, *rest, **options):
        if any(value.metadata.plugin_data.plugin_name == "lightning_subspace" for value in summary.value):
            raise OSError("no space left")
        return kept(self, summary, *rest, **options)

    from torch.utils.tensorboard import FileWriter

    kept = FileWriter.add_summary
    monkeypatch.setattr(FileWriter, "add_summary", broken)
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, dtype="float64")
    with pytest.warns(UserWarning, match="no space left") as told:
        trainer = fit(tmp_path, monitor, steps=4)
    assert (trainer.global_step, len(monitor.history)) == (4, 3)
    assert len([one for one in told if "no space left" in str(one.message)]) == 1
    assert read_probes(tmp_path) == {}


def test_an_entry_without_numbers_that_are_none_can_be_written():
    from lightning_subspace.subspace.record import Record

    entry = tab_entry(Record(3, {"lost": math.nan, "kept": 2.0}), lr=None)
    assert json.loads(to_json(entry)) == {"v": 1, "step": 3, "metrics": {"kept": 2}}
