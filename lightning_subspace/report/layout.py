"""TensorBoard page of combined charts: the custom-scalars layout.

A log directory has one layout, and writing another replaces it. So the existing one, another monitor's or the user's,
is read from the event files first, and the charts are added to it. A layout that the user writes *after* this one still
replaces it; TensorBoard has no way to append.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from lightning_subspace.parallel.ranks import in_words
from lightning_subspace.report.loggers import logged_name
from lightning_subspace.state.notice import warn

# Category -> chart -> [kind, tags], as `SummaryWriter.add_custom_scalars` takes it.
Layout: TypeAlias = dict[str, dict[str, list[Any]]]

# The layouts written here, by writer: they stand in where the log directory cannot be read, and restore ours where the
# user has replaced it in the meantime.
_written: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()


def add_layout(loggers: Iterable[Any], prefix: str, k: int) -> None:
    """Add the monitor's charts to the custom-scalars page of every TensorBoard logger.

    Charts of the same category and title are replaced, all others stay. Never raises; call on rank 0 only.

    Args:
        loggers: `trainer.loggers`; those that are not TensorBoard's are left alone.
        prefix: the monitor's `name`, which becomes the category.
        k: number of eigenpairs; with 0 there are only the charts of the gradient.
    """
    for logger in loggers:
        if not any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
            continue
        try:
            _add_to_writer(logger.experiment, {prefix: charts(prefix, k)})
        except Exception as error:
            warn(
                f"the TensorBoard layout of {prefix!r} could not be written ({in_words(error)}); the same curves are "
                "on the Scalars page.",
            )


def charts(prefix: str, k: int) -> dict[str, list[Any]]:
    """The charts of the monitor of this name, with k eigenpairs.

    Example:
        >>> charts("subspace", 0)["gradient"]
        ['Multiline', ['subspace/gradient_hessian_cosine$']]
    """
    if k == 0:
        keys = {
            "gradient": ["gradient_hessian_cosine"],
            "gradient norm": ["gradient_norm"],
            "curvature along the gradient": ["gradient_curvature"],
        }
    else:
        keys = {
            "eigenvalues": [f"eigenvalues/{index:02d}" for index in range(1, k + 2)],
            "gradient fraction": ["gradient_fraction", "gradient_fraction_low", "gradient_fraction_high"],
            "update and cosine": ["update_fraction", "gradient_hessian_cosine"],
            "overlap": ["overlap_previous", "overlap_reference"],
            "stability": ["sharpness_over_threshold"],
        }

    def pattern(key: str) -> str:  # TensorBoard takes the tags of a chart as regular expressions, open at the end
        return re.escape(logged_name(prefix, key)) + "$"

    return {title: ["Multiline", list(map(pattern, chart))] for title, chart in keys.items()}


def merge(*layouts: Mapping[str, Mapping[str, list[Any]]]) -> Layout:
    """Unite layouts; of charts with the same name the last counts.

    Example:
        >>> merge({"a": {"x": [1]}}, {"b": {"y": [2]}, "a": {"z": [3]}})
        {'a': {'x': [1], 'z': [3]}, 'b': {'y': [2]}}
    """
    merged: Layout = {}
    for layout in layouts:
        for category, its_charts in layout.items():
            merged.setdefault(category, {}).update(its_charts)
    return merged


def read_layout(log_dir: str) -> Layout:
    """The last layout written to a log directory; empty if none.

    Raises:
        OSError: where the directory or one of its event files cannot be read.
    """
    # Imported here, since tensorboard takes a while to import and most runs never need it.
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout as LayoutProto  # type: ignore[import-untyped]
    from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG  # type: ignore[import-untyped]

    last = b""
    # The names of event files begin with the time they were opened at.
    for name in sorted(name for name in os.listdir(log_dir) if "tfevents" in name):
        for record in _event_records(Path(log_dir, name)):
            # Searching the bytes first spares parsing every scalar and image of the run.
            if CONFIG_SUMMARY_TAG.encode() not in record:
                continue
            for value in Event.FromString(record).summary.value:
                if value.tag == CONFIG_SUMMARY_TAG and value.tensor.string_val:
                    last = value.tensor.string_val[0]
    return _as_dict(LayoutProto.FromString(last))


def _event_records(path: Path) -> Iterator[bytes]:
    """The serialized events of a file."""
    # Each is framed by its length, a checksum of that, and one of itself. TensorBoard's own reader verifies them in
    # Python, at 10 MB a second: a minute of waiting at the start of every resumed run with images in its log.
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            record = file.read(length)
            if len(record) < length:  # being written, or cut off by a crash
                return
            yield record
            file.seek(4, os.SEEK_CUR)


def _add_to_writer(writer: Any, layout: Layout) -> None:
    before: Layout = {}
    try:
        writer.flush()
        before = read_layout(writer.get_logdir())
    except Exception as error:
        warn(
            f"the TensorBoard layout in {writer.get_logdir()!r} could not be read ({in_words(error)}); if it has one "
            "of another writer's, that one is replaced.",
            stacklevel=3,
        )
    merged = merge(_written.get(writer, {}), before, layout)
    if merged != before:
        writer.add_custom_scalars(merged)
    _written[writer] = merged


def _as_dict(layout: Any) -> Layout:
    """A protobuf layout, as `add_custom_scalars` takes it."""
    result: Layout = {}
    for category in layout.category:
        its_charts = result.setdefault(category.title, {})
        for chart in category.chart:
            if chart.WhichOneof("content") == "margin":
                # The writer's interface knows one band a chart; further ones become charts of their own.
                for index, band in enumerate(chart.margin.series):
                    title = chart.title if index == 0 else f"{chart.title} ({index + 1})"
                    its_charts[title] = ["Margin", [band.value, band.lower, band.upper]]
            else:
                its_charts[chart.title] = ["Multiline", list(chart.multiline.tag)]
    return result
