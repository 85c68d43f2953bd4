"""What every README.md shows is run, and what it names exists."""

import ast
import importlib
import importlib.util
import inspect
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import lightning_subspace
from lightning_subspace import Measurement, SubspaceMonitor, SubspaceProjection, measure_subspace
from lightning_subspace.measurements import default_measurements
from tests.left_out import leave_error_bar_out, leave_figures_out, leave_self_check_out
from tests.processes import run
from tests.thorough import IS_THOROUGH

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FOLDERS = ("lightning_subspace", "tests", "examples")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [README, *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
    if "node_modules" not in path.parts
}
CI = (ROOT / ".ci" / "run").read_text()
MOST_LINES = 200


def fenced(language: str, text: str) -> list[str]:
    """The code blocks of a page that are marked as this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[Any]:
    """Those of all pages, as parameters of a test."""
    found = [(page, n, block) for page, text in PAGES.items() for n, block in enumerate(fenced(language, text))]
    return [pytest.param(page, block, id=f"{page}-{n}") for page, n, block in found]


def anchors(text: str) -> set[str]:
    """The headings of a page, as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Whether eigenvalue k of a toy has a gap behind it is for the monitor to say; it says so with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step:UserWarning")


# The first one is run below, and its curve looked at. What a self-check finds is no question here.
@pytest.mark.parametrize(("page", "block"), [b for b in blocks("python") if b.id != "README.md-0"])
def test_python_blocks_run(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not IS_THOROUGH:
        leave_self_check_out(monkeypatch)
        leave_error_bar_out(monkeypatch)
        leave_figures_out(monkeypatch)
    exec(compile(block, page, "exec"), {"__name__": "__readme__"})


def test_there_are_blocks() -> None:
    assert len(blocks("python")) >= 8
    assert len(blocks("yaml")) >= 1
    for page, text in PAGES.items():
        fences = re.findall(r"^```(.*)$", text, flags=re.MULTILINE)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= {"", "python", "yaml", "text"}, f"{page}: a block in another language is not run"


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about Lightning's use of it
@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_yaml_blocks_are_read_by_the_command_line(page: str, block: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(block)
    pytorch = importlib.import_module("lightning.pytorch")
    cli = importlib.import_module("lightning.pytorch.cli").LightningCLI(
        importlib.import_module("lightning.pytorch.demos.boring_classes").BoringModel,
        save_config_callback=None,
        run=False,
        seed_everything_default=0,
        args=["--config", str(path), "--trainer.logger", "false", "--trainer.accelerator", "cpu"],
    )
    assert isinstance(cli.trainer, pytorch.Trainer)
    asked = [callback["class_path"].split(".")[-1] for callback in yaml.safe_load(block)["trainer"]["callbacks"]]
    ours = [c for c in cli.trainer.callbacks if isinstance(c, (SubspaceMonitor, SubspaceProjection))]
    assert [type(c).__name__ for c in ours] == asked


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= MOST_LINES


def test_the_readme_is_in_the_order_of_its_user() -> None:
    sections = re.findall(r"^## (.*)$", PAGES["README.md"], flags=re.MULTILINE)
    assert sections == [
        "Install",
        "Use",
        "What is logged",
        "When a value is missing",
        "How to choose",
        "Limits",
        "Where to read on",
        "Changelog",
    ]
    assert PAGES["README.md"].index("examples/mnist.png") < PAGES["README.md"].index("## Install")


def linked_pages(page: str) -> set[str]:
    """Those that a page links."""
    paths = re.findall(r"\]\((?!http)([^)#]*README\.md)", PAGES[page])
    return {str(((ROOT / page).parent / path).resolve().relative_to(ROOT)) for path in paths}


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), {"README.md"}
    while ahead:
        reached |= ahead
        ahead = {page for one in ahead for page in linked_pages(one)} - reached
    assert reached == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page: str) -> None:
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", PAGES[page])
    assert links
    missing = []
    for link in links:
        name, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            missing.append(link)
    assert missing == []


def test_the_table_of_what_it_works_with_names_every_test_there_is() -> None:
    text = PAGES["tests/works_with/README.md"]
    named = set(re.findall(r"\((test_\w+\.py)\)", text))
    assert named == {path.name for path in (ROOT / "tests" / "works_with").glob("test_*.py")}
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert all(line.count(" | ") == 2 and "](test_" in line for line in rows)


