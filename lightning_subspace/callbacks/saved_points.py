"""Checkpoints of a training, as points that can be measured.

They are files that Lightning's `ModelCheckpoint` or `Trainer.save_checkpoint` has written. A step that several of them
hold, as `last.ckpt` does, is one point.
"""

from __future__ import annotations

import glob
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_subspace.parallel.fsdp import is_sharded
from lightning_subspace.probe.entries import CheckpointError

STATE, STEP = "state_dict", "global_step"
# Where a callback has put an average of the weights into the checkpoint, Lightning keeps those that were trained here.
TRAINED = "current_model_state"


@dataclass(frozen=True)
class SavedPoint:
    """One checkpoint, and the number of optimizer steps before it."""

    path: Path
    step: int


def points_of(patterns: Sequence[str], *, trust: bool = False) -> tuple[list[SavedPoint], dict[Path, str]]:
    """The points of files, by step; and why others cannot be read.

    A step that several files hold is one point, of the first.

    Args:
        patterns: paths, or shell-style patterns of them.
        trust: whether files are read that hold more than tensors and plain values.

    Raises:
        ValueError: for a pattern without a file.
        CheckpointError: where none can be read.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ValueError(f"--ckpt: expected checkpoints, got none that fit {pattern!r}; quote a pattern.")
        files.update(dict.fromkeys(map(Path, found)))
    points: dict[int, SavedPoint] = {}
    unread: dict[Path, str] = {}
    for file in files:
        try:
            step = int(read(file, trust=trust)[STEP])
        except CheckpointError as error:
            unread[file] = str(error)
        else:
            points.setdefault(step, SavedPoint(file, step))
    if not points:
        raise CheckpointError(next(iter(unread.values())))
    told = {file: f"{CheckpointError.__name__}: {reason}" for file, reason in unread.items()}
    return [points[step] for step in sorted(points)], told


def read(path: Path, *, trust: bool = False) -> Mapping[str, Any]:
    """A checkpoint, whose tensors stay on the disk until used.

    Raises:
        CheckpointError: for a file that is none of Lightning's checkpoints, or cannot be read.
    """
    if path.is_dir():
        raise CheckpointError(
            f"--ckpt: expected files, got the folder {str(path)!r}; make a file of a distributed checkpoint by "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch has many, some of them without a word
        reason = f"{type(error).__name__}: {error}".partition("\n")[0].partition(". ")[0].rstrip(": ")
        if isinstance(error, pickle.UnpicklingError) and not trust:
            raise CheckpointError(
                f"--ckpt: expected a checkpoint of tensors and plain values, got {str(path)!r} ({reason}); if you "
                "trust it, --trust reads it by pickle, which runs what is in it"
            ) from error
        raise CheckpointError(
            f"--ckpt: expected a checkpoint of a Trainer, got {str(path)!r}, which cannot be read ({reason}); leave it "
            "out, or copy it again"
        ) from error
    if not isinstance(saved, Mapping) or not {STATE, STEP} <= saved.keys():
        raise CheckpointError(
            f"--ckpt: expected checkpoints of a Trainer, got {str(path)!r}, which has no {STATE!r} and {STEP!r}"
        )
    return saved


def put_weights(module: Any, saved: Mapping[str, Any], path: Path) -> None:
    """Put the weights of a checkpoint into a LightningModule.

    Under FSDP2 each rank takes its shards; a collective.

    Args:
        module: takes them.
        saved: the checkpoint.
        path: where it lies, for the message.

    Raises:
        CheckpointError: where they do not fit, in one sentence.
    """  # noqa: DOC501  # others are of the module's own loading
    module.on_load_checkpoint(saved)
    state: Mapping[str, Any] = saved.get(TRAINED, saved[STATE])
    try:
        _load(module, state)
    except (KeyError, RuntimeError, ValueError) as error:
        if not (differences := _differences(module, state)):
            raise
        raise CheckpointError(
            f"--ckpt: expected weights of the module that --config builds, got {str(path)!r}, "
            f"{', '.join(differences)}; pass the --config that this model was trained by, or its arguments behind --"
        ) from error


def _load(module: Any, state: Mapping[str, Any]) -> None:
    if not any(map(is_sharded, _parameters(module))):
        module.load_state_dict(state, strict=module.strict_loading)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=module.strict_loading)
    set_model_state_dict(module, dict(state), options=options)


def put_counters(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Put the counters of a checkpoint into a trainer.

    A training step may depend on `global_step` or `current_epoch`.
    """
    loops = saved.get("loops", {})
    if "fit_loop" in loops:
        trainer.fit_loop.load_state_dict(loops["fit_loop"])


def optimizers_at(optimizers: Iterable[Any], saved: Mapping[str, Any], module: nn.Module) -> list[Any]:
    """The optimizers as they were at a checkpoint.

    None where it has no states. Sharded ones are left out: their states are not read.
    """
    own, states = list(optimizers), saved.get("optimizer_states", [])
    if len(states) != len(own) or any(map(is_sharded, _parameters(module))):
        return []
    for optimizer, state in zip(own, states, strict=True):
        optimizer.load_state_dict(state)
    return own


def _differences(module: Any, state: Mapping[str, Any]) -> list[str]:
    """In what a module's own state differs from another one, in words."""
    own = module.state_dict()
    known = {key: one for key, one in own.items() if isinstance(one, Tensor) and not is_lazy(one)}
    shapes = {
        key: f"with shape {tuple(state[key].shape)} in place of {tuple(one.shape)} in {key!r}"
        for key, one in known.items()
        if isinstance(state.get(key), Tensor) and state[key].shape != one.shape
    }
    found = [list(shapes.values())]
    if module.strict_loading:
        found.append([f"without {key!r}" for key in own if key not in state])
        found.append([f"with {key!r}, which it does not know" for key in state if key not in own])
    return [f"{first}{f' (and {len(more)} more)' if more else ''}" for first, *more in filter(None, found)]


def _parameters(module: nn.Module) -> Iterable[Any]:
    return module.parameters()
