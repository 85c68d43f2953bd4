"""A gathered sample in a checkpoint: what comes back, what is not written, what is refused."""

import io
from dataclasses import replace

import pytest
import torch

from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.gathered import Gathered, GatheredSample
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.probe import sample_state
from lightning_subspace.probe.entries import CheckpointError
from lightning_subspace.probe.sample_state import decode_gathered, encode_gathered


def gathered(*data):
    sample = GatheredSample(4, 100, counter=ExampleCounter(2))
    for one in data:
        sample.add(one, 3)
    return sample.state


PLAIN = [torch.arange(6.0).reshape(2, 3), {"y": torch.tensor([1, 2]), "names": ("a", None), "scale": 0.5}]


def written(state):
    """As a checkpoint writes and reads it."""
    file = io.BytesIO()
    torch.save(encode_gathered(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_it_comes_back_as_it_was():
    state = gathered(PLAIN, PLAIN)
    found = decode_gathered(written(state))
    assert (found.epoch, found.is_closed) == (3, False)
    for ours, theirs in zip(found.batches, state.batches, strict=True):
        assert replace(ours, data=None) == replace(theirs, data=None)
        assert torch.equal(ours.data[0], theirs.data[0])
        assert ours.data[1]["names"] == ("a", None)
    other = GatheredSample(4, 100, counter=ExampleCounter(2))
    other.resume(found)
    assert sum(batch.size for batch in other.sample.hessian) == 4
    other.add(PLAIN, 3)
    assert [batch.index for batch in other.sample.extra] == [2]


class Own:
    def __init__(self):
        self.x = torch.zeros(2, 3)


@pytest.mark.parametrize("data", [Own(), [torch.zeros(2, 3).to_sparse()], [torch.zeros(2, 3), {1.5: 2}]])
def test_what_is_no_plain_data_is_not_written(data):
    assert encode_gathered(gathered(data, data)) is None


def test_what_is_large_is_not_written(monkeypatch):
    state = gathered(PLAIN, PLAIN)
    nbytes = 2 * (6 * 4 + 2 * 8)
    monkeypatch.setattr(sample_state, "LARGEST", nbytes)
    assert encode_gathered(state) is not None
    monkeypatch.setattr(sample_state, "LARGEST", nbytes - 1)
    assert encode_gathered(state) is None


def test_nothing_is_nothing():
    assert encode_gathered(None) is None
    assert encode_gathered(Gathered((), None, False)) is None
    assert decode_gathered(None) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", -1.0),
        ("weight", float("nan")),
        ("weight", "2"),
        ("index", 5),
        ("size", -2),
        ("size", None),
        ("transferred", False),
        ("is_local", False),
        ("is_counted", 1),
        ("draw", -1),
        ("checksum", "a"),
        ("off_cpu", [True]),
        ("off_cpu", (1, 2)),
        ("data", {1, 2}),
    ],
)
def test_a_damaged_micro_batch_is_refused(name, value):
    saved = written(gathered(PLAIN, PLAIN))
    saved["batches"][1][name] = value
    with pytest.raises(CheckpointError, match=r"sample\.batches\[1\]"):
        decode_gathered(saved)
    del saved["batches"][1][name]
    with pytest.raises(CheckpointError, match=name):
        decode_gathered(saved)


@pytest.mark.parametrize(("name", "value"), [("epoch", -1), ("is_closed", 0), ("batches", []), ("batches", None)])
def test_a_damaged_sample_is_refused(name, value):
    saved = written(gathered(PLAIN, PLAIN))
    with pytest.raises(CheckpointError, match=f"sample.{name}"):
        decode_gathered({**saved, name: value})


def test_all_fields_of_a_micro_batch_are_written():
    assert set(encode_gathered(gathered(PLAIN))["batches"][0]) == set(MicroBatch.__dataclass_fields__)
