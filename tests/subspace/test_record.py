"""Rows of records: one dict a probe, all with the same keys, ready for csv or a table."""

import csv
import io
import math

import torch

from lightning_subspace.linalg import Outcome
from lightning_subspace.subspace.record import Record, to_rows
from lightning_subspace.subspace.subspace import Subspace


def test_every_row_has_every_key_in_order_of_first_appearance():
    rows = to_rows(
        [
            Record(0, {"sharpness": 2.0, "gradient_fraction": 0.1}),
            Record(10, {"sharpness": 3.0, "overlap_previous": 0.5}),
            Record(20, {"gradient_fraction": 0.9, "sharpness": 4.0}),
        ]
    )
    assert [list(row) for row in rows] == [["step", "sharpness", "gradient_fraction", "overlap_previous"]] * 3
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert [row["sharpness"] for row in rows] == [2.0, 3.0, 4.0]
    assert rows[2]["gradient_fraction"] == 0.9


def test_an_absent_value_is_nan():
    rows = to_rows([Record(0, {"a": 1.0}), Record(1, {"b": 2.0})])
    assert math.isnan(rows[0]["b"])
    assert math.isnan(rows[1]["a"])


def test_no_records_no_rows():
    assert to_rows([]) == []
    assert to_rows([Record(3, {})]) == [{"step": 3}]


def test_an_iterator_is_read_once():
    assert to_rows(iter([Record(0, {"a": 1.0}), Record(1, {"a": 2.0})])) == [
        {"step": 0, "a": 1.0},
        {"step": 1, "a": 2.0},
    ]


def test_rows_do_not_share_state_with_the_records():
    record = Record(0, {"a": 1.0})
    to_rows([record])[0]["a"] = 5.0
    assert record.metrics == {"a": 1.0}


def test_rows_go_through_csv():
    rows = to_rows([Record(0, {"sharpness": 0.1}), Record(5, {"sharpness": 1 / 3, "solver/seconds": 2.0})])
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    file.seek(0)
    back = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert back[1] == rows[1]
    assert math.isnan(back[0]["solver/seconds"])


def test_the_repr_leaves_out_the_sketch():
    assert "sketch" not in repr(Record(0, {"a": 1.0}))


def test_the_repr_is_a_line_without_eigenvectors():
    values = torch.linspace(2.0, 1.0, 11, dtype=torch.float64)
    space = Subspace(values, torch.eye(11, 90_000), values / 3e6, 0.123456, 0.01, Outcome.CONVERGED, True, 40)
    assert repr(space) == (
        "Subspace(k=11, eigenvalues=[2, 1.9, 1.8, 1.7, 1.6, ..., 1], eigenvectors=float32 of shape (11, 90000), "
        "residuals=[6.667e-07, 6.333e-07, 6e-07, 5.667e-07, 5.333e-07, ..., 3.333e-07], next_eigenvalue=0.1235, "
        "error=0.01, outcome=CONVERGED, verified=True, num_matvecs=40, gap_given_up=False)"
    )
    numbers = {"solver/matvecs": 40.0, "loss": 1 / 3, "gradient_fraction": 0.5, **dict.fromkeys("abcdef", 1.0)}
    record = Record(3, {**numbers, "eigenvalues/01": 2.0}, space)
    assert repr(record) == str(record)
    assert repr(record) == (
        "Record(step=3, metrics={'gradient_fraction': 0.5, 'loss': 0.3333, 'a': 1, 'b': 1, 'c': 1, 'd': 1, "
        f"... 3 more}}, subspace={space!r})"
    )
    assert (record.metrics["loss"], record == Record(3, record.metrics, space)) == (1 / 3, True)
