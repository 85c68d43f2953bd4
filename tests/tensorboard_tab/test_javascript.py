"""The JavaScript of the page: its pure parts by node's own runner, its types and its form by npm's tools."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lightning_subspace.tensorboard_tab.page_files import STATIC

HERE = Path(__file__).with_name("javascript")
NODE_FROM = 20  # its test runner, and modules without a build step


def tool(name):
    """A tool that npm has installed here, or that is on the path."""
    own = HERE / "node_modules" / ".bin" / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: npm install in {HERE.name}/")
    return found


def run(*command, cwd=HERE):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def node():
    found = shutil.which("node")
    if found is None or int(re.match(r"v(\d+)", run(found, "--version").stdout)[1]) < NODE_FROM:
        pytest.skip(f"node {NODE_FROM} is not installed")
    return found


@pytest.fixture
def copy(tmp_path):
    """A copy of the page and of its checks, to plant faults in."""
    ignored = shutil.ignore_patterns("node_modules", "__pycache__")
    static = tmp_path / "lightning_subspace" / "tensorboard_tab" / "static"
    shutil.copytree(STATIC, static)
    shutil.copytree(HERE, tmp_path / "tests" / "tensorboard_tab" / "javascript", ignore=ignored)
    return static, tmp_path / "tests" / "tensorboard_tab" / "javascript"


def plant(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_the_pure_parts(node):
    done = run(node, "--test")
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"^\D*pass (\d+)", done.stdout, re.MULTILINE)[1]) >= 50


@pytest.mark.thorough  # of the tests
def test_a_fault_in_them_is_found(node, copy):
    static, checks = copy
    plant(static / "series.js", "if (high < 0) return -1;", "if (high < 0) return 0;")
    assert run(node, "--test", cwd=checks).returncode != 0


def test_types():
    done = run(tool("tsc"), "--noEmit", "--project", ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("panels/words.js", "run.header.n ?", "run.haeder.n ?", "haeder"),
        ("scales.js", "low > high) return { kind: 'linear'", "low > high) return { kind: 'lines'", '"lines"'),
        ("view.js", "nearest(steps, this.step)];", "nearest(steps, this.tag)];", "string"),
    ],
)
def test_a_type_error_is_found(copy, name, old, new, said):
    static, checks = copy
    plant(static / name, old, new)
    done = run(tool("tsc"), "--noEmit", "--project", ".", cwd=checks)
    assert done.returncode != 0
    assert said in done.stdout


def test_form():
    command = [tool("prettier"), "--config", str(HERE / ".prettierrc.json"), "--check"]
    # Not in node_modules, which prettier leaves out of itself.
    done = run(*command, str(HERE), str(STATIC / "**" / "*.js"))
    assert done.returncode == 0, done.stdout + done.stderr
