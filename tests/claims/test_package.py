"""What is released: contents of the archives, workflows, and what importing costs, in modules."""

import ast
import email
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_subspace
from tests.package.contents import PACKAGE, faults_of_metadata, faults_of_sdist, faults_of_wheel
from tests.rooms import modules

ROOT = Path(__file__).parents[2]
HABITS = ROOT / ".github"
WORKFLOWS = sorted((HABITS / "workflows").glob("*.yml"))
INFO = f"{PACKAGE}-0.1.0.dist-info"
WHEEL = [
    *(f"{PACKAGE}/{name}" for name in ("__init__.py", "py.typed", "loss/README.md", "tab/index.js", "tab/style.css")),
    *(f"{INFO}/{name}" for name in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE")),
]
METADATA = """\
Summary: a callback
License-Expression: Apache-2.0
Requires-Python: >=3.10
Classifier: Programming Language :: Python :: 3.10
Keywords: hessian
Description-Content-Type: text/markdown
"""


def test_a_wheel_as_it_should_be_has_no_fault():
    assert faults_of_wheel(WHEEL) == []
    assert faults_of_metadata(email.message_from_string(METADATA)) == []
    assert faults_of_sdist(["pyproject.toml", "README.md", "LICENSE", f"{PACKAGE}/__init__.py"]) == []


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ([*WHEEL, "tests/test_all.py"], "tests/test_all.py: not of the package"),
        ([*WHEEL, f"{PACKAGE}/loss/test_loss.py"], f"{PACKAGE}/loss/test_loss.py: a test"),
        ([*WHEEL, f"{PACKAGE}/growth.png"], ".png: no file of that kind belongs there"),
        ([name for name in WHEEL if "py.typed" not in name], f"{PACKAGE}/py.typed: missing"),
        ([name for name in WHEEL if not name.endswith(".css")], ".css: no file of that kind"),
        ([name for name in WHEEL if "entry_points" not in name], "entry_points.txt: missing"),
    ],
)
def test_faults_of_a_wheel_are_found(names, fault):
    assert faults_of_wheel(names) == [fault]


def test_faults_of_an_sdist_and_of_metadata_are_found():
    assert faults_of_sdist(["README.md", "LICENSE", "tests/conftest.py"]) == [
        "pyproject.toml: missing in the sdist",
        "tests/conftest.py: in the sdist",
    ]
    newer = METADATA.replace(">=3.10", ">=3.12").replace("Keywords: hessian\n", "")
    first, second = faults_of_metadata(email.message_from_string(newer))
    assert first == "Keywords: not in the metadata"
    assert second.startswith("Classifier: 3.12, the oldest Python")


