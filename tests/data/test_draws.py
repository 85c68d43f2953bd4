"""Repeated draws: how many, with which seeds and weights, on which rank."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_subspace.data.assignment import owner_rank
from lightning_subspace.data.draws import repeated
from lightning_subspace.data.micro_batch import MicroBatch, few_examples, single_examples
from lightning_subspace.data.sample import Sample
from lightning_subspace.parallel.ranks import Ranks


def batches(count, size, start=0):
    return tuple(MicroBatch(torch.zeros(size, 2), float(size), start + i, size=size) for i in range(count))


def whole(count, size):
    return Sample(batches(count, size), population=count * size)


@pytest.mark.parametrize(
    ("count", "size", "hessian", "gradient"),
    [
        (1, 1, 32, 256),  # a dummy item: as many evaluations as the default work has micro-batches
        (10, 1, 30, 250),  # whole passes
        (4, 64, 16, 128),  # 1,024 and 8,192 examples
        (28, 64, 28, 112),  # a Hessian of 1,792 examples has no room for another pass
        (200, 64, 200, 200),  # 12,800 examples are more than were asked for
        (1, 4096, 2, 8),  # what an error bar needs
        (3, 4096, 3, 9),
    ],
)
def test_as_many_whole_passes_as_there_is_room_for(count, size, hessian, gradient):
    sample = repeated(whole(count, size), 1024, 8192)
    every = (*sample.hessian, *sample.extra)
    assert (len(sample.hessian), len(every)) == (hessian, gradient)
    assert len({batch.key for batch in every}) == gradient
    for index in range(count):  # every example has the same weight in the mean
        assert sorted(b.draw for b in every if b.index == index) == list(range(gradient // count))
    assert math.isinf(sample.population)
    assert sample.hessian_share == sample.gradient_share == 0.0


def test_draws_share_the_data_and_the_rank():
    given = whole(3, 8)
    sample = repeated(given, 1024, 8192)
    assert sample.nbytes == given.nbytes
    ranks = Ranks()
    ranks.count = 2
    for batch in (*sample.hessian, *sample.extra):
        assert batch.data is given.hessian[batch.index].data
        assert owner_rank(batch, ranks) == batch.index % 2


def test_each_half_has_draws_of_every_micro_batch():
    hessian = repeated(whole(2, 1), 1024, 8192).hessian
    assert [sorted({batch.index for batch in hessian[start::2]}) for start in (0, 1)] == [[0, 1], [0, 1]]


def test_more_examples_come_before_more_draws():
    part = Sample(batches(32, 32), batches(224, 32, 32), population=60_000)
    sample = repeated(part, 1024, 8192)
    assert (sample.hessian, sample.extra) == (part.hessian, part.extra)
    assert math.isinf(sample.population)


def test_the_rest_of_a_small_set_is_repeated_for_the_gradient_alone():
    part = Sample(batches(4, 32), batches(4, 32, 4), population=256)
    sample = repeated(part, 128, 1024)
    for batch, given in zip(sample.hessian, part.hessian, strict=True):
        assert batch.data is given.data  # by identity: since Python 3.13 `==` of dataclasses compares tensors
        assert batch.key == given.key
    assert sorted(b.key for b in (*sample.hessian, *sample.extra)) == [(i, d) for i in range(8) for d in range(4)]


@pytest.mark.parametrize(("count", "passes"), [(31, 8), (32, 1)])
def test_of_a_set_of_unknown_size_a_short_sample_is_repeated(count, passes):
    sample = repeated(Sample(batches(count, 1)), 1024, 8192)
    assert len(sample.hessian) + len(sample.extra) == count * passes


def test_a_part_of_a_draw_has_random_numbers_of_its_own():
    batch = batches(1, 4)[0]
    draws = [replace(batch, draw=number) for number in range(3)]
    assert [few_examples(draw, 2).key for draw in draws] == [(0, 0), (0, 1), (0, 2)]
    assert [example.draw for draw in draws for example in single_examples(draw)] == list(range(12))
