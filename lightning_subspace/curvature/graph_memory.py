"""Memory of retained graphs: what is free, and what a graph takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_subspace._torch import base_of, storages_of
from lightning_subspace.state.free_memory import free_memory

FREE_SHARE = 0.5  # of the free memory, that retained graphs may take


def memory_budget(device: torch.device, num_ranks: int) -> float:
    """Bytes that this rank may retain: half of what is free now.

    On a CPU ranks share the memory as if all were on one host.
    """
    return FREE_SHARE * free_memory(device) / (1 if device.type == "cuda" else num_ranks)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context that counts the bytes kept by a graph built inside.

    Each storage counts once, by autograd's hooks on saved tensors. Parameters are left out, and views of them (the
    transposed weight of a linear layer): the graphs of all micro-batches share them.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._storages: dict[int, int] = {}  # bytes by address; what takes the place of something freed counts alone
        self._parameters: set[int] = set()

    def count(self, held: Iterable[Tensor], leaves: Iterable[Tensor]) -> int:
        """Bytes of what autograd has saved and of the tensors `held` beside."""
        for tensor in held:
            self._add(tensor)
        shared = self._parameters.union(leaf.untyped_storage().data_ptr() for leaf in leaves)
        return sum(size for address, size in self._storages.items() if address not in shared)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = base_of(tensor)
        if isinstance(base, torch.nn.Parameter):
            self._parameters.add(base.untyped_storage().data_ptr())
        else:
            self._add(tensor)
        return tensor.detach()  # autograd attaches the graph again; returning the tensor itself would be a cycle

    def _add(self, tensor: Tensor) -> None:
        for piece in storages_of(tensor):
            storage = piece.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
