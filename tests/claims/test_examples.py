"""The examples: CI runs them, and their pages show what is in their files."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples"
CI = (ROOT / ".ci" / "run").read_text()
# Minutes each, or a browser. Those of reproduce/ are run by a loop.
BY_HAND = {"examples/mnist.py", "examples/tab.py", "examples/picture.py"}
SCRIPTS = [
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "*.ipynb", "cifar/*.py", "cifar/*.yaml", "text/*.py")
    for path in sorted(FOLDER.glob(pattern))
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_ci_runs_it(name):
    assert (name in CI) != (name in BY_HAND)


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_in_the_table(name):
    table = (FOLDER / "README.md").read_text().split("\n## ")[0]
    name = name.removeprefix("examples/")
    assert f"]({name})" in table or f"]({name.split('/')[0]}/README.md)" in table


def test_the_monitor_of_the_project_is_the_one_on_its_page():
    page = (FOLDER / "cifar" / "README.md").read_text()
    shown = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    config = yaml.safe_load((FOLDER / "cifar" / "config.yaml").read_text())
    assert config["trainer"]["callbacks"] == shown["trainer"]["callbacks"]
    assert "lightning_subspace" not in (FOLDER / "cifar" / "train.py").read_text(), (
        "it is a project without the monitor"
    )
