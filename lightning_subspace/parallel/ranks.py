"""The processes that measure together. The only file that talks to torch.distributed.

Every method is a collective: all ranks call the same ones in the same order. That is so by construction as long as
whatever decides comes out of a sum over ranks; `Ranks.agree` is for what construction cannot give, an exception on
one rank. Inside it every collective begins with a comparison of notes, one all-reduce of three numbers: has a rank
failed, and are all at the same place? A rank that fails thus meets the others at their next collective, and all leave
the block by an exception, as long as the code in it communicates by these methods alone.

The sums of the eigensolver go without (`unchecked`): there a rank that fails takes part until the end with nan as its
contribution, and the sums carry it to all. Its products are blocks of their own.

A process alone (`group=None`) takes the same path with no communication.
"""

from __future__ import annotations

import atexit
import pickle
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# The latter are their names in earlier versions of torch.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world() -> dist.ProcessGroup:
    """The group of all processes."""
    group = dist.group.WORLD
    assert group is not None, "set up by the strategy"
    return group


class PeerError(RuntimeError):
    """Another rank has failed, and says why; or the ranks have come to different places."""


class Ranks:
    """A group of processes, or one alone.

    Args:
        group: a process group of torch.distributed, gloo or nccl; None for this process alone.
        device: of the process; the collectives of nccl want their tensors there, those of gloo on the CPU.

    Attributes:
        index: of this rank in the group.
        count: W, the number of ranks.
        calls: how often each collective was called, by its name.
        nbytes: the bytes of the whole vectors that each collective was called for, by its name; objects count 0.

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
        self._compares_notes = False
        self._ended = ""  # why the block that compares notes is over; nobody answers in it any more
        self.index = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    @property
    def bytes_moved(self) -> int:
        """Of all calls so far."""
        return sum(self.nbytes.values())

    def all_reduce(self, local: Tensor) -> Tensor:
        """Sum a small tensor over ranks, in its own precision; equal to the bit on all of them."""
        if self._group is None:
            return local
        total = local.to(self._device, copy=True).contiguous()
        self._begin("all_reduce", total.nbytes, f"{total.shape}{total.dtype}")
        dist.all_reduce(total, group=self._group)
        return total.to(local.device)

    def all_reduce_min(self, value: int) -> int:
        """The smallest of one number a rank."""
        return min(self.all_gather_object(value))

    def all_gather(
        self,
        local: Tensor,  # (s,), of one length on all ranks
        out: Tensor,  # (W s,)
    ) -> None:
        """Write the slices of all ranks into `out`, one after another."""
        if self._group is None:
            out.copy_(local)
            return
        received, sent = self._placed(out), self._placed(local)
        self._begin("all_gather", out.nbytes, f"{out.shape}{out.dtype}")
        _all_gather(received, sent, group=self._group)
        if received is not out:
            out.copy_(received)

    def reduce_scatter(
        self,
        whole: Tensor,  # (W s,)
        out: Tensor,  # (s,)
    ) -> None:
        """Sum a vector over ranks, and write this rank's slice of the sum into `out`."""
        if self._group is None:
            out.copy_(whole)
            return
        received, sent = self._placed(out), self._placed(whole)
        self._begin("reduce_scatter", whole.nbytes, f"{whole.shape}{whole.dtype}")
        _reduce_scatter(received, sent, group=self._group)
        if received is not out:
            out.copy_(received)

    def all_to_all(self, whole: Tensor) -> Tensor:  # (W s,) to (W s,)
        """The r-th slice of each rank's vector goes to rank r, which gets one from each."""
        if self._group is None:
            return whole
        sent = self._placed(whole)
        received = torch.empty_like(sent)
        self._begin("all_to_all", whole.nbytes, f"{whole.shape}{whole.dtype}")
        dist.all_to_all_single(received, sent, group=self._group)
        return received.to(whole.device)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first rank."""
        if self._group is None:
            return
        for tensor in tensors:
            moved = self._placed(tensor)
            self._begin("broadcast", tensor.nbytes, f"{tensor.shape}{tensor.dtype}")
            dist.broadcast(moved, self._source, group=self._group)
            if moved is not tensor:
                tensor.copy_(moved)

    def broadcast_object(self, value: T) -> T:
        """What the first rank has: a decision, or anything that can be pickled."""
        if self._group is None:
            return value
        # Not in the collective: a value that cannot be pickled would leave the others waiting in it.
        held = [pickle.dumps(value) if self.index == 0 else b""]
        self._begin("broadcast_object", 0, "")
        dist.broadcast_object_list(held, self._source, group=self._group, device=self._device)
        result: T = value if self.index == 0 else pickle.loads(held[0])
        return result

    def all_gather_object(self, value: T) -> list[T]:
        """What each rank has, by rank; anything that can be pickled."""
        if self._group is None:
            return [value]
        own, held = pickle.dumps(value), [b""] * self.count
        self._begin("all_gather_object", 0, "")
        dist.all_gather_object(held, own, self._group)
        return [pickle.loads(packed) for packed in held]

    @contextmanager
    def agree(self) -> Iterator[None]:
        """All ranks get to the end of the block, or none does: see the top of this file.

        Raises:
            PeerError: on a rank that is all right, when another one is not.
        """
        if self._group is None or self._compares_notes:
            yield
            return
        self._compares_notes, self._ended = True, ""
        try:
            yield
            self._check("the end")
        except Exception as error:
            self.fail(error)
            raise
        finally:
            self._compares_notes = False

    def fail(self, error: Exception) -> None:
        """Within `agree`: tell the others at once, where the exception may not come to the end of the block soon."""
        if self._compares_notes and not self._ended:
            self._check("", error)

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Within `agree`: collectives without the comparison, where no rank can leave before the others.

        All ranks get into it, or none does. A `agree` in it compares notes, and is a block of its own.
        """
        if self._compares_notes:
            self._check("bare")
        before, self._compares_notes = self._compares_notes, False
        try:
            yield
        finally:
            self._compares_notes = before

    def describe(self, error: Exception) -> str:
        """What went wrong in a block, in words, and on which of several ranks."""
        if self.count == 1:
            return in_words(error)
        return str(error) if isinstance(error, PeerError) else f"rank {self.index}: {in_words(error)}"

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor where the collectives want it: gloo takes those of an accelerator by way of the CPU (untested)."""
        return tensor if tensor.device.type == self._device.type else tensor.to(self._device)

    @property
    def _source(self) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, 0)

    def _begin(self, name: str, nbytes: int, shape: str) -> None:
        if self._compares_notes:
            self._check(f"{name} {shape}")
        self.calls[name] += 1
        self.nbytes[name] += nbytes

    def _check(self, place: str, error: Exception | None = None) -> None:
        """Compare notes with the other ranks.

        Args:
            place: where this rank is; must be the same on all.
            error: what has happened to this rank; then it is nowhere.

        Raises:
            PeerError: unless all ranks are well and at the same place.
        """
        if self._ended:  # and somebody has kept the exception to himself
            raise PeerError(self._ended)
        code = float(zlib.crc32(place.encode()))
        # Of each the largest over ranks: whether one has failed; the place; the place negated. The last two sum to 0 if
        # all are equal. A rank that has failed is at no place: smaller than any.
        notes = [0.0, code, -code] if error is None else [1.0, -1.0, -float(1 << 33)]
        noted = torch.tensor(notes, dtype=torch.float64, device=self._device)
        self.calls["check"] += 1
        self.nbytes["check"] += noted.nbytes
        dist.all_reduce(noted, dist.ReduceOp.MAX, group=self._group)
        failed, high, low = noted.tolist()
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
    # A thread of gloo drops the tensors of a collective after the collective has returned, and needs the GIL for it. If
    # it gets no turn before the interpreter ends, it aborts the process (pytorch issue 190489). Destroying the group
    # does not help as long as something refers to it, and DDP does. Who sleeps gives the GIL away: ten turns.
    atexit.register(time.sleep, 0.05)


def in_words(error: Exception) -> str:
    """An exception as a traceback ends, also where its class makes nothing of it."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of its `__str__`; whoever is told waits
        return type(error).__name__
