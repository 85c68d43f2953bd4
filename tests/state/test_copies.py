"""A copied batch shares nothing with the original."""

from dataclasses import dataclass

import numpy as np
import torch

from lightning_subspace.state.copies import copied
from tests.modules import differences, fingerprint


class Bag:
    def __init__(self, x):
        self.x, self.array, self.list = x, np.zeros(2), [1]


def test_a_copied_batch_shares_nothing_with_the_original():
    x = torch.zeros(2)
    batch = {"x": x, "again": [x, "text"], "bag": Bag(x), "array": np.zeros(2), "meta": ({"id": {1, 2}}, None)}
    before = fingerprint(batch, "batch")
    new = copied(batch, torch.clone)
    assert differences(before, fingerprint(new, "batch")) == []
    new["x"].add_(1)
    new["bag"].array += 1
    new["bag"].list.append(1)
    new["array"] += 1
    new["meta"][0]["id"].clear()
    assert differences(before, fingerprint(batch, "batch")) == []
    assert new["again"][0] is new["x"] is new["bag"].x


@dataclass(frozen=True)
class FrozenBatch:
    x: torch.Tensor
    y: torch.Tensor


def test_a_frozen_dataclass_can_be_copied():
    batch = FrozenBatch(torch.zeros(2), torch.zeros(2))
    new = copied(batch, torch.clone)
    new.x.add_(1)
    new.y.add_(1)
    assert (batch.x.tolist(), batch.y.tolist()) == ([0, 0], [0, 0])


def test_a_batch_with_a_graph_can_be_copied():
    x = torch.ones(2, requires_grad=True) * 2
    assert not copied([x], lambda t: t.detach().clone())[0].requires_grad
