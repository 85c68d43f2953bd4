"""Micro-batches: number of examples, the first few of them, and each alone."""

import pytest
import torch

from lightning_subspace.data.micro_batch import MicroBatch, few_examples, single_examples


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
