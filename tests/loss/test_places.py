"""A gathered batch lies on the CPU; each of its tensors is evaluated where training has it."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_subspace.data import micro_batch as micro_batches
from lightning_subspace.data.micro_batch import detached_copy, few_examples
from lightning_subspace.data.sample import micro_batch, sample_of_current
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace


class Holder:
    """Cannot move itself."""

    def __init__(self, x, lengths):
        self.x, self.lengths = x, lengths


def make():
    """Integers stand for what training keeps on the CPU, floats for what is on the accelerator."""
    x, lengths = torch.ones(12, 2), torch.arange(12)
    x.mask = torch.ones(12)
    return {"lengths": lengths, "x": x, "again": x, "held": [Holder(torch.zeros(12, 1), lengths)]}


def evaluate(batch):
    """The data that a loss gets whose device is not the CPU: "meta", which tensors can go to from there."""
    net, seen = nn.Linear(2, 1), []

    def loss_fn(module, data, batch_idx):
        seen.append(data)
        return module.weight.sum()

    loss = TrainingLoss(net, ParameterSpace.of(net), loss_fn)
    with loss:
        loss.device = torch.device("meta")
        loss(batch)
    return seen[0]


@pytest.fixture
def floats_are_off_the_cpu(monkeypatch):
    monkeypatch.setattr(micro_batches, "is_off_cpu", torch.is_floating_point)


@pytest.mark.usefixtures("floats_are_off_the_cpu")
def test_every_tensor_goes_where_training_has_it():
    batch = micro_batch(make(), 0, transferred=True)
    assert all(tensor.device.type == "cpu" for tensor in micro_batches.tensors_of(batch.data))
    data = evaluate(batch)
    held = data["held"][0]
    assert data["x"].device.type == data["x"].mask.device.type == held.x.device.type == "meta"
    assert data["lengths"].device.type == held.lengths.device.type == "cpu"
    assert data["x"] is data["again"]
    assert data["lengths"] is held.lengths


@pytest.mark.usefixtures("floats_are_off_the_cpu")
def test_a_part_goes_where_the_whole_does():
    batch = micro_batch({"lengths": torch.arange(12), "x": torch.ones(12, 2)}, 0, transferred=True)
    data = evaluate(few_examples(batch, 8))
    assert (data["x"].device.type, data["lengths"].device.type) == ("meta", "cpu")
    assert (len(data["x"]), data["lengths"].tolist()) == (8, list(range(8)))


@pytest.mark.usefixtures("floats_are_off_the_cpu")
def test_the_lengths_of_a_packed_sequence_stay_on_the_cpu():
    data = evaluate(micro_batch([pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])], 0, transferred=True))
    assert (data[0].data.device.type, data[0].batch_sizes.device.type) == ("meta", "cpu")


@pytest.mark.usefixtures("floats_are_off_the_cpu")
def test_the_current_batch_stays_where_it_is():
    (batch,) = sample_of_current(make()).hessian
    data = evaluate(batch)
    assert (data["x"].device.type, data["lengths"].device.type) == ("meta", "cpu")


def test_a_batch_that_was_not_transferred_goes_through_the_hooks():
    data = evaluate(micro_batch({"lengths": torch.arange(12), "x": torch.ones(12, 2)}, 0))
    assert data["x"].device.type == data["lengths"].device.type == "meta"


def test_a_copy_is_on_the_device_asked_for():
    assert detached_copy(make())["x"].device.type == "cpu"
    assert detached_copy(make(), "meta")["held"][0].x.device.type == "meta"
