"""Vectors dealt to any number of ranks, in any ranges, are together the whole vector; each number is sent once."""

import math
from itertools import accumulate, pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_subspace.linalg import normals
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition, VectorBuffers
from lightning_subspace.parallel.ranks import Ranks
from tests.processes import run
from tests.thorough import how_many

FEW = settings(max_examples=how_many(20, thorough=60), deadline=None, derandomize=True, database=None)


class FakeRanks(Ranks):
    """One of several ranks in this process. What it sends lies in `sent`; it gets something when all have sent."""

    def __init__(self, index, count, sent):
        super().__init__()
        self.index, self.count, self.sent = index, count, sent

    def _exchanged(self, tensor):
        self.calls["transfers"] += 1
        self.nbytes["transfers"] += tensor.nbytes
        self.sent[self.index] = tensor.clone()
        return [self.sent[rank] for rank in range(self.count)] if len(self.sent) == self.count else None

    def all_gather(self, local, out):
        if (parts := self._exchanged(local)) is not None:
            out.copy_(torch.cat(parts))

    def reduce_scatter(self, whole, out):
        if (wholes := self._exchanged(whole)) is not None:
            out.copy_(torch.stack(wholes).sum(0).chunk(self.count)[self.index] if len(whole) else out)

    def all_to_all(self, whole):
        wholes = self._exchanged(whole)
        if wholes is None or not len(whole):
            return whole
        return torch.cat([other.chunk(self.count)[self.index] for other in wholes])


def on_all(partitions, method):
    """Pairs of a partition and what a method of it gives: of all ranks in this process, when all have called it."""
    if isinstance(partitions[0].ranks, FakeRanks):
        partitions[0].ranks.sent.clear()
        for partition in partitions:
            method(partition)
    return [(partition, method(partition)) for partition in partitions]


def even_cut(space, count):
    return Partition.even(space, FakeRanks(0, count, {})).ranges


def shards(space, count):
    """As FSDP2 does: each parameter by its rows, the first ranks the larger parts, the last ones perhaps nothing."""
    held = [[] for _ in range(count)]
    start = 0
    for shape, numel in zip(space.shapes, space.numels, strict=True):
        rows = shape[0] if shape else 1
        size, row = -(-rows // count), numel // max(rows, 1)
        for rank, ranges in enumerate(held):
            first, last = (start + min(r * size, rows) * row for r in (rank, rank + 1))
            ranges.append(range(first, last))
        start += numel
    return tuple(map(tuple, held))


@st.composite
def pieces(draw, space, count):
    """Any pieces to any rank."""
    cuts = sorted({0, space.n, *draw(st.lists(st.integers(0, space.n), max_size=8))})
    held = [[range(0, 0)] for _ in range(count)]
    for first, last in pairwise(cuts):
        held[draw(st.integers(0, count - 1))].append(range(first, last))
    return tuple(map(tuple, held))


@st.composite
def spaces(draw):
    """A few parameters of any shape: scalars, empty and complex ones too."""
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5))
    names = tuple(f"p{i}" for i in range(len(shapes)))
    is_complex = draw(st.sets(st.sampled_from(names)))
    return ParameterSpace(names, tuple(map(torch.Size, shapes)), frozenset(is_complex))


@st.composite
def worlds(draw):
    """The partition of every rank of a world."""
    space, count = draw(spaces()), draw(st.integers(1, 7))
    any_pieces, sent = draw(pieces(space, count)), {}
    ranges = draw(st.sampled_from([even_cut(space, count), shards(space, count), any_pieces]))
    return [Partition(space, ranges, FakeRanks(rank, count, sent)) for rank in range(count)]


