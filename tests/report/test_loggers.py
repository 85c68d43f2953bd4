"""Values arrive in every logger; a logger that fails loses its own values only."""

from __future__ import annotations

import copy
import csv
import json
import pickle
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_subspace.measurements import default_measurements
from lightning_subspace.report import Reporter, logged_name, select


class Calls:
    """Answers every call, and remembers it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


class RecordingLogger:
    def __init__(self) -> None:
        self.experiment = Calls()
        self.logged: list[tuple[dict[str, Any], int]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.append((metrics, step))


class WandbLogger(RecordingLogger):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, list[Any], int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images.append((key, images, step))


class MLFlowLogger(RecordingLogger):
    run_id = "run-7"


class CometLogger(RecordingLogger):
    pass


class MyCometLogger(CometLogger):
    pass


class ThrowingLogger(RecordingLogger):
    broken = True

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        super().log_metrics(metrics, step)


@pytest.fixture
def figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1], [0, 1])
    return figure


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="tb", version=0)


def read(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir).Reload()


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("gradient_fraction", "top/gradient_fraction"),
        ("solver/overhead", "top/solver/overhead"),
        ("eigenvalues/01", "top_eigenvalues/01"),
    ],
)
def test_eigenvalues_get_a_group_of_their_own(key: str, name: str) -> None:
    assert logged_name("top", key) == name


PROBE = {
    "sharpness": 2.0,
    "eigenvalues/01": 2.0,
    "reliability": 0.8,
    "overlap_reference": 0.7,
    "gradient_norm": 0.9,
    "batch_gradient_fraction": 0.5,
    "gap_index": 3.0,
    "solver/subspace_error": 0.01,
    "solver/overhead": 0.1,
    "solver/residual": 0.001,
    "solver/matvecs": 30.0,
    "solver/converged": 1.0,
}
EXTRA = {key for measurement in default_measurements(k=3) for key in measurement.extra}


def test_the_default_selection_is_what_a_person_looks_at() -> None:
    kept = {"sharpness", "eigenvalues/01", "reliability", "overlap_reference"}
    assert set(select(PROBE, "default", EXTRA)) == kept | {"solver/subspace_error", "solver/overhead"}


def test_all_is_everything_and_a_copy() -> None:
    selected = select(PROBE, "all", EXTRA)
    assert selected == PROBE
    assert selected is not PROBE


def test_without_eigenpairs_the_default_selection_has_all_of_the_gradient() -> None:
    probe = {"gradient_norm": 0.9, "gradient_curvature": 2.0, "gradient_hessian_cosine": 0.1, "solver/seconds": 3.0}
    assert set(select(probe, "default", EXTRA)) == probe.keys() - {"solver/seconds"}


def test_a_probe_that_did_not_converge_says_so() -> None:
    failed = {"solver/converged": 0.0, "solver/residual": 0.3, "solver/matvecs": 200.0, "solver/subspace_error": 2.0}
    assert set(select(failed, "default", EXTRA)) == {"solver/converged", "solver/residual", "solver/subspace_error"}


def test_the_default_selection_says_which_probes_nobody_verified() -> None:
    assert "solver/verified" not in select({**PROBE, "solver/converged": 1.0, "solver/verified": 1.0}, "default", EXTRA)
    unverified = select({**PROBE, "solver/converged": 1.0, "solver/verified": 0.0}, "default", EXTRA)
    assert unverified["solver/verified"] == 0.0


def test_tensorboard_shows_scalars_and_entries(tensorboard: TensorBoardLogger, figure: Figure) -> None:
    reporter = Reporter()
    reporter.scalars([tensorboard], {"subspace/sharpness": 2.5}, step=3)
    reporter.histogram([tensorboard], "subspace/spectrum", torch.tensor([1.0, 2.0, float("nan")]), step=3)
    reporter.figure([tensorboard], "subspace/overlap", figure, step=3)
    reporter.tab([tensorboard], "subspace", '{"v":1,"step":3}', step=3)
    events = read(tensorboard)
    assert [(event.step, event.value) for event in events.Scalars("subspace/sharpness")] == [(3, 2.5)]
    (entry,) = events.Tensors("subspace/probes")
    assert (entry.step, entry.tensor_proto.string_val) == (3, [b'{"v":1,"step":3}'])
    assert events.Tags()["images"] == events.Tags()["histograms"] == []


def test_csv_gets_scalars_and_image_files(tmp_path: Path, figure: Figure) -> None:
    logger = CSVLogger(tmp_path, name="csv", version=0)
    reporter = Reporter()
    reporter.figure([logger], "subspace/overlap", figure, step=3)
    reporter.histogram([logger], "subspace/spectrum", torch.ones(2), step=3)
    reporter.scalars([logger], {"subspace/sharpness": 2.5}, step=3)
    logger.save()
    folder = Path(logger.log_dir)
    with (folder / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"step": "3", "subspace/sharpness": "2.5"}]
    (image,) = (folder / "figures").iterdir()
    assert image.name == "subspace_overlap_000003.png"
    assert image.read_bytes().startswith(b"\x89PNG")


def test_wandb_gets_its_own_types(monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    wandb = types.ModuleType("wandb")
    wandb.Histogram = lambda values: ("histogram", values.tolist())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = WandbLogger()
    Reporter().histogram([logger], "subspace/spectrum", torch.tensor([1.0, 2.0]), step=3)
    Reporter().figure([logger], "subspace/overlap", figure, step=4)
    assert logger.logged == [({"subspace/spectrum": ("histogram", [1.0, 2.0])}, 3)]
    assert logger.images == [("subspace/overlap", [figure], 4)]


def test_mlflow_gets_numbered_artifacts(figure: Figure) -> None:
    logger = MLFlowLogger()
    Reporter().histogram([logger], "subspace/spectrum", torch.tensor([1.0, 2.0]), step=3)
    Reporter().figure([logger], "subspace/overlap", figure, step=3)
    dictionary, image = logger.experiment.calls
    assert dictionary[:2] == (
        "log_dict",
        ("run-7", {"step": 3, "values": [1.0, 2.0]}, "subspace/spectrum_000003.json"),
    )
    assert json.dumps(dictionary[1][1])
    assert image[:2] == ("log_figure", ("run-7", figure, "subspace/overlap_000003.png"))


def test_a_subclass_is_known_by_its_base(figure: Figure) -> None:
    logger = MyCometLogger()
    Reporter().histogram([logger], "subspace/spectrum", torch.tensor([1.0]), step=3)
    Reporter().figure([logger], "subspace/overlap", figure, step=3)
    histogram, image = logger.experiment.calls
    assert histogram[0] == "log_histogram_3d"
    assert histogram[2] == {"name": "subspace/spectrum", "step": 3}
    assert image == ("log_figure", (), {"figure_name": "subspace/overlap", "figure": figure, "step": 3})


def test_an_unknown_logger_gets_the_scalars_alone(figure: Figure) -> None:
    logger = RecordingLogger()
    Reporter().scalars([logger], {"a": 1.0}, step=3)
    Reporter().histogram([logger], "h", torch.ones(2), step=3)
    Reporter().figure([logger], "f", figure, step=3)
    assert logger.logged == [({"a": 1.0}, 3)]
    assert logger.experiment.calls == []


def test_the_loggers_of_fast_dev_run_are_fine(figure: Figure) -> None:
    Reporter().scalars([DummyLogger()], {"a": 1.0}, step=0)
    Reporter().histogram([DummyLogger()], "h", torch.ones(2), step=0)
    Reporter().figure([DummyLogger()], "f", figure, step=0)


def test_only_finite_values_are_sent() -> None:
    logger = RecordingLogger()
    Reporter().scalars([logger], {"a": 1.0, "b": float("nan"), "c": float("-inf")}, step=3)
    Reporter().scalars([logger], {"b": float("nan")}, step=4)
    assert logger.logged == [({"a": 1.0}, 3)]


def test_a_logger_cannot_change_what_the_next_one_gets() -> None:
    class Greedy(RecordingLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
            metrics.clear()

    logger = RecordingLogger()
    Reporter().scalars([Greedy(), logger], {"a": 1.0}, step=3)
    assert logger.logged == [({"a": 1.0}, 3)]


def test_a_throwing_logger_is_named_once_and_tried_again() -> None:
    throwing, other, reporter = ThrowingLogger(), RecordingLogger(), Reporter()
    with pytest.warns(
        UserWarning, match=r"ThrowingLogger raised ConnectionError: no route to host\. Lost: .*\(a\)"
    ) as w:
        reporter.scalars([throwing, other], {"a": 1.0}, step=3)
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reporter.scalars([throwing, other], {"a": 2.0}, step=4)
        throwing.broken = False
        reporter.scalars([throwing, other], {"a": 3.0}, step=5)
    assert other.logged == [({"a": 1.0}, 3), ({"a": 2.0}, 4), ({"a": 3.0}, 5)]
    assert throwing.logged == [({"a": 3.0}, 5)]


def test_each_throwing_logger_has_its_own_warning() -> None:
    with pytest.warns(UserWarning, match="ThrowingLogger") as caught:
        Reporter().scalars([ThrowingLogger(), ThrowingLogger()], {"a": 1.0}, step=3)
    assert len(caught) == 2


def test_a_figure_that_cannot_be_stored_is_a_warning(figure: Figure) -> None:
    logger = MLFlowLogger()
    logger.experiment = None  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="Lost: the figure subspace/overlap of step 3"):
        Reporter().figure([logger], "subspace/overlap", figure, step=3)


def test_a_reporter_can_travel_with_its_callback() -> None:
    reporter = Reporter()
    with pytest.warns(UserWarning, match="ThrowingLogger"):
        reporter.scalars([ThrowingLogger()], {"a": 1.0}, step=3)
    assert pickle.loads(pickle.dumps(copy.deepcopy(reporter)))
