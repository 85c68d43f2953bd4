"""How the package is laid out: few rooms, imports that go one way, private attributes of others in two files."""

import ast
import re
from functools import cache

import pytest

from tests.rooms import PACKAGE, between_rooms, circles, imports, levels, modules, room, within_room

PATHS = modules()
FOLDERS = {
    "state", "parallel", "data", "loss", "curvature", "linalg", "subspace", "measurements", "metrics", "report",
    "probe", "callbacks", "tensorboard_tab", "command",
}  # fmt: skip
# Longer ones are cut in two, or have a reason: the callbacks' arguments are explained in their class.
MOST_LINES = 300
LONGER = {"callbacks/monitor.py": 380, "callbacks/projection.py": 390}
MOST_WORDS = 12


@cache
def nodes(path):
    """Those of a file's syntax tree."""
    return [*ast.walk(ast.parse(path.read_text()))]


@pytest.fixture(scope="module")
def graph():
    return imports()


@pytest.fixture(scope="module")
def rooms(graph):
    return between_rooms(graph)


@pytest.fixture(scope="module")
def own():
    return set(names_of_its_own())


def test_nothing_else_is_in_the_root_of_the_package():
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    files = {"__init__.py", "__main__.py", "_arguments.py", "_lightning.py", "_torch.py", "py.typed", "view.py"}
    assert found == FOLDERS | files


def test_there_are_no_circles(graph, rooms):
    assert circles(rooms) == []
    assert [circle for name in FOLDERS for circle in circles(within_room(graph, name))] == []
    assert circles({name: targets for name, targets in graph.items() if name}) == []


def test_there_are_few_levels_and_arrows(rooms):
    # On top of the callbacks are the command, with an arrow to each of the six rooms that it shows or starts, and its
    # two names: `python -m lightning_subspace` and `python -m lightning_subspace.view`.
    assert max(levels(rooms).values()) <= 11
    assert sum(map(len, rooms.values())) <= 71


def test_circles_and_levels_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == [["a", "b", "c"]]
    assert levels({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}
    assert room("linalg.eigsh") == "linalg"


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_room_says_in_one_sentence_what_it_is(name):
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    assert text
    assert text.split("\n\n")[0].endswith(".")


@pytest.mark.parametrize("name", [name for name in PATHS if name])
def test_a_file_is_short(name):
    path = PATHS[name]
    assert path.read_text().count("\n") <= LONGER.get(str(path.relative_to(PACKAGE)), MOST_LINES)


@pytest.mark.parametrize("name", PATHS)
def test_first_lines_are_short_and_those_of_files_begin_with_what_it_is(name):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    heads = [
        text.splitlines()[0]
        for node in nodes(PATHS[name])
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    ]
    assert [head for head in heads if len(head.split()) > MOST_WORDS] == []
    assert not re.match(r"(What|Where|Which|How|When|Who|Do|Does|Is|Are)\b", heads[0])


def names_of_its_own():
    """What the package itself defines, as a function, a class or an attribute of `self`."""
    for path in PATHS.values():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Attribute) and _is_own(node.value):
                yield node.attr


def private_attributes(path):
    """Underscored attributes of anything but `self` and `cls`."""
    for node in nodes(path):
        is_private = isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
        if is_private and not _is_own(node.value):
            yield node.attr


def _is_own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize("name", [name for name in PATHS if name not in ("", "_torch", "_lightning")])
def test_private_attributes_of_other_packages_are_named_in_two_files_alone(name, own):
    # `_asdict`, `_replace` and `_fields` are the public interface of named tuples; the last two are of Python itself.
    allowed = {"_asdict", "_replace", "_fields", "_lru_cache_wrapper", "_current_frames"}
    assert set(private_attributes(PATHS[name])) <= allowed | own
