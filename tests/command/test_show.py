"""The command `show`: what it reads, what it writes, what it refuses, and what it does not import."""

import csv
import json
import re
import subprocess
import sys

import pytest

from lightning_subspace import __version__, view
from lightning_subspace.command.main import main
from lightning_subspace.command.runs import read_runs
from lightning_subspace.command.table import in_terminal
from tests.tensorboard_tab.runs import write

STEPS = range(0, 1100, 100)


@pytest.fixture
def logs(tmp_path):
    """A folder with two runs."""
    for name in ("a", "b"):
        write(tmp_path / "logs" / name, STEPS).close()
    return tmp_path / "logs"


def test_a_folder_is_printed_as_a_table(logs, capsys):
    assert main(["show", str(logs)]) == 0
    assert capsys.readouterr().out == in_terminal(read_runs(logs)) + "\n"


def test_several_places_are_told_apart(logs, capsys):
    assert main(["show", str(logs / "a"), str(logs / "b"), "--last", "1"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if "probes" in line]
    assert [head.split(",")[0] for head in heads] == [str(logs / "a"), str(logs / "b")]


def test_files_are_written(logs, tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "html", "png")}
    options = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert main(["show", str(logs), *options]) == 0
    told = capsys.readouterr().out.splitlines()
    pictures = [tmp_path / f"out_{run}_subspace.png" for run in ("a", "b")]
    names = [files["csv"], files["json"], files["html"], f"{pictures[0]}, {pictures[1]}"]
    assert told == [f"22 probes of 2 runs in {name}" for name in names]
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == 22
    assert json.loads(files["json"].read_text()) == read_runs(files["json"]) == read_runs(logs)
    page = re.search(r'type="application/json">(.*?)</script>', files["html"].read_text(), re.DOTALL)[1]
    assert json.loads(page) == read_runs(logs)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_a_file_that_cannot_be_written_is_told_with_its_option(logs, tmp_path, capsys):
    assert main(["show", str(logs), "--csv", str(tmp_path / "none" / "x.csv")]) == 1
    assert re.fullmatch(r"--csv: expected a file to write, got '.*x\.csv' \(.+\)\.\n", capsys.readouterr().err)


def test_a_file_that_is_no_checkpoint_is_told_without_advice_to_trust_it(tmp_path, capsys):
    (tmp_path / "x.py").write_text("print('not one')")
    assert main(["show", str(tmp_path / "x.py")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("path: expected a checkpoint that torch.load reads with weights_only=True, got ")
    assert "False" not in said


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_file_may_be_the_standard_output(logs, tmp_path, capsys, kind):
    assert main(["show", str(logs), f"--{kind}", "-"]) == 0
    printed = capsys.readouterr().out
    assert main(["show", str(logs), f"--{kind}", str(tmp_path / "file")]) == 0
    assert printed == (tmp_path / "file").read_text()


def test_the_first_name_of_the_page_is_the_same_page(logs, tmp_path):
    assert main(["show", str(logs), "--html", str(tmp_path / "new.html")]) == 0
    assert view.main([str(logs), "--out", str(tmp_path / "old.html")]) == 0
    assert (tmp_path / "new.html").read_text() == (tmp_path / "old.html").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["nowhere"], "path: expected a folder of logs or a checkpoint, got 'nowhere', which does not exist."),
        (["empty"], "path: expected logs or a checkpoint of a run with SubspaceMonitor, got none in empty; train"),
        (["logs", "--html", "-"], "--html: expected a file to write, got '-'; name one."),
        (["logs/a.json", "--csv", "logs/a.json"], "--csv: expected a file to write, got 'logs/a.json', which is to be"),
        (["logs", "--last", "0"], "--last: expected a positive number of probes, got 0."),
        (["logs", "--keys", "none"], "--keys: expected names of numbers that the run has, got 'none'"),
        (["logs", "--csv", "none/a.csv"], "none/a.csv"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(logs, monkeypatch, capsys, options, told):
    monkeypatch.chdir(logs.parent)
    (logs.parent / "empty").mkdir()
    (logs / "a.json").write_text("{}")
    assert main(["show", *options]) == 1
    printed = capsys.readouterr()
    assert told in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
    assert (logs / "a.json").read_text() == "{}"


@pytest.mark.parametrize("arguments", [[], ["paint"], ["show"], ["measure", "--ckpt", "a.ckpt"]])
def test_a_wrong_command_line_has_a_code_of_its_own(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: lightning-subspace" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["show"], ["measure"], ["env"]])
def test_the_help_can_be_acted_on(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert ("exit codes:" if not command else f"lightning-subspace {command[0]}") in told
    assert max(map(len, told.splitlines())) <= 120


def test_help_and_folders_import_nothing_heavy(logs):
    script = (
        "import sys\n"
        "from lightning_subspace.command.main import main\n"
        "try:\n    main(['measure', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'numpy', 'lightning', 'matplotlib', 'tensorboard')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "code = main(['show', sys.argv[1], '--csv', '-', '--html', sys.argv[1] + '/page.html'])\n"
        "print([name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules])\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(logs)], capture_output=True, text=True, timeout=60)
    lists = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert (done.returncode, lists) == (0, ["[]", "[]"]), done.stderr


def test_the_package_is_the_command_too(logs):
    command = [sys.executable, "-m", "lightning_subspace"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"lightning_subspace {__version__}\n"
    # `| head` reads a few lines and goes.
    pipe = subprocess.run(
        f"{sys.executable} -m lightning_subspace show {logs} --csv - | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (pipe.returncode, pipe.stderr) == (0, "")
    assert pipe.stdout.startswith("run,monitor,step,")