def test_every_argument_of_the_callbacks_is_explained() -> None:
    text = PAGES["lightning_subspace/callbacks/README.md"]
    monitor, projection = text.split("## SubspaceProjection\n")
    arguments = monitor.split("## SubspaceMonitor, argument by argument\n")[1].split("\n### ")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", arguments, flags=re.MULTILINE))
    parameters = inspect.signature(SubspaceMonitor).parameters
    assert table.keys() == parameters.keys()
    for name, default in table.items():
        value = parameters[name].default
        assert value is None or ast.literal_eval(default.strip("`")) == value, name
    own = inspect.signature(SubspaceProjection).parameters.keys() - parameters.keys()
    assert [name for name in own if f"{name}=" not in projection] == []


def test_every_measurement_on_request_is_in_the_table() -> None:
    text = PAGES["lightning_subspace/measurements/README.md"]
    named = re.findall(r"^\| `([A-Z]\w+)\(\)` \|", text, flags=re.MULTILINE)
    public = [getattr(lightning_subspace, name) for name in lightning_subspace.__all__]
    ours = [item for item in public if inspect.isclass(item) and issubclass(item, Measurement)]
    default = {type(item).__name__ for item in default_measurements(k=1)}
    assert sorted(named) == sorted(item.__name__ for item in ours if item.__name__ not in {"Measurement", *default})


def test_the_first_example_measures_a_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__readme__"}
    exec(compile(fenced("python", PAGES["README.md"])[0], "README.md", "exec"), names)
    steps = [record.step for record in names["monitor"].history if "gradient_fraction" in record.metrics]
    assert len(steps) >= 4
    assert steps[0] == 0
    assert (tmp_path / "subspace.png").exists()
    keys = {key for record in names["monitor"].history for key in record.metrics}
    table = PAGES["README.md"] + PAGES["lightning_subspace/measurements/README.md"]
    unnamed = {key for key in keys if not is_named(key, table)}
    assert unnamed == set(), "logged, and not in the table"


def is_named(key: str, table: str) -> bool:
    """Whether a key is in a table, its last word alone in some, and what is behind `_` in others."""
    last = key.split("/")[-1]
    if key.startswith("noise/"):  # "and all of the above with `_bulk` and `_top`"
        last = re.sub(r"_(bulk|top)(?=_|$)", "", last) if "hessian" not in last else last
    ends = (f"`_{end}`" for end in ("low", "high") if last.endswith(f"_{end}"))
    return last.isdigit() or f"{last}`" in table or any(end in table for end in ends)


def test_the_commands_of_the_readme_are_those_of_ci() -> None:
    assert "pip install -e '.[dev]'" in PAGES["README.md"]
    assert "-e '.[dev]'" in CI
    assert "python -m pytest" in PAGES["README.md"]
    assert "python -m pytest" in CI
    for page, text in PAGES.items():
        for script in re.findall(r"examples/(?:\w+/)?\w+\.(?:py|yaml)", "".join(fenced("", text))):
            assert script in CI, f"{page}: {script}"


def test_the_scripts_that_are_named_exist() -> None:
    for page, text in PAGES.items():
        files = re.findall(r"(?:python|torchrun)\b[^`\n]*? ((?:tests|examples)/[\w/]+\.py)", text)
        modules = re.findall(r"python -m (tests(?:\.\w+)+)", text)
        assert [file for file in files if not (ROOT / file).exists()] == [], page
        assert [name for name in modules if importlib.util.find_spec(name) is None] == [], page


def test_the_time_limit_of_the_process_group_ends_a_wait() -> None:
    """As parallel/README.md says: the limit is the group's, and what it ends is an error on every rank."""

    def in_a_process() -> tuple[str, float]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
        start = time.monotonic()
        time.sleep(5 * dist.get_rank())
        try:
            batch = torch.ones(4, 2)
            net = torch.nn.Linear(2, 1)
            measure_subspace(net, [batch], k=1, loss_fn=lambda m, x, i: m(x).square().mean(), group=dist.group.WORLD)
        except Exception as error:
            return type(error).__name__, time.monotonic() - start
        return "nothing", 0.0

    (waiting, seconds), (late, _) = run(in_a_process, 2, group=False)
    assert (waiting, late) == ("RuntimeError", "RuntimeError")
    assert 1.5 < seconds < 4.5
