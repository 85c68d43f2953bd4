"""Numbers in the pages are those of the stored results, and a number that is none of them is found."""

import importlib
import re

import pytest

from tests.benchmarks.example_pages import by_kind
from tests.benchmarks.made import MAKERS, pieces
from tests.benchmarks.pages import RESULTS, ROOT, Block, Sentence, Table, rewritten, short, stored
from tests.benchmarks.repository_pages import suite
from tests.benchmarks.speed_pages import ratio, summary
from tests.benchmarks.suite import counted

benchmarks = importlib.import_module("tests.benchmarks.__main__")
PIECES = pieces(stored())
TABLE = Table("page", ("n", "", "seconds"), (("1", "one", ".5"), ("2", "", ".25")))
TEXT = """\
Text.

| n | | seconds |
| --- | --- | --- |
| 9 | nine | .9 |

More than 1,000 in 3 s.

```
command
```

```text
old
lines
```
"""


def test_the_pages_have_the_numbers_that_are_stored():
    assert rewritten(PIECES) == {}, "run python -m tests.benchmarks --write"


def test_every_result_has_a_maker_and_every_maker_a_result():
    assert MAKERS.keys() == {path.stem for path in RESULTS.glob("*.json")}
    for name in MAKERS:
        assert any(f"{{out}}/{name}.json" in command for command in benchmarks.BENCHMARKS.values()), name


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: f"{piece.page}-{PIECES.index(piece)}")
def test_another_number_in_a_page_is_found_and_mended(piece):
    page = (ROOT / piece.page).read_text()
    if isinstance(piece, Table):
        row = max(piece.rows, key=lambda cells: len("".join(cells)))
        wrong = Table(piece.page, piece.header, ((*row[:-1], "77"), *piece.rows)).put_into(page)
    elif isinstance(piece, Block):
        wrong = Block(piece.page, piece.before, "77\n" + piece.text).put_into(page)
    else:
        wrong = Sentence(piece.page, piece.words, ("77",) * len(piece.numbers)).put_into(page)
    assert wrong != page
    assert piece.put_into(wrong) == page


def test_a_table_is_replaced_down_to_its_last_row():
    assert TABLE.put_into(TEXT).split("\n")[4:7] == ["| 1 | one | .5 |", "| 2 | | .25 |", ""]


def test_a_sentence_may_be_broken_anywhere_and_keeps_its_lines():
    words = "More than {} in {} s."
    broken = TEXT.replace("than 1,000 in", "than\n1,000\nin")
    assert (
        Sentence("page", words, ("2,000", ".7"))
        .put_into(broken)
        .startswith(broken.split("1,000")[0] + "2,000\nin .7 s.\n")
    )


def test_a_block_is_replaced_between_its_fences():
    found = Block("page", "```\ncommand\n```", "new\n").put_into(TEXT)
    assert found == TEXT.replace("old\nlines", "new")


@pytest.mark.parametrize(
    "piece",
    [
        Table("page", ("n", "s"), ()),
        Sentence("page", "Less than {}", ("1",)),
        Sentence("page", "e", ()),
        Block("page", "Text.", "new"),
    ],
)
def test_what_is_not_there_or_several_times_is_an_error(piece):
    with pytest.raises(LookupError, match="page: expected"):
        piece.put_into(TEXT)


def test_numbers_are_written_without_the_zero_before_the_point():
    assert [short(value, 2) for value in (0.5, -0.25, 1.5, 10.0)] == [".50", "-.25", "1.50", "10.00"]


def measured(way, reached=True, **numbers):
    """A row of `speed.py`, of the MLP."""
    row = {"workload": "mlp", "k": 10, "tol": 1e-3, "way": way, "matvecs": 30, "reached": reached, "residual": 5e-4}
    return row | {"seconds": 1.0, "gradients": 40.0, "clock_gradients": 50.0} | numbers


def test_the_fastest_tuned_peer_whose_answer_is_right_is_compared():
    rows = [
        measured("lightning_subspace, cold"),
        measured("lightning_subspace, differences", seconds=0.5),
        measured("hessian-eigenthings, tuned", seconds=1.5, gradients=60.0),
        measured("hessian-eigenthings, as documented", seconds=3.0, gradients=100.0),
        measured("curvlinops + ARPACK, tuned", seconds=1.2, reached=False),
        measured("lightning_subspace, cold", k=20),
        measured("hessian-eigenthings, tuned", k=20, reached=False),
    ]
    found = summary(rows)
    assert found["cells"]["curvlinops + ARPACK, tuned"]["mlp"]["reached"] is False
    first, differences, other = found["ratios"]
    assert (first["mine"], first["tuned"]) == ("lightning_subspace, cold", {"clock": 1.5, "operations": 1.5})
    assert first["documented"] == {"clock": 3.0, "operations": 2.5}
    assert (differences["tuned"]["clock"], differences["documented"]["clock"]) == (3.0, 6.0)
    assert (other["k"], other["tuned"]) == (20, None)
    table = {(of["k"], of["tol"], of["mine"], of["workload"]): of for of in found["ratios"]}
    problem = (1e-3, "lightning_subspace, cold", "mlp")
    assert ratio(table, 10, *problem, "tuned", 2, ", ") == "1.50 (1.50), 3.00 by differences"
    assert ratio(table, 20, *problem, "tuned", 2, ", ") == "none is right"


def test_minutes_of_the_tests_are_rounded_up_from_what_pytest_reports():
    report = "<testsuites><testsuite tests='10' skipped='2' failures='1' errors='0' time='61.5'/></testsuites>"
    row = counted(report)
    assert [row[key] for key in ("passed", "skipped", "failed", "seconds")] == [7, 2, 1, 61.5]
    whole = row | {"cores": 4}
    assert [piece.numbers for piece in suite({"whole": whole, "fast": row})] == [("2", "4", "2"), ("2", "4"), ("2",)]


def test_numbers_of_a_claim_are_read_by_their_kind():
    assert by_kind("none 3.6, 4; ways, every 10 7e-05, -.5") == {"none": [3.6, 4.0], "ways, every 10": [7e-5, -0.5]}


def test_pictures_of_the_pages_are_made_by_a_benchmark():
    shown = set()
    pages = [
        path for place in ("examples", "lightning_subspace", "tests") for path in (ROOT / place).rglob("README.md")
    ]
    for path in [ROOT / "README.md", *pages]:
        if "node_modules" not in path.parts and path.parent != ROOT / "examples" / "reproduce":  # those of the gallery
            links = re.findall(r"\]\(([^)]+\.(?:png|svg))\)", path.read_text())
            shown |= {str((path.parent / link).resolve().relative_to(ROOT)) for link in links}
    assert shown == set(benchmarks.PICTURES.values())
    for name in benchmarks.PICTURES:
        assert any(
            name in command or f"/{name.removesuffix('.png')}.py" in command
            for command in benchmarks.BENCHMARKS.values()
        )


def test_the_command_compares_and_writes(monkeypatch, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(TEXT)
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks, "GALLERY", ("true",))
    monkeypatch.setattr(importlib.import_module("tests.benchmarks.pages"), "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks, "pieces", lambda _: [Table("page.md", TABLE.header, TABLE.rows)])
    exits = []
    for option in ("--check", "--write", "--check"):
        monkeypatch.setattr("sys.argv", ["benchmarks", option])
        exits.append(benchmarks.main())
    assert exits == [1, 0, 0]
    assert "page.md: other numbers" in capsys.readouterr().out
    assert "| 2 | | .25 |" in page.read_text()
