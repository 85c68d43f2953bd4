"""Whole copies of sharded parameters, and room for them.

FSDP2's shards have no second derivatives, so on every rank the whole replaces them for exact products
(`parallel/fsdp.py`). What does not fit is refused with its numbers before anything is gathered: a rank that runs out of
memory later has taken that of training, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_subspace.loss.copied_bytes import bytes_of_copy
from lightning_subspace.parallel.fsdp import compute_device, replacements, sharded_parameters
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.free_memory import free_memory
from lightning_subspace.subspace.room import GIB


def whole_copies(module: nn.Module, ranks: Ranks, narrowest: torch.dtype | None) -> dict[int, Tensor]:
    """The `replacements` for an exact loss, if they fit. A collective."""
    require_room(module, narrowest)
    return replacements(module, ranks, narrowest=narrowest)


def require_room(module: nn.Module, narrowest: torch.dtype | None) -> None:
    """Refuse copies that this rank has no memory for.

    Args:
        module: any; nothing is needed where nothing is sharded.
        narrowest: floating-point type of the copies, unless the parameter is wider; None keeps all types.

    Raises:
        ValueError: with the number of parameters, and the memory that is needed and free. Within `Ranks.agree`, the
            others learn of it at their next collective.

    Example:
        >>> require_room(nn.Linear(2, 2), torch.float32)
    """
    sharded = list(sharded_parameters(module).values())
    if not sharded:
        return
    sizes = [bytes_of_copy(p, narrowest) for p in sharded]
    # One more while it is gathered and widened.
    device, needed = compute_device(sharded[0]), sum(sizes) + max(sizes)
    if (there := free_memory(device)) < needed:
        raise ValueError(
            f"curvature: expected room on each rank for the whole of n = {sum(p.numel() for p in sharded):,} sharded "
            f"parameters, {needed / GIB:.3g} GiB, got {there / GIB:.3g} GiB free on {device}; use "
            "curvature='finite-difference', which works on the shards of a smooth network, or 'none'."
        )
