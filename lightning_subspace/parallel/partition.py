"""Partition of R^n over ranks, and transfers between whole and local vectors.

Each rank holds a few contiguous ranges of every flat vector, about n / W coordinates in all: under plain strategies and
DDP a part of ceil(n / W), the last ranks less; under FSDP2 its own shards, one range a parameter, so that the solver's
vectors lie where the parameters do (`holding.py`). Only buffers of transfers are padded. A transfer moves n numbers:
every rank sends and receives (W - 1) / W of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from lightning_subspace.linalg.normals import normals
from lightning_subspace.parallel.fsdp import compute_device, fsdp_parameters, is_sharded, sharded_parameters
from lightning_subspace.parallel.holding import Holding, first_row
from lightning_subspace.parallel.parameters import ParameterSpace, flat_values
from lightning_subspace.parallel.ranks import Ranks


@dataclass(frozen=True)
class Partition:
    """The coordinates of R^n that each rank holds.

    Attributes:
        space: names and shapes behind the coordinates.
        ranges: of flat coordinates, for every rank, ascending; together they are 0..n-1, each once.
        ranks: the process group.

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
        """A flat cut into W parts of ceil(n / W) coordinates."""
        ranks = Ranks() if ranks is None else ranks
        size = -(-space.n // ranks.count)
        cuts = [min(rank * size, space.n) for rank in range(ranks.count + 1)]
        return cls(space, tuple((range(a, b),) for a, b in pairwise(cuts)), ranks)

    @classmethod
    def of(cls, space: ParameterSpace, module: nn.Module, ranks: Ranks) -> Partition:
        """The shards of a module under FSDP2, otherwise a flat cut.

        Raises:
            ValueError: for a module that is sharded in another way (see `shards`).
        """
        ranges = shards(space, module, ranks.members)
        if ranges is not None and len(ranges) != ranks.count:
            raise ValueError(
                f"group: expected the {len(ranges)} processes that the module is sharded over, got {ranks.count}; pass "
                "their process group."
            )
        return cls.even(space, ranks) if ranges is None else cls(space, ranges, ranks)

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

    def cut(self, whole: Tensor) -> Tensor:  # (..., n) to (..., local_n), a copy
        """This rank's part of a whole vector, or of rows of them."""
        return torch.cat([whole[..., piece.start : piece.stop] for piece in self.local_ranges], dim=-1)

    def gather(self, local: Tensor) -> Tensor:  # (local_n,) to (n,)
        """The whole of a vector from all ranks' parts: one all-gather."""
        if self.ranks.count == 1:
            return local if self.is_in_order else self.assemble(local, torch.empty_like(local))
        own, gathered = local.new_zeros(self.longest), local.new_empty(self.ranks.count * self.longest)
        own[: len(local)] = local
        self.ranks.all_gather(own, gathered)
        return self.assemble(gathered, local.new_empty(self.n))

    def exchange(self, whole: Tensor) -> Tensor:  # (n,) to (W, local_n)
        """This rank's part of every rank's vector, unsummed: one all-to-all."""
        if self.ranks.count == 1:
            return self.cut(whole)[None]
        laid = self.lay_out(whole, whole.new_zeros(self.ranks.count * self.longest))
        return self.ranks.all_to_all(laid).view(self.ranks.count, self.longest)[:, : self.local_n]

    def flatten(self, tensors: Iterable[Tensor | None], like: Tensor) -> Tensor:  # (local_n,)
        """This rank's part of a flat vector, from one tensor a parameter.

        Args:
            tensors: in the order of the space, whole or sharded (DTensors); None stands for zeros.
            like: gives (real) dtype and device.

        Raises:
            ValueError: when a tensor has not the shape of its parameter.
        """
        named = dict(zip(self.space.names, zip(tensors, self.space.shapes, strict=True), strict=True))
        local = torch.zeros(self.local_n, dtype=like.dtype.to_real(), device=like.device)
        for name, offset, place in self.locate():
            tensor, shape = named[name]
            if tensor is not None:
                values = flat_values(tensor, name, shape)
                if is_sharded(tensor):  # these values begin where this rank's shard does
                    offset -= first_row(tensor) * (math.prod(shape[1:]) * (2 if tensor.is_complex() else 1))
                local[place.start : place.stop] = values[offset : offset + len(place)]
        return local

    def point(self, module: nn.Module, device: torch.device | None = None) -> Tensor:  # (local_n,)
        """This rank's part of a module's parameters, copied, in the widest type."""
        parameters = self.space.tensors(module)
        like = torch.empty(0, dtype=self.space.widest_dtype(module), device=device or compute_device(parameters[0]))
        return self.flatten(parameters, like)

    def random(  # (local_n,)
        self, seed: int, number: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """This rank's part of a standard normal vector; see `normals`."""
        return normals(seed, number, self.local_ranges, dtype, device)

    def locate(self) -> list[tuple[str, int, range]]:
        """Local coordinates by parameter: name, offset in it, local range."""
        ends = accumulate(self.space.numels, initial=0)
        return [
            (name, offset, place)
            for name, (start, stop) in zip(self.space.names, pairwise(ends), strict=True)
            for offset, place in self._overlaps(start, stop)
        ]

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[int, range]]:
        """Local coordinates in start..stop-1: offset from `start`, local range."""
        done = 0
        for piece in self.local_ranges:
            first, last = max(piece.start, start), min(piece.stop, stop)
            if first < last:
                place = done + first - piece.start
                yield first - start, range(place, place + last - first)
            done += len(piece)

    @property
    def longest(self) -> int:
        """The largest number of coordinates that a rank holds."""
        return max(sum(map(len, ranges)) for ranges in self.ranges)

    @property
    def is_in_order(self) -> bool:
        """Whether the parts of the ranks, one after another, are the vector."""
        starts = [min(rank * self.longest, self.n) for rank in range(len(self.ranges))]
        return all(len(own) == 1 and own[0].start == start for own, start in zip(self.ranges, starts, strict=True))

    def assemble(self, gathered: Tensor, out: Tensor) -> Tensor:  # (W longest,), (n,) to (n,)
        """Put padded parts in order, in `out` or as a view."""
        if self.is_in_order:
            return gathered[: self.n]
        for place, piece in self._places():
            out[piece.start : piece.stop] = gathered[place : place + len(piece)]
        return out

    def lay_out(self, whole: Tensor, out: Tensor) -> Tensor:  # (n,), (W longest,) to (W longest,)
        """Write the padded parts into `out`, whose padding must be zeros."""
        if whole.data_ptr() == out.data_ptr() and self.is_in_order:  # it lies there already
            return out
        for place, piece in self._places():
            out[place : place + len(piece)] = whole[piece.start : piece.stop]
        return out

    def _places(self) -> Iterator[tuple[int, range]]:
        """The beginning of each range among the padded parts, with the range."""
        for rank, ranges in enumerate(self.ranges):
            place = rank * self.longest
            for piece in ranges:
                yield place, piece
                place += len(piece)


class VectorBuffers:
    """Buffers for the transfers of one operator's vectors, allocated once.

    An allocation can fail on one rank alone, so none may stand between a rank and its collective where a rank cannot
    leave before the others (`Ranks.unchecked`). The buffers hold 2 n + 2 n / W numbers for a flat cut, 4 n + 2 n / W
    for several ranges a rank, n in one process.

    Args:
        partition: of the vectors over ranks.
        dtype: of the vectors.
        device: of the vectors.

    Attributes:
        total: (n,), to be filled with this rank's summand.
    """

    def __init__(self, partition: Partition, dtype: torch.dtype, device: torch.device) -> None:
        self._partition = partition
        count, longest, n = partition.ranks.count, partition.longest, partition.n
        self._is_alone = count == 1

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._laid = zeros(count * longest)  # the parts of all ranks, each padded with zeros to one length
        self.total = self._laid[:n] if partition.is_in_order else zeros(n)
        if not self._is_alone:
            self._own, self._part, self._gathered = zeros(longest), zeros(longest), zeros(count * longest)
            self._whole = self._gathered[:n] if partition.is_in_order else zeros(n)

    def gather(self, local: Tensor) -> Tensor:  # (local_n,) to (n,)
        """The whole of a vector, until the next call: one all-gather."""
        if self._is_alone:
            return self._partition.gather(local)  # the vector itself, if in order
        self._own[: len(local)] = local
        self._partition.ranks.all_gather(self._own, self._gathered)
        return self._partition.assemble(self._gathered, self._whole)

    def sum_scatter(self) -> Tensor:  # (local_n,)
        """This rank's part of the summed `total`s: one reduce-scatter."""
        partition = self._partition
        if self._is_alone:
            return partition.cut(self.total)
        partition.lay_out(self.total, self._laid)
        partition.ranks.reduce_scatter(self._laid, self._part)
        return self._part[: partition.local_n].clone()


def shards(
    space: ParameterSpace, module: nn.Module, members: Sequence[int] | None = None
) -> tuple[tuple[range, ...], ...] | None:
    """The ranges of flat coordinates on every rank, one a parameter.

    A range may be empty. What several ranks hold is cut among them: the shards of HSDP, and parameters that are not
    sharded in a module where others are.

    Args:
        space: whose coordinates they are.
        module: with the parameters.
        members: the ranks that measure together, as numbers among all processes; by default those of the mesh.

    Returns:
        None when no parameter of the module is sharded.

    Raises:
        ValueError: when a parameter is sharded otherwise than by rows (see `Holding`), or by tensor parallelism.
    """
    holdings = holdings_of(space, module, members)
    if holdings is None:
        return None
    starts = [0, *accumulate(space.numels)]
    return tuple(
        tuple(_moved(holding.dealt(rank), start) for holding, start in zip(holdings, starts, strict=False))
        for rank in range(len(holdings[0].shard_of))
    )


def holdings_of(space: ParameterSpace, module: nn.Module, members: Sequence[int] | None = None) -> list[Holding] | None:
    """Where the coordinates of each parameter are; otherwise as `shards`."""
    sharded = sharded_parameters(module)
    if not sharded:
        return None
    own = set(map(id, fsdp_parameters(module)))
    for name in space.names:
        if name in sharded and id(sharded[name]) not in own:
            raise ValueError(
                f"{name!r}: expected a parameter that fully_shard has sharded, got a DTensor of another origin, such "
                "as tensor parallelism, through which second derivatives are wrong in torch; use fully_shard alone."
            )
    if members is None:
        members = sorted(next(iter(sharded.values())).device_mesh.mesh.flatten().tolist())
    tensors = zip(space.names, space.tensors(module), space.numels, strict=True)
    return [Holding.of(name, tensor, numel, members) for name, tensor, numel in tensors]


def _moved(piece: range, by: int) -> range:
    return range(piece.start + by, piece.stop + by)
