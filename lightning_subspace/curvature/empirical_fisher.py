"""Empirical Fisher matrix: the second moment of the gradients of examples.

    F v = (1 / N) sum_n g_n (g_n . v)

over the N examples of the sample; g_n is the gradient of the loss of example n alone. Source: Kunstner, Hennig and
Balles 2019, arXiv 1905.12558, eq. 3, divided by N as the loss is. Micro-batches have the weights that they have in the
mean, and the examples of one share its weight. It needs no second derivative. Its rank is at most N.

A training step gives the mean loss of a batch, so single examples are evaluated as batches of one, each with random
numbers of its own. `examples_check` finds out whether that is the same loss. Where it is not, and where a batch cannot
be cut, F is taken over micro-batches: (1 / sum w_b) sum_b w_b g_b g_b^T.

The gradient of the mean loss is the mean of the g_n, so that it lies in the range of F by construction: its fraction in
the top eigenspace is 1 for k = rank F, and near 1 below. What F is not, and its costs: README.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.graph_memory import Footprint, memory_budget
from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck
from lightning_subspace.data.micro_batch import MicroBatch, single_examples
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.state.quiet import quiet
from lightning_subspace.state.signals import SignalError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# How far the loss of a batch and the mean over its examples may be apart in float64, relative to the larger one.
MEAN_ROUNDING = 1e-6


class EmpiricalFisher(BatchMean):
    """The empirical Fisher over single examples, or over micro-batches.

    Args:
        loss: as for `BatchMean`, like `batches` and `partition`; best of order 1.
        examples: over single examples; a micro-batch that cannot be cut counts as one. False: over micro-batches.
        memory: bytes that gradients may take (4 n each; others are taken anew for every product); None: half of the
            memory that is free.
        footprint: as for `RetainedGraphs`.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
        ValueError: for an empty sample.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), weight=2.0, index=0)
        >>> with TrainingLoss(net, ParameterSpace.of(net), lambda m, x, i: m(x).mean()) as loss:
        ...     print(EmpiricalFisher(loss, [data]).matvec(torch.ones(2)))
        tensor([2., 8.])
    """

    def __init__(
        self,
        loss: TrainingLoss,
        batches: Sequence[MicroBatch],
        *,
        examples: bool = True,
        memory: float | None = None,
        partition: Partition | None = None,
        footprint: Footprint | None = None,
    ) -> None:
        super().__init__(loss, batches, partition=partition)
        self._examples = examples
        ranks = self.partition.ranks
        counts = [len(self._cut(batch)) for batch, _ in self._assignments]
        # A training step may contain collectives of its own, so all ranks evaluate equally often in every round.
        passes = [max(together) for together in zip(*ranks.all_gather_object(counts), strict=True)]
        budget = memory_budget(self.device, ranks.count) if memory is None else memory
        size = loss.space.n * loss.dtype.itemsize
        footprint = self.footprint = self.footprint if footprint is None else footprint
        room = budget / size
        kept = ranks.all_reduce_min(sum(needed <= room for needed in accumulate(counts)))
        kept = int(min(kept, footprint.most))
        footprint.see(kept=[size * count for count in counts[:kept]], left=[size for _ in counts[kept:]])
        self._retained = [(number, None) for number in passes]
        for turn, (batch, share) in enumerate(self._assignments[:kept]):
            gradients = [g for g in self._gradients(batch, passes[turn]) if share]
            self._retained[turn] = (passes[turn], gradients)

    @property
    def num_retained(self) -> int:
        """Number of gradients that are kept on this rank."""
        return sum(len(gradients) for _, gradients in self._retained if gradients is not None)

    def matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """F v: an inner product and a sum for each gradient."""

        def images(whole: Tensor) -> Iterator[Tensor]:
            for (batch, _), (passes, gradients) in zip(self._assignments, self._retained, strict=True):
                image, count = torch.zeros_like(whole), 0
                for gradient in self._gradients(batch, passes) if gradients is None else gradients:
                    image.addcmul_(gradient, gradient @ whole)  # by a tensor, so that nothing is read from the device
                    count += 1
                yield image.div_(max(count, 1))

        return self._product(v, images)

    def _gradients(self, batch: MicroBatch, passes: int) -> Iterator[Tensor]:  # (n,) of the whole space
        """The gradient of every example; passes beyond these count for nothing."""
        cut = self._cut(batch)
        for number in range(passes):
            gradient = self._gradient_of(cut[min(number, len(cut) - 1)])
            if number < len(cut):
                yield gradient

    def _cut(self, batch: MicroBatch) -> list[MicroBatch]:
        return (single_examples(batch) if self._examples else None) or [batch]


def examples_check(loss: TrainingLoss, batch: MicroBatch, *, seed: int = 0) -> SelfCheck:
    """Whether the loss of a batch is the mean over its examples.

    Arguments as `self_check`; `seed` is not used. PASSED, or SKIPPED with the reason why not. No derivative is checked,
    since F is made of the gradients of training, right or wrong. A loss that draws random numbers is compared in eval
    mode: a batch and its examples draw different ones.

    Raises:
        SignalError: when a signal has come meanwhile.
    """
    examples = single_examples(batch)
    if examples is None:
        return _skipped("a batch cannot be cut into examples, for which all its tensors need one length")
    try:
        with quiet():  # what the model has to say, it says in training
            with loss:
                norms = [m for m in loss.module.modules() if isinstance(m, BATCH_NORMS)]
                if any(norm.training or norm.running_mean is None for norm in norms):
                    return _skipped("batch-norm takes its statistics over the batch")
                whole, mean = _both(loss, batch, examples)
                is_random = loss.value_at(None, [(replace(batch, draw=1), 1.0)]) != whole
            if is_random and not _are_close(whole, mean):
                calm = copy.copy(loss)
                calm.mode = "eval"
                with calm:
                    whole, mean = _both(calm, batch, examples)
    except SignalError:
        raise
    except Exception as failure:  # a batch of one can fail in any way inside the user's code
        return _skipped(f"a batch of one example cannot be evaluated ({type(failure).__name__}: {failure})")
    if not _are_close(whole, mean):
        return _skipped(f"the loss of a batch, {whole:.6g}, is not the mean over its examples, {mean:.6g}")
    reason = f"the loss of a batch, {whole:.6g}, is the mean over its examples"
    return SelfCheck(CheckOutcome.PASSED, abs(whole - mean), reason=reason)


def _both(loss: TrainingLoss, batch: MicroBatch, examples: Sequence[MicroBatch]) -> tuple[float, float]:
    # The loss of a batch, and the mean over its examples.
    share = 1.0 / len(examples)
    return loss.value_at(None, [(batch, 1.0)]), loss.value_at(None, [(example, share) for example in examples])


def _are_close(whole: float, mean: float) -> bool:
    return abs(whole - mean) <= MEAN_ROUNDING * max(abs(whole), abs(mean))


def _skipped(reason: str) -> SelfCheck:
    return SelfCheck(CheckOutcome.SKIPPED, reason=reason)
