"""Checks of the arguments of a probe, with those of `_arguments.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence, Set
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lightning_subspace import measurements as room
from lightning_subspace._arguments import described as described
from lightning_subspace._arguments import is_integer, is_list_like, require_instances
from lightning_subspace._arguments import is_number as is_number
from lightning_subspace._arguments import require_flag as require_flag
from lightning_subspace._arguments import require_function as require_function
from lightning_subspace._arguments import require_instance as require_instance
from lightning_subspace._arguments import require_integer as require_integer
from lightning_subspace._arguments import require_loss as require_loss
from lightning_subspace._arguments import require_number as require_number
from lightning_subspace._arguments import require_patterns as require_patterns
from lightning_subspace._arguments import require_word as require_word
from lightning_subspace._arguments import wrong as wrong
from lightning_subspace.data.given import require_given_batches
from lightning_subspace.measurements.base import Measurement, Needs
from lightning_subspace.parallel.fsdp import compute_device, is_sharded
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.subspace.record import Record

MEASUREMENT_METHODS = {
    "require_space": ("space",),
    "measure": ("probe",),
    "expected_products": ("prospect",),
    "after_step": ("probe", "gradient", "update"),
}


def require_measurements(values: Any) -> tuple[Measurement, ...]:
    """Measurements, each once, as a probe needs them.

    Raises:
        ValueError: naming the argument; for the name of a measurement, with what to pass in its place.
    """  # noqa: DOC501  # `wrong` makes one
    expected = "a list of instances of lightning_subspace.Measurement"
    given = tuple(values) if is_list_like(values) and not isinstance(values, Sequence) else values  # read once
    parts = given if is_list_like(given) else [given]
    if words := [one for one in parts if isinstance(one, str) and one]:
        raise wrong("measurements", expected, given, _instead_of(words[0]))
    found = require_instances("measurements", given, Measurement, expected, once=True)
    for measurement in found:
        _require_measurement(measurement)
    return found


def require_name(name: str, value: Any) -> None:
    """ASCII without blanks or slashes: loggers make paths and groups of it."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", value):
        raise wrong(name, "an ASCII word of letters, digits, '_', '-' and '.'", value)


def require_steps(name: str, value: Any) -> int | list[int]:
    """A positive interval, or a list of steps."""
    if isinstance(value, Integral):
        return int(require_integer(name, value, 1))
    steps = list(value) if is_list_like(value) else []
    if not steps or not all(is_integer(step) and step >= 0 for step in steps):
        raise wrong(name, "a positive integer or a list of steps, each 0 or more", value)
    return [int(step) for step in steps]


def ranks_of_group(group: Any, module: Any) -> Ranks:
    """The processes of a group, for a module still unchecked.

    Raises:
        ValueError: for another thing than a group, or one that this process is not in.
    """
    expected = "a process group of torch.distributed that this process is in, or None"
    require_instance("group", group, ProcessGroup, expected, optional=True)
    parameters = module.parameters() if isinstance(module, nn.Module) else iter(())
    return Ranks(group, next(map(compute_device, parameters), torch.device("cpu")))


def check_given(module: Any, batches: Any, measurements: Any, optimizer: Any, previous: Any) -> None:
    """What `measure_subspace` takes beside the settings of a probe."""
    require_instance("module", module, nn.Module, "a LightningModule or another nn.Module")
    require_given_batches("batches", batches)
    if measurements is None:
        raise wrong("measurements", "a list of measurements", measurements, "leave it out for the default ones")
    require_instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer or None", optional=True)
    require_instance("previous", previous, Record, "a Record of measure_subspace or None", optional=True)


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


def checked_k(k: int, space: ParameterSpace, ncv: int | None = None) -> int:
    """k, or an error that names it or `ncv`.

    Raises:
        ValueError: for k outside 0..n, or a basis without room for it.
    """
    if not 0 <= k <= space.n:
        raise ValueError(f"k: expected 0..{space.n}, the number of parameters, got {k}.")
    require_integer("ncv", ncv, min(space.n, k + 3), optional=True)
    return k


def trusted_basis(previous: Record | None, partition: Partition) -> Tensor | None:  # (k, n)
    """The eigenvectors of an earlier record, if it is trusted.

    Raises:
        ValueError: for a record without them, over other parameters or dealt otherwise.
    """
    if previous is None or previous.subspace is None or not previous.subspace.trusted:
        return None
    if previous.subspace.eigenvectors is None:
        raise ValueError("previous: expected a record with its eigenvectors, got one without, as a history keeps them.")
    basis, held = previous.subspace.eigenvectors, previous.subspace.partition
    num_parameters = basis.shape[1] if held is None else held.n
    if num_parameters != partition.n:
        raise ValueError(
            f"previous: expected a record over the same {partition.n} parameters, got one over {num_parameters}."
        )
    if held is not None and held.ranges != partition.ranges:
        raise ValueError(
            f"previous: expected a record dealt to {len(partition.ranges)} ranks as this one is, got one dealt to "
            f"{len(held.ranges)}; leave it out, or measure it with the same group=."
        )
    return basis


def _require_measurement(value: Measurement) -> None:
    """A measurement whose attributes and methods are as a probe needs them."""
    name = type(value).__name__
    require_integer(f"{name}.every", value.every, 1)
    require_instance(f"{name}.needs", value.needs, Needs, "one of lightning_subspace.Needs")
    require_instance(f"{name}.extra", value.extra, Set, "a frozenset of keys")
    for method, takes in MEASUREMENT_METHODS.items():
        require_function(f"{name}.{method}", getattr(value, method), takes, optional=False)


def _instead_of(word: str) -> str:
    """What to pass in place of the name of a measurement."""
    kinds = {name.lower(): kind for name, kind in vars(room).items() if isinstance(kind, type)}
    kind = kinds.get(word.rpartition(".")[2].lower(), Measurement)
    if not issubclass(kind, Measurement) or kind is Measurement:
        return f"pass objects, such as [Trace()] after `from {room.__name__} import Trace`, not their names"
    needs = any(one.default is one.empty for one in inspect.signature(kind).parameters.values())
    return f"pass [{kind.__name__}({'...' if needs else ''})] after `from {room.__name__} import {kind.__name__}`"


def _widest(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
