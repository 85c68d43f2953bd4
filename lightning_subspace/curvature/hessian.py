"""The Hessian of the mean training loss as a matrix-vector product, exact, by double backward.

H v = sum_b w_b grad(grad L_b . v) / sum_b w_b over the micro-batches b of a fixed sample. The graph of the gradient
does not depend on v, so it is built once a probe and reused by every product (Pearlmutter 1994; a product then costs
about 1.5 to 2 gradients instead of 2.5 to 3). Where the graphs of all batches do not fit the memory budget, those that
fit are kept and the others are rebuilt for every product; the result is the same.

Under ranks v and H v are dealt out (`Partition`), and so are the micro-batches (`rounds`): a product is one all-gather
of v, the local sums, and one reduce-scatter. A rank on which something fails contributes nan, and raises afterwards.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lightning_subspace.curvature.gradient import weighted_gradient
from lightning_subspace.micro_batch import MicroBatch
from lightning_subspace.partition import Partition
from lightning_subspace.rounds import Turn, by_rounds, owner, rounds
from lightning_subspace.training_loss import TrainingLoss
from lightning_subspace.transfers import Transfers

# Share of the free memory that retained graphs may take.
MEMORY_SHARE = 0.5
# Where a container finds what it may take and what it has taken (cgroup v2).
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of one micro-batch as a function of its leaves, ready to be differentiated again."""

    leaves: list[Tensor]
    gradients: list[Tensor | None]

    @classmethod
    def build(cls, loss: TrainingLoss, batch: MicroBatch) -> GradientGraph:
        """Evaluate the loss of a micro-batch and its gradient."""
        evaluation = loss(batch)
        gradients = torch.autograd.grad(evaluation.value, evaluation.leaves, create_graph=True, allow_unused=True)
        return cls(evaluation.leaves, list(gradients))

    @property
    def held(self) -> list[Tensor]:
        """Tensors kept as long as this is, beside what autograd saves for backward and beside the leaves."""
        return [gradient for gradient in self.gradients if gradient is not None]

    def product(self, direction: list[Tensor]) -> list[Tensor | None]:
        """Derivative of gradient . direction by every leaf; None where it does not depend on the leaf."""
        # A gradient without a graph is constant in theta: a piecewise linear part of the loss.
        pairs = [(g, v) for g, v in zip(self.gradients, direction, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None] * len(self.leaves)
        outputs = [g.to_dense() if g.is_sparse else g for g, _ in pairs]
        weights = [v.reshape(g.shape).to(g.dtype) for g, v in pairs]
        return list(torch.autograd.grad(outputs, self.leaves, weights, retain_graph=True, allow_unused=True))


class Hessian:
    """The Hessian of the mean loss over `batches` at the parameters of an open `TrainingLoss`.

    Args:
        loss: an open context; it must stay open as long as products are taken.
        batches: the fixed sample, of all ranks; weights need not be normalised.
        memory: bytes that retained graphs may take; None takes half of the memory that is free.
        partition: how vectors, and with them the work, are dealt to ranks; None: all to this process.

    Attributes:
        n: length of a vector here: of this rank's part.
        partition: how vectors are dealt to ranks; `partition.n` is the dimension of the whole space.
        batches: the micro-batches, of all ranks.

    Raises:
        LossError: when a loss cannot be evaluated (see `TrainingLoss`).
        ValueError: for an empty sample.

    Example:
        >>> from lightning_subspace.parameters import ParameterSpace
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> data = MicroBatch(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), weight=2.0, index=0)
        >>> with TrainingLoss(net, ParameterSpace.of(net), lambda m, x, i: m(x).square().mean()) as loss:
        ...     print(Hessian(loss, [data]).matvec(torch.ones(2)))
        tensor([1., 4.])
    """

    fails_as_nan = True
    max_asymmetry = 1e-4  # 2e-6 at most, and far more where something is wrong
    _graph_class: ClassVar[type[GradientGraph]] = GradientGraph

    def __init__(
        self,
        loss: TrainingLoss,
        batches: Sequence[MicroBatch],
        *,
        memory: float | None = None,
        partition: Partition | None = None,
    ) -> None:
        if not batches:
            raise ValueError("batches: expected at least one micro-batch, got an empty sample.")
        self.partition = Partition.even(loss.space) if partition is None else partition
        self.n = self.partition.local_n
        self.dtype = loss.dtype
        self.device = loss.device
        self.batches = tuple(batches)
        self._loss = loss
        self._turns = rounds(self.batches, self.partition.ranks)
        self._transfers = Transfers(self.partition, loss.dtype, loss.device)
        self._graphs: list[GradientGraph | None] = []  # one a turn
        self._mean: Tensor | None = None  # the gradient, once it is known
        self._retain(_memory_budget(self.device, self.partition.ranks.count) if memory is None else memory)

    @property
    def num_retained(self) -> int:
        """Number of micro-batches whose gradient graph is kept on this rank."""
        return sum(graph is not None for graph in self._graphs)

    def gradient(self) -> Tensor:  # (n,)
        """Gradient of the mean loss over the sample."""
        if self._mean is None:
            self._mean = self._weighted_mean(lambda graph: graph.gradients)
        return self._mean.clone()

    def matvec(
        self,
        v: Tensor,  # (n,)
    ) -> Tensor:  # (n,)
        """H v: one all-gather and one reduce-scatter of a vector, whatever the number of batches."""
        whole = self._transfers.gather(v)
        directions: list[list[Tensor]] = []  # inside of the sum, as memory is taken for those of complex parameters

        def product(graph: GradientGraph) -> list[Tensor | None]:
            directions[:] = directions or [self._loss.space.unflatten(whole.to(self.dtype))]
            return graph.product(directions[0])

        return self._weighted_mean(product)

    def value(
        self,
        offset: Tensor | None,  # (n,)
    ) -> float:
        """The mean loss at theta + offset: a forward pass, one all-gather, and a sum of one number."""
        whole = None if offset is None else self.partition.gather(offset.to(self._loss.dtype))
        own, failures = math.nan, []
        try:
            own = self._loss.value_at(whole, self._turns)
        except Exception as error:
            failures.append(error)
        total = float(self.partition.ranks.all_sum(torch.tensor([own], dtype=torch.float64)))
        if failures:
            raise failures[0]
        return total

    def batch_gradients(self) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each micro-batch, of all ranks, with the gradient of its own mean loss, (n,)."""
        own = (self._loss.space.flatten(graph.gradients, like=self._mean) for graph in self._all_graphs())
        return self._dealt_out(self.batches, own)

    def mean_gradient(self, batches: Sequence[MicroBatch]) -> Tensor:  # (n,)
        """Gradient of the mean loss over other micro-batches, taken once."""
        turns = self._rounds(batches)
        return self._summed(lambda total: total.copy_(weighted_gradient(self._loss, turns)))

    def other_gradients(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """Each of other micro-batches, of all ranks, with the gradient of its own mean loss, (n,); taken once."""
        own = (weighted_gradient(self._loss, [Turn(batch, 1.0)]) for batch, _ in self._rounds(batches))
        return self._dealt_out(batches, own)

    def part(self, positions: Iterable[int]) -> Hessian:
        """The Hessian over some of the micro-batches, sharing the retained graphs.

        Rounds in which no rank has anything left are passed over; in the others every rank still takes its turn.
        """
        chosen = {self.batches[position].index for position in positions}
        part = copy.copy(self)
        part.batches = tuple(batch for batch in self.batches if batch.index in chosen)
        total = sum(batch.weight for batch in part.batches)
        of_round = [{b.index for b in together} for together in by_rounds(self.batches, self.partition.ranks)]
        kept = [number for number, indices in enumerate(of_round) if indices & chosen]
        part._turns = []
        for batch, share in (self._turns[number] for number in kept):
            part._turns.append(Turn(batch, batch.weight / total if share and batch.index in chosen else 0.0))
        part._graphs = [self._graphs[number] for number in kept]
        part._mean = None
        return part

    def _rounds(self, batches: Sequence[MicroBatch]) -> list[Turn]:
        return rounds(batches, self.partition.ranks, held=self.batches)

    def _retain(self, memory: float) -> None:
        """Build every graph once, for the gradient; keep those that fit, on all ranks equally many."""
        used = 0

        def built() -> Iterator[GradientGraph]:
            nonlocal used
            for batch, _ in self._turns:
                with _SavedBytes() as saved:
                    graph = self._graph_class.build(self._loss, batch)
                used += saved.bytes(graph)
                self._graphs.append(graph if used <= memory else None)
                yield graph

        self._mean = self._weighted_mean(lambda graph: graph.gradients, built())
        count = self.partition.ranks.smallest(self.num_retained)
        self._graphs = [graph if number < count else None for number, graph in enumerate(self._graphs)]

    def _weighted_mean(
        self, part: Callable[[GradientGraph], Sequence[Tensor | None]], graphs: Iterable[GradientGraph] | None = None
    ) -> Tensor:
        """This rank's part of the mean over all turns of all ranks."""

        def add(total: Tensor) -> None:
            for (_, share), graph in zip(self._turns, self._all_graphs() if graphs is None else graphs, strict=True):
                values = self._loss.space.flatten(part(graph), like=total)
                if share:
                    total.add_(values, alpha=share)

        return self._summed(add)

    def _summed(self, add: Callable[[Tensor], object]) -> Tensor:
        """This rank's part of the sum over ranks of what each adds to zeros.

        All get to the sum: a rank that fails contributes nan, and raises behind it.
        """
        failure: Exception | None = None
        try:
            add(self._transfers.total.zero_())
        except Exception as error:
            failure = error
            self._transfers.total.fill_(math.nan)
        local = self._transfers.sum_scatter()
        if failure is not None:
            raise failure
        return local

    def _dealt_out(self, batches: Sequence[MicroBatch], own: Iterable[Tensor]) -> Iterator[tuple[MicroBatch, Tensor]]:
        """This rank's part of one whole vector a micro-batch, from what each rank has of its own in every round."""
        ranks = self.partition.ranks
        for together, vector in zip(by_rounds(batches, ranks), own, strict=True):
            parts = self.partition.exchange(vector.to(self.dtype))
            for batch in together:
                yield batch, parts[owner(batch, ranks)]

    def _all_graphs(self) -> Iterator[GradientGraph]:
        for (batch, _), graph in zip(self._turns, self._graphs, strict=True):
            yield graph if graph is not None else self._graph_class.build(self._loss, batch)


class _SavedBytes:
    """Count what a graph that is built while this is open keeps, each storage once.

    Parameters are left out, also where a view of one is saved (the transposed weight of a linear layer): the graphs of
    all micro-batches share them.
    """

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}  # bytes by address; what takes the place of something freed counts alone
        self._parameters: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> _SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)

    def bytes(self, graph: GradientGraph) -> int:
        """Bytes of what autograd has saved and of what the graph holds by itself."""
        for tensor in graph.held:
            self._add(tensor)
        shared = self._parameters.union(leaf.untyped_storage().data_ptr() for leaf in graph.leaves)
        return sum(size for address, size in self._storages.items() if address not in shared)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, torch.nn.Parameter):
            self._parameters.add(base.untyped_storage().data_ptr())
        else:
            self._add(tensor)
        return tensor.detach()  # autograd attaches the graph again; returning the tensor itself would be a cycle

    def _add(self, tensor: Tensor) -> None:
        # A sparse gradient (of nn.Embedding) has no storage of its own.
        for piece in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = piece.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()


def _memory_budget(device: torch.device, num_ranks: int) -> float:
    """Half of the memory that is free now; of a host's, what comes to one rank if all are on it."""
    if device.type == "cuda":  # untested: no GPU was available
        return MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    try:
        free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not Linux
        free = float(4 << 30)
    return MEMORY_SHARE * min(free, _left_in_container()) / num_ranks


def _left_in_container() -> float:
    """What the limit of this process's container leaves, of which the host knows nothing; infinite without one."""
    try:
        limit, taken = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or no limit: "max"
        return math.inf
    return float(max(limit - taken, 0))
