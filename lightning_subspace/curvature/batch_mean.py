"""Base of all operators: a mean over the sample's micro-batches.

    A v = sum_b s_b A_b v,    g = sum_b s_b grad L_b,    s_b = w_b / sum_b w_b

Under ranks both vectors (`Partition`) and micro-batches (`data/assignment.py`) are divided among them: a product is one
all-gather of v, the local sums, and one reduce-scatter.

A new operator is one class with one method: `matvec` below `BatchMean`, where A_b v needs v alone (as in
`empirical_fisher.py`); `_build` below `RetainedGraphs`, where a graph serves all products (`hessian.py`); `matvec`
below `DisplacedGradients`, where it is a difference of gradients (`forward_difference.py`). One row of the table in
`selection.py` gives it a name.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.assignment import Assignment, assign, group_by_round, owner_rank
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss, place_of
from lightning_subspace.parallel.partition import Partition, VectorBuffers
from lightning_subspace.state.signals import give_up_if_signalled


class BatchMean(ABC):
    """Symmetric operator at the parameters of an open `TrainingLoss`.

    Under ranks every method is a collective, and vectors are this rank's part of them.

    Args:
        loss: an open context; it must stay open as long as products are taken.
        batches: the fixed sample, of all ranks; weights need not be normalised.
        dtype: of the vectors that come and go; None: that of the loss.
        partition: how vectors, and with them the work, are dealt to ranks; None: all to this process.

    Attributes:
        n: length of this rank's part of a vector; `partition.n` is that of the whole.
        footprint: what it holds.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
        ValueError: for an empty sample.
    """

    # Whether a product that fails on one rank takes part in all its collectives, with nan, before it raises. Then it
    # needs no further agreement between ranks.
    raises_after_collectives = True
    # Whether there are products, or gradients and values of the loss alone.
    has_products: ClassVar[bool] = True
    # The largest |v.Au - u.Av| of unit vectors that is rounding, relative to the largest |eigenvalue|. 2e-6 at most was
    # measured, and far more where something is wrong.
    max_asymmetry = 1e-4

    def __init__(
        self,
        loss: TrainingLoss,
        batches: Sequence[MicroBatch],
        *,
        dtype: torch.dtype | None = None,
        partition: Partition | None = None,
    ) -> None:
        if not batches:
            raise ValueError("batches: expected at least one micro-batch, got an empty sample.")
        self.partition = Partition.even(loss.space) if partition is None else partition
        self.n = self.partition.local_n
        self.dtype = loss.dtype if dtype is None else dtype
        self.device = loss.device
        self.batches = tuple(batches)
        self.footprint = Footprint()
        self._loss = loss
        self._held = self.batches  # also in a part: fillers, which are evaluated at weight zero, come from here
        self._assignments = self._rounds(self.batches)
        self._together = group_by_round(self.batches, self.partition.ranks)  # what all ranks evaluate in each round
        self._retained: list[Any] = [None] * len(self._assignments)  # what a subclass keeps of each evaluation
        self._mean: Tensor | None = None  # the gradient, once it is known
        loss.served.add(self)
        if self.raises_after_collectives:  # then no product may take memory between its collectives
            _ = self._buffers

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """A v."""

    def gradient(self) -> Tensor:  # (n,)
        """Gradient of the mean loss over the sample."""
        return self._centre().to(self.dtype, copy=True)

    def mean_gradient(self, batches: Sequence[MicroBatch]) -> Tensor:  # (n,)
        """Gradient of the mean loss over other micro-batches, taken once."""
        return self._gradient_over(self._rounds(batches)).to(self.dtype)

    def batch_gradients(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch of all ranks, with the gradient of its loss, (n,)."""
        return self.other_gradients(self.batches)

    def other_gradients(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each of other micro-batches of all ranks, with its gradient, (n,)."""
        own = (self._gradient_of(batch) for batch, _ in self._rounds(batches))
        return self._by_batch(group_by_round(batches, self.partition.ranks), own)

    def value(self, offset: Tensor | None) -> float:  # (n,)
        """Mean loss at theta + offset, finite or not.

        A forward pass of every micro-batch, one all-gather, and a sum of one number.
        """
        whole = None if offset is None else self.partition.gather(offset.to(self._loss.dtype))

        def summed(own: float) -> float:
            return float(self.partition.ranks.all_reduce(torch.tensor([own], dtype=torch.float64)))

        try:
            own = self._loss.value_at(whole, self._assignments)
        except Exception:
            summed(math.nan)  # the other ranks are waiting in this sum
            raise
        return summed(own)

    def observe(self, around: Callable[[nn.Module, MicroBatch], AbstractContextManager[Any]]) -> None:
        """Evaluate this rank's micro-batches, each inside of a context.

        `around(module, batch)` is entered around the training step, in which the module is as in training, on copies of
        its state: its submodules can be given hooks, to be taken off at the end. It is entered again, anew, where an
        evaluation is repeated. One forward pass of every micro-batch, and no communication but that of the step.
        """
        for batch, share in self._assignments:
            context = partial(around, self._loss.module, batch) if share else nullcontext  # a filler is no example
            self._loss.value_at(None, [(batch, share)], context)

    def part(self, positions: Iterable[int]) -> BatchMean:
        """The operator over some micro-batches, by their positions in `batches`.

        It shares what is retained. Rounds without any of them are left out; in the others all ranks evaluate one.
        """
        chosen = {self.batches[position].key for position in positions}
        part = copy.copy(self)
        part.batches = tuple(batch for batch in self.batches if batch.key in chosen)
        total = sum(batch.weight for batch in part.batches)
        left = [[batch for batch in together if batch.key in chosen] for together in self._together]
        kept = [number for number, together in enumerate(left) if together]
        part._together = [left[number] for number in kept]
        part._assignments = []
        for batch, share in (self._assignments[number] for number in kept):
            weight = batch.weight / total if share and batch.key in chosen else 0.0
            part._assignments.append(Assignment(batch, weight))
        part._retained = [self._retained[number] for number in kept]
        part._mean = None
        self._loss.served.add(part)
        return part

    def release(self) -> None:
        """Free what is kept between products: the loss is closed."""
        self._retained, self._mean = [None] * len(self._retained), None
        vars(self).pop("_buffers", None)

    @cached_property
    def _buffers(self) -> VectorBuffers:
        return VectorBuffers(self.partition, self._loss.dtype, self.device)

    def _rounds(self, batches: Sequence[MicroBatch]) -> list[Assignment]:
        return assign(batches, self.partition.ranks, fillers=self._held)

    def _gradient_of(self, batch: MicroBatch) -> Tensor:  # (whole n,)
        return backward_gradient(self._loss, batch)

    def _gradient_over(self, assignments: Sequence[Assignment]) -> Tensor:
        return self._mean_of(
            self._tallied((self._gradient_of(batch) for batch, _ in assignments), assignments), assignments
        )

    def _tallied(self, gradients: Iterable[Tensor], assignments: Sequence[Assignment]) -> Iterator[Tensor]:
        """Whole gradients at theta, which the loss's tally sees."""
        for (batch, share), gradient in zip(assignments, gradients, strict=True):
            if share and self._loss.tally is not None:
                self._loss.tally.see(place_of(batch), gradient)
            yield gradient

    def _centre(self) -> Tensor:
        """This rank's part of g(theta), in the dtype of the loss."""
        if self._mean is None:
            self._mean = self._gradient_over(self._assignments)
        return self._mean

    def _product(self, v: Tensor, images: Callable[[Tensor], Iterable[Tensor]]) -> Tensor:  # (n,) -> (n,)
        """A v: one all-gather and one reduce-scatter, whatever the number of micro-batches.

        `images` makes the whole of v into the whole of A_b v for each evaluation. As a generator function it runs
        inside of the sum, where it may fail and take memory.
        """
        return self._mean_of(images(self._buffers.gather(v.to(self._loss.dtype)))).to(self.dtype)

    def _mean_of(self, terms: Iterable[Tensor], assignments: Sequence[Assignment] | None = None) -> Tensor:
        """This rank's part of the mean of one vector an evaluation."""
        total = self._buffers.total.zero_()
        try:
            for (_, share), term in zip(self._assignments if assignments is None else assignments, terms, strict=True):
                give_up_if_signalled()  # also where a retained graph or gradient needs no evaluation
                if share:
                    total.add_(term, alpha=share)
        except Exception:  # it goes on behind the sum, in which the other ranks are waiting
            total.fill_(math.nan)
            self._buffers.sum_scatter()
            raise
        return self._buffers.sum_scatter()

    def _by_batch(
        self, rounds: Iterable[Sequence[MicroBatch]], own: Iterable[Tensor]
    ) -> Iterator[tuple[MicroBatch, Tensor]]:
        """This rank's part of one whole vector a micro-batch, of all ranks."""
        for together, vector in zip(rounds, own, strict=True):
            parts = self.partition.exchange(vector.to(self.dtype))
            for batch in together:
                yield batch, parts[owner_rank(batch, self.partition.ranks)]
