"""The page shows what the commands print: they are run in its order, and compared but for their digits."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_subspace.command.main import main
from tests.benchmarks.pages import ROOT
from tests.benchmarks.printed import COMMAND, QUIET, Session

PAGE = (ROOT / COMMAND).read_text()


def without_digits(text):
    """Each number as one sign, so that widths do not count either; lines that have the same numbers are equal."""
    return [re.sub(r"-?\d[\d.e+-]*", "#", " ".join(line.split())) for line in text.strip().splitlines()]


@pytest.mark.filterwarnings("ignore")  # what is printed is looked at here, not what Lightning warns of
def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    session = Session.on_page()
    Path("blobs.py").write_text(session.project)
    _, flag, script, *arguments = shlex.split(session.training)
    assert flag == "-c"
    monkeypatch.setattr(sys, "argv", ["-c", *arguments, *QUIET])
    exec(script, {})
    assert len(session.shown) == 2
    for command, shown in session.shown.items():
        capsys.readouterr()
        name, *arguments = shlex.split(command)
        assert (name, main(arguments)) == ("lightning-subspace", 0)
        assert without_digits(capsys.readouterr().out) == without_digits(shown)
    monkeypatch.delitem(sys.modules, "blobs")


def test_every_option_that_the_page_names_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["measure", "--help"])
    measured = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    known = set(re.findall(r"--[a-z-]+", measured + capsys.readouterr().out))
    named = set(re.findall(r"(?<![\w.-])(--[a-z][a-z-]*)(?![\w.-])", PAGE))
    assert named - known == {"--help", "--optimizer", "--nproc-per-node", "--logdir"} - known  # of other programs
