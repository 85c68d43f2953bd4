"""What the README shows is run, and what it names exists."""

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


# Whether eigenvalue k of a toy has a gap behind it is for the monitor to say; it says so with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step:UserWarning")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__readme__"})


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 3


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    assert links
    assert [link for link in links if not (Path(__file__).parent.parent / link).exists()] == []


def test_the_table_of_what_it_works_with_names_every_test_there_is() -> None:
    section = README.split("## Works with")[1].split("\n## ")[0]
    named = set(re.findall(r"\(tests/works_with/(test_\w+\.py)\)", section))
    assert named == {path.name for path in (Path(__file__).parent / "works_with").glob("test_*.py")}
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert all(line.count(" | ") == 2 and "tests/works_with/" in line for line in rows)


def test_the_first_example_measures_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__readme__"}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    steps = [record.step for record in names["monitor"].history if "gradient_fraction" in record.metrics]
    assert len(steps) >= 4
    assert steps[0] == 0
    assert (tmp_path / "subspace.png").exists()


def test_the_commands_of_the_readme_are_those_of_ci() -> None:
    ci = (Path(__file__).parent.parent / ".ci" / "run").read_text()
    assert "pip install -e '.[dev]'" in README
    assert "-e '.[dev]'" in ci
    assert "python -m pytest" in README
    assert "python -m pytest" in ci
