"""Sums of bits, equal for equal tensors on whatever device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_subspace.parallel.fsdp import is_sharded, local_part
from lightning_subspace.parallel.ranks import Ranks

# Integers of the width of a float: their sum over a tensor does not depend on its order, so is the same on all devices.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the bits of this rank's part of a tensor.

    On its device.

    Example:
        >>> int(bit_sum(torch.ones(2))) == int(bit_sum(torch.ones(2))), int(bit_sum(torch.zeros(3)))
        (True, 0)
    """
    return as_integers(local_part(tensor.detach()).to_dense()).sum(dtype=torch.int64)


def as_integers(tensor: Tensor) -> Tensor:
    """Bits of a dense tensor, as integers as wide as its numbers.

    Example:
        >>> as_integers(torch.tensor([0.0, -0.0])).tolist()
        [0, -2147483648]
    """
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.resolve_neg().view(INTEGERS[real.element_size()])


def require_equal(named: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Refuse parameters that differ between ranks. A collective.

    Those that are sharded are left out.

    Raises:
        ValueError: on all ranks, naming the first.
    """
    if ranks.count == 1:
        return
    whole = {name: tensor for name, tensor in named.items() if not is_sharded(tensor)}
    sums = _on_host(map(bit_sum, whole.values()))
    others = ranks.all_gather_object(sums)
    differing = next((name for name, *own in zip(whole, *others, strict=True) if len(set(own)) > 1), None)
    if differing is not None:
        raise ValueError(
            f"the parameter {differing!r} has other values on other ranks, so that there is no loss of one model; "
            "expected the same on all, as DDP keeps them (not while models are averaged every few steps)."
        )


def _on_host(sums: Iterable[Tensor]) -> list[int]:
    """One wait for the device, if all are on one."""
    found = list(sums)
    places = {tensor.device for tensor in found}
    return torch.stack(found).tolist() if len(places) == 1 else [int(tensor) for tensor in found]
