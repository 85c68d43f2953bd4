"""Check that a probe fits in memory, before it takes any.

A lower bound: the copy of the parameters, the whole vectors of a product, the vectors around a solve, and the smallest
basis. What the graphs take is known once they are built; then the solver asks again (`subspace/room.py`).
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.loss.copied_bytes import copied_bytes
from lightning_subspace.parallel.fsdp import is_sharded
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.state.free_memory import free_memory
from lightning_subspace.subspace.solver import Solver


def require_room(solver: Solver, choice: CurvatureConfig, module: nn.Module, partition: Partition) -> None:
    """Refuse a probe that cannot fit, on all ranks alike. A collective.

    Args:
        solver: asks for the basis; nothing without eigenpairs.
        choice: of the matrix, and of the narrowest type.
        module: that is measured.
        partition: of its parameters.

    Raises:
        NoRoomError: with what is needed, and what is free.
    """
    if solver.k == 0 or not choice.has_products:
        return
    tensors = partition.space.tensors(module)
    widest = partition.space.widest_dtype(module)
    narrowest = getattr(torch, choice.dtype) if isinstance(choice.dtype, str) and choice.dtype != "native" else None
    computed = widest if narrowest is None else torch.promote_types(widest, narrowest)
    # Finite differences on shards (FSDP2) need no whole vector.
    is_whole = choice.curvature != "finite-difference" or not any(map(is_sharded, tensors))
    reserved = copied_bytes(module, narrowest, whole=is_whole)
    if is_whole:
        is_alone = partition.ranks.count == 1
        numbers = partition.n if is_alone else 2 * (partition.n + partition.local_n)  # see `VectorBuffers`
        reserved += numbers * computed.itemsize
    solver.place(partition, computed, tensors[0].device, reserved=reserved, free=free_memory)
