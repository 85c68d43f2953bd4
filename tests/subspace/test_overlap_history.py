"""Overlaps between probes: a bounded number of sketches, and the numbers between them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.sketch import CELLS, Sketch, sketch
from lightning_subspace.subspace.subspace import overlap

K = 3


def random_basis(n, seed, k=K):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0].T.contiguous()


def drifting_bases(n, count, seed=0):
    """Spaces that turn slowly, so that overlaps of every size occur."""
    first, last = random_basis(n, seed), random_basis(n, seed + 1)
    mixes = [(1.0 - t) * first + t * last for t in np.linspace(0.0, 1.0, count)]
    return [torch.linalg.qr(mix.T)[0].T.contiguous() for mix in mixes]


def exact_sketches(count, n=20):
    return [Sketch(basis.float(), exact=True) for basis in drifting_bases(n, count)]


def kept_steps(history):
    return sorted(history.sketches)


def test_nothing_yet():
    steps, matrix = OverlapHistory().matrix()
    assert steps == []
    assert matrix.shape == (0, 0)
    assert OverlapHistory().error is None


def test_the_matrix_is_symmetric_has_a_unit_diagonal_and_agrees_with_the_bases():
    bases = drifting_bases(20, 6)
    history = OverlapHistory()
    for step, basis in enumerate(bases):
        assert history.add(10 * step, Sketch(basis, exact=True)) is None
    steps, matrix = history.matrix()
    assert steps == [0, 10, 20, 30, 40, 50]
    assert (matrix == matrix.T).all()
    assert (matrix.diagonal() == 1.0).all()
    np.testing.assert_allclose(matrix, [[overlap(a, b) for b in bases] for a in bases], atol=1e-12)
    assert history.error is None


def test_estimates_are_within_the_stated_error():
    space = Partition.even(ParameterSpace.of(nn.Linear(150, 100)))
    assert space.n > CELLS
    bases = drifting_bases(space.n, 8)
    history = OverlapHistory()
    for step, basis in enumerate(bases):
        history.add(step, sketch(basis, space))
    exact = np.array([[overlap(a, b) for b in bases] for a in bases])
    assert history.error == pytest.approx(sketch(bases[0], space).error)
    assert 0.001 < history.error < 0.01
    difference = history.matrix()[1] - exact
    assert np.abs(difference).max() <= 4.0 * history.error
    assert math.sqrt(np.mean(difference[np.triu_indices(8, 1)] ** 2)) <= 1.5 * history.error


@pytest.mark.parametrize("keep", [2, 5, 16])
def test_at_most_keep_sketches_are_held_the_first_and_the_last_among_them(keep):
    history = OverlapHistory(keep)
    sketches = exact_sketches(40)
    gone = set()
    for index, one in enumerate(sketches):
        given_up = history.add(100 * index, one)
        assert (given_up is not None) == (index >= keep)
        if given_up is not None:
            assert given_up not in gone
            gone.add(given_up)
        held = kept_steps(history)
        assert len(held) == min(index + 1, keep)
        assert held[0] == 0
        assert held[-1] == 100 * index
        assert not gone & set(held)


def test_what_is_kept_is_spread_over_the_logarithm_of_the_step():
    keep = 12
    history = OverlapHistory(keep)
    one = exact_sketches(1)[0]
    for step in range(0, 100_001, 50):
        history.add(step, one)
    places = np.log1p(kept_steps(history))[1:]  # behind 0
    gaps = np.diff(places)
    assert gaps.max() <= 3.0 * np.median(gaps)
    # A regular spacing in steps would have its first gap at log(9000 / 50) of the whole log(2000).
    assert places[1] - places[0] < 0.35 * (places[-1] - places[0])


def test_overlaps_go_with_their_sketches_and_the_others_stay_what_they_are():
    sketches = exact_sketches(30)
    short, long = OverlapHistory(4), OverlapHistory(100)
    for step, one in enumerate(sketches):
        short.add(step, one)
        long.add(step, one)
        held = kept_steps(short)
        steps, matrix = short.matrix()
        assert steps == held
        assert not np.isnan(matrix).any()
        np.testing.assert_array_equal(matrix, long.matrix()[1][np.ix_(held, held)])
        assert len(short.pairs) == len(held) * (len(held) - 1) // 2
    assert steps[-1] == 29


def test_a_step_that_is_taken_back_or_given_out_of_order_leaves_no_pair_behind():
    one, two, three = exact_sketches(3)
    history = OverlapHistory(3)
    for step, sketch_ in ((10, one), (0, two), (5, three)):  # as a loop of the user's own may count
        history.add(step, sketch_)
    assert sorted(history.pairs) == [(0, 5), (0, 10), (5, 10)]
    assert history.matrix()[1][0, 1] == overlap(one.basis, two.basis)
    history.forget(0)
    assert list(history.pairs) == [(5, 10)]
    history.add(20, one)
    history.add(30, one)
    assert len(history.pairs) == 3


def test_keep_is_at_least_two():
    with pytest.raises(ValueError, match="keep: expected at least 2 sketches, got 1"):
        OverlapHistory(1)