def new_modules(*statements):
    """Which modules the last of these statements imports, beyond those of the ones before."""
    before = "; ".join(statements[:-1])
    code = (
        f"import sys; {before or 'pass'}; b = set(sys.modules); {statements[-1]}; print(*sorted(set(sys.modules) - b))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_importing_the_package_imports_nothing_but_pythons_own():
    """In milliseconds: 12 to 14, of which this test can say nothing on a busy machine."""
    found = {name.partition(".")[0] for name in new_modules("import lightning_subspace")}
    assert found - set(sys.stdlib_module_names) == {PACKAGE}


def imported_with(name):
    """Modules of the package, and names of others, that come with one of its modules, as its files have it."""
    paths, others, ahead = modules(), set(), {name}
    found = set()
    while ahead:
        found |= ahead
        named = {target for one in ahead for target in at_once(ast.parse(paths[one].read_text()))}
        ours = {target.partition(".")[2] for target in named if target.split(".")[0] == PACKAGE}
        others |= {target.split(".")[0] for target in named} - {PACKAGE}
        parts = [target.split(".") for target in ours]
        ahead = {".".join(part[:i]) for part in parts for i in range(1, len(part) + 1)} & paths.keys() - found
    return found, others - set(sys.stdlib_module_names)


def at_once(node):
    """What code imports when it is run, so outside of functions and of what is for type checkers alone."""
    if isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for child in node.orelse:
            yield from at_once(child)
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from at_once(child)


WAITING = {"report.figures", "report.panel", "tensorboard_tab.plugin", "view"}  # for their first use: they take long


def test_what_the_callback_imports_as_its_files_have_it():
    found, others = imported_with("callbacks.monitor")
    assert {"callbacks.monitor", "probe", "report.loggers", "linalg"} <= found
    assert found & WAITING == set()
    assert others == {"torch", "lightning_utilities", "numpy", "typing_extensions"}


def test_matplotlib_is_imported_for_figures_alone_and_pyplot_never():
    assert "matplotlib" not in imported_with("report")[1]
    assert "matplotlib" in imported_with("report.figures")[1]
    for name, path in modules().items():
        if "pyplot" not in path.read_text():
            continue
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not [target for node in nodes for target in at_once(node) if "pyplot" in target], name


@pytest.mark.thorough
def test_the_callback_imports_little_beyond_torch_and_lightning():
    """In seconds: .09 to .12, installed, so with compiled files, beyond the three that it stands on."""
    stands_on = "import torch, lightning.pytorch, pytorch_lightning"
    found = new_modules(stands_on, "from lightning_subspace import SubspaceMonitor")
    others = {name.partition(".")[0] for name in found} - set(sys.stdlib_module_names)
    assert others == {PACKAGE}
    # What takes long to import waits for its first use.
    assert not WAITING & {name.removeprefix(f"{PACKAGE}.") for name in found}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_hash_with_their_version(path):
    used = re.findall(r"uses: (.*)", path.read_text())
    assert used
    for line in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_one_action_has_one_hash():
    found = {tuple(line.split("@")) for path in WORKFLOWS for line in re.findall(r"uses: (\S+)", path.read_text())}
    assert len({name for name, _ in found}) == len(found)


def test_the_workflows_run_what_is_run_here():
    steps = {path.stem: [line for job in jobs(path) for line in runs(job)] for path in WORKFLOWS}
    assert "bash .ci/run" in steps["test"]
    assert "bash .ci/package dist" in steps["release"]
    assert "bash .ci/package" in (ROOT / ".ci" / "run").read_text()


def test_the_one_job_that_may_publish_runs_no_code_of_the_repository():
    allowed = {(path.stem, name) for path in WORKFLOWS for name, job in jobs_by_name(path) if "id-token" in str(job)}
    assert allowed == {("release", "publish")}
    (publish,) = (job for name, job in jobs_by_name(HABITS / "workflows" / "release.yml") if name == "publish")
    assert runs(publish) == []
    assert "secrets." not in (HABITS / "workflows" / "release.yml").read_text()


def jobs_by_name(path):
    return yaml.safe_load(path.read_text())["jobs"].items()


def jobs(path):
    return [job for _, job in jobs_by_name(path)]


def runs(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_oldest_versions_that_are_tried_are_the_bounds():
    (pins,) = re.findall(r"pins: (torch.*)", (HABITS / "workflows" / "test.yml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    bounds = re.findall(r'^  "([\w-]+)>=(\d[\d.]*\d)', project.partition("[project.optional")[0], flags=re.MULTILINE)
    assert len(bounds) >= 5
    for name, bound in bounds:
        assert re.search(rf"\b{name}=={re.escape(bound)}(\.0)*( |$)", pins), f"{name}>={bound}"


def test_forms_ask_for_the_environment():
    forms = [yaml.safe_load(path.read_text()) for path in (HABITS / "ISSUE_TEMPLATE").glob("*.yml")]
    asking = [form for form in forms if "body" in form]
    assert len(asking) == 2
    for form in asking:
        assert any("lightning-subspace env" in item["attributes"]["label"] for item in form["body"])


def test_one_version_is_told():
    version = lightning_subspace.__version__
    assert yaml.safe_load((HABITS / "CITATION.cff").read_text())["version"] == version
    assert f"version = {{{version}}}" in (HABITS / "CONTRIBUTING.md").read_text()
    assert f"### {version}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(HABITS.glob("*.md")), ids=lambda path: path.stem)
def test_what_the_pages_link_exists(path):
    text = path.read_text()
    links = re.findall(r"\]\((?!http)([^)\s]+)\)", text)
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        assert (path.parent / name).exists(), link
        headings = re.findall(r"^#+ (.*)$", (path.parent / name).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}
