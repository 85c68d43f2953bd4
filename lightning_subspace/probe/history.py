"""History of a monitor, read from a checkpoint without the model."""

from __future__ import annotations

import os
from typing import Any

import torch

from lightning_subspace.probe.arguments import require_instance
from lightning_subspace.probe.checkpoint import RunState, decode
from lightning_subspace.probe.entries import CheckpointError, Entries
from lightning_subspace.subspace.record import Record

PREFIX, SUFFIX = "SubspaceMonitor{'name': ", "}"  # of the key of a state


def read_history(path: str | os.PathLike[str], name: str | None = None) -> list[Record]:
    """Read a monitor's history from a checkpoint, without the model.

    Args:
        path: of the checkpoint, a file that `Trainer.save_checkpoint` or `ModelCheckpoint` has written.
        name: of the monitor; may be left out where there is only one.

    Returns:
        The records, oldest first, as in `SubspaceMonitor.history`. The last one may lack the numbers of the step that
        followed it, if the checkpoint was written before that step.

    Raises:
        ValueError: for a path or a name of another type.
        CheckpointError: when the file holds no state of such a monitor, or a damaged one, or is no checkpoint.
        OSError: when there is no such file.

    Example:
        >>> import tempfile
        >>> torch.save({"callbacks": {}}, f"{tempfile.gettempdir()}/empty.ckpt")
        >>> read_history(f"{tempfile.gettempdir()}/empty.ckpt")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_subspace.probe.entries.CheckpointError: name: expected a monitor of the checkpoint, got None; ...
    """
    require_instance("path", path, (str, os.PathLike), "the path of a checkpoint")
    require_instance("name", name, str, "the name of a monitor or None", optional=True)
    found = _saved(path)
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        names = ", ".join(map(repr, found)) or "none"
        raise CheckpointError(f"name: expected a monitor of the checkpoint, got {name!r}; it has {names}")
    return list(decode(found[name]).records)


def read_states(path: str | os.PathLike[str]) -> dict[str, RunState]:
    """The runs of all monitors in a checkpoint, by their names.

    Raises:
        CheckpointError: for a damaged state, or a file that is no checkpoint.
        OSError: when there is no such file.
    """
    return {name: decode(state) for name, state in _saved(path).items()}


def key_of(name: str) -> str:
    """The key of a monitor's state in a checkpoint.

    Example:
        >>> key_of("subspace")
        "SubspaceMonitor{'name': 'subspace'}"
    """
    return f"{PREFIX}{name!r}{SUFFIX}"


def load(path: str | os.PathLike[str]) -> Entries:
    """The entries of a checkpoint.

    Raises:
        CheckpointError: for a file that is none.
        OSError: when there is no such file.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch has many, some of them without a word
        # An UnpicklingError begins with the advice to pass weights_only=False, which runs whatever is in the file.
        cause = str(error).rpartition("WeightsUnpickler error:")[2].strip() or str(error)
        reason = f"{type(error).__name__}: {cause}".partition("\n")[0].partition(" Please ")[0]
        raise CheckpointError(
            f"path: expected a checkpoint that torch.load reads with weights_only=True, got {str(path)!r} ({reason})"
        ) from error
    return Entries(loaded, "checkpoint")


def _saved(path: str | os.PathLike[str]) -> dict[str, Any]:
    """States of monitors as they are in a checkpoint, by their names."""
    saved = load(path)
    states = saved.below("callbacks").values if "callbacks" in saved else {}
    return {
        key.removeprefix(PREFIX).removesuffix(SUFFIX)[1:-1]: state
        for key, state in states.items()
        if str(key).startswith(PREFIX)
    }
