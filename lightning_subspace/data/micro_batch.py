"""Micro-batches: units of a fixed sample, evaluated and assigned to ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.data.cut import common_length, cut
from lightning_subspace.state.copies import CopyError, copied, tensors_of
from lightning_subspace.state.layouts import dense_parts
from lightning_subspace.state.notice import warn_on_first_rank

Weight = Callable[[Any], float]


class SampleError(ValueError):
    """The training data cannot give a fixed sample."""


@dataclass(frozen=True)
class MicroBatch:
    """One batch of a fixed sample.

    Attributes:
        data: what the collate function returned, on the CPU; None on ranks that do not hold it.
        weight: weight in means, positive and finite, not normalised: the number of examples or tokens.
        index: its place in the sample; fixes the random seed.
        batch_idx: what `training_step` is given; None: the index.
        transferred: whether it has been through the transfer hooks, as a batch seen in training has.
        size: number of examples; if that is not known, the loader's batch size.
        is_local: whether this rank holds the data.
        checksum: of the data, with several ranks; see `require_same_batches`.
        draw: second part of the random seed, different for the examples of one batch, and for repeated draws of one.
        is_counted: whether the weight is known; otherwise it is 1, see `with_equal_weights`.
        off_cpu: of a transferred batch: for each tensor, in the order of copying, whether training has it on another
            device than the CPU, and evaluations too; None: all of them.

    Raises:
        SampleError: for a weight that is not positive and finite.
    """

    data: Any
    weight: float
    index: int
    transferred: bool = False
    size: int = 0
    is_local: bool = True
    checksum: int = 0
    draw: int = 0
    is_counted: bool = True
    off_cpu: tuple[bool, ...] | None = None
    batch_idx: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise SampleError(f"weight: expected a positive finite number for every batch, got {self.weight}.")

    @property
    def key(self) -> tuple[int, int]:
        """Index and draw, which no other of a sample has both."""
        return self.index, self.draw


def few_examples(batch: MicroBatch, count: int) -> MicroBatch:
    """The first `count` examples, or the batch if it cannot be cut."""
    length = _cuttable_length(batch)
    if length is None or length <= count:
        return batch
    few = replace(batch, data=cut(batch.data, length, slice(0, count)), weight=float(count), size=count)
    return replace(few, off_cpu=_off_cpu_of_part(batch, few.data))


def single_examples(batch: MicroBatch) -> list[MicroBatch] | None:
    """The examples as views, or None if the batch cannot be cut."""
    length = _cuttable_length(batch)
    if length is None:
        return None
    pieces = [cut(batch.data, length, slice(i, i + 1)) for i in range(length)]
    one = replace(batch, weight=1.0, size=1)
    first = batch.draw * length  # no two examples of two draws of the batch share a seed
    return [
        replace(one, data=data, draw=first + i, off_cpu=_off_cpu_of_part(batch, data)) for i, data in enumerate(pieces)
    ]


def parts_of(batch: MicroBatch, sizes: Sequence[int]) -> list[MicroBatch] | None:
    """Consecutive parts of these sizes, or None if it cannot be cut.

    Parts are views. They have the index of the batch; their weights are in the proportion of their sizes.
    """
    length = _cuttable_length(batch)
    if length is None or length != sum(sizes):
        return None
    parts = []
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        data = cut(batch.data, length, slice(start, start + size))
        part = replace(batch, data=data, weight=batch.weight * size / length, size=size)
        parts.append(replace(part, off_cpu=_off_cpu_of_part(batch, data)))
    return parts


def with_equal_weights(batches: Sequence[MicroBatch], *, warn: bool = True) -> list[MicroBatch]:
    """The batches, equally weighted if one is not counted, with a word."""
    if all(batch.is_counted for batch in batches):
        return list(batches)
    if warn and len(batches) > 1:
        warn_on_first_rank(
            "SubspaceMonitor: weight: expected batches whose number of examples can be told, got some with several "
            "possible numbers or none; all batches count the same. Pass weight=, a function from a batch to a number."
        )
    return [replace(batch, weight=1.0) for batch in batches]


def detached_copy(data: Any, device: str | None = None) -> Any:
    """A deep copy without graphs, on the given or the same device.

    Raises:
        SampleError: for a batch that cannot be copied.
    """
    with _refusal():
        return copied(data, lambda t: t.detach().to(device or t.device, copy=True))


def places(data: Any) -> tuple[bool, ...]:
    """Whether each tensor is off the CPU, in the order of copying.

    Raises:
        SampleError: for a batch that cannot be copied.
    """
    with _refusal():
        return tuple(is_off_cpu(tensor) for tensor in tensors_of(data))


def is_off_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on another device than the CPU."""
    return tensor.device.type != "cpu"


def checksum(data: Any) -> int:
    """Checksum of the tensors in a batch.

    Raises:
        SampleError: for a batch that cannot be copied.

    Example:
        >>> checksum([torch.zeros(2), "a"]) == checksum({"x": torch.zeros(2)}), checksum(torch.ones(2)) == 0
        (True, False)
    """
    with _refusal():
        tensors = tensors_of(data)
    dense = (part.detach().cpu() for tensor in tensors for part in dense_parts(tensor) if part.numel())
    plain = (part.resolve_conj().resolve_neg().contiguous().as_subclass(Tensor).reshape(-1) for part in dense)
    return zlib.crc32(repr([zlib.crc32(part.view(torch.uint8).numpy().tobytes()) for part in plain]).encode())


@contextmanager
def _refusal() -> Iterator[None]:
    """Turn a batch that cannot be copied into a `SampleError`."""
    try:
        yield
    except CopyError as error:
        raise SampleError(str(error)) from error


def _cuttable_length(batch: MicroBatch) -> int | None:
    """Number of examples that a batch can be cut into, or None."""
    length = common_length(batch.data, batch.size)
    if length is not None and batch.off_cpu is not None and len(set(batch.off_cpu)) > 1:
        # a list of examples has fewer tensors when it is cut, and nothing says which of them are on the CPU
        part = cut(batch.data, length, slice(0, 1))
        return length if len(tensors_of(part)) == len(batch.off_cpu) else None
    return length


def _off_cpu_of_part(batch: MicroBatch, part: Any) -> tuple[bool, ...] | None:
    if not batch.off_cpu or len(set(batch.off_cpu)) > 1:
        return batch.off_cpu
    return batch.off_cpu[:1] * len(tensors_of(part))
