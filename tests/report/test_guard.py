"""Output that fails: told once, and training does not hear of it, whatever is raised."""

import copy
import itertools
import pickle
import warnings
from types import SimpleNamespace

import matplotlib.figure
import pytest
import torch

from lightning_subspace.linalg import Outcome
from lightning_subspace.report import Publisher, Reporter, figures
from lightning_subspace.report.guard import Guard
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.sketch import Sketch
from lightning_subspace.subspace.subspace import Subspace
from tests.thorough import covering


class UnspeakableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


FAILURES = [
    MemoryError("no room"),
    RecursionError("too deep"),
    OSError(28, "No space left on device"),
    UnspeakableError(),
    UserWarning("a warning that is an error"),
]
CALLS = ["scalars", "histogram", "figure", "file"]
SPACE = Subspace(
    torch.ones(1).double(), None, torch.zeros(1).double(), 0.5, 0.0, Outcome.CONVERGED, verified=True, num_matvecs=3
)
RECORDS = [Record(step, {"sharpness": 1.0, "eigenvalues/01": 1.0}, SPACE) for step in range(3)]


def overlaps():
    history = OverlapHistory()
    for record in RECORDS:
        history.add(record.step, Sketch(torch.eye(4)[:1], exact=True))
    return history


class CometLogger:
    """Fails at one place, or nowhere."""

    def __init__(self, error=None, at=""):
        self.error, self.at, self.got = error, at, []
        self.experiment = SimpleNamespace(
            log_histogram_3d=lambda *args, **kwargs: self.take("histogram"),
            log_figure=lambda *args, **kwargs: self.take("figure"),
            log_asset_data=lambda *args, **kwargs: self.take("file"),
        )

    def take(self, what):
        if what == self.at:
            raise self.error
        self.got.append(what)

    def log_metrics(self, metrics, step):
        self.take("scalars")


class Metrics(dict):
    def update(self, *args):
        raise MemoryError("no room")


def trainer(*loggers, callback_metrics=None):
    metrics = {} if callback_metrics is None else callback_metrics
    return SimpleNamespace(is_global_zero=True, loggers=list(loggers), callback_metrics=metrics)


def publish(trainer, publisher=None):
    """All that a monitor sends for its records."""
    publisher = Publisher("subspace", "default", frozenset()) if publisher is None else publisher
    for record in RECORDS:
        publisher.update_callback_metrics(trainer, record)
        publisher.log(trainer, record)
        publisher.tell(trainer, lambda step=record.step: {"step": step})
        publisher.draw(trainer, [record], overlaps())
    publisher.keep(trainer, RECORDS, overlaps(), {})
    return publisher


@pytest.mark.parametrize(("call", "error"), covering(list(itertools.product(CALLS, ["always", "error"])), FAILURES))
def test_a_logger_may_raise_anything_at_any_call(call, error, logged, monkeypatch):
    at, action = call
    for name in ("spectrum_figure", "overlap_figure"):  # what a figure shows is no question here, and takes long
        monkeypatch.setattr(figures, name, lambda *args: matplotlib.figure.Figure())
    bad, good = CometLogger(error, at), CometLogger()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter(action)
        publish(trainer(bad, good))
    assert good.got == ["scalars", "histogram", "figure", "figure"] * 3 + ["file"]
    assert bad.got == [what for what in good.got if what != at]
    [text] = logged if action == "error" else [str(w.message) for w in told]
    assert f"CometLogger raised {type(error).__name__}" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("at", CALLS)
def test_what_ends_the_process_passes(at, error):
    with pytest.raises(type(error)):
        publish(trainer(CometLogger(error, at)))


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["spectrum", "overlaps", "matrix", "matplotlib"])
def test_a_picture_may_fail_at_any_place(monkeypatch, place, error):
    def fail(*args, **kwargs):
        raise error

    owner, name = {
        "spectrum": (figures, "spectrum_figure"),
        "overlaps": (figures, "overlap_figure"),
        "matrix": (OverlapHistory, "matrix"),
        "matplotlib": (matplotlib.figure.Figure, "add_subplot"),
    }[place]
    monkeypatch.setattr(owner, name, fail)
    logger = CometLogger()
    with pytest.warns(UserWarning, match=f"the figures could not be drawn: {type(error).__name__}") as told:
        publish(trainer(logger))
    assert len(told) == 1  # of three records
    assert logger.got.count("scalars") == 3


def test_without_a_logger_no_matrix_is_built(monkeypatch):
    monkeypatch.setattr(OverlapHistory, "matrix", lambda self: pytest.fail("not asked for"))
    publish(trainer())


def test_values_for_other_callbacks_may_fail():
    logger = CometLogger()
    with pytest.warns(UserWarning, match="ModelCheckpoint and EarlyStopping could not be set: MemoryError") as told:
        publish(trainer(logger, callback_metrics=Metrics()))
    assert len(told) == 1
    assert logger.got.count("scalars") == 3


class TensorBoardLogger(CometLogger):
    """One whose event file cannot be written."""

    def __init__(self, error=None):
        super().__init__()
        writer = SimpleNamespace(add_summary=lambda summary, step: self.take("entry"))
        self.experiment._get_file_writer = lambda: writer
        self.error, self.at = error, "entry"


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_an_entry_for_the_tab_may_fail(error):
    logger = TensorBoardLogger(error)
    with pytest.warns(UserWarning, match="an entry for TensorBoard's tab") as told:
        publish(trainer(logger))
    assert len(told) == 1
    assert logger.got.count("scalars") == 3


def test_a_guard_tells_each_kind_of_failure_once_and_where_warnings_are_errors_it_is_logged(logged):
    guard = Guard()

    def fail_in_turn():
        for error in (ValueError("a"), ValueError("b"), OSError("c"), MemoryError("d")):
            with guard.of("the thing"):
                raise error

    with pytest.warns(UserWarning, match="the thing") as told:
        fail_in_turn()
    assert [str(w.message).split(";")[0] for w in told] == [
        "the thing: ValueError: a",
        "the thing: OSError: c",
        "the thing: MemoryError: d",
    ]
    with guard.of("the thing"):
        raise ValueError("told already")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Guard().of("said all the same"):
            raise ValueError("a")
    assert [text.split(";")[0] for text in logged] == ["said all the same: ValueError: a"]
    assert pickle.loads(pickle.dumps(copy.deepcopy(guard)))


def test_a_publisher_that_has_failed_can_be_copied():
    with pytest.warns(UserWarning, match="raised MemoryError"):
        publisher = publish(trainer(CometLogger(MemoryError(), "scalars")))
    publish(trainer(), pickle.loads(pickle.dumps(copy.deepcopy(publisher))))
    Reporter().scalars([CometLogger()], {"a": float("nan")}, step=1)
