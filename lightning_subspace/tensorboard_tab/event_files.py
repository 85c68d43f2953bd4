"""Probes in TensorBoard's event files, read without a TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning_subspace.tensorboard_tab.schema import PLUGIN, from_json

# A record is framed by its length (8 bytes), a checksum of that (4), and one of itself (4).
HEAD, TAIL = 12, 4


def read_probes(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Probes by run and tag, in the order they were written.

    Runs are named as TensorBoard names them.

    Args:
        folder: of logs, with runs at any depth.

    Raises:
        OSError: where a file cannot be read.
        ValueError: for a file that is none of TensorBoard's, or is damaged.
    """
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(folder.rglob("*tfevents*")):  # the names of the files begin with the time they were opened at
        run = file.parent.relative_to(folder).as_posix()
        for tag, text in _strings(file):
            try:
                probe = from_json(text)
            except ValueError as error:
                raise ValueError(_damaged(file, f"{tag} with {error}")) from error
            runs.setdefault(run, {}).setdefault(tag, []).append(probe)
    return runs


def _damaged(file: Path, what: str) -> str:
    return f"path: expected an event file, got {str(file)!r}: {what}; leave it out of the folder."


def _strings(file: Path) -> Iterator[tuple[str, bytes]]:
    """Tags and texts of the tab's tensors in a file."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    known: set[str] = set()  # a writer may give the metadata with the first value of a tag alone
    with file.open("rb") as stream:
        for record in _records(stream):
            # Searching the bytes first spares parsing every scalar and image of the run.
            if PLUGIN.encode() not in record and not any(tag.encode() in record for tag in known):
                continue
            try:
                event = Event.FromString(record)
            except DecodeError as error:
                raise ValueError(_damaged(file, str(error))) from error
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == PLUGIN:
                    known.add(value.tag)
                if value.tag in known and value.tensor.string_val:
                    yield value.tag, value.tensor.string_val[0]


def _records(stream: BinaryIO) -> Iterator[bytes]:
    size = stream.seek(0, 2)
    stream.seek(0)
    while len(head := stream.read(HEAD)) == HEAD:
        length = int.from_bytes(head[:8], "little")
        if length > size - stream.tell():  # being written, or cut off by a crash
            return
        yield stream.read(length)
        stream.seek(TAIL, 1)
