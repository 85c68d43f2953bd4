"""The gallery of reproductions is what its scripts have measured, and there is one of each."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "reproduce"
SHARED = ("common", "gallery")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


@pytest.fixture
def load(monkeypatch):
    """The scripts import each other as neighbours, the way python runs them."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def loaded(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return loaded


def test_the_gallery_is_made_of_the_results(load, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--check"])
    load("common")
    load("gallery").main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_is_in_the_gallery_with_what_it_found(name, load):
    load("common")
    assert name in load("gallery").ORDER
    result = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert result["name"] == name
    assert not result["quick"]
    assert result["claims"]
    for claim in result["claims"]:
        assert claim["holds"] != bool(claim["why_not"]), claim
    assert not re.search(r"(^|[ =])/", result["command"]), "files by name: where they lie is the user's business"


def test_a_claim_that_does_not_hold_ends_the_script(load, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--quick", "--out", str(tmp_path)])
    common = load("common")

    def reproduction(*claims):
        made = common.Reproduction.start("script.py", "title", "source", "doc")
        for claim in claims:
            made.claim(*claim)
        return made

    reproduction(("true", "1", "1", True), ("not here", "1", "0", False, "a smaller network")).finish()
    found = json.loads((tmp_path / "results" / "script.json").read_text())
    assert [claim["holds"] for claim in found["claims"]] == [True, False]
    with pytest.raises(AssertionError, match=r"otherwise than expected: .*false"):
        reproduction(("false", "1", "0", False)).finish()
    with pytest.raises(AssertionError, match=r"otherwise than expected: .*after all"):
        reproduction(("after all", "1", "1", True, "a smaller network")).finish()
