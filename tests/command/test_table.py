"""The table in a terminal, and the rows of a file."""

import csv
import io

import pytest

from lightning_subspace.command.table import SHOWN, as_csv, in_terminal, numbers
from tests.tensorboard_tab.runs import FAILED, REASON, UNCONVERGED, WITHHELD, probes

STEPS = range(0, 1100, 100)
RUNS = {"a": {"subspace/probes": list(probes(STEPS, rich=True))}, "b": {"head/probes": list(probes(STEPS[:2]))}}


def rows_of(text):
    """The lines of a table behind its title and its head."""
    return [line.split() for line in text.splitlines() if line.split()[0].isdigit()]


def test_each_run_has_a_title_and_a_line_a_probe():
    first, second = in_terminal(RUNS).split("\n\n")
    assert first.startswith("a, subspace: 11 probes, steps 0 to 1000; k = 4, n = 1930, sample = 512")
    assert second.startswith("b, head: 2 probes, steps 0 to 100; k = 4")
    assert [int(row[0]) for row in rows_of(first)] == list(STEPS)


def test_names_are_whole_when_they_are_read_downwards():
    [block, _] = in_terminal(RUNS).split("\n\n")
    head = [line for line in block.splitlines()[1:] if not line.split()[0].isdigit()]
    width = max(map(len, head))
    ends = [i + 1 for i, end in enumerate(head[-1].ljust(width + 1)) if end == " " and head[-1][i - 1 : i].strip()]
    starts = [0, *ends]
    columns = zip(starts, [*ends, width], strict=True)
    names = ["".join(line.ljust(width)[start:end].strip() for line in head) for start, end in columns]
    known = {key for probe in RUNS["a"]["subspace/probes"] for key in numbers(probe)}
    assert [name for name in names if name] == ["step", *(key for key in SHOWN if key in known)]


def test_why_a_number_is_missing_stands_behind_the_line():
    lines = {int(line.split()[0]): line for line in in_terminal(RUNS).split("\n\n")[0].splitlines()[5:]}
    assert lines[WITHHELD].endswith(REASON)
    assert lines[UNCONVERGED].endswith("20 products did not suffice")
    assert lines[FAILED].split(maxsplit=1)[1] == "failed: RuntimeError: no second derivative"
    narrow = in_terminal(RUNS, width=120).split("\n\n")[0].splitlines()[1:]
    assert max(map(len, narrow)) == 120
    [cut] = [line for line in narrow if line.startswith(f"{WITHHELD:4d}")]
    assert cut.endswith("...")
    assert any(cut[:-3].endswith(f"  {REASON[:length]}") for length in range(17, len(REASON)))


def test_numbers_are_chosen_by_patterns_in_their_order():
    text = in_terminal({"a": RUNS["a"]}, ["step/c*", "lr", "eigenvalues/01"], last=2)
    assert [row[0] for row in rows_of(text)] == ["900", "1000"]
    assert rows_of(text)[-1] == ["1000", "0.001784", "1.5", "-0.8667", "0.1", "3.619"]
    with pytest.raises(
        ValueError, match=r"--keys: expected names of numbers that the run has, got 'nothing\*'; it has"
    ):
        in_terminal(RUNS, ["nothing*"])


def test_a_probe_written_twice_counts_once_and_is_the_later_one():
    twice = {"a": {"subspace/probes": [{"step": 3, "lr": 1.0}, {"step": 0, "lr": 2.0}, {"step": 3, "lr": 3.0}]}}
    assert rows_of(in_terminal(twice, ["lr"])) == [["0", "2"], ["3", "3"]]
    assert [row["lr"] for row in csv.DictReader(io.StringIO(as_csv(twice)))] == ["2.0", "3.0"]


def test_a_file_has_every_number_of_every_run():
    rows = list(csv.DictReader(io.StringIO(as_csv(RUNS))))
    entries = [probe for tags in RUNS.values() for probes in tags.values() for probe in probes]
    assert [(row["run"], row["monitor"]) for row in rows] == [("a", "subspace")] * 11 + [("b", "head")] * 2
    for row, probe in zip(rows, entries, strict=True):
        assert int(row["step"]) == probe["step"]
        known = numbers(probe)
        assert {key: float(row[key]) for key in known} == known
        assert all(row[key] == "" for key in row.keys() - known.keys() - {"run", "monitor", "step", *probe})
        assert row["failed"] == probe.get("failed", "")
