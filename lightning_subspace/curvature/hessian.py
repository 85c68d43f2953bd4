"""Hessian of the training loss, exact, by double backward.

    H v = sum_b w_b grad(grad L_b . v) / sum_b w_b

over the micro-batches b of a fixed sample (Pearlmutter 1994). The graph of the gradient does not depend on v, so it is
built once a probe and serves every product: 1.5 to 2 gradients each, instead of 2.5 to 3. Graphs beyond the memory
budget are rebuilt for every product, with the same result to the last bit. On a GPU convolutions have second
derivatives of their own (`loss/convolution.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.gradient import pruned_gradient
from lightning_subspace.curvature.graph_memory import Footprint, SavedBytes, memory_budget
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.convolution import regular_convolutions
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.partition import Partition


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of one micro-batch, ready to be differentiated again."""

    leaves: list[Tensor]
    gradients: list[Tensor | None]

    @classmethod
    def build(cls, loss: TrainingLoss, batch: MicroBatch) -> GradientGraph:
        """Evaluate the loss of a micro-batch and its gradient."""
        with regular_convolutions(loss.device):
            evaluation = loss(batch)
            loss.dependence.require_no_reentrant_checkpoint()
            value, leaves = evaluation.value, evaluation.leaves
            with loss.default_type():
                gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        return cls(leaves, list(gradients))

    @property
    def held(self) -> list[Tensor]:
        """Tensors kept beside the leaves and what autograd saves for backward."""
        return [gradient for gradient in self.gradients if gradient is not None]

    def product(self, direction: list[Tensor]) -> list[Tensor | None]:
        """Derivative of gradient . direction by leaf; None without influence."""
        # A gradient without a graph is constant in theta: a piecewise linear part of the loss.
        pairs = [(g, v) for g, v in zip(self.gradients, direction, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(self.leaves)
        outputs = [g.to_dense() if g.is_sparse else g for g, _ in pairs]
        weights = [v.reshape(g.shape).to(g.dtype) for g, v in pairs]
        with regular_convolutions(self.leaves[0].device):  # for checkpoints, whose forward pass runs again
            return list(torch.autograd.grad(outputs, self.leaves, weights, retain_graph=True, allow_unused=True))


class RetainedGraphs(BatchMean):
    """A mean over micro-batches with one retained graph each.

    Args:
        loss: as for `BatchMean`, like `batches` and `partition`.
        memory: bytes that retained graphs may take; None: half of the memory that is free.
        footprint: bounds the number of graphs, and takes down what is held; None: one of its own.
    """

    def __init__(
        self,
        loss: TrainingLoss,
        batches: Sequence[MicroBatch],
        *,
        memory: float | None = None,
        partition: Partition | None = None,
        footprint: Footprint | None = None,
    ) -> None:
        super().__init__(loss, batches, partition=partition)
        self.footprint = self.footprint if footprint is None else footprint
        self._retain(memory_budget(self.device, self.partition.ranks.count) if memory is None else memory)

    @abstractmethod
    def _build(self, batch: MicroBatch) -> GradientGraph:
        """Evaluate the loss of a micro-batch, and make its graph."""

    @property
    def num_retained(self) -> int:
        """Number of micro-batches whose graph is kept on this rank."""
        return sum(graph is not None for graph in self._retained)

    def matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """A v, by one product with every graph."""

        def images(whole: Tensor) -> Iterator[Tensor]:
            directions = self._loss.space.unflatten(whole)
            for graph in self._graphs():
                with self._loss.default_type():
                    product = graph.product(directions)
                image = self._loss.space.flatten(product, like=whole)
                del graph, product  # before the next one is rebuilt
                yield image

        return self._product(v, images)

    def batch_gradients(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch of all ranks, with its gradient, (n,), from the graphs."""
        return self._by_batch(self._together, map(self._flat_gradient, self._graphs()))

    def _gradient_of(self, batch: MicroBatch) -> Tensor:
        return pruned_gradient(self._loss, batch)

    def _centre(self) -> Tensor:
        if self._mean is None:
            self._mean = self._mean_of(map(self._flat_gradient, self._graphs()))
        return self._mean

    def _retain(self, memory: float) -> None:
        """Build every graph once, for the gradient; keep those that fit."""
        sizes: list[int] = []

        def built() -> Iterator[GradientGraph]:
            for number, (batch, _) in enumerate(self._assignments):
                saved = SavedBytes()
                with saved:
                    graph = self._build(batch)
                sizes.append(saved.count(graph.held, graph.leaves))
                is_kept = number < self.footprint.most and sum(sizes) <= memory
                self._retained[number] = graph if is_kept else None
                self.footprint.kept = self.num_retained
                yield graph
                del graph  # before the next one is built

        self._mean = self._mean_of(self._tallied(map(self._flat_gradient, built()), self._assignments))
        # All ranks keep equally many, to rebuild the others together: a training step may have collectives of its own.
        count = self.partition.ranks.all_reduce_min(self.num_retained)
        self._retained[count:] = [None] * (len(self._assignments) - count)
        self.footprint.see(kept=sizes[:count], left=sizes[count:])

    def _graphs(self) -> Iterator[GradientGraph]:
        for (batch, _), graph in zip(self._assignments, self._retained, strict=True):
            yield graph if graph is not None else self._build(batch)

    def _flat_gradient(self, graph: GradientGraph) -> Tensor:
        return self._loss.space.flatten(graph.gradients, like=self._buffers.total)


class Hessian(RetainedGraphs):
    """The Hessian; arguments as `RetainedGraphs`.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
        ValueError: for an empty sample.

    Example:
        >>> from lightning_subspace.parallel.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), weight=2.0, index=0)
        >>> with TrainingLoss(net, ParameterSpace.of(net), lambda m, x, i: m(x).square().mean()) as loss:
        ...     print(Hessian(loss, [data]).matvec(torch.ones(2)))
        tensor([1., 4.])
    """

    def _build(self, batch: MicroBatch) -> GradientGraph:
        return GradientGraph.build(self._loss, batch)
