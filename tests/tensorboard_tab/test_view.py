"""The command that makes a page: of logs, of checkpoints, and of neither."""

import json
import re
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_subspace import SubspaceMonitor
from lightning_subspace.tensorboard_tab.event_files import read_probes
from lightning_subspace.view import main, read_runs
from tests.left_out import leave_figures_out
from tests.tensorboard_tab.fits import fit
from tests.tensorboard_tab.runs import write

STEPS = range(0, 1100, 100)


def data_of(html):
    return json.loads(re.search(r'<script id="probes" type="application/json">(.*?)</script>', html, re.DOTALL)[1])


def test_a_folder_of_logs_becomes_a_page(tmp_path, capsys):
    write(tmp_path / "logs" / "a", STEPS).close()
    write(tmp_path / "logs" / "b", STEPS).close()
    out = tmp_path / "page.html"
    assert main([str(tmp_path / "logs"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"22 probes of 2 runs in {out}\n"
    assert data_of(out.read_text()) == read_probes(tmp_path / "logs")


def test_a_folder_needs_no_torch(tmp_path):
    write(tmp_path / "logs" / "a", STEPS).close()
    script = (
        "import sys; from lightning_subspace.view import main; code = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules]); sys.exit(code)"
    )
    out = str(tmp_path / "page.html")
    command = [sys.executable, "-c", script, str(tmp_path / "logs"), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_a_checkpoint_has_the_probes_that_the_logs_have(tmp_path):
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, name="mine")
    trainer = fit(tmp_path, monitor, steps=6)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    [(run, tags)] = read_runs(tmp_path / "last.ckpt").items()
    assert (run, list(tags)) == ("last", ["mine/probes"])
    [logged] = read_probes(tmp_path / "logs").values()
    kept = ("v", "step", "outcome", "trusted", "verified", "eigenvalues", "residuals", "next", "metrics")
    assert [probe["step"] for probe in tags["mine/probes"]] == [0, 2, 4, 6]
    for saved, written in zip(tags["mine/probes"], logged["mine/probes"], strict=True):
        assert {key: saved[key] for key in kept if key in saved} == {
            key: written[key] for key in kept if key in written
        }
    assert main([str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "page.html")]) == 0


def test_the_file_of_another_logger_has_them_too(tmp_path, monkeypatch):
    leave_figures_out(monkeypatch)
    loggers = [CSVLogger(str(tmp_path), "csv", ""), TensorBoardLogger(str(tmp_path), "logs", "")]
    monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, name="mine")
    fit(tmp_path, monitor, steps=2, loggers=loggers)
    [file] = (tmp_path / "csv").rglob("*_probes.json")
    [tags] = read_runs(file).values()
    [logged] = read_probes(tmp_path / "logs").values()
    assert list(tags) == list(logged) == ["mine/probes"]
    for saved, written in zip(*tags.values(), *logged.values(), strict=True):
        assert saved["metrics"] == written["metrics"]
        assert saved["eigenvalues"] == written["eigenvalues"]
    assert main([str(file), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": {"b": [{"v": 1}]}}', '{"a": {"b": [{"step": 1, "lr": NaN}]}}'])
def test_a_file_that_is_no_loggers_is_told_in_one_line(tmp_path, capsys, text):
    (tmp_path / "other.json").write_text(text)
    assert main([str(tmp_path / "other.json"), "--out", str(tmp_path / "page.html")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "other.json" in told


def test_without_a_probe_there_is_no_page(tmp_path, capsys):
    torch.save({"callbacks": {}}, tmp_path / "empty.ckpt")
    for path in (tmp_path, tmp_path / "empty.ckpt"):
        assert main([str(path), "--out", str(tmp_path / "page.html")]) == 1
        told = capsys.readouterr()
        assert told.err.startswith("path: expected logs or a checkpoint of a run with SubspaceMonitor, got none in")
        assert (told.out, (tmp_path / "page.html").exists()) == ("", False)


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_a_file_that_is_no_checkpoint_is_told_in_one_line(tmp_path, capsys, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert main([str(tmp_path / "a.ckpt"), "--out", str(tmp_path / "page.html")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "a.ckpt" in told


def test_a_path_that_is_not_there(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 1
    assert re.fullmatch(r"path: expected a folder of logs or a checkpoint, got '.*none', .*\n", capsys.readouterr().err)


def test_a_page_that_cannot_be_written_is_told(tmp_path, capsys):
    write(tmp_path / "a", STEPS).close()
    assert main([str(tmp_path), "--out", str(tmp_path / "none" / "page.html")]) == 1
    assert "page.html" in capsys.readouterr().err


def test_an_event_file_that_is_damaged_is_told(tmp_path, capsys):
    record = b"lightning_subspace"
    file = tmp_path / "events.out.tfevents.1"
    file.write_bytes(len(record).to_bytes(8, "little") + bytes(4) + record + bytes(4))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("path: expected an event file")


def test_the_command_needs_a_path(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "usage: python -m lightning_subspace.view" in capsys.readouterr().err
