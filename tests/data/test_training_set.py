"""Training set: the examples that each sampler may draw, and loading that disturbs nothing."""

import math
import multiprocessing

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_subspace.data.drawn import sample_of_dataset
from tests.data.datasets import COUNT, Numbered, all_states, indices, loader, sizes


def test_only_what_a_subset_sampler_may_draw():
    allowed = list(range(0, COUNT, 3))
    sample = sample_of_dataset(loader(sampler=SubsetRandomSampler(allowed)), None)
    assert sorted(indices(sample.hessian)) == allowed
    held_out_everywhere = sample_of_dataset(loader(sampler=SubsetRandomSampler(torch.tensor(allowed))), 5, 9)
    assert set(indices((*held_out_everywhere.hessian, *held_out_everywhere.extra))) <= set(allowed)


@pytest.mark.parametrize(
    "inner", [SequentialSampler(range(COUNT)), RandomSampler(range(COUNT)), SubsetRandomSampler(range(COUNT - 1))]
)
def test_a_batch_sampler(inner):
    sample = sample_of_dataset(DataLoader(Numbered(), batch_sampler=BatchSampler(inner, 6, drop_last=True)), 15)
    assert sizes(sample.hessian) == [6, 6, 6]
    if isinstance(inner, SubsetRandomSampler):
        assert COUNT - 1 not in indices(sample.hessian)


def test_a_weighted_sampler_with_replacement_is_followed():
    weights = torch.tensor([0.0] * 10 + [1.0] * 20 + [3.0] * 20)
    sample = sample_of_dataset(loader(sampler=WeightedRandomSampler(weights, 2000), num_workers=1), None)
    drawn = torch.tensor(indices(sample.hessian))
    assert len(drawn) == 2000  # "all" is an epoch's worth
    frequencies = torch.bincount(drawn, minlength=COUNT) / 2000
    expected = weights / weights.sum()
    assert (frequencies - expected).abs().max() < 5 * (expected.max() / 2000).sqrt()  # five standard deviations
    assert frequencies[:10].sum() == 0.0  # weight zero: held out
    assert frequencies[30:].sum() == pytest.approx(0.75, abs=0.05)
    assert sample.population == math.inf


def test_a_weighted_sampler_without_replacement_is_followed():
    sampler = WeightedRandomSampler(torch.arange(COUNT) + 1.0, 20, replacement=False)
    drawn = [indices(sample_of_dataset(loader(sampler=sampler), 8, 16, seed=seed).hessian) for seed in range(12)]
    assert all(len(set(one)) == 8 for one in drawn)
    mean = torch.tensor(drawn).float().mean()
    assert mean > 28.0  # uniform: 24.5


def test_a_small_epoch_of_weighted_draws_bounds_the_sample():
    assert (
        len(indices(sample_of_dataset(loader(sampler=WeightedRandomSampler(torch.ones(COUNT), 10)), 30).hessian)) == 10
    )


@pytest.mark.parametrize(
    ("options", "limit", "expected"),
    [
        ({}, 2, 16),
        ({}, math.inf, COUNT),
        ({}, 100, COUNT),
        ({"drop_last": True}, math.inf, 48),
        ({"drop_last": True}, 3, 24),
        ({"shuffle": True}, 2, COUNT),
        ({"shuffle": True, "drop_last": True}, math.inf, COUNT),
        ({"sampler": SubsetRandomSampler(range(30))}, 2, 30),
        ({"batch_sampler": [[0, 1, 2, 3], [4, 5]]}, 1, COUNT),
    ],
)
def test_without_shuffling_the_batches_behind_the_last_are_not_of_the_training_set(options, limit, expected):
    found = sample_of_dataset(loader(**options), None, limit=limit, batch_size=10)
    assert sorted(indices(found.hessian)) == list(range(expected))
    assert found.hessian_share == 1.0


class EveryOther(Sampler):
    def __iter__(self):
        raise AssertionError("the sampler of training may not be moved")

    def __len__(self):
        return COUNT // 2


def test_another_sampler_is_taken_to_draw_all_examples():
    assert sorted(indices(sample_of_dataset(loader(sampler=EveryOther()), None).hessian)) == list(range(COUNT))


class ByList(Dataset):
    """Takes a list of indices, and gives a batch."""

    def __len__(self):
        return COUNT

    def __getitem__(self, listed):
        return (torch.tensor(listed),)


def test_a_sampler_of_lists_without_automatic_batching():
    sampler = BatchSampler(SubsetRandomSampler(range(20)), 6, drop_last=False)
    sample = sample_of_dataset(loader(ByList(), batch_size=None, sampler=sampler), None)
    assert sizes(sample.hessian) == [5, 5, 5, 5]
    assert sorted(indices(sample.hessian)) == list(range(20))


def doubled(examples):
    return torch.stack([number for number, _ in examples]), torch.full((len(examples),), 2.0)


def test_the_collate_function_is_the_loaders():
    sample = sample_of_dataset(loader(collate_fn=doubled), 10)
    assert [batch.data[1].tolist() for batch in sample.hessian] == [[2.0] * 8, [2.0] * 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_generator_moves(workers):
    dataset = Numbered()
    trainer_loader = loader(dataset, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(3))
    before, of_loader = all_states(dataset), trainer_loader.generator.get_state()
    sample_of_dataset(trainer_loader, 12, 30)
    assert all_states(dataset) == before
    assert torch.equal(trainer_loader.generator.get_state(), of_loader)


def test_workers_are_gone_afterwards():
    before = set(multiprocessing.active_children())
    sample_of_dataset(loader(num_workers=2, persistent_workers=True), 12)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_bits(workers):
    first, again = (sample_of_dataset(loader(num_workers=workers), 12, 20, seed=3) for _ in range(2))
    torch.rand(1)
    for a, b in zip((*first.hessian, *first.extra), (*again.hessian, *again.extra), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.data, b.data, strict=True))
    assert indices(sample_of_dataset(loader(), 12, seed=4).hessian) != indices(first.hessian)
