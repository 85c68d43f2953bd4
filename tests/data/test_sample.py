"""The fixed sample: which examples, in which order and with which weights; and batches given by the user."""

import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, SubsetRandomSampler, TensorDataset

from lightning_subspace.data.drawn import sample_of_dataset
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch, SampleError, checksum, with_equal_weights
from lightning_subspace.data.sample import Sample, micro_batch, sample_of_current
from lightning_subspace.parallel.ranks import Ranks
from tests.data.datasets import COUNT, Numbered, RandomStream, Ready, Stream, all_states, indices, loader, sizes


def test_examples_are_drawn_without_repetition_and_not_in_order():
    sample = sample_of_dataset(loader(), 20, 20)
    drawn = indices(sample.hessian)
    assert len(set(drawn)) == len(drawn) == 24  # whole batches, of 8
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
    assert (len(first), len(rest)) == (16, 16)
    assert not set(first) & set(rest)
    assert (sample.hessian_share, sample.gradient_share) == (16 / COUNT, 32 / COUNT)


@pytest.mark.parametrize("size", [1, 5, 12, 30])
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(size):
    whole = indices(sample_of_dataset(loader(), None).hessian)
    part = sample_of_dataset(loader(), size, 40)
    cut = -(-size // 8) * 8
    assert indices(part.hessian) == whole[:cut]
    assert indices(part.extra) == whole[cut:40]


def test_a_gradient_sample_of_everything_and_one_that_is_too_small():
    everything = sample_of_dataset(loader(), 12, None)
    assert sorted(indices((*everything.hessian, *everything.extra))) == list(range(COUNT))
    assert sample_of_dataset(loader(), 12, 5).extra == ()


def test_a_part_has_batches_of_the_size_of_training():
    sample = sample_of_dataset(loader(), 20, 31)
    assert sizes(sample.hessian) == [8, 8, 8]
    assert sizes(sample.extra) == [8]


def test_uneven_batches_are_weighted_by_their_examples():
    sample = sample_of_dataset(loader(), 20, None)
    assert sizes(sample.extra) == [6, 7, 6, 7]  # nearly equal: a batch-norm refuses a batch of one
    batches = [*sample.hessian, *sample.extra]
    assert [batch.weight for batch in batches] == [8.0, 8.0, 8.0, 6.0, 7.0, 6.0, 7.0]
    assert [batch.index for batch in batches] == list(range(7))
    assert not any(batch.transferred for batch in batches)


@pytest.mark.parametrize("sample", [10, 49, 1000])
def test_with_drop_last_all_batches_are_complete(sample):
    found = sizes(sample_of_dataset(loader(drop_last=True, shuffle=True), sample, sample).hessian)
    assert found == [8] * (2 if sample == 10 else COUNT // 8)


def test_all_are_all_also_with_drop_last():
    assert sum(sizes(sample_of_dataset(loader(drop_last=True, shuffle=True), None).hessian)) == COUNT


def test_the_batch_size_can_be_chosen():
    assert sizes(sample_of_dataset(loader(), 10, 10, batch_size=7).hessian) == [7, 7]
    assert sizes(sample_of_dataset(loader(drop_last=True), None, batch_size=9).hessian) == [8] * 6


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


def test_a_weight_function():
    sample = sample_of_dataset(loader(), 10, 10, weight=lambda batch: 1.0 + len(batch[0]))
    assert [batch.weight for batch in sample.hessian] == [9.0, 9.0]


def test_the_sample_holds_its_own_copies():
    values = torch.arange(6.0)
    sample = sample_of_dataset(loader(TensorDataset(values)), None)
    values.zero_()
    assert sorted(sample.hessian[0].data[0].tolist()) == [0, 1, 2, 3, 4, 5]
    assert sample.nbytes == 6 * 4


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


class Unsized:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sample_of_dataset(loader(Stream()), 5), "iterable"),
        (lambda: sample_of_dataset(DataLoader(Unsized(), sampler=range(3)), 5), "whose end is known"),
        (lambda: sample_of_dataset(loader(Numbered(0)), 5), "empty"),
        (lambda: sample_of_dataset(loader(sampler=SubsetRandomSampler([])), 5), "empty"),
        (lambda: sample_of_dataset([torch.zeros(3)], 5), "list"),
        (lambda: sample_of_dataset(loader(batch_sampler=[[0], [1, 2]]), 5), "batch_size"),
        (lambda: sample_of_dataset(loader(batch_size=60, drop_last=True, shuffle=True), 5, 5), "drop_last"),
        (lambda: sample_of_dataset(loader(), 5, weight=lambda batch: 0.0), "positive"),
        (lambda: sample_of_batches([]), "at least one"),
        (lambda: sample_of_batches([(x for x in "ab")]), "generator.*sample="),
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


def test_lists_of_examples_are_weighted_by_their_number():
    images = [torch.zeros(3, 2, 2) for _ in range(9)]
    batches = [images[:4], images[4:8], images[8:]]
    assert [(b.weight, b.size) for b in sample_of_batches(batches).hessian] == [(4.0, 4), (4.0, 4), (1.0, 1)]
    by_hand = sample_of_batches(batches, weight=lambda batch: 2.0 * len(batch)).hessian
    assert [b.weight for b in by_hand] == [8.0, 8.0, 2.0]


def test_where_the_number_is_not_known_weights_are_equal_and_a_word_is_said():
    batches = [(torch.zeros(t), torch.zeros(b, 2)) for t, b in ((70, 5), (52, 7), (93, 6))]
    with pytest.warns(UserWarning, match="all batches count the same. Pass weight=") as said:
        sample = sample_of_batches(batches)
    assert len(said) == 1
    assert [b.weight for b in sample.hessian] == [1.0] * 3
    assert [b.weight for b in sample_of_batches(batches, weight=lambda batch: len(batch[1])).hessian] == [5.0, 7.0, 6.0]
    assert [b.weight for b in sample_of_batches(zip(batches, (3, 2, 1), strict=True)).hessian] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("batch", ["no tensor", torch.tensor(1.0), None])
def test_a_single_batch_needs_no_number(batch):
    assert [b.weight for b in sample_of_batches([batch]).hessian] == [1.0]


def test_a_counter_knows_what_other_batches_have_taught():
    counter = ExampleCounter(4)
    images = [torch.zeros(3, 2, 2) for _ in range(5)]
    found = [micro_batch(part, i, counter=counter) for i, part in enumerate((images[:4], images[4:]))]
    assert [(b.weight, b.size, b.is_counted) for b in found] == [(4.0, 4, True), (1.0, 1, True)]
    unknown = micro_batch(None, 2, counter=counter)
    assert (unknown.weight, unknown.size, unknown.is_counted) == (1.0, 4, False)
    with pytest.warns(UserWarning, match="weight="):
        assert [b.weight for b in with_equal_weights([*found, unknown])] == [1.0] * 3


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_bytes_and_checksums_of_every_layout():
    def batches(scale):
        eye = scale * torch.eye(4)
        nested = [torch.full((2, 3), scale), torch.full((4, 3), scale)]
        yield eye.to_sparse(), 4 * 4 + 8 * 8
        yield {"x": eye.to_sparse_csr()}, 4 * 4 + 9 * 8
        yield [torch.nested.nested_tensor(nested, layout=torch.jagged)], 18 * 4
        yield [torch.nested.nested_tensor(nested)], 18 * 4
        yield {"held": Unsized(), "x": eye.bfloat16()}, 32

    for (batch, nbytes), (other, _), (same, _) in zip(batches(1.0), batches(2.0), batches(1.0), strict=True):
        assert sample_of_batches([batch]).nbytes == nbytes
        assert checksum(batch) == checksum(same) != checksum(other)
    held = Unsized()
    held.x = torch.ones(5)
    assert sample_of_batches([held]).nbytes == 20
    assert checksum(held) == checksum(torch.ones(5))


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
