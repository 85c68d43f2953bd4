"""The fixed sample: which examples, in which order and with which weights; and that drawing it disturbs nothing."""

import math
import multiprocessing
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_subspace.data.micro_batch import (
    MicroBatch,
    SampleError,
    few_examples,
    number_of_examples,
    single_examples,
)
from lightning_subspace.data.sample import Sample, sample_of_batches, sample_of_current, sample_of_dataset
from lightning_subspace.parallel.ranks import Ranks

COUNT = 50


class Numbered(Dataset):
    """Example i is the number i, with noise from every generator there is."""

    def __init__(self, count=COUNT):
        self.count = count
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        noise = torch.rand(1, generator=self.generator) + torch.rand(1) + np.random.rand() + random.random()
        return torch.tensor(index), noise.float()


def loader(dataset=None, **options):
    if "batch_sampler" in options:
        options["batch_size"] = 1  # what torch expects beside it
    return DataLoader(Numbered() if dataset is None else dataset, **({"batch_size": 8} | options))


def indices(batches):
    return [i for batch in batches for i in batch.data[0].tolist()]


def sizes(batches):
    return [len(batch.data[0]) for batch in batches]


def all_states(dataset):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    return (
        torch_state.numpy().tobytes(),
        numpy_state[1].tobytes(),
        numpy_state[2:],
        random.getstate(),
        dataset.generator.get_state().numpy().tobytes(),
    )


# Which examples


def test_examples_are_drawn_without_repetition_and_not_in_order():
    sample = sample_of_dataset(loader(), 20, 20)
    drawn = indices(sample.hessian)
    assert len(set(drawn)) == len(drawn) == 20
    assert set(drawn) <= set(range(COUNT))
    assert drawn != sorted(drawn)
    assert sample.extra == ()


@pytest.mark.parametrize("sample", [None, COUNT, 10 * COUNT])
def test_all_examples(sample):
    found = sample_of_dataset(loader(), sample, 10 * COUNT)
    assert sorted(indices(found.hessian)) == list(range(COUNT))
    assert found.extra == ()
    assert found.hessian_share == found.gradient_share == 1.0


def test_the_gradient_sample_continues_that_of_the_hessian():
    sample = sample_of_dataset(loader(), 12, 30)
    first, rest = indices(sample.hessian), indices(sample.extra)
    assert (len(first), len(rest)) == (12, 18)
    assert not set(first) & set(rest)
    assert (sample.hessian_share, sample.gradient_share) == (12 / COUNT, 30 / COUNT)


@pytest.mark.parametrize("size", [1, 5, 12, 30])
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(size):
    whole = indices(sample_of_dataset(loader(), None).hessian)
    part = sample_of_dataset(loader(), size, 40)
    assert indices(part.hessian) == whole[:size]
    assert indices(part.extra) == whole[size:40]


def test_a_gradient_sample_of_everything_and_one_that_is_too_small():
    everything = sample_of_dataset(loader(), 12, None)
    assert sorted(indices((*everything.hessian, *everything.extra))) == list(range(COUNT))
    assert sample_of_dataset(loader(), 12, 5).extra == ()


def test_uneven_batches_are_weighted_by_their_examples():
    sample = sample_of_dataset(loader(), 20, 31)
    assert sizes(sample.hessian) == [6, 7, 7]
    assert sizes(sample.extra) == [5, 6]
    batches = [*sample.hessian, *sample.extra]
    assert [batch.weight for batch in batches] == [6.0, 7.0, 7.0, 5.0, 6.0]
    assert [batch.index for batch in batches] == list(range(5))
    assert not any(batch.transferred for batch in batches)


def test_drop_last_drops_nothing_here():
    assert sizes(sample_of_dataset(loader(drop_last=True), 10).hessian) == [5, 5]


def test_no_example_is_left_over_alone():
    assert sizes(sample_of_dataset(loader(), 17).hessian) == [5, 6, 6]  # a batch-norm refuses a batch of one


def test_the_batch_size_can_be_chosen():
    assert sizes(sample_of_dataset(loader(), 10, batch_size=7).hessian) == [5, 5]


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
    assert sizes(sample.hessian) == [5, 5, 5]
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


