"""Parts of the batches of a sample: the same examples, each once, with the same weights in sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.parts import cut_sample
from lightning_subspace.data.sample import Sample, SampleSpec
from lightning_subspace.parallel.ranks import Ranks


def batches(sizes, data=lambda start, size: torch.arange(start, start + size)):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [MicroBatch(data(s, n), 2.0 * n, i, size=n) for i, (s, n) in enumerate(zip(starts, sizes, strict=True))]


def spec(sample, batch_size=None):
    return SampleSpec(sample, 10_000, batch_size, None, 0)


def sizes(part):
    return [batch.size for batch in part]


@pytest.mark.parametrize(
    ("given_sizes", "sample", "batch_size", "hessian", "extra"),
    [
        ([8, 8, 8], 10, None, [8, 8], [8]),
        ([8, 8, 8], 8, None, [8], [8, 8]),
        ([8, 8], 3, None, [3], [5, 8]),
        ([8, 8], 3, 2, [1, 2], [1, 2, 2, 2, 2, 2, 2]),
        ([8, 8], 16, 3, [2, 3, 3, 2, 3, 3], []),
        ([5, 9], 14, 4, [2, 3, 3, 3, 3], []),
    ],
)
def test_sizes(given_sizes, sample, batch_size, hessian, extra):
    found = cut_sample(Sample.of(batches(given_sizes), sample), spec(sample, batch_size), Ranks())
    assert (sizes(found.hessian), sizes(found.extra)) == (hessian, extra)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 30), st.integers(1, 9) | st.none())
def test_every_example_is_there_once_and_weighs_the_same(given_sizes, sample, batch_size):
    whole = Sample.of(batches(given_sizes), sample)
    found = cut_sample(whole, spec(sample, batch_size), Ranks())
    every = (*found.hessian, *found.extra)
    assert sorted(int(i) for batch in every for i in batch.data) == list(range(sum(given_sizes)))
    assert all(batch.weight == pytest.approx(2.0 * batch.size) for batch in every)
    assert len({batch.index for batch in every}) == len(every)
    assert batch_size is None or max(sizes(every)) <= batch_size
    assert sum(sizes(found.hessian)) >= min(sample, sum(sizes(whole.hessian)))


def test_what_has_no_parts_stays_whole():
    ragged = batches([4], lambda start, size: [torch.zeros(4, 2), torch.zeros(7)])
    whole = Sample.of(ragged, 2)
    assert cut_sample(whole, spec(2), Ranks()) is whole


def test_parts_stay_on_the_rank_of_their_batch():
    alone = Ranks()
    alone.count = 2  # no collective is asked for: one process
    local = [MicroBatch(torch.zeros(8), 8.0, 0, size=8), MicroBatch(None, 8.0, 1, size=8, is_local=False)]
    found = cut_sample(Sample.of([*local], 6), spec(6), alone)
    assert [(batch.size, owner_rank(batch, alone)) for batch in found.hessian] == [(3, 0), (3, 1)]
    assert [(batch.size, owner_rank(batch, alone)) for batch in found.extra] == [(5, 0), (5, 1)]
    assert [batch.is_local for batch in found.hessian] == [True, False]
