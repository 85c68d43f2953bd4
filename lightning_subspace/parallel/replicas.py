"""Parts of a vector that several ranks hold alike.

Under HSDP, and for parameters that are not sharded, a rank holds more coordinates than are dealt to it (`holding.py`).
A displacement has to reach all that it holds: an all-gather among the ranks that hold the same, n / S numbers for S
shards. Nothing is sent where each holds its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_subspace.parallel.holding import Holding, replica_ranks
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks


class Replicas:
    """What this rank holds of a module's parameters, alone or with others.

    Args:
        space: of the parameters.
        tensors: the parameters, in order.
        holdings: where their coordinates are.
        ranks: that measure together.
        index: of this rank among those of the holdings.

    Attributes:
        dealt: what is dealt to this rank of its part of each parameter.
    """

    def __init__(
        self, space: ParameterSpace, tensors: Sequence[Tensor], holdings: Sequence[Holding], ranks: Ranks, index: int
    ) -> None:
        self.dealt = [
            slice(own.start - held.start, own.stop - held.start)
            for own, held in ((holding.dealt(index), holding.held(index)) for holding in holdings)
        ]
        # Parameters that the same ranks share are gathered together.
        groups: dict[tuple[int, ...], tuple[Ranks, list[int]]] = {}
        for place, (tensor, holding) in enumerate(zip(tensors, holdings, strict=True)):
            peers = tuple(holding.peers(index))
            if len(peers) > 1:
                sharing = replica_ranks(tensor, ranks) if peers not in groups else groups[peers][0]
                groups.setdefault(peers, (sharing, []))[1].append(place)  # type: ignore[arg-type]
        self._shared = [
            (_partition(space, holdings, places, peers, sharing), places) for peers, (sharing, places) in groups.items()
        ]

    def held(self, local: Tensor) -> list[Tensor]:  # (local n,)
        """What this rank holds of a vector, by parameter. A collective."""
        pieces = list(torch.split(local, [piece.stop - piece.start for piece in self.dealt]))
        for partition, places in self._shared:
            whole = partition.gather(torch.cat([pieces[place] for place in places]))
            for place, piece in zip(places, torch.split(whole, list(partition.space.numels)), strict=True):
                pieces[place] = piece
        return pieces


def _partition(
    space: ParameterSpace, holdings: Sequence[Holding], places: Sequence[int], peers: Sequence[int], sharing: Ranks
) -> Partition:
    """The partition of what some ranks share, parameter after parameter."""
    start, names, shapes = 0, [], []
    ranges: list[list[range]] = [[] for _ in peers]
    for holding, place in ((holdings[place], place) for place in places):
        held = holding.held(peers[0])
        for own, rank in zip(ranges, peers, strict=True):
            piece = holding.dealt(rank)
            own.append(range(start + piece.start - held.start, start + piece.stop - held.start))
        names.append(space.names[place])
        shapes.append(torch.Size([len(held)]))
        start += len(held)
    return Partition(ParameterSpace(tuple(names), tuple(shapes)), tuple(map(tuple, ranges)), sharing)