class Ready(Dataset):
    """Items that are batches: item i has i examples, all of them i."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return (torch.full((index + 1,), index),)


def test_items_that_are_batches_are_drawn_whole():
    sample = sample_of_dataset(loader(Ready(), batch_size=None, shuffle=True), 6, 15)
    batches = [*sample.hessian, *sample.extra]
    assert len({batch.data[0][0].item() for batch in batches}) == len(batches)
    assert all(batch.weight == batch.size == len(batch.data[0]) for batch in batches)
    counts = torch.tensor([batch.size for batch in batches]).cumsum(0)
    cut = len(sample.hessian) - 1
    assert counts[cut] >= 6 > counts[cut] - batches[cut].size
    assert counts[-1] >= 15 > counts[-2]
    everything = sample_of_dataset(loader(Ready(), batch_size=None), None).hessian
    assert sorted(batch.size for batch in everything) == [1, 2, 3, 4, 5, 6, 7]


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
    assert [batch.data[1].tolist() for batch in sample.hessian] == [[2.0] * 5, [2.0] * 5]


def test_a_weight_function():
    sample = sample_of_dataset(loader(), 10, weight=lambda batch: 1.0 + len(batch[0]))
    assert [batch.weight for batch in sample.hessian] == [6.0, 6.0]


# What drawing must not do


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


def test_the_sample_holds_its_own_copies():
    values = torch.arange(6.0)
    sample = sample_of_dataset(loader(TensorDataset(values)), None)
    values.zero_()
    assert sorted(sample.hessian[0].data[0].tolist()) == [0, 1, 2, 3, 4, 5]
    assert sample.nbytes == 6 * 4


# Batches given by the user


def test_given_batches():
    sample = sample_of_batches([torch.zeros(32, 2), torch.zeros(8, 2)])
    assert [(b.weight, b.index) for b in sample.hessian] == [(32.0, 0), (8.0, 1)]
    assert sample.extra == ()
    assert sample.population == math.inf
    assert sample.hessian_share == sample.gradient_share == 0.0


def test_pairs_of_batch_and_weight():
    batch = {"x": torch.zeros(4, 2), "y": torch.ones(4)}
    sample = sample_of_batches([(batch, 2.5), (batch, 3)])
    assert [b.weight for b in sample.hessian] == [2.5, 3.0]
    assert sample.hessian[0].data.keys() == {"x", "y"}


def test_a_pair_of_tensors_is_a_batch():
    (batch,) = sample_of_batches([(torch.zeros(4, 2), torch.tensor(3.0))]).hessian
    assert batch.weight == 4.0
    assert len(batch.data) == 2


def test_a_weight_function_over_given_batches():
    sample = sample_of_batches([torch.ones(3, 2), torch.ones(1, 2)], weight=lambda batch: batch.sum())
    assert [b.weight for b in sample.hessian] == [6.0, 2.0]


def test_a_loader_as_batches_leaves_the_global_generators_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sample = sample_of_batches(loader(shuffle=True))
    assert sorted(indices(sample.hessian)) == list(range(COUNT))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_loader_as_batches_leaves_every_generator_alone(shuffle, own):
    dataset = Numbered()
    generator = torch.Generator().manual_seed(3) if own else None
    given = loader(dataset, shuffle=shuffle, generator=generator, drop_last=True)
    before, of_loader = all_states(dataset), generator.get_state() if own else None
    sample = sample_of_batches(given)
    assert sizes(sample.hessian) == [8] * 6
    assert (indices(sample.hessian) == list(range(48))) is not shuffle
    assert all_states(dataset) == before
    assert not own or torch.equal(generator.get_state(), of_loader)


def test_a_loader_over_a_stream_as_batches_is_read_elsewhere():
    dataset = RandomStream()
    before = dataset.generator.get_state()
    sample = sample_of_batches(loader(dataset))
    assert sizes(sample.hessian) == [8, 2]
    assert dataset.count == 0
    assert torch.equal(dataset.generator.get_state(), before)


def test_a_loader_without_automatic_batching_as_batches():
    assert [batch.weight for batch in sample_of_batches(loader(Ready(), batch_size=None)).hessian] == list(range(1, 8))


def test_given_batches_are_copied():
    data = torch.ones(3, 2, requires_grad=True)
    (batch,) = sample_of_batches([data]).hessian
    with torch.no_grad():
        data.zero_()
    assert batch.data.sum() == 6.0
    assert not batch.data.requires_grad


def test_micro_batches_go_through_as_they_are():
    batch = MicroBatch(torch.ones(2), 7.0, 3)
    assert sample_of_batches([batch]).hessian == (batch,)


def test_the_current_batch():
    data = [torch.ones(5, 2), torch.zeros(5)]
    sample = sample_of_current(data)
    data[0].zero_()
    (batch,) = sample.hessian
    assert (batch.weight, batch.transferred) == (1.0, True)  # it has been through the hooks of the module
    assert batch.data[0].sum() == 10.0


def test_number_of_examples():
    assert number_of_examples({"scale": torch.tensor(1.0), "x": torch.zeros(6, 2), "y": torch.zeros(3)}) == 6
    assert number_of_examples([{"x": torch.zeros(2, 9)}]) == 2


# A few examples of a batch


def test_few_examples_of_a_batch():
    batch = MicroBatch({"x": torch.arange(20), "y": (torch.arange(20), "name")}, 20.0, 4, transferred=True)
    few = few_examples(batch, 8)
    assert few.data["x"].tolist() == few.data["y"][0].tolist() == list(range(8))
    assert few.data["y"][1] == "name"
    assert (few.weight, few.index, few.transferred) == (8.0, 4, True)


@pytest.mark.parametrize(
    "data",
    [torch.zeros(8, 2), (torch.zeros(20), torch.zeros(19)), (torch.zeros(20), torch.tensor(1.0)), "no tensor"],
    ids=["small", "uneven", "scalar", "nothing"],
)
def test_a_batch_that_cannot_be_cut_stays_whole(data):
    batch = MicroBatch(data, 20.0, 0)
    assert few_examples(batch, 8) is batch


def test_single_examples_of_a_batch():
    batch = MicroBatch({"x": torch.arange(6).view(3, 2), "y": (torch.arange(3), "name")}, 20.0, 4, transferred=True)
    examples = single_examples(batch)
    assert [e.data["x"].tolist() for e in examples] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [(e.data["y"][0].tolist(), e.data["y"][1]) for e in examples] == [([i], "name") for i in range(3)]
    assert [(e.weight, e.index, e.transferred, e.size, e.draw) for e in examples] == [
        (1.0, 4, True, 1, i) for i in range(3)
    ]
    assert examples[1].data["x"].data_ptr() == batch.data["x"][1].data_ptr()  # no copies


@pytest.mark.parametrize(
    "data",
    [(torch.zeros(20), torch.zeros(19)), (torch.zeros(20), torch.tensor(1.0)), torch.zeros(0, 2), "no tensor"],
    ids=["uneven", "scalar", "empty", "nothing"],
)
def test_a_batch_without_single_examples(data):
    assert single_examples(MicroBatch(data, 20.0, 0)) is None


# Errors


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class RandomStream(IterableDataset):
    def __init__(self):
        self.generator, self.count = torch.Generator().manual_seed(1), 0

    def __iter__(self):
        for _ in range(10):
            self.count += 1
            yield (torch.rand((), generator=self.generator),)


class Unsized:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sample_of_dataset(loader(Stream()), 5), "iterable"),
        (lambda: sample_of_dataset(DataLoader(Unsized(), sampler=range(3)), 5), "no fixed examples"),
        (lambda: sample_of_dataset(loader(Numbered(0)), 5), "empty"),
        (lambda: sample_of_dataset(loader(sampler=SubsetRandomSampler([])), 5), "empty"),
        (lambda: sample_of_dataset([torch.zeros(3)], 5), "list"),
        (lambda: sample_of_dataset(loader(batch_sampler=[[0], [1, 2]]), 5), "batch_size"),
        (lambda: sample_of_dataset(loader(), 5, weight=lambda batch: 0.0), "positive"),
        (lambda: sample_of_batches([]), "at least one"),
        (lambda: sample_of_batches(["no tensor"]), "weight="),
        (lambda: sample_of_batches([torch.tensor(1.0)]), "weight="),
        (lambda: sample_of_batches([(torch.zeros(3), 0)]), "positive"),
        (lambda: sample_of_batches([(torch.zeros(3), -1.0)]), "positive"),
        (lambda: sample_of_batches([(torch.zeros(3), math.inf)]), "finite"),
        (lambda: sample_of_batches([torch.zeros(3)], weight=lambda batch: math.nan), "finite"),
        (lambda: sample_of_batches([torch.zeros(0, 3)]), "positive"),
    ],
)
def test_what_cannot_be_sampled_is_an_error_that_says_what_to_do(make, match):
    with pytest.raises(SampleError, match=match):
        make()


def test_a_sample_is_a_value():
    assert Sample(()) == Sample(())


def test_a_loader_that_deals_examples_to_ranks_is_refused():
    data = TensorDataset(torch.arange(8.0)[:, None])
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    ranks = Ranks()
    ranks.count = 2  # it is refused before they would meet
    with pytest.raises(SampleError, match="without it, the same one on all ranks"):
        sample_of_batches(loader, ranks=ranks)
    assert len(sample_of_batches(loader).hessian) == 2
