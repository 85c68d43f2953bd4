"""No exception is kept with what its frames hold: a rule for the source, as a cycle shows in no result.

A frame that refers to an exception whose traceback refers to the frame is a cycle, and all that the frames on the way
hold is alive until a garbage collection: the graphs of a probe. Python deletes the name of `except ... as name` for
that reason. So nothing else may refer to it, and what raises a kept exception drops it in a `finally`.
"""

import ast
from pathlib import Path

import pytest

import lightning_subspace

PACKAGE = Path(lightning_subspace.__file__).parent
# Where one is stored all the same, by file: it is dropped in a `finally`, and where it waits, its frames are cleared.
STORED = {"state/copies.py": 1, "state/failure.py": 0, "linalg/agreement.py": 1}


def stored(tree):
    """Lines where the exception of a handler gets another name."""
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
            continue
        for node in ast.walk(handler):
            value = getattr(node, "value", None)
            is_kept = isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr | ast.Return | ast.Yield)
            if is_kept and any(isinstance(part, ast.Name) and part.id == handler.name for part in parts(value)):
                yield node.lineno


def parts(value):
    """A value and the items of a display."""
    return [value, *getattr(value, "elts", ()), *getattr(value, "values", ())]


def raised(tree):
    """Lines that raise what another name refers to than that of a handler, without a `finally` around."""

    def visit(node, names, is_dropped):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name | ast.Attribute | ast.Subscript):
            name = node.exc.id if isinstance(node.exc, ast.Name) else ""
            if name not in names and not name.lstrip("_")[:1].isupper() and not is_dropped:
                yield node.lineno
        for field, children in ast.iter_fields(node):
            for child in children if isinstance(children, list) else [children]:
                if not isinstance(child, ast.AST):
                    continue
                inner = names | {child.name} if isinstance(child, ast.ExceptHandler) and child.name else names
                drops = is_dropped or (isinstance(node, ast.Try) and field == "body" and bool(node.finalbody))
                if isinstance(child, ast.FunctionDef | ast.Lambda):
                    inner, drops = frozenset(), False
                yield from visit(child, inner, drops)

    yield from visit(tree, frozenset(), False)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_exception_is_kept_with_its_frames(path):
    tree = ast.parse(path.read_text())
    assert len(list(stored(tree))) == STORED.get(path.relative_to(PACKAGE).as_posix(), 0)
    assert list(raised(tree)) == []


def test_the_rule_finds_what_it_is_for():
    kept = ast.parse("try:\n    f()\nexcept E as error:\n    failure = error\nif failure:\n    raise failure\n")
    assert (list(stored(kept)), list(raised(kept))) == ([4], [6])
    dropped = ast.parse("try:\n    raise failure\nfinally:\n    del failure\n")
    assert list(raised(dropped)) == []
    usual = ast.parse("try:\n    f()\nexcept E as error:\n    g(error)\n    raise X(str(error)) from error\n")
    assert (list(stored(usual)), list(raised(usual))) == ([], [])
