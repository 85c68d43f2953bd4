"""Checks of the project that a callback finds itself in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_subspace._lightning import (
    CombinedLoader,
    MisconfigurationException,
    Trainer,
    is_a,
    undeclared,
)
from lightning_subspace.callbacks.strategy import ranks_of
from lightning_subspace.data.sample import SampleSpec
from lightning_subspace.data.training_data import first_step
from lightning_subspace.loss.loss_function import LossFunction, resolve_loss
from lightning_subspace.measurements import Measurement
from lightning_subspace.probe.arguments import wrong
from lightning_subspace.state.notice import warn_on_first_rank


@contextmanager
def misconfiguration(speaker: str) -> Iterator[None]:
    """Turn a refusal inside into a MisconfigurationException under the callback's name.

    Raises:
        MisconfigurationException: for a ValueError or a TypeError.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(f"{speaker}: {error}") from error


def check_project(trainer: Trainer, module: nn.Module, loss_fn: LossFunction | None) -> None:
    """Refuse a trainer or a module that cannot be probed.

    Raises:
        ValueError: for a strategy that is not supported, or manual optimization without a `loss_fn`.
        TypeError: for a module without a training step that can be evaluated.
    """
    ranks_of(trainer)  # refuses strategies
    if loss_fn is None and not getattr(module, "automatic_optimization", True):
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step takes optimizer steps and cannot be "
            "evaluated on its own; pass loss_fn=, a function (pl_module, batch, batch_idx) -> scalar."
        )
    resolve_loss(module, loss_fn)


def check_steps(spec: SampleSpec, trainer: Trainer, steps: int | Sequence[int], loaders: CombinedLoader | None) -> None:
    """Refuse a list with steps that come before the sample.

    Raises:
        ValueError: naming the first of them, and what to pass.
    """  # noqa: DOC501  # `wrong` makes one
    if isinstance(steps, int) or loaders is None:
        return
    first, start = first_step(spec, trainer, loaders), trainer.global_step
    if early := [step for step in steps if start <= step < first]:
        raise wrong(
            "every_n_steps",
            f"steps from {first} on",
            early[0],
            f"the {spec.sample} examples of sample=, or those of one epoch, are gathered from the batches of training, "
            "and are there at that step; pass sample='all', a loader or a list of batches, which are read before the "
            "first step, or a number of examples that the first batch has",
        )


def check_apart(given: Sequence[tuple[str, Sequence[Measurement] | None]]) -> None:
    """Refuse callbacks that share a name or a measurement.

    They would write over each other.

    Args:
        given: name and measurements of each callback of one class.

    Raises:
        ValueError: naming what two of them share.
    """  # noqa: DOC501  # `wrong` makes one
    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise wrong("name", "another one for every callback of a Trainer", name)
    users: dict[int, str] = {}
    for name, measurements in given:
        for measurement in measurements or ():
            first = users.setdefault(id(measurement), name)
            if first != name:
                kind = type(measurement).__name__
                raise ValueError(
                    f"measurements: expected objects of their own for each monitor, got one {kind} for {first!r} and "
                    f"{name!r}; it remembers the probes of one monitor; make a {kind} for each place."
                )


def warn_of_missing_keys(trainer: Trainer, name: str) -> None:
    """Warn of callbacks that wait for a value a probe may withhold."""
    for callback in undeclared(trainer, "callbacks"):
        key = str(getattr(callback, "monitor", None))
        if not key.startswith((f"{name}/", f"{name}_")):
            continue
        if is_a(callback, "EarlyStopping") and callback.strict:
            warn_on_first_rank(
                f"EarlyStopping(monitor={key!r}, strict=True) will end the run with an error if it asks before a probe "
                "has logged that value, which a probe that does not converge withholds; use strict=False."
            )
        elif is_a(callback, "ModelCheckpoint"):
            warn_on_first_rank(
                f"ModelCheckpoint(monitor={key!r}) saves nothing before a probe has logged that value, which a probe "
                "that does not converge withholds; once validation has run it then ends the run with an error. Every "
                "later save sees the last value logged."
            )
