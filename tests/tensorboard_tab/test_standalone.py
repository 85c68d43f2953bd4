"""The page as one file: it holds its data and its modules, and asks for nothing."""

import json
import re

import pytest

from lightning_subspace.tensorboard_tab.schema import to_json
from lightning_subspace.tensorboard_tab.standalone import EXPORT, IMPORT, STATIC, joined_modules, page
from tests.tensorboard_tab.runs import probes

RUNS = {"a": {"subspace/probes": [json.loads(to_json(probe)) for probe in probes(range(0, 1100, 100))]}}
DATA = re.compile(r'<script id="probes" type="application/json">(.*?)</script>', re.DOTALL)
MODULES = sorted(file.relative_to(STATIC).as_posix() for file in STATIC.rglob("*.js"))


def test_the_data_come_back():
    assert json.loads(DATA.search(page(RUNS, "a"))[1]) == RUNS


def test_no_text_ends_the_element_it_stands_in():
    text = "</script><script>alert(1)</script><!-- ]]> & \u2028"
    html = page({text: {text: [{"v": 1, "step": 0, "failed": text}]}}, title=text)
    assert html.count("<script") == html.count("</script>") == 2
    assert json.loads(DATA.search(html)[1]) == {text: {text: [{"v": 1, "step": 0, "failed": text}]}}
    assert html.count("<!--") == 0


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="Out of range float"):
        page({"a": {"b": [{"v": 1, "step": float("nan")}]}}, "a")


def test_nothing_is_asked_for():
    html = page(RUNS, "a")
    assert not re.search(r"\b(?:src|href)=", html)
    addresses = set(re.findall(r"https?://[^'\"\s)]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a kind of element


def test_every_module_is_in_it_once_and_behind_those_it_imports():
    joined = joined_modules()
    names = re.findall(r"^const (module_\w+) = \(\(\) =>", joined, re.MULTILINE)
    assert sorted(names) == sorted("module_" + re.sub(r"\W", "_", name) for name in MODULES)
    for used in re.finditer(r"^const \{[^}]*\} = (module_\w+);", joined, re.MULTILINE):
        assert joined.index(f"const {used[1]} = (() =>") < used.start()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_and_exports_in_the_forms_that_can_be_joined(name):
    text = (STATIC / name).read_text()
    assert len(re.findall(r"^import\b", text, re.MULTILINE)) == len(IMPORT.findall(text))
    assert not any(" as " in names for names, _ in IMPORT.findall(text))
    assert len(re.findall(r"^export\b", text, re.MULTILINE)) == len(EXPORT.findall(text))
    assert "import(" not in text.replace("@type {import(", "").replace("import('./", "").replace("import('../", "")
    assert "</script" not in text
    assert len(text.splitlines()) <= 300
