"""Room for the solver's basis, on the device or in host memory.

Decided before any of it is taken, from what is free on every rank, so that all ranks decide alike: as many vectors as
are wanted on the device; fewer there, at least `least_size`; as many as fit in host memory; or a refusal with the
numbers. Fewer vectors cost products (at k + 5, none to 30 % more than at 2 k + 10), host memory costs transfers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from platform import node
from typing import Literal

import torch

from lightning_subspace.linalg import tiles
from lightning_subspace.linalg.tiles import BasisPlace
from lightning_subspace.parallel.ranks import Ranks

BasisChoice = Literal["auto", "device", "cpu"]

VECTORS = 8  # of length n that are held for a while around a solve, beside the basis and k eigenvectors
MORE_WANTED, MORE_NEEDED = 10, 5  # vectors beyond 2 k and beyond k
# Of what is free: on a device some is lost between blocks; a host has the workers of loaders, and the cache of files.
DEVICE_SHARE, HOST_SHARE = 0.9, 0.5
GIB = 1 << 30
WAY_OUT = (
    "take fewer parameters by params= (adapters, the head), a smaller k, more ranks, or curvature='none', which needs "
    "no basis"
)


class NoRoomError(MemoryError):
    """A basis that would not fit in memory."""


@dataclass(frozen=True)
class Place:
    """What was decided.

    Attributes:
        size: vectors of the basis, ncv.
        wanted: as many as were asked for.
        basis: where they lie.
    """

    size: int
    wanted: int
    basis: BasisPlace

    @property
    def rows(self) -> int:
        """Vectors that are held: the basis and the pending one."""
        return self.size + 1


@dataclass(frozen=True)
class Room:
    """What a rank needs, and what is free for it.

    Args:
        local_n: numbers of a vector on this rank.
        itemsize: bytes of one.
        reserved: bytes on the device that something else will take, beside `VECTORS` and the eigenvectors.
        device: of the vectors.
        ranks: the processes that measure together.
        free: bytes that are free on a device.
    """

    local_n: int
    itemsize: int
    reserved: int
    device: torch.device
    ranks: Ranks
    free: Callable[[torch.device], float]

    def place(self, k: int, ncv: int | None, dimension: int, choice: BasisChoice = "auto") -> Place:
        """Where the basis of k eigenpairs lies. A collective.

        Args:
            k: number of eigenpairs.
            ncv: the size to be taken, whatever it costs; None: what fits, at most 2 k + 10.
            dimension: of the whole space.
            choice: "auto" decides; "device" and "cpu" leave no other place.

        Raises:
            NoRoomError: on all ranks, where a basis of the least size does not fit on one.
        """
        wanted = wanted_size(k, ncv, dimension)
        least = least_size(k, ncv, dimension)
        needs = [_Need(*row) for row in self._of_all_ranks(k)]
        there, here = (min(need.most(place) for need in needs) for place in ("cpu", "device"))
        is_one = self.device.type == "cpu"  # both places are the same, and what lies there needs no copies
        if (choice != "cpu" or is_one) and here >= least:
            return Place(min(wanted, int(here)), wanted, "device")
        if choice != "device" and not is_one and there >= least:
            return Place(min(wanted, int(there)), wanted, "cpu")
        raise NoRoomError(_refusal(max(needs, key=lambda need: need.missing(least)), least, self.ranks.count, is_one))

    def _of_all_ranks(self, k: int) -> list[list[float]]:
        """What each rank has and needs, by rank: one sum."""
        own = torch.zeros(self.ranks.count, 7, dtype=torch.float64)
        host = float(zlib.crc32(node().encode()))
        vector = self.local_n * self.itemsize
        beside = self.reserved + (k + VECTORS) * vector
        stage = 2 * min(self.local_n, tiles.WIDTH) * self.itemsize
        cpu = torch.device("cpu")
        own[self.ranks.index] = torch.tensor(
            [vector, beside, stage, self.free(self.device), self.free(cpu), host, self.device.type == "cpu"],
            dtype=torch.float64,
        )
        rows = self.ranks.all_reduce(own).tolist()
        hosts = [row.pop(-2) for row in rows]
        return [[*row, hosts.count(host)] for row, host in zip(rows, hosts, strict=True)]


@dataclass(frozen=True)
class _Need:
    """Bytes on one rank: what is needed, and what is free.

    `stage` is of a vector's part in the two tiles that are on the device where the basis is not.
    """

    vector: float
    beside: float
    stage: float
    device_free: float
    host_free: float
    is_cpu: float
    sharing: float  # ranks on its host

    @property
    def device_room(self) -> float:
        """Bytes that this rank may take on its device."""
        return DEVICE_SHARE * self.device_free / (self.sharing if self.is_cpu else 1)

    @property
    def host_room(self) -> float:
        """Bytes that this rank may take on its host."""
        return HOST_SHARE * self.host_free / self.sharing

    def most(self, place: str) -> float:
        """The largest basis that fits."""
        left = self.device_room - self.beside
        if place == "device":
            return left // max(self.vector, 1.0) - 1
        rows = min(self.host_room // max(self.vector, 1.0), left // max(self.stage, 1.0))
        return rows - 1

    def missing(self, least: int) -> float:
        """Bytes that are missing on the device."""
        return self.beside + (least + 1) * self.vector - self.device_room


def wanted_size(k: int, ncv: int | None, dimension: int) -> int:
    """The size of a basis that memory does not bound.

    Example:
        >>> wanted_size(10, None, 1_000), wanted_size(10, None, 12), wanted_size(10, 17, 1_000)
        (30, 12, 17)
    """
    return min(dimension, 2 * k + MORE_WANTED if ncv is None else ncv)


def least_size(k: int, ncv: int | None, dimension: int) -> int:
    """The least size of a basis: as asked, or k + 5."""
    return min(dimension, k + MORE_NEEDED if ncv is None else ncv)


def _refusal(need: _Need, least: int, num_ranks: int, is_one: bool) -> str:
    where = f"{need.device_room / GIB:.3g} GiB free on the device"
    if not is_one:
        where += f" and {need.host_room / GIB:.3g} GiB in host memory"
    each = " on each rank" if num_ranks > 1 else ""
    return (
        f"basis: expected room for {least + 1} vectors of {need.vector / GIB:.3g} GiB{each}, "
        f"{(least + 1) * need.vector / GIB:.3g} GiB, beside {need.beside / GIB:.3g} GiB on the device for all else, "
        f"got {where}; {WAY_OUT}."
    )
