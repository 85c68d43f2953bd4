"""The arguments of a monitor, checked as soon as they can be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

from torch import nn

from lightning_subspace._lightning import MisconfigurationException, is_a, rank_zero_warn, ranks_of
from lightning_subspace.alignment import StartWhenAligned
from lightning_subspace.curvature.choice import Curvature, OnCheckFail, Precision
from lightning_subspace.loss_function import LossFunction, check_loss_function
from lightning_subspace.measurements import Measurement
from lightning_subspace.solver import MAX_TOL
from lightning_subspace.training_loss import Mode


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """All arguments of `SubspaceMonitor`, by name.

    Raises:
        MisconfigurationException: naming the argument, what was expected and what came.
    """
    given = arguments.__getitem__
    check_number("k", given("k"), least=0)
    check_steps("every_n_steps", given("every_n_steps"))
    check_share("max_overhead", given("max_overhead"), optional=True)
    check_number("reference_step", given("reference_step"), least=0, optional=True)
    check_measurements("measurements", given("measurements"))
    check_choice("log", given("log"), ("default", "all"))
    check_flag("layout", given("layout"))
    check_probing(arguments)


def check_projection(arguments: Mapping[str, Any]) -> None:
    """All arguments of `SubspaceProjection`, by name; `StartWhenAligned` checks its own.

    Raises:
        MisconfigurationException: naming the argument, what was expected and what came.
    """
    given = arguments.__getitem__
    check_choice("keep", given("keep"), ("top", "bulk"))
    check_number("k", given("k"), least=1)
    check_number("refresh_every_n_steps", given("refresh_every_n_steps"), least=1)
    if not isinstance(given("start_when"), StartWhenAligned):
        if not isinstance(given("start_when"), int):
            raise _wrong("start_when", "a step or a StartWhenAligned(chi=..., decay=...)", given("start_when"))
        check_number("start_when", given("start_when"), least=0)
    check_probing(arguments)


def check_probing(arguments: Mapping[str, Any]) -> None:
    """The arguments that say how a subspace is computed; k is known to be right."""
    given = arguments.__getitem__
    check_sample(given("sample"), given("gradient_sample"))
    check_number("batch_size", given("batch_size"), least=1, optional=True)
    check_callable("weight", given("weight"))
    check_choice("which", given("which"), ("LA", "SA", "LM", "BE"))
    check_tolerance("tol", given("tol"))
    check_number("max_matvecs", given("max_matvecs"), least=max(given("k"), 1))
    check_number("ncv", given("ncv"), least=given("k") + 3, optional=True)
    check_patterns("params", given("params"))
    check_callable("loss_fn", given("loss_fn"))
    check_choice("mode", given("mode"), get_args(Mode))
    check_derivatives(given("dtype"), given("curvature"))
    check_choice("on_check_fail", given("on_check_fail"), get_args(OnCheckFail))
    check_choice("on_failure", given("on_failure"), ("warn", "raise"))
    check_name("name", given("name"))
    check_number("seed", given("seed"), least=0)


@contextmanager
def speaking_for(callback: str) -> Iterator[None]:
    """Let what is refused inside name this callback in the place of `SubspaceMonitor`."""
    try:
        yield
    except MisconfigurationException as error:
        raise MisconfigurationException(str(error).replace("SubspaceMonitor", callback)) from error.__cause__


def check_number(name: str, value: Any, *, least: int, optional: bool = False) -> None:
    """An integer of at least `least`, or None where that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(name, f"an integer of at least {least}{' or None' if optional else ''}", value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
        raise _wrong(name, "one of " + ", ".join(repr(choice) for choice in choices), value)


def check_share(name: str, value: Any, *, optional: bool = False) -> None:
    """A number strictly between 0 and 1, or None where that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise _wrong(name, f"a number between 0 and 1{' or None' if optional else ''}", value)


def check_steps(name: str, value: Any) -> None:
    """A positive interval, or a list of steps."""
    if isinstance(value, int):
        return check_number(name, value, least=1)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not value
        or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in value)
    ):
        raise _wrong(name, "a positive integer or a list of steps, each 0 or more", value)
    return None


def check_sample(sample: Any, gradient_sample: Any) -> None:
    """A number of examples, a word, or something to iterate over; and a gradient sample that contains it."""
    if isinstance(sample, str):
        check_choice("sample", sample, ("all", "current"))
    elif isinstance(sample, int):
        check_number("sample", sample, least=1)
    elif not hasattr(sample, "__iter__"):
        raise _wrong("sample", "a number of examples, 'all', 'current', a loader or a list of batches", sample)
    if isinstance(gradient_sample, str):
        return check_choice("gradient_sample", gradient_sample, ("all",))
    check_number("gradient_sample", gradient_sample, least=1)
    if isinstance(sample, int) and gradient_sample < sample:
        raise _wrong("gradient_sample", f"at least the {sample} of `sample`, which it contains", gradient_sample)
    return None


def check_derivatives(dtype: Any, curvature: Any) -> None:
    """Words, and no differences of what is computed in a narrow type."""
    check_choice("dtype", dtype, get_args(Precision))
    check_choice("curvature", curvature, get_args(Curvature))
    if dtype == "native" and curvature == "finite-difference":
        raise _wrong("dtype", "'float32' or 'float64' for finite differences, which are taken in float64", dtype)


def check_patterns(name: str, value: Any) -> None:
    """A list of shell-style patterns; a lone string would be read letter by letter."""
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(p, str) for p in value):
        raise _wrong(name, "a list of patterns such as ['head.*'], or None", value)


def check_name(name: str, value: Any) -> None:
    """ASCII without blanks or slashes: loggers make paths and groups of it."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise _wrong(name, "an ASCII word of letters, digits, '_', '-' and '.'", value)


def check_tolerance(name: str, value: Any) -> None:
    """A positive number of at most `MAX_TOL`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= MAX_TOL:
        raise _wrong(name, f"a number in (0, {MAX_TOL}], relative to the largest eigenvalue", value)


def check_callable(name: str, value: Any) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise _wrong(name, "a function or None", value)


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)


def check_measurements(name: str, value: Any) -> None:
    """A list of instances of `Measurement`."""
    if value is None:
        return
    if not isinstance(value, Sequence) or not all(isinstance(item, Measurement) for item in value):
        raise _wrong(name, "a list of instances of lightning_subspace.Measurement, or None", value)
    for item in value:
        check_number(f"{type(item).__name__}.every", item.every, least=1)


def check_project(trainer: Any, module: nn.Module, loss_fn: LossFunction | None) -> None:
    """What a trainer and a module must have for a probe to be possible."""
    ranks_of(trainer)  # refuses strategies
    if loss_fn is None and not getattr(module, "automatic_optimization", True):
        raise MisconfigurationException(
            f"SubspaceMonitor: {type(module).__name__} optimizes manually, so its training_step takes optimizer steps "
            "and cannot be evaluated on its own; pass loss_fn=, a function (pl_module, batch, batch_idx) -> scalar."
        )
    try:
        check_loss_function(module, loss_fn)
    except TypeError as error:
        raise MisconfigurationException(f"SubspaceMonitor: {error}") from error


def check_names(names: Sequence[str]) -> None:
    """Several monitors in one trainer would write over each other under one name."""
    for name in names:
        if names.count(name) > 1:
            raise _wrong("name", "different for every monitor of a Trainer", name)


def warn_of_missing_keys(trainer: Any, name: str) -> None:
    """A probe that cannot stand behind a value withholds it; say what callbacks that wait for one will then do."""
    for callback in trainer.callbacks:
        key = str(getattr(callback, "monitor", None))
        if not key.startswith((f"{name}/", f"{name}_")):
            continue
        if is_a(callback, "EarlyStopping") and callback.strict:
            rank_zero_warn(
                f"EarlyStopping(monitor={key!r}, strict=True) will end the run with an error if it asks before a probe "
                "has logged that value, which a probe that does not converge withholds; use strict=False."
            )
        elif is_a(callback, "ModelCheckpoint"):
            rank_zero_warn(
                f"ModelCheckpoint(monitor={key!r}) saves nothing before a probe has logged that value, which a probe "
                "that does not converge withholds; once validation has run it then ends the run with an error. Every "
                "later save sees the last value logged."
            )


def _wrong(name: str, expected: str, value: Any) -> MisconfigurationException:
    return MisconfigurationException(f"SubspaceMonitor: `{name}` must be {expected}; got {value!r}.")
