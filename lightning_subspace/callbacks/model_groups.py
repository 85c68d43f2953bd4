"""Signs that the processes of a DDP strategy share a model.

A subclass of DDPStrategy may let several processes hold one model together, or work on one batch. A micro-batch that a
rank evaluates on its own then waits for others, or has another loss. What can be observed is this:

- the sampler it asks for: another number of shares than processes;
- attributes and arguments that are named like a number of processes to a model, with a value above 1;
- a `process_dataloader` of its own, if no such number says that a model has one process;
- process groups that it or the module holds, and the group of its DistributedDataParallel.

A constructor, time limits, backends and hooks say nothing. An attribute `data_parallel = True` of the strategy, or of
its class, says that each process has the whole model and batches of its own.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_subspace._lightning import Trainer
from lightning_subspace.parallel.ranks import in_words

SAID = "data_parallel"
ADVICE = (
    f"if each process has the whole model and batches of its own, say so by an attribute {SAID} = True of the strategy "
    "(in YAML: of a subclass); otherwise use strategy='ddp'"
)
# Names like num_gpus_per_model, model_comm_group_size, tensor_parallel_size, ensemble_comm_group or tp_size.
NAMED = re.compile(
    r"(gpus?|devices?|ranks?|procs|process(es)?|workers?)_per_(model|ensemble|replica|instance|group)"
    r"|(model|ensemble|tensor|pipeline|sequence|context|expert|spatial|domain)_?(comm_?)?(parallel|group|shard)"
    r"|\b_*(tp|pp|cp|sp|ep|mp)_?(size|degree|group)\b",
    re.IGNORECASE,
)


def why_shared(trainer: Trainer) -> str | None:
    """Why processes of a strategy may share a model, in words.

    None where nothing says so, as for DDPStrategy itself.
    """
    strategy = trainer.strategy
    said = getattr(strategy, SAID, None)
    own = _own_classes(strategy)
    if said is True or (said is None and not own) or trainer.world_size == 1:
        return None
    if said is not None:
        return f"its attribute {SAID} is {said!r}"
    return why_by_sampler(strategy) or _why_by_names(strategy, own) or _why_by_groups(strategy, trainer)


def why_by_sampler(strategy: Any) -> str | None:
    """Why processes are dealt other shares of batches, or None."""
    count, rank = strategy.world_size, strategy.global_rank
    try:
        asked = dict(strategy.distributed_sampler_kwargs)
    except Exception as error:  # such as that its groups are not there yet
        return f"its distributed_sampler_kwargs raise {in_words(error)}"
    found = asked.get("num_replicas", count), asked.get("rank", rank)
    if found == (count, rank):
        return None
    return f"its distributed_sampler_kwargs are {asked} in process {rank} of {count}"


def _own_classes(strategy: Any) -> list[type]:
    """The classes of a strategy below Lightning's."""
    names = [cls.__name__ for cls in type(strategy).__mro__]
    return list(type(strategy).__mro__[: names.index("DDPStrategy")])


def _why_by_names(strategy: Any, own: Iterable[type]) -> str | None:
    # Attributes of its classes, then of itself.
    names = [name for cls in own for name, value in vars(cls).items() if not _is_method(value)]
    values = {name: _value(strategy, name) for name in (*names, *vars(strategy)) if NAMED.search(name)}
    for name, value in values.items():
        if not _is_single(value):
            return f"it has {name} = {value!r:.60}"
    for cls in own:
        if "__init__" in vars(cls):
            arguments = inspect.signature(vars(cls)["__init__"]).parameters
            hidden = next((name for name in arguments if NAMED.search(name)), None)
            if hidden is not None and not values:  # kept under a name that says nothing
                return f"it takes {hidden}, and does not say which one it has"
        if "process_dataloader" in vars(cls) and not values:
            return f"{cls.__name__}.process_dataloader deals batches to processes in a way of its own"
    return None


def _why_by_groups(strategy: Any, trainer: Trainer) -> str | None:
    if not dist.is_available() or not dist.is_initialized():
        return None
    wrapped = strategy.model
    if isinstance(wrapped, DistributedDataParallel) and _size(wrapped.process_group) != trainer.world_size:
        return "its DistributedDataParallel has a process group of some of the processes"
    if any(_size(group) > 1 for group in _groups(vars(strategy))):
        return "it holds a process group beside that of all processes"
    module: nn.Module | None = trainer.lightning_module
    for name, part in () if module is None else module.named_modules():
        # The group of a SyncBatchNorm is one for statistics.
        if not isinstance(part, nn.SyncBatchNorm) and any(_size(group) > 1 for group in _groups(vars(part))):
            return f"the module holds a process group beside that of all processes{f', in {name}' if name else ''}"
    return None


def _groups(attributes: Mapping[str, Any]) -> Iterator[dist.ProcessGroup]:
    """Process groups among some attributes, and in their lists and dicts."""
    for value in attributes.values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        yield from (one for one in inside if isinstance(one, dist.ProcessGroup) and one is not dist.group.WORLD)


def _size(group: dist.ProcessGroup) -> int:
    return dist.get_world_size(group)


def _is_single(value: Any) -> bool:
    """Whether a value stands for one process to a model, or nothing."""
    if isinstance(value, dist.ProcessGroup):
        return _size(value) == 1
    if value is None or isinstance(value, bool):
        return not value
    return (isinstance(value, Integral) and value <= 1) or (hasattr(value, "__len__") and not len(value))


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, classmethod | staticmethod)


def _value(strategy: Any, name: str) -> Any:
    """The value of an attribute, or why it has none."""
    try:
        return getattr(strategy, name)
    except Exception as error:
        return in_words(error)
