"""Runs on a disk: TensorBoard's folders, checkpoints, and files of other loggers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_subspace.tensorboard_tab.event_files import read_probes
from lightning_subspace.tensorboard_tab.schema import from_json, tag_of, to_json

Probe = dict[str, Any]
Runs = dict[str, dict[str, list[Probe]]]
KEPT = "_probes.json"  # how the names of the files end that loggers other than TensorBoard's keep
CAN_BE_SHOWN = f"a folder of logs, a checkpoint of a Trainer with SubspaceMonitor, or a file *{KEPT} of a logger"


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
                "TensorBoardLogger or one that keeps files, such as CSVLogger, or name another path."
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
        found = read_probes(path)
        return found | _kept_in(path, found)
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


def _kept_in(folder: Path, written: Runs) -> Runs:
    """Runs that loggers have kept as files, named by place.

    One that event files have already is left out: a Trainer may have loggers of both kinds.

    Args:
        folder: of logs, with runs at any depth.
        written: the runs in its event files.

    Raises:
        OSError: where a file cannot be read.
        ValueError: for a file of a monitor that is damaged.
    """
    files = sorted(folder.rglob(f"*{KEPT}"))
    if not files:
        return {}
    known = {of for tags in written.values() for tag, probes in tags.items() for of in _marks(tag, probes)}
    runs: Runs = {}
    for file in files:
        name = file.name.removesuffix(KEPT)
        with file.open("rb") as stream:
            head = f'{{"{name}":{{"{tag_of(name)}":'.encode()
            if stream.read(len(head)) != head:  # of somebody else, or what `show --json` has written of these runs
                continue
        run = file.parent.relative_to(folder).as_posix()
        for tag, probes in _of_json(file)[name].items():
            # Loggers of one Trainer may have folders of their own, whose names differ.
            marks = _marks(tag, probes)
            if tag not in written.get(run, {}) and not (marks and marks <= known):
                runs.setdefault(run, dict(written.get(run, {})))[tag] = probes
    return runs


def _marks(tag: str, probes: Sequence[Probe]) -> set[tuple[str, int, str]]:
    """What tells probes from those of any other run."""
    # Seconds are among the numbers; a probe that failed has none, and may be as it is in another run.
    known = [probe for probe in probes if probe.get("metrics")]
    return {(tag, probe["step"], json.dumps(probe["metrics"], sort_keys=True)) for probe in known}


def _of_json(path: Path) -> Runs:
    try:
        runs: Runs = from_json(path.read_text(encoding="utf-8"))
        is_fine = all(isinstance(probe["step"], int) for tags in runs.values() for of in tags.values() for probe in of)
    except (ValueError, AttributeError, TypeError, KeyError):
        is_fine = False
    if not is_fine:
        raise ValueError(
            f"path: expected the file that a logger has kept of a run, got {str(path)!r}, which is another or "
            "is damaged; leave it out."
        )
    return runs


def _of_checkpoint(path: Path) -> Runs:
    # Torch and the monitor are loaded for a checkpoint alone.
    from lightning_subspace.probe.entries import CheckpointError
    from lightning_subspace.probe.history import read_states
    from lightning_subspace.report.tab_entry import failed_entry, tab_entry

    tags: dict[str, list[Probe]] = {}
    try:
        states = read_states(path)
    except CheckpointError as error:
        if not str(error).startswith("path: "):  # a checkpoint, and its state is damaged
            raise
        raise ValueError(f"{error}; name {CAN_BE_SHOWN}.") from error
    for name, state in states.items():
        entries = {step: failed_entry(step, reason) for step, reason in state.failed.items()}
        entries |= {record.step: tab_entry(record, state.overlaps) for record in state.records}
        probes = [from_json(to_json(entries[step])) for step in sorted(entries)]
        if probes:
            probes[0]["run"] = {"k": state.k, "n": state.space.n, "which": state.which}
            tags[tag_of(name)] = probes
    return {path.stem: tags} if tags else {}
