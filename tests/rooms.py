"""Rooms of the package, read off its imports: `python -m tests.rooms` prints them.

A room is a folder of the package, or a module beside the folders; an arrow is an import from one room to another. The
level of a room is one more than that of the highest room it imports. What is imported for type checkers alone counts.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "lightning_subspace"
NAME = PACKAGE.name


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """The modules of a package by their dotted names below it; that of the package itself is empty."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For every module the modules of the package that it imports, inside of functions too."""
    known = modules(package)
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            dotted = []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                dotted = [alias.name for alias in node.names]
            for target in dotted:
                below = target.split(".")[1:] if target.split(".")[0] == package.name else None
                while below and ".".join(below) not in known:
                    below = below[:-1]
                if below:
                    targets.add(".".join(below))
        found[name] = targets - {name}
    return found


def between_rooms(graph: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """The same between rooms. The package's own `__init__` is none: it imports everything, when it is asked to."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, targets in graph.items():
        if name:
            rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    return dict(rooms)


def within_room(graph: Mapping[str, Iterable[str]], name: str) -> dict[str, set[str]]:
    """The same between the files of one room; its `__init__` is none."""
    files = {file for file in graph if file.startswith(f"{name}.")}
    return {file: set(graph[file]) & files for file in files}


def room(name: str) -> str:
    return name.split(".")[0]


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """What imports itself by way of others: the strongly connected components of more than one (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            component = [stack.pop()]
            while component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def levels(graph: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """The level of every room of a graph without circles, from 1."""
    known: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in known:
            known[node] = 1 + max((level(target) for target in graph.get(node, ())), default=0)
        return known[node]

    for node in graph:
        level(node)
    return known


def main(package: Path) -> None:
    graph = imports(package)
    rooms = between_rooms(graph)
    found = [*circles(rooms), *(c for name in rooms for c in circles(within_room(graph, name)))]
    print(f"{len(rooms)} rooms, {sum(map(len, rooms.values()))} arrows, {len(found)} circles")
    for component in found:
        print("  circle:", ", ".join(component))
    if circles(rooms):
        return
    level_of = levels(rooms)
    for level in range(1, max(level_of.values()) + 1):
        print(f"level {level}: ", ", ".join(sorted(name for name, own in level_of.items() if own == level)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
