"""How the coordinates of R^n are dealt to ranks, and how vectors go from whole to dealt and back.

Each rank holds a few contiguous ranges of every flat vector, about n / W coordinates in all. Plain and DDP: W parts of
n / W, rounded up, in order; the last ranks may hold less, or nothing. Under FSDP2: the rank's own shards, one
range a parameter, so that a vector of the solver lies where the parameters do. Nothing is padded but the buffers of a
transfer, so no sum over coordinates ever meets a coordinate that does not exist.

One transfer moves n numbers: every rank sends and receives (W - 1) / W of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace.parallel.fsdp import is_dim0_sharded, is_sharded, local_part, sharded_parameters
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks

# Random numbers are drawn in blocks of this length, of which a rank keeps what is its own.
BLOCK = 1 << 20
SEED_STRIDE = 1_000_003  # keeps the vectors of neighbouring seeds apart


@dataclass(frozen=True)
class Partition:
    """Which coordinates this rank holds of R^n, and which the others.

    Attributes:
        space: names and shapes behind the coordinates.
        ranges: for every rank its ranges of flat coordinates, ascending; together they are 0..n, each once.
        ranks: the processes.

    Example:
        >>> partition = Partition.even(ParameterSpace.of(torch.nn.Linear(3, 2)))
        >>> partition.n, partition.local_n, partition.gather(torch.arange(8.0))[5]
        (8, 8, tensor(5.))
    """

    space: ParameterSpace
    ranges: tuple[tuple[range, ...], ...]
    ranks: Ranks = field(default_factory=Ranks, compare=False)

    @classmethod
    def even(cls, space: ParameterSpace, ranks: Ranks | None = None) -> Partition:
        """A flat cut into parts of ceil(n / W) coordinates."""
        ranks = Ranks() if ranks is None else ranks
        size = -(-space.n // ranks.count)
        cuts = [min(rank * size, space.n) for rank in range(ranks.count + 1)]
        return cls(space, tuple((range(a, b),) for a, b in pairwise(cuts)), ranks)

    @classmethod
    def of(cls, space: ParameterSpace, module: nn.Module, ranks: Ranks) -> Partition:
        """The shards of a module that FSDP2 has sharded over these ranks; of any other a flat cut.

        Raises:
            ValueError: for a module that is sharded in another way, see `shards`.
        """
        held = shards(space, module)
        return cls.even(space, ranks) if held is None else cls(space, held, ranks)

    @property
    def n(self) -> int:
        """Dimension of the whole space."""
        return self.space.n

    @property
    def local_ranges(self) -> tuple[range, ...]:
        """This rank's ranges."""
        return self.ranges[self.ranks.index]

    @property
    def local_n(self) -> int:
        """Number of coordinates that this rank holds."""
        return sum(map(len, self.local_ranges))

    def cut(
        self,
        whole: Tensor,  # (..., n)
    ) -> Tensor:  # (..., local_n), a copy
        """This rank's part of what every rank has."""
        return torch.cat([whole[..., piece.start : piece.stop] for piece in self.local_ranges], dim=-1)

    def gather(
        self,
        local: Tensor,  # (local_n,)
    ) -> Tensor:  # (n,)
        """The whole of a vector that is dealt to ranks: one all-gather."""
        if self.ranks.count == 1:
            return local if self.is_in_order else self.assemble(local, torch.empty_like(local))
        own, gathered = local.new_zeros(self.longest), local.new_empty(self.ranks.count * self.longest)
        own[: len(local)] = local
        self.ranks.all_gather(own, gathered)
        return self.assemble(gathered, local.new_empty(self.n))

    def sum_scatter(
        self,
        whole: Tensor,  # (n,)
    ) -> Tensor:  # (local_n,)
        """This rank's part of the sum of one vector a rank: one reduce-scatter."""
        if self.ranks.count == 1:
            return self.cut(whole)
        laid = self.lay_out(whole, whole.new_zeros(self.ranks.count * self.longest))
        part = whole.new_empty(self.longest)
        self.ranks.reduce_scatter(laid, part)
        return part[: self.local_n]

    def exchange(
        self,
        whole: Tensor,  # (n,)
    ) -> Tensor:  # (W, local_n)
        """This rank's part of one vector of every rank, unsummed: one all-to-all."""
        if self.ranks.count == 1:
            return self.cut(whole)[None]
        laid = self.lay_out(whole, whole.new_zeros(self.ranks.count * self.longest))
        return self.ranks.all_to_all(laid).view(self.ranks.count, self.longest)[:, : self.local_n]

    def flatten(
        self,
        tensors: Iterable[Tensor | None],
        like: Tensor,
    ) -> Tensor:  # (local_n,)
        """This rank's part of what `ParameterSpace.flatten` gives, of parameters or gradients that training holds.

        Args:
            tensors: one a parameter, in the order of the space: whole ones, or this rank's shards of them (DTensors).
            like: gives dtype and device.

        Raises:
            ValueError: when a tensor has not the shape of its parameter.
        """
        shapes = dict(zip(self.space.names, self.space.shapes, strict=True))
        named = dict(zip(self.space.names, tensors, strict=True))
        local = torch.zeros(self.local_n, dtype=like.dtype.to_real(), device=like.device)
        for name, offset, place in self.locate():
            tensor = named[name]
            if tensor is None:
                continue
            if tensor.shape != shapes[name]:
                raise ValueError(f"{name!r}: expected shape {tuple(shapes[name])}, got {tuple(tensor.shape)}.")
            values = local_part(tensor.detach()).to_dense()
            if values.is_complex():
                values = torch.view_as_real(values.resolve_conj())
            values = values.reshape(-1)
            local[place.start : place.stop] = values if is_sharded(tensor) else values[offset : offset + len(place)]
        return local

    def random(self, seed: int, number: int, dtype: torch.dtype = torch.float32) -> Tensor:  # (local_n,)
        """This rank's part of a standard normal vector on the CPU, the same one for any number of ranks."""
        generator = torch.Generator().manual_seed((seed * SEED_STRIDE + number) % 2**63)
        local = torch.empty(self.local_n, dtype=dtype)
        for start in range(0, self.n, BLOCK):
            block = torch.randn(min(BLOCK, self.n - start), generator=generator, dtype=dtype)
            done = 0
            for piece in self.local_ranges:
                first, last = max(piece.start, start), min(piece.stop, start + len(block))
                if first < last:
                    place = done + first - piece.start
                    local[place : place + last - first] = block[first - start : last - start]
                done += len(piece)
        return local

    def locate(self) -> list[tuple[str, int, range]]:
        """This rank's coordinates by parameter: name, offset in the parameter, and the range among the local ones."""
        found = []
        done = 0
        ends = list(accumulate(self.space.numels, initial=0))
        for piece in self.local_ranges:
            for name, (start, stop) in zip(self.space.names, pairwise(ends), strict=True):
                first, last = max(piece.start, start), min(piece.stop, stop)
                if first < last:
                    place = done + first - piece.start
                    found.append((name, first - start, range(place, place + last - first)))
            done += len(piece)
        return found

    @property
    def longest(self) -> int:
        """The largest number of coordinates that a rank holds."""
        return max(sum(map(len, ranges)) for ranges in self.ranges)

    @property
    def is_in_order(self) -> bool:
        """Whether the parts of the ranks, one after another and without their padding, are the vector."""
        starts = [min(rank * self.longest, self.n) for rank in range(len(self.ranges))]
        return all(len(own) == 1 and own[0].start == start for own, start in zip(self.ranges, starts, strict=True))

    def assemble(
        self,
        gathered: Tensor,  # (W longest,)
        out: Tensor,  # (n,)
    ) -> Tensor:
        """Put the ranks' parts, padded to one length, into the order of the coordinates; `out`, or a view in order."""
        if self.is_in_order:
            return gathered[: self.n]
        for place, piece in self._places():
            out[piece.start : piece.stop] = gathered[place : place + len(piece)]
        return out

    def lay_out(
        self,
        whole: Tensor,  # (n,)
        out: Tensor,  # (W longest,), zeros where there is padding
    ) -> Tensor:
        """The reverse: the parts one after another. Nothing to do where `whole` lies in `out` and is in order."""
        if whole.data_ptr() == out.data_ptr() and self.is_in_order:
            return out
        for place, piece in self._places():
            out[place : place + len(piece)] = whole[piece.start : piece.stop]
        return out

    def _places(self) -> Iterator[tuple[int, range]]:
        """Where each range begins when the parts of the ranks, padded to one length, follow one another."""
        for rank, ranges in enumerate(self.ranges):
            place = rank * self.longest
            for piece in ranges:
                yield place, piece
                place += len(piece)


