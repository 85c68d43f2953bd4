"""The command `show`: what it reads, what it writes, what it refuses, and what it does not import."""

import csv
import json
import re
import subprocess
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_subspace import SubspaceMonitor, __version__, view
from lightning_subspace.command.main import main
from lightning_subspace.command.runs import read_runs
from lightning_subspace.command.table import in_terminal
from lightning_subspace.tensorboard_tab.schema import tag_of, to_json
from tests.left_out import leave_figures_out
from tests.tensorboard_tab.fits import fit
from tests.tensorboard_tab.runs import FAILED, probes, write

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
    assert said.endswith(
        "); name a folder of logs, a checkpoint of a Trainer with SubspaceMonitor, or a file "
        "*_probes.json of a logger.\n"
    )


def keep(folder, steps=STEPS, name="subspace", scale=1.0):
    """What a logger of another kind has kept in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = ",".join(to_json(probe) for probe in probes(steps, scale))
    (folder / f"{name}_probes.json").write_text(f'{{"{name}":{{"{tag_of(name)}":[{entries}]}}}}')


def test_files_of_loggers_are_found_in_their_folders_and_named_by_these(tmp_path, capsys):
    keep(tmp_path / "mon" / "version_0")
    keep(tmp_path / "mon" / "version_0", name="head")
    keep(tmp_path / "mon" / "version_1", STEPS[:3], scale=2.0)
    found = read_runs(tmp_path)
    tags = {run: {tag: len(of) for tag, of in tags.items()} for run, tags in found.items()}
    assert tags == {
        "mon/version_0": {"head/probes": 11, "subspace/probes": 11},
        "mon/version_1": {"subspace/probes": 3},
    }
    assert read_runs(tmp_path / "mon" / "version_0")["."] == found["mon/version_0"]
    for kind in ("csv", "json", "html", "png"):
        target = tmp_path / f"all_probes.{kind}"  # `--json` so writes a file that is not read with the others
        assert main(["show", str(tmp_path), f"--{kind}", str(target)]) == 0
        assert capsys.readouterr().out.startswith("25 probes of 2 runs in ")
    assert main(["show", str(tmp_path)]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if " probes, " in line]
    assert [head.partition(":")[0] for head in heads] == [
        "mon/version_0, head", "mon/version_0, subspace", "mon/version_1, subspace",
    ]  # fmt: skip


def test_a_run_that_is_in_event_files_is_not_shown_again(logs):
    alone = read_runs(logs)
    keep(logs / "a")
    keep(logs / "csv" / "version_0")  # of a second logger of the same run, in a folder of its own
    assert read_runs(logs) == alone
    keep(logs / "a", name="head")
    keep(logs / "csv" / "version_1", scale=2.0)
    keep(logs / "csv" / "version_2", [FAILED])
    found = read_runs(logs)
    assert [(run, list(tags)) for run, tags in found.items()] == [
        ("a", ["subspace/probes", "head/probes"]), ("b", ["subspace/probes"]),
        ("csv/version_1", ["subspace/probes"]), ("csv/version_2", ["subspace/probes"]),
    ]  # fmt: skip
    assert found["a"]["subspace/probes"] == alone["a"]["subspace/probes"]


@pytest.mark.parametrize("kinds", [[CSVLogger], [CSVLogger, TensorBoardLogger]])
def test_a_run_of_a_trainer_is_shown_once_whatever_its_loggers(tmp_path, monkeypatch, capsys, kinds):
    leave_figures_out(monkeypatch)
    loggers = [kind(str(tmp_path), kind.__name__) for kind in kinds]
    fit(tmp_path, SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None), steps=2, loggers=loggers)
    capsys.readouterr()
    assert main(["show", str(tmp_path)]) == 0
    [head] = [line for line in capsys.readouterr().out.splitlines() if " probes, " in line]
    assert head.startswith(f"{kinds[-1].__name__}/version_0, subspace: 2 probes")


def test_a_file_of_a_folder_that_is_anothers_is_passed_over_and_a_damaged_one_is_told(logs, capsys):
    alone = read_runs(logs)
    for name, content in {"gpu": b'{"gpu": 1}', "empty": b"", "bytes": b"\xff\xfe"}.items():
        (logs / f"{name}_probes.json").write_bytes(content)
    assert read_runs(logs) == alone
    keep(logs / "c")
    file = logs / "c" / "subspace_probes.json"
    file.write_text(file.read_text()[:-20])
    assert main(["show", str(logs)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"path: expected the file that a logger has kept of a run, got {str(file)!r}")
    assert told.endswith("; leave it out.\n")


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
        (
            ["empty"],
            "path: expected logs or a checkpoint of a run with SubspaceMonitor, got none in empty; train with a "
            "TensorBoardLogger or one that keeps files, such as CSVLogger, or name another path.",
        ),
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
