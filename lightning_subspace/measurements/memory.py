"""Memory of measurements between probes: whose it is, and its entries.

A measurement that keeps something from probe to probe does so for one run. It belongs to its last user, a monitor: a
run that begins takes it over and clears it, and one that goes on after another has used it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.measurements.base import Measurement

ROOM = __name__.rpartition(".")[0]


def declares_memory(measurement: Measurement) -> bool:
    """Whether a measurement says that it keeps something between probes."""
    return type(measurement).state_dict is not Measurement.state_dict


def may_remember(measurement: Measurement) -> bool:
    """Whether it may keep something, which a user's class need not say."""
    return declares_memory(measurement) or not type(measurement).__module__.startswith(f"{ROOM}.")


def take_over(measurements: Iterable[Measurement], user: object) -> None:
    """Note whose memory these measurements have from now on."""
    for measurement in measurements:
        vars(measurement)["_user"] = user  # also of one that is frozen


def require_own(measurements: Iterable[Measurement], user: object) -> None:
    """Refuse a measurement that another one has used.

    Raises:
        ValueError: naming its class, and the way out.

    Example:
        >>> from lightning_subspace.measurements.density import Density
        >>> density, one, other = Density(), object(), object()
        >>> take_over([density], one)
        >>> require_own([density], one)
        >>> require_own([density], other)
        Traceback (most recent call last):
        ValueError: measurements: expected a Density of its own for each monitor, got one that something else has ...
    """
    for measurement in measurements:
        if may_remember(measurement) and vars(measurement).get("_user") not in (None, user):
            raise ValueError(
                f"measurements: expected a {type(measurement).__name__} of its own for each monitor, got one that "
                "something else has used since the last probe of this run, so that it remembers another; make one for "
                "each monitor and each call of measure_subspace."
            )


def remember(history: list[Any], found: Any, keep: int) -> None:
    """Add what was found to a history of at most `keep` entries.

    It takes the place of an entry of its step, or a later one: a probe may be taken again behind a checkpoint.
    """
    while history and history[-1].step >= found.step:
        history.pop()
    history.append(found)
    thin_out(history, keep)


def thin_out(history: list[Any], keep: int) -> None:
    """Drop every second entry of the older half, beyond `keep`.

    Example:
        >>> entries = [1, 2, 3, 4, 5]
        >>> thin_out(entries, keep=4)
        >>> entries
        [1, 3, 4, 5]
    """
    if len(history) > keep:
        half = len(history) // 2
        history[:half] = history[:half:2]
        del history[:-keep]  # one or two have no half to thin out


def tensor_entry(state: Mapping[str, Any], name: str, dtype: torch.dtype, dimensions: int) -> Tensor:
    """A tensor of a state, on the CPU.

    Raises:
        ValueError: for an entry that is absent or something else.
    """
    value = state.get(name)
    if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != dimensions:
        raise ValueError(f"{name}: expected a tensor of type {dtype} and {dimensions} dimensions, got {kind(value)}")
    return value.detach().cpu()


def kind(value: object) -> str:
    """A value in few words, for messages."""
    if isinstance(value, Tensor):
        return f"one of shape {tuple(value.shape)} and type {value.dtype}"
    return f"{value!r:.40}"
