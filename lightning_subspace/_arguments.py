"""Checks of arguments, each with one grammar for what is wrong.

    name: expected ..., got ...; way out.

A check returns the value as the code behind it takes it: numpy's integers as Python's own, any iterable as a tuple.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor, nn

MAX_SEED = 2**63 - 1
LONGEST = 100  # characters of a value in a message


def wrong(name: str, expected: str, value: object, way_out: str = "") -> ValueError:
    """The error for a wrong argument.

    Example:
        >>> str(wrong("k", "an integer of at least 0", -1))
        'k: expected an integer of at least 0, got -1.'
    """
    return ValueError(f"{name}: expected {expected}, got {described(value)}{'; ' if way_out else ''}{way_out}.")


def described(value: object) -> str:
    """A value in a message; of a tensor its type and shape.

    Example:
        >>> described(Tensor(2, 3)), described(nn.Linear), described("3")
        ('torch.float32 of shape (2, 3)', 'the class Linear', "'3'")
    """
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, nn.Module):
        return f"an object of type {type(value).__name__}"
    text = repr(value)
    head = text[:LONGEST].partition("\n")[0]
    return text if text == head else f"{head} ..."


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, True and False apart."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, True and False apart."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_integer(name: str, value: Any, least: int, *, optional: bool = False) -> Any:
    """An integer of at least `least`, or None where that is allowed."""
    if optional and value is None:
        return None
    if not is_integer(value) or value < least:
        raise wrong(name, f"an integer of at least {least}{' or None' if optional else ''}", value)
    return int(value)


def require_seed(name: str, value: Any) -> int:
    """A seed with room for small numbers on top, in 64 bits."""
    if not is_integer(value) or not 0 <= value <= MAX_SEED:
        raise wrong(name, "an integer from 0 to 2**63 - 1", value)
    return int(value)


def require_number(name: str, value: Any, expected: str, allowed: Callable[[float], bool], way_out: str = "") -> float:
    """A real number in a range that `expected` says; never nan."""
    try:
        number = float(value) if is_number(value) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.nan
    if not allowed(number):
        raise wrong(name, expected, value, way_out)
    return number


def require_word(name: str, value: Any, words: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in words:
        raise wrong(name, "one of " + ", ".join(map(repr, words)), value)


def require_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise wrong(name, "True or False", value)


def require_function(name: str, value: Any, takes: Sequence[str] = (), *, optional: bool = True) -> None:
    """A function, or None where that is allowed.

    Args:
        name: of the argument.
        value: the argument.
        takes: what the function is called with, by position; empty: it is not looked at.
        optional: whether None is allowed.

    Raises:
        ValueError: naming the argument.
    """  # noqa: DOC501  # `wrong` makes one
    if optional and value is None:
        return
    if not callable(value):
        raise wrong(name, "a function or None" if optional else "a function", value)
    if isinstance(value, type):
        raise wrong(name, "a function", value, "pass a function that uses an instance of it")
    if takes and not _accepts(value, len(takes)):
        raise wrong(name, f"a function of {len(takes)} positional arguments ({', '.join(takes)})", value)


def require_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """Shell-style patterns, or None; not a lone string."""
    if value is None:
        return None
    patterns = tuple(value) if is_list_like(value) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise wrong(name, "a list of patterns such as ['head.*'], or None", value)
    return patterns


def require_loss(name: str, value: Any) -> None:
    """A function (module, batch, batch_idx) -> scalar, or None."""
    require_function(name, value, ("module", "batch", "batch_idx"))
    if getattr(value, "__module__", None) == "torch.nn.functional":  # its third argument is another one
        expected = "a function (module, batch, batch_idx) -> scalar tensor"
        raise wrong(name, expected, value, "apply it to the module's output in a function of your own")


def require_instance(
    name: str, value: Any, kind: type | tuple[type, ...], expected: str, way_out: str = "", *, optional: bool = False
) -> None:
    """An instance of a class, which `expected` says in words."""
    if optional and value is None:
        return
    if not isinstance(value, kind):
        is_class = isinstance(value, type) and issubclass(value, kind)
        raise wrong(name, expected, value, "pass an instance" if is_class else way_out)


def require_instances(name: str, values: Any, kind: type, expected: str, *, once: bool = False) -> tuple[Any, ...]:
    """Instances of a class, in any iterable but one with another meaning.

    Args:
        name: of the argument.
        values: the argument.
        kind: the class.
        expected: in words.
        once: whether each may be given once only.

    Returns:
        All of them.

    Raises:
        ValueError: naming the argument.
    """  # noqa: DOC501  # `wrong` makes one
    if not is_list_like(values):
        raise wrong(name, expected, values, "put it into a list" if isinstance(values, kind) else "")
    found = tuple(values)
    for value in found:
        if not isinstance(value, kind):
            is_class = isinstance(value, type) and issubclass(value, kind)
            shown = values if isinstance(values, Sequence) else value
            raise wrong(name, expected, shown, f"pass {value.__name__}()" if is_class else "")
        if once and sum(value is other for other in found) > 1:
            raise wrong(name, "every one once", values, f"{described(value)} is there twice")
    return found


def require_shape(name: str, value: Any, shape: Sequence[int | str], way_out: str = "") -> None:
    """A real tensor of this shape; a word stands for any number."""
    is_tensor = isinstance(value, Tensor) and not value.is_complex() and value.ndim == len(shape)
    fits = is_tensor and all(isinstance(a, str) or a == b for a, b in zip(shape, value.shape, strict=True))
    if not fits:
        inside = ", ".join(map(str, shape))
        raise wrong(name, f"a real tensor of shape ({inside}{',' if len(shape) == 1 else ''})", value, way_out)


def is_list_like(value: Any) -> bool:
    """Whether a value holds others, as a list or a generator does."""
    is_other = isinstance(value, str | bytes | Mapping | Tensor | type | nn.Module)
    return isinstance(value, Iterable) and not is_other and not (isinstance(value, np.ndarray) and value.ndim == 0)


def _accepts(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes so many arguments, as far as it says."""
    try:
        signature = inspect.signature(getattr(function, "forward", function))
    except (TypeError, ValueError):  # built in, and without a signature
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
