"""Memory of retained graphs: what is free, and what they take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace._torch import base_of, storages_of
from lightning_subspace.state.free_memory import free_memory
from lightning_subspace.subspace.room import Place

FREE_SHARE = 0.5  # of the free memory, that retained graphs may take


def memory_budget(device: torch.device, num_ranks: int) -> float:
    """Bytes that this rank may retain: half of what is free now.

    On a CPU ranks share the memory as if all were on one host.
    """
    return FREE_SHARE * free_memory(device) / (1 if device.type == "cuda" else num_ranks)


@dataclass
class Footprint:
    """Bytes that an operator holds, and how many graphs it may.

    Of this rank. One for all probes of a run: where memory runs out, fewer graphs are kept from then on.

    Attributes:
        most: micro-batches of which a rank may keep the graph (or, for the empirical Fisher, the gradients).
        kept: of how many it does.
        rounds: of how many it could.
        graphs: bytes of what is kept.
        largest: bytes of the largest graph, kept or not: what rebuilding one takes.
        copies: bytes of the copies of the module's state.
        joined: bytes of the data of joined micro-batches, which are copies.
        itemsize: bytes of a number in the vectors of the operator.
        notice: what a user should know about it; None where memory has not run out.
        basis: of the solver; None before a solve.

    Example:
        >>> footprint = Footprint()
        >>> footprint.see(kept=[800, 900], left=[1000])
        >>> footprint.graphs, footprint.largest, footprint.kept, footprint.rounds
        (1700, 1000, 2, 3)
        >>> footprint.lower(footprint.kept), footprint.most
        (True, 1)
        >>> footprint.lower(1), footprint.lower(0), footprint.most
        (True, False, 0)
    """

    most: float = math.inf
    kept: int = 0
    rounds: int = 0
    graphs: int = 0
    largest: int = 0
    copies: int = 0
    joined: int = 0
    itemsize: int = 4
    notice: str | None = None
    basis: Place | None = None

    @property
    def of_product(self) -> int:
        """Bytes that a product takes for a while.

        As much as its graph, beside a graph that is rebuilt for it.
        """
        return self.largest * (1 + (self.kept < self.rounds))

    def free_memory(self, device: torch.device) -> float:
        """Bytes that are free on a device now."""
        return free_memory(device)

    def see_basis(self, place: Place) -> None:
        """Take down where the basis of the first solve lies."""
        self.basis = place if self.basis is None else self.basis

    def begin(self) -> None:
        """Another operator is made."""
        self.kept = self.rounds = self.graphs = self.largest = self.joined = 0
        self.basis = None

    def forget(self) -> None:
        """Other graphs are to be kept: begin without a bound."""
        self.most, self.notice = math.inf, None

    def see(self, kept: Sequence[int], left: Sequence[int] = ()) -> None:
        """Take down the bytes of graphs, kept or to be rebuilt."""
        self.kept, self.rounds = len(kept), len(kept) + len(left)
        self.graphs, self.largest = sum(kept), max((*kept, *left), default=0)

    def lower(self, kept: int) -> bool:
        """Memory has run out: keep half as many from now on.

        Args:
            kept: the largest number that was kept, over all ranks; so `most` is equal on all.

        Returns:
            Whether any were kept, so that it may be tried again.
        """
        if kept == 0:
            return False
        self.most = kept // 2
        self.notice = (
            f"memory ran out while the graphs of {kept} micro-batches were kept on a rank; at most {self.most} are "
            "kept from now on, and the others are rebuilt for every product: the same numbers, more slowly."
        )
        return True


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context that counts the bytes kept by a graph built inside.

    Each storage counts once, by autograd's hooks on saved tensors. Parameters are left out, and views of them (the
    transposed weight of a linear layer): the graphs of all micro-batches share them.

    Attributes:
        narrow: a type narrower than float32 that something saved has; None: nothing has.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._storages: dict[int, int] = {}  # bytes by address; what takes the place of something freed counts alone
        self._parameters: set[int] = set()
        self.narrow: torch.dtype | None = None

    def count(self, held: Iterable[Tensor], leaves: Iterable[Tensor]) -> int:
        """Bytes of what autograd has saved and of the tensors `held` beside."""
        for tensor in held:
            self._add(tensor)
        shared = self._parameters.union(leaf.untyped_storage().data_ptr() for leaf in leaves)
        return sum(size for address, size in self._storages.items() if address not in shared)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize:
            self.narrow = tensor.dtype
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