def vectors(count, n, seed=0):
    return list(torch.randn(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def coordinates(partition):
    return [i for piece in partition.local_ranges for i in piece]


def sum_scatter(partition, whole):
    buffers = VectorBuffers(partition, whole.dtype, whole.device)
    buffers.total.copy_(whole)
    return buffers.sum_scatter()


def check(partitions, wholes):
    """All that a partition does, against the whole vectors, one of each rank."""
    alone = Partition.even(partitions[0].space)
    for p, local in on_all(partitions, lambda p: p.cut(wholes[0])):
        own = coordinates(p)
        assert p.local_n == len(own)
        assert torch.equal(local, wholes[0][own])
        assert torch.equal(p.cut(torch.stack(wholes)), torch.stack(wholes)[:, own])
        local.zero_()  # a copy
    assert wholes[0].any() or not alone.n

    for _, whole in on_all(partitions, lambda p: p.gather(p.cut(wholes[0]))):
        assert torch.equal(whole, wholes[0])
    for p, local in on_all(partitions, lambda p: sum_scatter(p, wholes[p.ranks.index])):
        rounding = 50 * torch.finfo(local.dtype).eps
        assert torch.allclose(local, p.cut(torch.stack(wholes).sum(0)), rtol=0, atol=rounding)
    for p, parts in on_all(partitions, lambda p: p.exchange(wholes[p.ranks.index])):
        assert torch.equal(parts, torch.stack([p.cut(whole) for whole in wholes]))
    for dtype in (torch.float32, torch.float64):
        expected = alone.random(3, 5, dtype)
        assert expected.dtype == dtype
        for p, local in on_all(partitions, lambda p, dtype=dtype: p.random(3, 5, dtype)):
            assert torch.equal(local, p.cut(expected))


# -- in one process ---------------------------------------------------------------------------------------------------


@given(spaces(), st.integers(1, 9))
@FEW
def test_a_flat_cut_gives_each_coordinate_to_one_rank(space, count):
    partitions = [Partition.even(space, FakeRanks(rank, count, {})) for rank in range(count)]
    assert [i for partition in partitions for i in coordinates(partition)] == list(range(space.n))
    size = math.ceil(space.n / count)
    for rank, partition in enumerate(partitions):
        assert partition.local_n == min(size, max(0, space.n - rank * size))
        assert len(partition.local_ranges) == 1


@given(worlds(), st.integers(0, 3))
@FEW
def test_whole_vectors_and_dealt_ones_agree(partitions, seed):
    space = partitions[0].space
    wholes = vectors(len(partitions), space.n, seed)

    check(partitions, wholes)
    with mock.patch.object(normals, "_BLOCK", 3):
        check(partitions, wholes)


@given(worlds())
@FEW
def test_buffers_serve_many_transfers(partitions):
    buffers = {id(p): VectorBuffers(p, torch.float64, torch.device("cpu")) for p in partitions}

    def summed(p):
        buffers[id(p)].total.copy_(wholes[p.ranks.index])
        return buffers[id(p)].sum_scatter()

    for seed in range(2):
        wholes = vectors(len(partitions), partitions[0].n, seed)
        for _, whole in on_all(partitions, lambda p, first=wholes[0]: buffers[id(p)].gather(p.cut(first)).clone()):
            assert torch.equal(whole, wholes[0])
        for p, local in on_all(partitions, summed):
            assert torch.allclose(local, p.cut(torch.stack(wholes).sum(0)))


@given(worlds())
@FEW
def test_a_transfer_sends_a_vector_once(partitions):
    """And the padding of the shorter parts: nothing for a flat cut that comes out even."""
    count, n = len(partitions), partitions[0].n
    longest = max(partition.local_n for partition in partitions)
    whole = torch.zeros(n)
    for method in (
        lambda p: p.gather(torch.zeros(p.local_n)),
        lambda p: sum_scatter(p, whole),
        lambda p: p.exchange(whole),
    ):
        sent = {}
        for rank, partition in enumerate(partitions):
            ranks = FakeRanks(rank, count, sent)
            method(Partition(partition.space, partition.ranges, ranks))
            assert ranks.calls["transfers"] == (count > 1)
    if count > 1:
        assert ranks.nbytes["transfers"] == 4 * count * longest


@given(worlds())
@FEW
def test_local_coordinates_are_found_in_the_parameters(partitions):
    space = partitions[0].space
    whole = torch.arange(space.n)
    starts = dict(zip(space.names, accumulate(space.numels, initial=0), strict=False))
    numels = dict(zip(space.names, space.numels, strict=True))
    for partition in partitions:
        local, found = partition.cut(whole), []
        for name, offset, place in partition.locate():
            assert 0 <= offset < offset + len(place) <= numels[name]
            first = starts[name] + offset
            assert torch.equal(local[place.start : place.stop], whole[first : first + len(place)])
            found.extend(place)
        assert found == list(range(partition.local_n))


@given(worlds(), st.data())
@FEW
def test_flatten_is_a_part_of_the_whole_flat_vector(partitions, data):
    space = partitions[0].space
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        dtype = torch.complex64 if name in space.complex_names else torch.float32
        tensor = torch.randn(shape, generator=generator, dtype=dtype)
        kind = data.draw(st.sampled_from(["dense", "none", "sparse", "conj", "strided"]))
        if kind == "none":
            tensor = None
        elif kind == "sparse" and tensor.ndim:
            tensor = tensor.to_sparse()
        elif kind == "conj":
            tensor = tensor.conj()
        elif kind == "strided":
            tensor = torch.stack([tensor, tensor], dim=-1)[..., 0]
        tensors.append(tensor)
    like = torch.zeros((), dtype=torch.float64)
    whole = space.flatten(tensors, like)
    for partition in partitions:
        local = partition.flatten(tensors, like)
        assert local.dtype == torch.float64
        assert torch.equal(local, partition.cut(whole))


def test_flatten_refuses_what_has_another_shape():
    space = ParameterSpace.of(torch.nn.Linear(3, 2))
    first, second = (Partition.even(space, FakeRanks(rank, 2, {})) for rank in range(2))
    wrong = [torch.zeros(3, 2), torch.zeros(2)]
    for partition in (first, second):
        with pytest.raises(ValueError, match=r"'weight': expected shape \(2, 3\), got \(3, 2\)"):
            partition.flatten(wrong, torch.zeros(1))


def test_random_numbers_are_the_same_for_any_number_of_ranks():
    n = 100_003
    space = ParameterSpace(("p",), (torch.Size([n]),))
    whole = Partition.even(space).random(1, 2)
    for count in (2, 3):
        parts = [Partition.even(space, FakeRanks(rank, count, {})).random(1, 2) for rank in range(count)]
        assert torch.equal(torch.cat(parts), whole)
    assert abs(float(whole.mean())) < 5 / n**0.5
    assert abs(float(whole.var()) - 1) < 10 / n**0.5


def test_random_vectors_of_different_seeds_and_numbers_differ_and_disturb_nothing():
    partition = Partition.even(ParameterSpace(("p",), (torch.Size([50]),)))
    state = torch.get_rng_state()
    drawn = {tuple(partition.random(seed, number).tolist()) for seed in range(4) for number in range(10)}
    assert len(drawn) == 40
    assert tuple(partition.random(2, 3).tolist()) in drawn
    assert torch.equal(torch.get_rng_state(), state)


# -- in several -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_processes_agree_with_one(count):
    """Lengths that come out even and others, fewer coordinates than ranks, shards, and parts out of order."""
    of_shapes = [[(2, 3), (6,)], [(5, 4), (5,), (3, 5), (3,)], [(1,)], [(2,), ()], [(7, 1, 2), (4,)]]
    spaces = [
        ParameterSpace(tuple(f"p{i}" for i in range(len(shapes))), tuple(map(torch.Size, shapes)))
        for shapes in of_shapes
    ]

    def reverse(space, count):
        return even_cut(space, count)[::-1]

    def in_a_process():
        ranks = Ranks(dist.group.WORLD)
        gathered = []
        for space in spaces:
            for deal in (even_cut, shards, reverse):
                partition = Partition(space, deal(space, count), ranks)
                for dtype in (torch.float32, torch.float64):
                    wholes = [whole.to(dtype) for whole in vectors(count, space.n)]
                    ranks.calls.clear()
                    check([partition], wholes)
                    assert ranks.calls == {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
                gathered.append(partition.gather(partition.random(0, 1)).tolist())
        return gathered

    found = run(in_a_process, count)
    expected = [Partition.even(space).random(0, 1).tolist() for space in spaces for _ in range(3)]
    assert found == [expected] * count
