"""What every operator made of derivatives of the loss can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_subspace.micro_batch import MicroBatch
from lightning_subspace.partition import Partition


@runtime_checkable
class Operator(Protocol):
    """A symmetric operator on the parameter space, with the gradients that come with it.

    Under ranks every method is a collective, and vectors are this rank's part of them.

    Attributes:
        n: length of a vector here.
        dtype: of vectors.
        device: of vectors.
        partition: how vectors are dealt to ranks.
        batches: the micro-batches of the mean, of all ranks.
        fails_as_nan: whether a product that fails on one rank gets to all its collectives nevertheless, with nan as its
            part, and raises behind them: then ranks need not compare notes in it.
        max_asymmetry: how far v.Hu and u.Hv of unit vectors may be apart by rounding, relative to the largest
            |eigenvalue|.
    """

    n: int
    dtype: torch.dtype
    device: torch.device
    partition: Partition
    batches: tuple[MicroBatch, ...]
    fails_as_nan: bool
    max_asymmetry: float

    def matvec(self, v: Tensor) -> Tensor:
        """The image of a vector."""
        ...

    def gradient(self) -> Tensor:
        """Gradient of the mean loss over `batches`."""
        ...

    def mean_gradient(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Gradient of the mean loss over other micro-batches."""
        ...

    def value(self, offset: Tensor | None) -> float:
        """The mean loss over `batches` at theta + offset; inf or nan where it is not finite."""
        ...

    def batch_gradients(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch with the gradient of its own mean loss."""
        ...

    def other_gradients(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """The same for other micro-batches."""
        ...

    def part(self, positions: Iterable[int]) -> Operator:
        """The operator over some of the micro-batches, by their positions in `batches`."""
        ...
