"""Products over joined micro-batches, where the loss is a mean over examples.

    sum_b w_b L_b / sum_b w_b = L(all examples of the b)

A product of a small micro-batch takes as long as its operations take to start. Where the equation holds, several become
one (`data/joined.py`) for products and values of the loss; gradients stay those of the single ones, as the error bar
needs them. Before the first probe each rank compares two of them with both in one, value and gradient, in float64 at a
jittered theta. That refuses batch-norm in train mode, sums, contrastive losses, means over tokens whose weights are not
the numbers of tokens, and losses that depend on `batch_idx`; so does a loss that draws random numbers, whose masks
would be others. Every probe compares again, over the whole sample, in its own precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.curvature.gradient import pruned_gradient
from lightning_subspace.curvature.graph_memory import Footprint, SavedBytes, memory_budget
from lightning_subspace.curvature.hessian import GradientGraph, RetainedGraphs
from lightning_subspace.curvature.self_check import checking, drawn
from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.joined import data_bytes, grouped, joined
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import ElsewhereError, WrittenError
from lightning_subspace.loss.training_loss import TrainingLoss, place_of
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import PeerError, Ranks, in_words
from lightning_subspace.state.failure import is_out_of_memory
from lightning_subspace.state.rng import next_numbers
from lightning_subspace.state.signals import SignalError

# Largest difference that is rounding, relative to the parts: sums of another order leave 1e-15 and 1e-6 (measured for
# MLPs, convolutions and transformers).
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
# Bytes of a graph that several micro-batches may share. On a CPU operations start fast, and larger arrays leave its
# caches: joined graphs of 1 to 26 MB made products 2 to 7 times as fast, of 100 MB none, and of 200 MB slower (one
# thread; MLPs, convolutions and transformers of n = 9e4 to 9e5, 16 micro-batches).
CPU_BYTES = 24 << 20
CUDA_SHARE = 1 / 8  # of all memory on the card; untested: no GPU was available

SHORT = "there was not enough memory for it"
PAIR = "the loss of two in one cannot be evaluated"
NO_MEAN = "the loss of {} is not the mean of theirs: value or gradient are apart by {:.1e}"
# What says nothing about the joined ones: others answer it.
NOT_OF_THE_SIZE = (ElsewhereError, PeerError, SignalError, WrittenError)


class JoinError(RuntimeError):
    """Micro-batches that cannot be joined, on any rank."""


class JoinedLossError(RuntimeError):
    """A loss of joined micro-batches that cannot be evaluated, on one rank."""


class Joined(BatchMean):
    """An operator whose products are taken over joined micro-batches.

    Args:
        parts: over the single ones; it gives gradients, and the parts that are no union of groups.
        whole: over the joined ones.
        groups: the positions of the single ones in each joined one.
    """

    def __init__(self, parts: BatchMean, whole: BatchMean, groups: Sequence[tuple[int, ...]]) -> None:
        vars(self).update(vars(parts))
        self._parts, self._whole, self._groups = parts, whole, groups

    def matvec(self, v: Tensor) -> Tensor:  # (n,) -> (n,)
        """A v, by one product with every joined micro-batch."""
        return self._whole.matvec(v)

    def value(self, offset: Tensor | None) -> float:  # (n,)
        """Mean loss at theta + offset, finite or not."""
        return self._whole.value(offset)

    def part(self, positions: Iterable[int]) -> BatchMean:
        """The operator over some micro-batches, joined where whole groups are asked for."""
        chosen = sorted({range(len(self.batches))[position] for position in positions})
        parts, rank = self._parts.part(chosen), {position: i for i, position in enumerate(chosen)}
        inside = [i for i, group in enumerate(self._groups) if all(position in rank for position in group)]
        groups = [tuple(rank[position] for position in self._groups[i]) for i in inside]
        if sum(map(len, groups)) < len(chosen):
            return parts
        return Joined(parts, self._whole.part(inside), groups)

    def _gradient_of(self, batch: MicroBatch) -> Tensor:
        return self._parts._gradient_of(batch)

    def _centre(self) -> Tensor:
        return self._whole._centre() if self._mean is None else self._mean  # that of the parts, if it is known


def joined_operator(
    operator: Callable[..., BatchMean],
    loss: TrainingLoss,
    batches: Sequence[MicroBatch],
    partition: Partition,
    most: int,
    footprint: Footprint | None = None,
    *,
    nbytes: float = math.inf,
) -> BatchMean:
    """The operator over the sample, its micro-batches joined. A collective.

    Costs one gradient more than without.

    Args:
        operator: a class below `RetainedGraphs`.
        loss: as for `BatchMean`, like `batches` and `partition`.
        batches: the sample.
        partition: how vectors are dealt to ranks.
        most: how many become one, at most.
        footprint: of what the joined ones hold.
        nbytes: what the data of one may have, at most.

    Raises:
        JoinError: where the gradient of the joined ones is not that of the single ones.
        JoinedLossError: where theirs cannot be evaluated on this rank.
    """
    groups = grouped(batches, partition.ranks, most, nbytes)
    if len(groups) == len(batches):
        return operator(loss, batches, partition=partition, footprint=footprint)
    parts = operator(loss, batches, partition=partition, memory=0.0)
    try:
        together = [joined([batches[i] for i in group]) for group in groups]
        whole = operator(loss, together, partition=partition, footprint=footprint)
        vars(whole)["_buffers"] = parts._buffers  # one pair of vectors is enough: products are taken one by one
        assert isinstance(parts, RetainedGraphs)
        assert isinstance(whole, RetainedGraphs)
        difference = _difference(loss, parts, whole)
    except Exception as error:  # the user's code may fail in any way on a batch of another size
        if isinstance(error, NOT_OF_THE_SIZE) or is_out_of_memory(error):
            raise
        raise JoinedLossError(f"the loss of joined ones cannot be evaluated ({in_words(error)})") from error
    if not difference <= ROUNDING[loss.dtype]:
        raise JoinError(NO_MEAN.format("joined ones, over the whole sample,", difference))
    if footprint is not None:
        copies = (one.data for one, group in zip(together, groups, strict=True) if len(group) > 1 and one.is_local)
        footprint.joined = sum(map(data_bytes, copies))
    return Joined(parts, whole, groups)


def most_joined(
    loss: TrainingLoss, wide: TrainingLoss, batches: Sequence[MicroBatch], ranks: Ranks, *, seed: int = 0
) -> tuple[int, float]:
    """How many micro-batches may be joined, and bytes of data. A collective.

    A power of two, which is 1 where there are too few of them; and what the data of a joined one may have, at most, so
    that its graph is not too large. Costs a graph of the largest one, and in float64 three gradients, the last one of
    two in one.

    Args:
        loss: of the probe, not open.
        wide: the same in float64, not open.
        batches: the sample.
        ranks: the processes that share it.
        seed: of the jitter.

    Raises:
        JoinError: when none may be, with the reason.
        LossError: when a loss cannot be evaluated.
    """
    if len(batches) < 3 * ranks.count:  # one half each is what the error bar needs
        return 1, math.inf
    pairs = _pairs(batches, ranks)
    if not pairs:  # on all ranks: whole rounds are joined
        raise JoinError("no two have data of one structure")
    sizes = [data_bytes(batch.data) for pair in pairs for batch in pair]
    with loss:
        if any(ranks.all_gather_object(_draws(loss, pairs[0][0]))):
            raise JoinError("the loss draws random numbers, which would be others")
        saved = SavedBytes()
        with saved:
            largest = max((batch for pair in pairs for batch in pair), key=lambda batch: data_bytes(batch.data))
            graph = GradientGraph.build(loss, largest)
        # The gradients beside it are shared.
        found = ranks.all_gather_object((max(sizes), saved.count([], graph.leaves), min(sizes), saved.narrow))
        del graph
        room = min(ranks.all_gather_object(_largest_graph(loss.device, ranks)))
    if (narrow := next((one[-1] for one in found if one[-1] is not None), None)) is not None:
        raise JoinError(f"rounding of {str(narrow).removeprefix('torch.')} would hide a difference")
    # A graph has as many bytes in proportion to its data as the largest one, or fewer: attention grows by the square.
    size, of_graph = max(one[:2] for one in found)
    nbytes = room * size / max(of_graph, 1)
    most = 1 << int(math.log2(max(nbytes / max(min(one[2] for one in found), 1), 1.0)))
    pairs = _pairs(batches, ranks, nbytes)
    if most == 1 or not pairs:
        raise JoinError(f"they are large enough, with graphs of {of_graph / 1e6:.0f} MB")
    differences = ranks.all_gather_object(_difference_of_pair(wide, pairs[0], seed))
    limit = ROUNDING[wide.dtype]
    if any(isinstance(one, str) and one != PAIR for one in differences):  # float64 can fail in any way
        differences = ranks.all_gather_object(_difference_of_pair(loss, pairs[0], seed))
        limit = ROUNDING[loss.dtype]
    for one in sorted(differences, key=lambda one: isinstance(one, float)):  # reasons first
        if isinstance(one, str):
            raise JoinError(one)
        if not one <= limit:
            raise JoinError(NO_MEAN.format("two in one", one))
    return most, nbytes


def _pairs(batches: Sequence[MicroBatch], ranks: Ranks, nbytes: float = math.inf) -> list[list[MicroBatch]]:
    """Pairs that this rank would join, in order. A collective."""
    groups = [[batches[i] for i in group] for group in grouped(batches, ranks, 2, nbytes)]
    return [group for group in groups if len(group) == 2 and owner_rank(group[0], ranks) == ranks.index]


def _draws(loss: TrainingLoss, batch: MicroBatch) -> bool:
    """Whether a forward pass draws random numbers."""
    loss.value_at(None, [(batch, 1.0)])
    behind = next_numbers()
    loss.seed_generators(batch)
    return behind != next_numbers()


def _largest_graph(device: torch.device, ranks: Ranks) -> float:
    """Bytes of a joined graph at most.

    A fixed number where there is memory: on the groups depends how products are rounded.
    """
    room = (
        memory_budget(device, ranks.count) / 2
    )  # so that one that is rebuilt finds a place beside those that are kept
    if device.type == "cpu":
        return min(CPU_BYTES, room)
    if device.type == "cuda":
        return min(CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory, room)
    return room


def _difference_of_pair(loss: TrainingLoss, pair: Sequence[MicroBatch], seed: int) -> float | str:
    """Distance of two in one from their mean, or why none.

    Relative to their own sizes, in value or gradient, the larger one.

    Raises:
        LossError: when the loss depends on parameters elsewhere, or is to be evaluated again.
        SignalError: when a signal has come meanwhile.
    """
    jitter, _ = drawn(loss, 0, seed)
    total = sum(batch.weight for batch in pair)
    one, found = None, []
    try:
        with checking(loss):
            for batch in pair:
                found.append(_at(loss, jitter, batch))
            one = joined(pair)
            value, gradient = _at(loss, jitter, one)
    except NOT_OF_THE_SIZE:
        raise
    except Exception as error:  # what else the user's code does with a batch of another size decides nothing but this
        if is_out_of_memory(error):
            return SHORT
        return "their loss cannot be evaluated" if one is None else PAIR
    shares = [batch.weight / total for batch in pair]
    mean = sum(share * part for share, (part, _) in zip(shares, found, strict=True))
    size = sum(share * abs(part) for share, (part, _) in zip(shares, found, strict=True))
    of_value = abs(value - mean) / size if size else abs(value - mean)
    slope = torch.stack([share * part for share, (_, part) in zip(shares, found, strict=True)])
    length = float(slope.norm(dim=1).sum())
    apart = float((gradient - slope.sum(dim=0)).norm())
    return max(of_value, apart / length if length else apart)


def _at(loss: TrainingLoss, offset: Tensor, batch: MicroBatch) -> tuple[float, Tensor]:
    value = loss.value_at(offset, [(batch, 1.0)])
    loss.displace(offset)
    return value, pruned_gradient(loss, batch)


def _difference(loss: TrainingLoss, parts: RetainedGraphs, whole: RetainedGraphs) -> float:
    """How far joined ones are from single ones. A collective.

    Relative to their own sizes, in loss or gradient, the larger one.
    """
    apart = (parts._centre() - whole._centre()).double().square().sum()
    # The gradients may cancel in the mean, and what is left be smaller than their rounding.
    sizes = [
        share * whole._flat_gradient(graph).double().square().sum()
        for (_, share), graph in zip(whole._assignments, whole._graphs(), strict=True)
    ]
    losses = [
        torch.stack([share * loss.values[place_of(batch)].double() for batch, share in one._assignments if share])
        for one in (parts, whole)
    ]
    numbers = [apart, torch.stack(sizes).sum(), losses[0].sum() - losses[1].sum(), losses[0].abs().sum()]
    found: list[float] = parts.partition.ranks.all_reduce(torch.stack(numbers)).tolist()
    square, size, of_value, scale = found
    return max(math.sqrt(square / size) if size else square, abs(of_value) / scale if scale else abs(of_value))
