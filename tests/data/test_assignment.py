"""Assignment: each micro-batch to one rank, equally many evaluations on all, shares that sum to one."""

import pytest

from lightning_subspace.data.assignment import assign, group_by_round, owner_rank
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.parallel.ranks import Ranks


def rank(index, count):
    ranks = Ranks()
    ranks.index, ranks.count = index, count
    return ranks


def batches(number, ranks):
    """As a rank holds them: with the data of its own and of the first."""
    return [MicroBatch(None, i + 1.0, i, is_local=i % ranks.count == ranks.index or i == 0) for i in range(number)]


@pytest.mark.parametrize("number", [1, 2, 5, 6])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_micro_batch_counts_once_in_equally_many_rounds(number, count):
    total = number * (number + 1) / 2
    all_ranks = [rank(index, count) for index in range(count)]
    assigned = [assign(batches(number, ranks), ranks) for ranks in all_ranks]
    assert {len(own) for own in assigned} == {-(-number // count)}
    shares = {one.batch.index: one.share for own in assigned for one in own if one.share}
    assert shares == {i: (i + 1.0) / total for i in range(number)}
    assert all(one.batch.is_local for own in assigned for one in own)
    for ranks, own in zip(all_ranks, assigned, strict=True):
        assert all(owner_rank(one.batch, ranks) == ranks.index for one in own if one.share)


def test_rounds_are_the_same_seen_from_any_rank():
    rounds = [
        [[b.index for b in together] for together in group_by_round(batches(5, r), r)] for r in (rank(0, 2), rank(1, 2))
    ]
    assert rounds == [[[0, 1], [2, 3], [4]]] * 2
    assert group_by_round([], rank(0, 2)) == []


def test_a_rank_without_one_left_evaluates_a_filler_at_weight_zero():
    ranks = rank(1, 2)
    first, second = batches(2, ranks)
    mine = assign([first], ranks, fillers=[second])
    assert [(one.batch, one.share) for one in mine] == [(first, 0.0)]
    elsewhere = MicroBatch(None, 1.0, 0, is_local=False)
    assert assign([elsewhere], ranks, fillers=[second]) == [(second, 0.0)]
    with pytest.raises(ValueError, match="at least one micro-batch whose data are on this rank"):
        assign([elsewhere], ranks)
