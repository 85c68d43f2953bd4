"""The Subspace page of logs without a TensorBoard, as one HTML file.

    python -m lightning_subspace.view LOGDIR [--out subspace.html]

LOGDIR is a folder with TensorBoard's event files, of one run or of many, or a checkpoint of a Trainer with a monitor,
or a file "subspace_probes.json" that another logger has kept.
The file holds its data and needs no network: it can be mailed, kept as an artefact of CI, or shown beside a paper.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_subspace.tensorboard_tab.event_files import read_probes
from lightning_subspace.tensorboard_tab.schema import from_json, tag_of, to_json
from lightning_subspace.tensorboard_tab.standalone import page

Runs = dict[str, dict[str, list[dict[str, Any]]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; 0 where there was something to show."""
    parser = argparse.ArgumentParser("python -m lightning_subspace.view", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path, help="a folder of TensorBoard logs, a checkpoint, or a logger's JSON file")
    parser.add_argument("--out", type=Path, default=Path("subspace.html"), help="the file to write (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        runs = read_runs(options.path)
        if not runs:
            told = f"path: expected logs or a checkpoint of a run with SubspaceMonitor, got none in {options.path}"
            print(f"{told}; train with a TensorBoardLogger, or name another folder.", file=sys.stderr)
            return 1
        options.out.write_text(page(runs, title=f"Subspace: {options.path}"), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    count = sum(len(probes) for tags in runs.values() for probes in tags.values())
    print(f"{count} probes of {len(runs)} runs in {options.out}")
    return 0


def read_runs(path: Path) -> Runs:
    """Probes by run and tag, of logs or a checkpoint.

    Raises:
        FileNotFoundError: where it is not there.
        OSError: where it cannot be read.
        ValueError: for a file that is none of these.
    """
    if path.is_dir():
        return read_probes(path)
    if not path.exists():
        raise FileNotFoundError(
            f"path: expected a folder of logs or a checkpoint, got {str(path)!r}, which does not exist."
        )
    return _of_json(path) if path.suffix == ".json" else _of_checkpoint(path)


def _of_json(path: Path) -> Runs:
    try:
        runs: Runs = from_json(path.read_text(encoding="utf-8"))
        is_fine = all(isinstance(probe["step"], int) for tags in runs.values() for of in tags.values() for probe in of)
    except (ValueError, AttributeError, TypeError, KeyError):
        is_fine = False
    if not is_fine:
        raise ValueError(
            f"path: expected the file that a logger has kept of a run, got {str(path)!r}, which is another."
        )
    return runs


def _of_checkpoint(path: Path) -> Runs:
    # Torch and the monitor are loaded for a checkpoint alone.
    from lightning_subspace.probe.history import read_states
    from lightning_subspace.report.tab_entry import tab_entry

    tags = {
        tag_of(name): [from_json(to_json(tab_entry(record, state.overlaps))) for record in state.records]
        for name, state in read_states(path).items()
        if state.records
    }
    return {path.stem: tags} if tags else {}


if __name__ == "__main__":
    sys.exit(main())
