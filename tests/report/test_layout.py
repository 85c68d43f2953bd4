"""The custom-scalars page keeps every category that anyone has written."""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter

from lightning_subspace.report import add_layout, layout

USERS = {
    "mine": {"loss": ["Multiline", ["train", "val"]], "band": ["Margin", ["mean", "low", "high"]]},
    "subspace": {"my chart": ["Multiline", ["subspace/sharpness"]]},
}


def shown(log_dir: str) -> dict[str, dict[str, list[str]]]:
    """The layout as TensorBoard's own reader finds it: category -> chart -> tags."""
    event = EventAccumulator(log_dir).Reload().Tensors("custom_scalars__config__")[-1]
    categories = Layout.FromString(event.tensor_proto.string_val[0]).category
    return {
        category.title: {
            chart.title: list(chart.multiline.tag) or [s.value for s in chart.margin.series] for chart in category.chart
        }
        for category in categories
    }


@pytest.fixture
def logger(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="run", version=0)


def test_two_monitors_and_a_user_share_the_page(logger: TensorBoardLogger) -> None:
    logger.experiment.add_custom_scalars(USERS)
    add_layout([logger], "subspace", k=3)
    add_layout([logger], "small", k=0)
    logger.experiment.flush()
    page = shown(logger.log_dir)
    assert list(page) == ["mine", "subspace", "small"]
    assert page["mine"] == {"loss": ["train", "val"], "band": ["mean"]}
    assert set(page["subspace"]) == {"my chart", *layout.charts("subspace", 10)}


def test_bands_of_the_user_keep_their_bounds(logger: TensorBoardLogger) -> None:
    logger.experiment.add_custom_scalars(USERS)
    logger.experiment.flush()
    assert layout.read_layout(logger.log_dir) == USERS


def test_a_resumed_run_keeps_the_page_and_writes_nothing_new(logger: TensorBoardLogger) -> None:
    logger.experiment.add_custom_scalars(USERS)
    add_layout([logger], "subspace", k=2)
    resumed = TensorBoardLogger(logger.save_dir, name="run", version=0)
    logger.experiment.close()
    before = shown(logger.log_dir)
    add_layout([resumed], "subspace", k=2)
    resumed.experiment.flush()
    assert shown(logger.log_dir) == before
    assert sum(b"custom_scalars" in file.read_bytes() for file in Path(logger.log_dir).glob("*tfevents*")) == 1
    add_layout([resumed], "other", k=2)
    resumed.experiment.flush()
    assert set(shown(logger.log_dir)) == {"mine", "subspace", "other"}


def test_a_page_that_the_user_replaced_is_restored_by_the_next_monitor(logger: TensorBoardLogger) -> None:
    add_layout([logger], "subspace", k=2)
    logger.experiment.add_custom_scalars({"mine": USERS["mine"]})
    add_layout([logger], "other", k=2)
    logger.experiment.flush()
    assert set(shown(logger.log_dir)) == {"mine", "subspace", "other"}


def test_the_eigenvalues_are_those_up_to_the_one_behind_the_gap() -> None:
    _, tags = layout.charts("subspace", 10)["eigenvalues"]
    assert len(tags) == 11
    assert re.match(tags[-1], "subspace_eigenvalues/11")


def test_tags_match_themselves_alone() -> None:
    tags = [tag for _, chart in layout.charts("a.b+", 2).values() for tag in chart]
    assert any(re.match(tag, "a.b+/gradient_fraction") for tag in tags)
    assert not any(re.match(tag, "a.b+/gradient_fraction_other") for tag in tags)


def test_an_event_file_that_was_cut_off_is_read_as_far_as_it_goes(logger: TensorBoardLogger) -> None:
    logger.experiment.add_custom_scalars(USERS)
    logger.experiment.add_scalar("loss", 1.0, 0)
    logger.experiment.close()
    (path,) = Path(logger.log_dir).glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-9])
    assert layout.read_layout(logger.log_dir) == USERS


def test_a_directory_that_cannot_be_read_keeps_what_was_written_here(
    logger: TensorBoardLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise OSError("remote")

    add_layout([logger], "subspace", k=2)
    monkeypatch.setattr(layout, "read_layout", fail)
    with pytest.warns(UserWarning, match=r"could not be read \(OSError: remote\)"):
        add_layout([logger], "other", k=2)
    logger.experiment.flush()
    assert set(shown(logger.log_dir)) == {"subspace", "other"}


def test_a_failing_writer_is_a_warning(logger: TensorBoardLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(SummaryWriter, "add_custom_scalars", fail)
    with pytest.warns(UserWarning, match=r"'subspace' could not be written \(OSError: disk full\)"):
        add_layout([logger], "subspace", k=2)


def test_other_loggers_are_left_alone(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_layout([CSVLogger(tmp_path)], "subspace", k=2)
    assert not any(tmp_path.iterdir())


def test_a_writer_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    gc.collect()  # the writers of earlier tests
    before = len(layout._written)
    logger = TensorBoardLogger(tmp_path)
    add_layout([logger], "subspace", k=2)
    assert len(layout._written) == before + 1
    logger.experiment.close()
    del logger
    gc.collect()
    assert len(layout._written) == before
