"""Micro-batches: units of a fixed sample, evaluated and assigned to ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_subspace.state.copies import copied

Weight = Callable[[Any], float]


class SampleError(ValueError):
    """The training data cannot give a fixed sample."""


@dataclass(frozen=True)
class MicroBatch:
    """One batch of a fixed sample.

    Attributes:
        data: what the collate function returned, on the CPU; None on ranks that do not hold it.
        weight: weight in means, positive and finite, not normalised: the number of examples or tokens.
        index: its place in the sample; fixes `batch_idx` and the random seed.
        transferred: whether it has been through the transfer hooks, as a batch seen in training has.
        size: number of examples; 0 if not known.
        is_local: whether this rank holds the data.
        checksum: of the data, with several ranks; see `require_same_batches`.
        draw: second part of the random seed, different for the examples of one batch, and for repeated draws of one.

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

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise SampleError(f"weight: expected a positive finite number for every batch, got {self.weight}.")

    @property
    def key(self) -> tuple[int, int]:
        """Index and draw, which no other of a sample has both."""
        return self.index, self.draw


def few_examples(batch: MicroBatch, count: int) -> MicroBatch:
    """The first `count` examples, or the batch if it cannot be cut."""
    length = _common_length(batch.data)
    if length is None or length <= count:
        return batch
    data = apply_to_collection(batch.data, Tensor, lambda t: t[:count])
    return MicroBatch(data, float(count), batch.index, batch.transferred, draw=batch.draw)


def single_examples(batch: MicroBatch) -> list[MicroBatch] | None:
    """The examples as views, or None if the batch cannot be cut."""
    length = _common_length(batch.data)
    if length is None:
        return None
    pieces = [apply_to_collection(batch.data, Tensor, Tensor.__getitem__, slice(i, i + 1)) for i in range(length)]
    first = batch.draw * length  # no two examples of two draws of the batch share a seed
    return [
        MicroBatch(data, 1.0, batch.index, batch.transferred, size=1, draw=first + i) for i, data in enumerate(pieces)
    ]


def number_of_examples(batch: Any) -> int:
    """Length of the first dimension of the first tensor in a batch.

    Raises:
        SampleError: when there is no tensor with a dimension.
    """
    for tensor in tensors_of(batch):
        if tensor.ndim:
            return len(tensor)
    raise SampleError(
        f"sample: expected batches with a tensor, whose length is the number of examples, got one of type "
        f"{type(batch).__name__}; pass weight=, a function from a batch to a number."
    )


def detached_copy(data: Any, device: str | None = None) -> Any:
    """A deep copy without graphs, on the given or the same device."""
    return copied(data, lambda t: t.detach().to(device or t.device, copy=True))


def checksum(data: Any) -> int:
    """Checksum of the dense tensors in a batch.

    Example:
        >>> checksum([torch.zeros(2), "a"]) == checksum({"x": torch.zeros(2)}), checksum(torch.ones(2)) == 0
        (True, False)
    """
    dense = (t.detach().cpu() for t in tensors_of(data) if t.layout is torch.strided and t.numel())
    values = (t.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in dense)
    return zlib.crc32(repr([zlib.crc32(value) for value in values]).encode())


def tensors_of(data: Any) -> list[Tensor]:
    """The tensors in the collections of a batch."""
    found: list[Tensor] = []
    apply_to_collection(data, Tensor, found.append)
    return found


def _common_length(data: Any) -> int | None:
    """The first dimension that all tensors share, not 0, or None."""
    lengths = {len(t) if t.ndim else 0 for t in tensors_of(data)}
    return (lengths.pop() or None) if len(lengths) == 1 else None
