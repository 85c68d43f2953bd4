"""Checkpoints of a run without a monitor: the same numbers as by hand, whatever ended the command before."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_subspace import measure_subspace, read_history
from lightning_subspace.callbacks import checkpoint_walk
from lightning_subspace.callbacks.checkpoint_walk import CheckpointWalk
from lightning_subspace.callbacks.saved_points import SavedPoint, points_of
from lightning_subspace.command.picture import draw, overlaps_of, record_of
from lightning_subspace.command.runs import read_runs
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.history import read_states
from lightning_subspace.probe.settings import ProbeSettings
from tests.command.small_project import BATCH, CLASSES, EPOCHS, EXAMPLES, LR, Data, Net
from tests.processes import run
from tests.thorough import how_many

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # jsonargparse's, about Lightning's use of it
    pytest.mark.filterwarnings("ignore:.*is so close to the next one:UserWarning"),
]
STEPS = [EXAMPLES // BATCH * epoch for epoch in range(1, EPOCHS + 1)]
K = 2
# Numbers that count products or seconds, or depend on the solver's path.
COSTS = ("solver/",)
CLOSE = 1e-7


def by_hand(folder, steps=STEPS):
    """`measure_subspace` of each checkpoint, on all examples."""
    data = Data()
    data.setup("fit")
    x, labels = data.whole.tensors
    records = []
    for step in steps:
        [file] = folder.glob(f"*step={step}.ckpt")
        net = Net(classes=CLASSES)
        net.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        records.append(
            measure_subspace(
                net,
                list(zip(x.split(BATCH), labels.split(BATCH), strict=True)),
                k=K,
                tol=1e-10,
                dtype="float64",
                optimizer=torch.optim.SGD(net.parameters(), lr=LR),
                previous=records[-1] if records else None,
            )
        )
    return records


def numbers(records):
    return [{key: value for key, value in r.metrics.items() if not key.startswith(COSTS)} for r in records]


def test_the_numbers_are_those_of_measure_subspace(straight, trained):
    out, _ = straight
    found, expected = read_history(out / "history.ckpt"), by_hand(trained)
    assert [record.step for record in found] == STEPS
    for ours, theirs in zip(numbers(found), numbers(expected), strict=True):
        # Those that depend on how examples are put into micro-batches are of another split here.
        same = [key for key in theirs if not key.startswith(("noise/", "reliability", "gradient_fraction_"))]
        assert {"sharpness", "sharpness_over_threshold", "gradient_fraction", "eigenvalues/02"} <= set(same)
        for key in same:
            assert ours[key] == pytest.approx(theirs[key], rel=CLOSE, abs=CLOSE), key
    steps, matrix = read_states(out / "history.ckpt")["subspace"].overlaps.matrix()
    bases = [record.subspace.eigenvectors.double() for record in expected]
    dense = [[float((a @ b.T).square().sum()) / K for b in bases] for a in bases]
    assert steps == STEPS
    np.testing.assert_allclose(matrix, dense, atol=1e-6)  # sketches are in float32


def test_the_events_and_the_picture_are_of_the_same_history(straight, tmp_path):
    out, printed = straight
    assert f"history, subspace: {EPOCHS} probes, steps {STEPS[0]} to {STEPS[-1]}; k = 2, n = 27" in printed
    [events] = read_runs(out).values()
    [kept] = read_runs(out / "history.ckpt").values()
    for written, saved in zip(events["subspace/probes"], kept["subspace/probes"], strict=True):
        assert written["metrics"] == saved["metrics"]
        assert written["eigenvalues"] == saved["eigenvalues"]
    assert [probe["lr"] for probe in events["subspace/probes"]] == [LR] * EPOCHS
    [file] = draw({"run": events}, tmp_path / "a.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    records = [record_of(probe) for probe in events["subspace/probes"]]
    for drawn, record in zip(records, read_history(out / "history.ckpt"), strict=True):
        assert drawn.metrics == pytest.approx(record.metrics, rel=1e-4)  # five digits
    state = read_states(out / "history.ckpt")["subspace"]
    for ours, theirs in zip(overlaps_of(events["subspace/probes"]), state.overlaps.matrix(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)  # written in thousandths


def test_what_was_killed_goes_on_with_the_next_checkpoint(straight, measure, tmp_path, monkeypatch):
    write, taken = checkpoint_walk.write_results, []

    def dying(*args):
        write(*args)
        taken.append(args)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(checkpoint_walk, "write_results", dying)
    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    file = tmp_path / "out" / "history.ckpt"
    assert [r.step for r in read_history(file)] == STEPS[:2]
    monkeypatch.setattr(checkpoint_walk, "write_results", write)
    read, opened = checkpoint_walk.read, []
    monkeypatch.setattr(checkpoint_walk, "read", lambda path, **options: opened.append(path) or read(path, **options))
    assert measure() == 0
    assert len(opened) == EPOCHS - 2
    whole = straight[0] / "history.ckpt"
    for one, other in zip(numbers(read_history(whole)), numbers(read_history(file)), strict=True):
        assert one == pytest.approx(other, rel=CLOSE, abs=1e-6)  # the space before is kept in float32
    overlaps = [read_states(path)["subspace"].overlaps.matrix()[1] for path in (whole, file)]
    np.testing.assert_allclose(*overlaps, atol=1e-6)
    # In the events each is there once, also those that were written before.
    [tags] = read_runs(tmp_path / "out").values()
    # Files of one second, as of the process that was killed and of this one, are read in the order of process numbers.
    assert sorted(probe["step"] for probe in tags["subspace/probes"]) == STEPS
    opened.clear()
    assert measure() == 0
    assert opened == []


def test_two_processes_find_what_one_does(straight, measure, trained, tmp_path):
    count = how_many(2, thorough=EPOCHS)
    files = [str(file) for step in STEPS[:count] for file in trained.glob(f"*step={step}.ckpt")]
    assert run(measure, 2, "--ckpt", *files, group=False, timeout=60.0) == [0, 0]
    one, two = (read_history(folder / "history.ckpt") for folder in (straight[0], tmp_path / "out"))
    for ours, theirs in zip(numbers(one)[:count], numbers(two), strict=True):
        assert ours == pytest.approx(theirs, rel=CLOSE, abs=CLOSE)


def test_a_checkpoint_that_fails_costs_itself_alone(measure, trained, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for file in trained.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    [broken] = folder.glob(f"*step={STEPS[1]}.ckpt")
    saved = torch.load(broken, weights_only=True)
    weights = saved["state_dict"]
    weights["layers.0.weight"], weights["b"] = torch.zeros(1), weights.pop("layers.0.bias")
    del weights["layers.2.bias"]
    torch.save(saved, broken)
    assert measure(folder=folder) == 3
    assert [r.step for r in read_history(tmp_path / "out" / "history.ckpt")] == [STEPS[0], STEPS[2]]
    told = capsys.readouterr().err
    sentence = (
        f"{broken.name}: CheckpointError: --ckpt: expected weights of the module that --config builds, got "
        f"{str(broken)!r}, with shape (1,) in place of (3, 4) in 'layers.0.weight', without 'layers.0.bias' "
        "(and 1 more), with 'b', which it does not know; pass the --config that this model was trained by, or its "
        "arguments behind --\n"
    )
    assert sentence in told
    torch.save({**saved, "state_dict": Net(classes=CLASSES).state_dict()}, broken)  # mended, and too late
    assert measure(folder=folder) == 3
    assert "lies before one that is measured already" in capsys.readouterr().err
    assert measure("--anew", folder=folder) == 0
    assert [r.step for r in read_history(tmp_path / "out" / "history.ckpt")] == STEPS
    [tags] = read_runs(tmp_path / "out").values()
    assert [probe["step"] for probe in tags["subspace/probes"]] == STEPS


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--k", "1"], "--k: expected 2, as for what is measured already, got 1; name another folder"),
        (["--", "--data.examples=32"], "sample: expected the examples that earlier checkpoints were measured on"),
        (["--name", "other"], "--out: expected the results of `measure` under the name 'other', got"),
    ],
)
def test_results_of_something_else_are_refused(straight, measure, tmp_path, capsys, options, told):
    shutil.copytree(straight[0], tmp_path / "out")
    assert measure(*options) == 1
    assert told in capsys.readouterr().err
    assert [r.step for r in read_history(tmp_path / "out" / "history.ckpt")] == STEPS


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--k", "-1"], "k: expected an integer of at least 0, got -1"),
        (["--k", "60"], "k: expected 0..27, the number of parameters, got 60"),
        (["--measurements", "Nothing"], "--measurements: expected the path of what can be imported"),
        (["--measurements", "Record"], "--measurements: expected the name of a measurement"),
    ],
)
def test_wrong_options_are_told(measure, capsys, options, told):
    assert measure(*options) == 1
    assert told in capsys.readouterr().err


def test_files_that_are_none_are_told(measure, trained, tmp_path, capsys):
    assert measure(ckpt="nothing*.ckpt") == 1
    assert "--ckpt: expected checkpoints, got none that fit" in capsys.readouterr().err
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    assert measure("--ckpt", str(tmp_path / "other.ckpt")) == 1
    assert "which has no 'state_dict' and 'global_step'" in capsys.readouterr().err
    torch.save({"state_dict": {}, "global_step": 1, "hyper_parameters": nn.Linear(1, 1)}, tmp_path / "other.ckpt")
    assert measure("--ckpt", str(tmp_path / "other.ckpt")) == 1
    assert "if you trust it, --trust reads it by pickle" in capsys.readouterr().err


@pytest.mark.parametrize("length", [0, 100, -30, -1])
def test_a_damaged_checkpoint_costs_itself_alone(measure, trained, tmp_path, capsys, length):
    [good] = trained.glob(f"*step={STEPS[0]}.ckpt")
    [other] = trained.glob(f"*step={STEPS[1]}.ckpt")
    broken = tmp_path / "broken[1].ckpt"
    broken.write_bytes(other.read_bytes()[:length])
    assert measure("--ckpt", str(good), str(tmp_path / "broken*.ckpt")) == 3
    assert [r.step for r in read_history(tmp_path / "out" / "history.ckpt")] == STEPS[:1]
    told = capsys.readouterr().err
    expected = (
        f"{broken.name}: CheckpointError: --ckpt: expected a checkpoint of a Trainer, got {str(broken)!r}, which "
    )
    [line] = [line for line in told.splitlines() if line.startswith(expected)]
    assert line.endswith("); leave it out, or copy it again")
    assert "--trust" not in told
    assert measure("--ckpt", str(tmp_path / "broken*.ckpt")) == 1
    assert capsys.readouterr().err.startswith(expected.partition("CheckpointError: ")[2])


def test_a_checkpoint_of_objects_costs_itself_alone_and_may_be_trusted(measure, trained, tmp_path, capsys):
    files = [next(trained.glob(f"*step={step}.ckpt")) for step in STEPS[:2]]
    saved = torch.load(files[1], weights_only=True)
    torch.save({**saved, "extra": nn.Linear(1, 1)}, tmp_path / "objects.ckpt")
    both = ["--ckpt", str(tmp_path / "objects.ckpt"), str(files[0])]
    assert measure(*both) == 3
    assert "if you trust it, --trust reads it by pickle" in capsys.readouterr().err
    assert measure(*both, "--trust") == 0
    assert [r.step for r in read_history(tmp_path / "out" / "history.ckpt")] == STEPS[:2]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--sample", "argument --sample: expected a number of examples, or 'all', got '9x'"),
        ("--verify", "argument --verify: expected a number of checkpoints, or 'always' or 'never', got '9x'"),
    ],
)
def test_a_word_for_a_number_is_told_without_a_name_of_ours(measure, capsys, option, told):
    with pytest.raises(SystemExit):
        measure(option, "9x")
    assert capsys.readouterr().err.endswith(f"{told}\n")


def test_verification_may_be_asked_for_by_a_number(measure, tmp_path):
    assert measure("--verify", "2") == 0
    verified = [record.metrics["solver/verified"] for record in read_history(tmp_path / "out" / "history.ckpt")]
    assert verified == [1.0, 0.0, 1.0]


def test_more_is_measured_where_it_is_asked_for(measure, tmp_path):
    first = f"*step={STEPS[0]}.ckpt"
    more = ["--measurements", "Trace", "--params", "layers.2.*", "--sample", "32", "--gradient-sample", "40"]
    assert measure(*more, "--", "--data.iterable=true", ckpt=first) == 0
    [record] = read_history(tmp_path / "out" / "history.ckpt")
    assert "trace" in record.metrics
    assert read_states(tmp_path / "out" / "history.ckpt")["subspace"].space.n == 4 * CLASSES
    assert record.metrics["gradient_norm"] > 0.0


def test_the_last_of_several_files_of_a_step_is_not_measured_again(trained, tmp_path):
    [file] = trained.glob(f"*step={STEPS[1]}.ckpt")
    shutil.copy(file, tmp_path / "last.ckpt")
    points, _ = points_of([str(file), str(trained / "*.ckpt"), str(tmp_path / "last.ckpt")])
    assert [point.step for point in points] == STEPS
    assert points[1].path == file


def test_an_error_of_the_users_code_is_told_with_its_place_where_it_is_asked_for(measure, capsys, monkeypatch):
    def setup(self, stage):
        raise ValueError("no data here")

    monkeypatch.setattr(Data, "setup", setup)
    assert measure() == 1
    assert capsys.readouterr().err.endswith("no data here\n")
    with pytest.raises(ValueError, match="no data here") as error:
        measure("--traceback")
    assert error.traceback[-1].name == "setup"


def test_ctrl_c_has_a_code_of_its_own(measure, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_walk, "put_weights", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert measure() == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first one on


def test_sigterm_ends_it_between_two_checkpoints(measure, tmp_path, monkeypatch, capsys):
    write = checkpoint_walk.write_results

    def terminated(*args):
        write(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_walk, "write_results", terminated)
    assert measure() == 130
    assert [r.step for r in read_history(tmp_path / "out" / "history.ckpt")] == STEPS[:1]
    assert "SIGTERM arrived; the same command goes on with this checkpoint" in capsys.readouterr().err


def test_the_weights_that_were_trained_are_measured_beside_an_average(straight, measure, trained, tmp_path):
    [file] = trained.glob(f"*step={STEPS[0]}.ckpt")
    saved = torch.load(file, weights_only=True)
    average = {name: torch.zeros_like(value) for name, value in saved["state_dict"].items()}
    torch.save({**saved, "state_dict": average, "current_model_state": saved["state_dict"]}, tmp_path / "average.ckpt")
    assert measure("--ckpt", str(tmp_path / "average.ckpt")) == 0
    [found], [expected, *_] = (read_history(folder / "history.ckpt") for folder in (tmp_path / "out", straight[0]))
    assert found.metrics["sharpness"] == pytest.approx(expected.metrics["sharpness"], rel=CLOSE)


def test_counters_of_training_are_those_of_the_checkpoint(straight, measure, trained, tmp_path):
    config = (trained / "config.yaml").read_text().replace("small_project.Net", "small_project.Counting")
    (tmp_path / "config.yaml").write_text(config)
    assert measure("--config", str(tmp_path / "config.yaml"), ckpt=f"*step={STEPS[1]}.ckpt") == 0
    [found], [_, expected, _] = (read_history(folder / "history.ckpt") for folder in (tmp_path / "out", straight[0]))
    factor = 1.0 + STEPS[1] + 100.0 * 1  # of the second epoch
    assert found.metrics["sample_loss"] == pytest.approx(factor * expected.metrics["sample_loss"], rel=CLOSE)


def other_points_by_rank():
    walk = CheckpointWalk([SavedPoint(Path("a"), 1 + dist.get_rank())], ProbeSettings(), Path("results"), {})
    with pytest.raises(ValueError, match=r"--ckpt: expected checkpoints that each .* the steps \[\[1\], \[2\]\]"):
        walk._go_on(Ranks(dist.group.WORLD))
    return True


def test_processes_that_can_read_other_checkpoints_stop_together():
    assert run(other_points_by_rank, 2) == [True, True]
