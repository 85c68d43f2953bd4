"""What a projection writes for the tab: its numbers at their steps, and once a fit what was asked for."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_subspace import StartWhenAligned, SubspaceMonitor, SubspaceProjection
from lightning_subspace.tensorboard_tab.event_files import read_probes
from tests.tensorboard_tab.fits import Net, data, fit, trainer_of

N = sum(parameter.numel() for parameter in Net().parameters())


def entries(folder, name="projection"):
    [run] = read_probes(folder).values()
    return run[f"{name}/probes"]


def project(keep="bulk", **options):
    # Half as many directions as there are classes, since the last of them has no gap.
    return SubspaceProjection(keep, **{"k": 2, "dtype": "float64", "sample": "all", **options})


def test_its_numbers_are_those_of_the_other_loggers(tmp_path):
    loggers = [CSVLogger(str(tmp_path), "csv", ""), TensorBoardLogger(str(tmp_path), "logs", "")]
    fit(tmp_path, project(start_when=2), steps=6, loggers=loggers)
    found = entries(tmp_path / "logs")
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = {int(row["step"]): float(row["projection/removed"]) for row in csv.DictReader(file)}
    assert [entry["step"] for entry in found] == [2, 3, 4, 5]
    assert {entry["step"]: entry["metrics"] for entry in found} == {
        step: {"removed": pytest.approx(share, rel=5e-5)} for step, share in rows.items()
    }


def test_the_header_says_what_was_asked_for_once_a_fit(tmp_path):
    projection, net = project("top"), Net()
    logger = TensorBoardLogger(str(tmp_path), "logs", "")
    for steps in (1, 2):
        trainer_of(projection, logger, steps).fit(net, data())
    headers = [entry["run"] for entry in entries(tmp_path) if "run" in entry]
    assert len(headers) == 2
    for header in headers:
        asked = {key: header[key] for key in ("keep", "k", "n", "optimizer", "ranks", "dtype")}
        assert asked == {"keep": "top", "k": 2, "n": N, "optimizer": "SGD", "ranks": 1, "dtype": "float64"}


def test_of_two_entries_of_a_step_the_later_one_has_all_numbers(tmp_path):
    # It begins at the first refresh, whose chi is above the threshold: that step is projected already.
    fit(tmp_path, project(start_when=StartWhenAligned(0.01)), steps=3)
    at = {}
    for entry in entries(tmp_path):
        at.setdefault(entry["step"], []).append(set(entry["metrics"]))
    both = [of for of in at.values() if len(of) > 1]
    assert both == [[{"chi"}, {"chi", "removed"}]]


@pytest.mark.filterwarnings("ignore:.*no second derivative")
def test_a_refresh_that_fails_has_an_entry_with_its_reason(tmp_path):
    asked = []

    def rows(module):
        asked.append(len(asked))
        if len(asked) == 2:
            raise RuntimeError("no second derivative")
        return torch.eye(N)[:3]

    fit(tmp_path, SubspaceProjection("bulk", basis=rows, refresh_every_n_steps=2), steps=5)
    found = {entry["step"]: entry for entry in entries(tmp_path)}
    assert {step: entry["reason"] for step, entry in found.items() if "reason" in entry} == {
        2: "RuntimeError: no second derivative"
    }
    assert len(asked) == 3
    assert "removed" in found[2]["metrics"]  # from the space before


@pytest.mark.filterwarnings("ignore:.*the space is not used")
def test_a_space_that_is_not_used_has_an_entry_with_its_reason(tmp_path):
    fit(tmp_path, project(max_matvecs=2), steps=2)
    reasons = [entry["reason"] for entry in entries(tmp_path)]
    assert len(reasons) == 2
    assert all("the space is not used" in reason for reason in reasons)


def test_beside_a_monitor_each_has_a_tag_of_its_own(tmp_path):
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, dtype="float64")
    fit(tmp_path, [monitor, project()], steps=4)
    [run] = read_probes(tmp_path).values()
    assert {tag: len(found) for tag, found in run.items()} == {"subspace/probes": 3, "projection/probes": 4}