def shards(space: ParameterSpace, module: nn.Module) -> tuple[tuple[range, ...], ...] | None:
    """For every rank of the mesh, the ranges of flat coordinates that it holds, one a parameter in the space's order.

    A range may be empty. A parameter that is not sharded, in a module where others are, is cut evenly.

    Returns:
        None where no parameter of the space is sharded.

    Raises:
        ValueError: when a parameter is sharded other than along dimension 0 over one mesh of one dimension.
    """
    sharded = sharded_parameters(module)
    mesh = _mesh(space, sharded)
    if mesh is None:
        return None
    held: list[list[range]] = [[] for _ in range(mesh.size())]
    start = 0
    for name, shape, numel in zip(space.names, space.shapes, space.numels, strict=True):
        rows = shape[0] if name in sharded else numel
        size = -(-rows // mesh.size())  # the first ranks hold the larger parts, the last one perhaps nothing
        for rank, ranges in enumerate(held):
            first, last = (min(k * size, rows) * (numel // max(rows, 1)) for k in (rank, rank + 1))
            ranges.append(range(start + first, start + last))
        start += numel
    return tuple(tuple(ranges) for ranges in held)


def _mesh(space: ParameterSpace, sharded: dict[str, Any]) -> Any:
    """The one mesh of all sharded parameters of the space, or None."""
    found = None
    for name in space.names:
        if name not in sharded:
            continue
        parameter = sharded[name]
        if not is_dim0_sharded(parameter):
            raise ValueError(
                f"{name!r} is placed as {tuple(parameter.placements)} on a mesh of shape "
                f"{tuple(parameter.device_mesh.shape)}; expected (Shard(0),) on a mesh of one dimension, as "
                "fully_shard does by default: tensor parallelism, replicated groups (HSDP) and other dimensions are "
                "not measured."
            )
        if found is not None and found != parameter.device_mesh:
            raise ValueError(
                f"{name!r} is sharded over another mesh than the parameters before it; expected one mesh for all."
            )
        found = parameter.device_mesh
    return found
