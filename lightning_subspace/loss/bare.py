"""Modules inside of the wrappers of Fabric, DDP and torch.compile.

A wrapper is in the way of a measurement: it casts the inputs, runs under autocast, refuses a backward pass that is not
its own, and puts a prefix before every name. Its parameters are those of the module inside.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from lightning_subspace._lightning import is_a
from lightning_subspace._torch import uncompiled


def bare_module(module: nn.Module, dtype: str = "float32") -> nn.Module:
    """The module inside of all wrappers, or the module itself.

    Args:
        module: perhaps from `fabric.setup`, `torch.compile` or `DistributedDataParallel`.
        dtype: that is computed in.

    Raises:
        ValueError: for FSDP1, and for dtype="native" with a module from Fabric, whose types and autocast are its own.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> bare_module(nn.DataParallel(module)) is bare_module(module) is module
        True
    """
    if any(is_a(m, "FullyShardedDataParallel") for m in module.modules()):
        raise ValueError(
            "module: expected one that can be differentiated twice, got one in FullyShardedDataParallel (FSDP1); "
            "shard it by fully_shard (FSDP2), or wrap it in DistributedDataParallel."
        )
    if dtype == "native" and is_a(module, "_FabricModule"):
        raise ValueError(
            "dtype: expected 'float32' or 'float64' for a module from fabric.setup, got 'native'; pass the bare "
            "module, `module.module`, with a loss_fn that enters torch.autocast as training does."
        )
    inside: Any = module
    while True:
        original = uncompiled(inside)
        if original is not None:
            inside = original
        elif isinstance(inside, DataParallel | DistributedDataParallel) or is_a(inside, "_FabricModule"):
            inside = inside.module
        else:
            return inside  # type: ignore[no-any-return]


def bare_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer inside of Fabric's wrapper or Lightning's, whose rule is known."""
    if not (is_a(optimizer, "_FabricOptimizer") or is_a(optimizer, "LightningOptimizer")):
        return optimizer
    inside: Optimizer = getattr(optimizer, "optimizer")  # noqa: B009  # torch declares no such attribute
    return inside
