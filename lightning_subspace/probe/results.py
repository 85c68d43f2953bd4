"""File of a history that was measured from checkpoints.

It has the state that a monitor leaves in a checkpoint, where it leaves it, so that whatever reads the one reads the
other. Beside it stands what was asked for, so that a measurement that goes on is the same one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_subspace._arguments import wrong
from lightning_subspace.probe.checkpoint import RunState, decode, encode
from lightning_subspace.probe.entries import CheckpointError, Entries
from lightning_subspace.probe.history import key_of, load

MEASURED = "measured"


@dataclass(frozen=True)
class Results:
    """A history, and what it was measured from.

    Attributes:
        state: of the run.
        asked: the options by name, as plain values.
        sample: checksum of the examples.
        files: names of the checkpoints by their steps.
    """

    state: RunState
    asked: Mapping[str, Any]
    sample: int
    files: Mapping[int, str]

    def require_same(self, asked: Mapping[str, Any]) -> None:
        """Refuse to go on with other options.

        Raises:
            ValueError: naming the first that differs.
        """  # noqa: DOC501  # `wrong` makes one
        for name in {**asked, **self.asked}:
            now, then = asked.get(name), self.asked.get(name)
            if now != then:
                way_out = "name another folder by --out, or measure all anew by --anew"
                raise wrong(f"--{name.replace('_', '-')}", f"{then!r}, as for what is measured already", now, way_out)

    def require_same_sample(self, sample: int) -> None:
        """Refuse to go on with other examples.

        Raises:
            ValueError: saying what to do.
        """
        if sample != self.sample:
            raise ValueError(
                "sample: expected the examples that earlier checkpoints were measured on, got others: the data have "
                "changed, or are not read in the same order each time; measure all anew by --anew, or name another "
                "folder by --out."
            )


def write_results(file: Path, name: str, results: Results) -> None:
    """Write the file, whole or not at all.

    Args:
        file: its path.
        name: of the monitor whose history it looks like.
        results: what to write.

    Raises:
        OSError: where it cannot be written.
    """
    beside = {"asked": dict(results.asked), "sample": results.sample, "files": dict(results.files)}
    beginning = file.with_name(f"{file.name}.part")
    torch.save({"callbacks": {key_of(name): encode(results.state)}, MEASURED: beside}, beginning)
    os.replace(beginning, file)


def read_results(file: Path, name: str) -> Results | None:
    """What was measured so far; None where there is no file.

    Raises:
        CheckpointError: for another file.
        OSError: where it cannot be read.
    """
    if not file.exists():
        return None
    entries = load(file)
    if MEASURED not in entries or key_of(name) not in entries.below("callbacks"):
        raise CheckpointError(
            f"--out: expected the results of `measure` under the name {name!r}, got {str(file)!r}, which is another "
            "file; name another folder by --out"
        )
    beside = entries.below(MEASURED)
    return Results(
        decode(entries.below("callbacks").any(key_of(name))),
        beside.below("asked").values,
        beside.integer("sample"),
        {int(step): str(file) for step, file in Entries(beside.any("files")).values.items()},
    )
