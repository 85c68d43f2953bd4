"""Checks of arguments, each with one grammar for what is wrong.

name: expected ..., got ...; way out
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace.parallel.fsdp import is_sharded
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks


def wrong(name: str, expected: str, value: object, way_out: str = "") -> ValueError:
    """The error for a wrong argument.

    Example:
        >>> str(wrong("k", "an integer of at least 0", -1))
        'k: expected an integer of at least 0, got -1.'
    """
    return ValueError(f"{name}: expected {expected}, got {value!r}{'; ' if way_out else ''}{way_out}.")


def require_integer(name: str, value: Any, least: int, *, optional: bool = False) -> None:
    """An integer of at least `least`, or None where that is allowed."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise wrong(name, f"an integer of at least {least}{' or None' if optional else ''}", value)


def require_word(name: str, value: Any, words: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in words:
        raise wrong(name, "one of " + ", ".join(map(repr, words)), value)


def require_function(name: str, value: Any) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise wrong(name, "a function or None", value)


def require_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong(name, "True or False", value)


def require_patterns(name: str, value: Any) -> None:
    """A list of shell-style patterns, or None; not a lone string."""
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(p, str) for p in value):
        raise wrong(name, "a list of patterns such as ['head.*'], or None", value)


def require_name(name: str, value: Any) -> None:
    """ASCII without blanks or slashes: loggers make paths and groups of it."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise wrong(name, "an ASCII word of letters, digits, '_', '-' and '.'", value)


def require_steps(name: str, value: Any) -> None:
    """A positive interval, or a list of steps."""
    if isinstance(value, int):
        require_integer(name, value, 1)
    elif (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not value
        or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in value)
    ):
        raise wrong(name, "a positive integer or a list of steps, each 0 or more", value)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, True and False apart."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_the_same(ranks: Ranks, module: nn.Module, arguments: object) -> None:
    """Whether all ranks were given the same; a collective.

    Raises:
        ValueError: when the arguments differ, or the values of parameters that are not sharded.
    """
    if ranks.count == 1:
        return
    own = [float(_widest(p.detach()).abs().sum()) for p in module.parameters() if not is_sharded(p)]
    for what, given in (("arguments", repr(arguments)), ("modules", own)):
        if any(other != given for other in ranks.all_gather_object(given)):
            raise ValueError(f"group: expected the same {what} on all ranks, got different ones.")


def checked_k(k: int, space: ParameterSpace) -> int:
    """k, or an error that names it.

    Raises:
        ValueError: for k outside 0..n.
    """
    if not 0 <= k <= space.n:
        raise ValueError(f"k: expected 0..{space.n}, the number of parameters, got {k}.")
    return k


def _widest(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
