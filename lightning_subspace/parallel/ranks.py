"""Process group of a probe: collectives, and agreement on errors.

Nothing else in the package calls torch.distributed. Every method of `Ranks` is a collective: all ranks call the same
ones in the same order, as long as every decision comes from a sum over ranks. An exception on one rank breaks this;
`Ranks.agree` is for that. README.md in this folder has the protocols. One process alone (`group=None`) sends nothing.
"""

from __future__ import annotations

import atexit
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# Newer versions of torch have new names for these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world() -> dist.ProcessGroup:
    """The group of all processes."""
    group = dist.group.WORLD
    assert group is not None, "set up by the strategy"
    return group


class PeerError(RuntimeError):
    """Another rank has failed, or ranks are at different collectives."""


class Ranks:
    """A process group, or one process alone.

    Args:
        group: a process group of torch.distributed, gloo or nccl; None for this process alone.
        device: of the process; nccl takes tensors there, gloo on the CPU.

    Attributes:
        index: of this rank, in 0..W-1.
        count: W, the number of ranks.
        calls: number of calls of each collective, by its name.
        nbytes: bytes of the whole vectors in the calls of each collective, by its name; objects count 0.

    Example:
        >>> alone = Ranks()
        >>> alone.count, alone.all_reduce(torch.ones(2)).tolist(), alone.broadcast_object("a decision")
        (1, [1.0, 1.0], 'a decision')
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self._group = group
        is_gloo = group is not None and dist.get_backend(group) == "gloo"
        if group is not None and "gloo" in dist.get_backend_config(group):  # perhaps one of several
            _wait_for_gloo_at_exit()
        self._device = torch.device("cpu" if is_gloo else device)
        self._source = 0 if group is None else dist.get_global_rank(group, 0)
        self._is_checked = False  # inside of `agree` and not of `unchecked`: a check goes before each collective
        self._ended = ""  # why the block of `agree` is over; the other ranks have left it and answer no more
        self._whole: Ranks | None = None  # what this is a part of
        self.index = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    @property
    def members(self) -> tuple[int, ...] | None:
        """The ranks as numbers among all processes, ascending; None for one alone."""
        return None if self._group is None else tuple(dist.get_process_group_ranks(self._group))

    def part(self, group: dist.ProcessGroup) -> Ranks:
        """Some of these ranks, whose calls are counted and checked with these.

        Every rank has such a part, and all call the same in theirs at the same time.
        """
        part = Ranks(group, self._device)
        part._whole, part.calls, part.nbytes = self, self.calls, self.nbytes
        return part

    @property
    def bytes_moved(self) -> int:
        """Bytes of all calls so far."""
        return sum(self.nbytes.values())

    def all_reduce(self, local: Tensor) -> Tensor:
        """Sum a small tensor over ranks, to the same bits on all."""
        if self._group is None:
            return local
        total = local.to(self._device, copy=True).contiguous()
        self._begin("all_reduce", total)
        dist.all_reduce(total, group=self._group)
        return total.to(local.device)

    def all_reduce_min(self, value: int) -> int:
        """The smallest of one number a rank."""
        return min(self.all_gather_object(value))

    def all_gather(self, local: Tensor, out: Tensor) -> None:  # (s,), s equal on all ranks; (W s,)
        """Write the slices of all ranks into `out`, one after another."""
        self._write("all_gather", _all_gather, local, out, whole=out)

    def reduce_scatter(self, whole: Tensor, out: Tensor) -> None:  # (W s,); (s,)
        """Write this rank's slice of the sum over ranks into `out`."""
        self._write("reduce_scatter", _reduce_scatter, whole, out, whole=whole)

    def _write(self, name: str, collective: Callable[..., Any], source: Tensor, out: Tensor, *, whole: Tensor) -> None:
        if self._group is None:
            out.copy_(source)
            return
        received, sent = self._placed(out), self._placed(source)
        self._begin(name, whole)
        collective(received, sent, group=self._group)
        if received is not out:
            out.copy_(received)

    def all_to_all(self, whole: Tensor) -> Tensor:  # (W s,) to (W s,)
        """Send the r-th slice of each rank's vector to rank r."""
        if self._group is None:
            return whole
        sent = self._placed(whole)
        received = torch.empty_like(sent)
        self._begin("all_to_all", whole)
        dist.all_to_all_single(received, sent, group=self._group)
        return received.to(whole.device)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first rank."""
        if self._group is None:
            return
        for tensor in tensors:
            moved = self._placed(tensor)
            self._begin("broadcast", tensor)
            dist.broadcast(moved, self._source, group=self._group)
            if moved is not tensor:
                tensor.copy_(moved)

    def broadcast_object(self, value: T) -> T:
        """The first rank's value; anything that can be pickled."""
        if self._group is None:
            return value
        # Pickled before the collective: a value that cannot be pickled would leave the others waiting in it.
        packed = [pickle.dumps(value) if self.index == 0 else b""]
        self._begin("broadcast_object")
        dist.broadcast_object_list(packed, self._source, group=self._group, device=self._device)
        result: T = value if self.index == 0 else pickle.loads(packed[0])
        return result

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all ranks, by rank; anything that can be pickled."""
        if self._group is None:
            return [value]
        own, gathered = pickle.dumps(value), [b""] * self.count
        self._begin("all_gather_object")
        dist.all_gather_object(gathered, own, self._group)
        return [pickle.loads(packed) for packed in gathered]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Bring all ranks to the end of the block, or none.

        A check, one all-reduce of three numbers, goes before every collective in the block. A rank that fails meets the
        others at its next check, and all leave the block by an exception. The code in the block may only communicate by
        these methods. A block inside of a block is part of the outer one.

        Raises:
            PeerError: on a rank that is well, when another one is not.
        """
        if self._group is None or self._is_checked:
            yield
            return
        self._is_checked, self._ended = True, ""
        try:
            yield
            self._check("the end")
        except Exception as error:
            self.fail(error)
            raise
        finally:
            self._is_checked = False

    def fail(self, error: Exception) -> None:
        """Within `agree`: tell the others of an exception at once."""
        if self._is_checked and not self._ended:
            self._check("", error)

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Omit the checks within `agree`, where no rank can leave alone.

        All ranks enter the block or none does. An `agree` inside of it is checked, and is a block of its own.
        """
        if self._is_checked:
            self._check("unchecked")
        before, self._is_checked = self._is_checked, False
        try:
            yield
        finally:
            self._is_checked = before

    def describe(self, error: Exception) -> str:
        """An exception in words, with its rank if there are several."""
        if self.count == 1:
            return in_words(error)
        return str(error) if isinstance(error, PeerError) else f"rank {self.index}: {in_words(error)}"

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor on the device of the collectives."""
        return tensor if tensor.device.type == self._device.type else tensor.to(self._device)  # gloo: untested

    def _begin(self, name: str, tensor: Tensor | None = None) -> None:
        if self._is_checked:
            self._check(f"{name} " if tensor is None else f"{name} {tensor.shape}{tensor.dtype}")
        if self._whole is not None and self._whole._is_checked:
            self._whole._check(f"{name} in parts")  # their tensors may differ in size
        self.calls[name] += 1
        self.nbytes[name] += 0 if tensor is None else tensor.nbytes

    def _check(self, place: str, error: Exception | None = None) -> None:
        """Check that all ranks are well and at the same place.

        Args:
            place: where this rank is: the collective to come and its shape.
            error: of this rank; then it is at no place.

        Raises:
            PeerError: on a rank that is well, unless all are, and at the same place.
        """
        if self._ended:  # code in the block has swallowed the exception
            raise PeerError(self._ended)
        code = float(zlib.crc32(place.encode()))
        # The maximum of each over ranks: has one failed; the place; the place negated. The last two sum to 0 if all are
        # equal. A rank that has failed sends less than any place.
        flags = [0.0, code, -code] if error is None else [1.0, -1.0, -float(1 << 33)]
        found = torch.tensor(flags, dtype=torch.float64, device=self._device)
        self.calls["check"] += 1
        self.nbytes["check"] += found.nbytes
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        failed, high, low = found.tolist()
        if failed:
            causes: list[str | None] = [None] * self.count
            dist.all_gather_object(causes, None if error is None else in_words(error), self._group)
            self._ended = ", ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause is not None)
        elif high + low != 0.0:
            self._ended = (
                "the ranks have come to different places, so that their numbers do not belong together; does a "
                "measurement, a loss_fn or should_measure decide by something that differs between ranks?"
            )
        if self._ended and error is None:
            raise PeerError(self._ended)


@cache  # once a process
def _wait_for_gloo_at_exit() -> None:
    # A thread of gloo drops the tensors of a collective after it has returned, and needs the GIL for that. If it gets
    # no turn before the interpreter ends, it aborts the process (pytorch issue 190489). Destroying the group does not
    # help while something refers to it, and DDP does. Sleeping gives the GIL away: ten turns.
    atexit.register(time.sleep, 0.05)


def in_words(error: Exception) -> str:
    """An exception as the last line of a traceback."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its class has a broken `__str__`; the other ranks wait for an answer
        return type(error).__name__
