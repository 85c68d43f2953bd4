"""Runs on a disk: TensorBoard's folders, checkpoints, and files of other loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_subspace.tensorboard_tab.event_files import read_probes
from lightning_subspace.tensorboard_tab.schema import from_json, tag_of, to_json

Probe = dict[str, Any]
Runs = dict[str, dict[str, list[Probe]]]


def read_all(paths: Sequence[Path]) -> Runs:
    """Probes by run and tag, of several places.

    Of several, each run has the place in its name.

    Raises:
        FileNotFoundError: where one is not there.
        OSError: where one cannot be read.
        ValueError: for a file that is none of these, or a place without a probe.
    """
    found: Runs = {}
    for path in dict.fromkeys(paths):
        runs = read_runs(path)
        if not runs:
            raise ValueError(
                f"path: expected logs or a checkpoint of a run with SubspaceMonitor, got none in {path}; train with a "
                "TensorBoardLogger, or name another folder."
            )
        found |= runs if len(paths) == 1 else {_name(path, run): tags for run, tags in runs.items()}
    return found


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


def by_step(probes: Sequence[Probe]) -> list[Probe]:
    """Probes in the order of their steps.

    One that was written twice, as by a run that is resumed, counts once: the later one.

    Example:
        >>> by_step([{"step": 3}, {"step": 0}, {"step": 3, "lr": 0.1}])
        [{'step': 0}, {'step': 3, 'lr': 0.1}]
    """
    return sorted({probe["step"]: probe for probe in probes}.values(), key=lambda probe: int(probe["step"]))


def _name(path: Path, run: str) -> str:
    return path.as_posix() if run == "." or not path.is_dir() else f"{path.as_posix()}/{run}"


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
    from lightning_subspace.report.tab_entry import failed_entry, tab_entry

    tags: dict[str, list[Probe]] = {}
    for name, state in read_states(path).items():
        entries = {step: failed_entry(step, reason) for step, reason in state.failed.items()}
        entries |= {record.step: tab_entry(record, state.overlaps) for record in state.records}
        probes = [from_json(to_json(entries[step])) for step in sorted(entries)]
        if probes:
            probes[0]["run"] = {"k": state.k, "n": state.space.n, "which": state.which}
            tags[tag_of(name)] = probes
    return {path.stem: tags} if tags else {}
