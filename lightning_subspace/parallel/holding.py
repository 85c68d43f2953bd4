"""Coordinates of a parameter that ranks hold and are dealt.

FSDP2 cuts a parameter by rows over one dimension of a mesh and may repeat it over another: HSDP, `replicate`. One that
is not sharded is repeated on every rank. What several ranks hold is cut once more among them, so that each coordinate
is dealt to one rank, and vectors take n / W of memory whatever the mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_subspace.parallel.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Holding:
    """Where the coordinates of a parameter are.

    Attributes:
        numel: number of its (real) coordinates.
        step: coordinates a row; rows are what is cut into shards.
        num_shards: pieces of ceil(rows / num_shards) rows; the last ones hold less, or nothing.
        shard_of: the number of the shard that each rank holds.

    Example:
        >>> holding = Holding(numel=6, step=2, num_shards=2, shard_of=(0, 1, 0, 1))
        >>> [holding.held(rank) for rank in range(4)]
        [range(0, 4), range(4, 6), range(0, 4), range(4, 6)]
        >>> [holding.dealt(rank) for rank in range(4)]
        [range(0, 2), range(4, 5), range(2, 4), range(5, 6)]
    """

    numel: int
    step: int
    num_shards: int
    shard_of: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor, numel: int, members: Sequence[int]) -> Holding:
        """Of a parameter, on the ranks of a group.

        Args:
            name: of the parameter, for messages.
            tensor: the parameter, whole or a DTensor.
            numel: number of its real coordinates.
            members: the ranks, as numbers among all processes, ascending.

        Raises:
            ValueError: when it is cut otherwise than by rows, or over other ranks.
        """
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is None:
            return cls(numel, 1, 1, (0,) * len(members))
        if (reason := why_not_by_rows(tensor)) is not None:  # type: ignore[arg-type]
            raise ValueError(f"{name!r}: {reason}")
        ranks = mesh.mesh.tolist()
        if sorted(_flat(ranks)) != list(members):
            raise ValueError(
                f"{name!r}: expected a mesh over the ranks that measure together, {_some(members)}, got one over "
                f"{_some(sorted(_flat(ranks)))}; shard all parameters over the processes that share the data, and pass "
                "their group."
            )
        dim = shard_dim(tensor)  # type: ignore[arg-type]
        if dim is None:
            return cls(numel, 1, 1, (0,) * len(members))
        shard_of = {rank: place[dim] for place, rank in _placed(ranks)}
        step = numel // max(tensor.shape[0], 1)
        return cls(numel, step, mesh.size(dim), tuple(shard_of[rank] for rank in members))

    def held(self, rank: int) -> range:
        """The flat coordinates that a rank holds."""
        rows = self.numel // self.step if self.step else 0
        size = -(-rows // self.num_shards)
        first, last = (
            min(number * size, rows) * self.step for number in (self.shard_of[rank], self.shard_of[rank] + 1)
        )
        return range(first, last)

    def dealt(self, rank: int) -> range:
        """Those of the flat coordinates that are dealt to a rank."""
        peers, held = self.peers(rank), self.held(rank)
        size = -(-len(held) // len(peers))
        return held[peers.index(rank) * size : (peers.index(rank) + 1) * size]

    def peers(self, rank: int) -> list[int]:
        """The ranks that hold the same as a rank, itself among them."""
        return [other for other, shard in enumerate(self.shard_of) if shard == self.shard_of[rank]]


def shard_dim(parameter: DTensor) -> int | None:
    """The mesh dimension that a parameter is cut over, or None."""
    return next((dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()), None)


def first_row(parameter: DTensor) -> int:
    """The first row of this rank's shard."""
    dim = shard_dim(parameter)
    if dim is None:
        return 0
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    return min(mesh.get_local_rank(dim) * -(-rows // mesh.size(dim)), rows)


def own_index(parameter: DTensor) -> int:
    """The index of this rank among those of a mesh, ascending."""
    mesh = parameter.device_mesh
    return sorted(_flat(mesh.mesh.tolist())).index(mesh.get_rank())


def shard_ranks(parameter: DTensor, ranks: Ranks | None) -> Ranks | None:
    """The process group of a parameter's shards; None if not cut."""
    dim = shard_dim(parameter)
    return None if dim is None else _along(parameter, dim, ranks)


def replica_ranks(tensor: Tensor, ranks: Ranks) -> Ranks | None:
    """The process group that holds the same part, or None."""
    parameter: Any = tensor
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return ranks if ranks.count > 1 else None
    repeated = (dim for dim, place in enumerate(parameter.placements) if place.is_replicate() and mesh.size(dim) > 1)
    dim = next(repeated, None)
    return None if dim is None else _along(parameter, dim, ranks)


def why_not_by_rows(parameter: DTensor) -> str | None:
    """Why a parameter is not cut by rows, or None."""
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [placement for placement in placements if not placement.is_replicate()]
    repeated = [dim for dim, place in enumerate(placements) if place.is_replicate() and mesh.size(dim) > 1]
    if all(type(place).__name__ == "Shard" and place.is_shard(0) for place in cut) and len(cut) < 2 > len(repeated):
        if _ascends(mesh):
            return None
        return f"expected ranks that ascend along a mesh, got {mesh.mesh.tolist()}; leave their order as it is."
    return (
        "expected shards by rows, as fully_shard makes them by default, over a mesh of one dimension, or of two with "
        f"replicas over the other (HSDP), got {tuple(placements)} on a mesh of shape {tuple(mesh.shape)}; tensor "
        "parallelism and shards along other dimensions are not measured."
    )


@lru_cache(maxsize=8)  # asked for each parameter at each evaluation
def _ascends(mesh: DeviceMesh) -> bool:
    """Whether ranks ascend along a mesh, as in a process group."""
    return all(bool((mesh.mesh.diff(dim=dim) > 0).all()) for dim in range(mesh.ndim))


def _along(parameter: DTensor, dim: int, ranks: Ranks | None) -> Ranks:
    mesh = parameter.device_mesh
    if ranks is not None and ranks.count == mesh.size(dim):
        return ranks
    group = mesh.get_group(dim)
    return Ranks(group, mesh.device_type) if ranks is None or ranks.count == 1 else ranks.part(group)


def _placed(ranks: Any, place: tuple[int, ...] = ()) -> Iterable[tuple[tuple[int, ...], int]]:
    """The place in a mesh of each rank."""
    if isinstance(ranks, int):
        return [(place, ranks)]
    return chain.from_iterable(_placed(inner, (*place, number)) for number, inner in enumerate(ranks))


def _flat(ranks: Any) -> list[int]:
    return [rank for _, rank in _placed(ranks)]


def _some(ranks: Sequence[int]) -> str:
    """Ranks in words, not all of a thousand."""
    return f"{list(ranks)}" if len(ranks) <= 8 else f"{ranks[0]} to {ranks[-1]} ({len(ranks)} of them)"
