"""The global generators: put back to the byte, seeded all at once."""

import random

import numpy as np
import pytest
import torch

from lightning_subspace.state import rng as random_state
from lightning_subspace.state.rng import next_numbers, preserved_random_state, seed_generators
from tests.modules import fingerprint, random_bytes


def state():
    return fingerprint(random_bytes(), "random")


def draw():
    # An odd number of normal variates leaves a spare one in the state of numpy and of python.
    return torch.randn(3).tolist(), np.random.randn(3).tolist(), [random.gauss(0.0, 1.0) for _ in range(3)]


@pytest.fixture(autouse=True)
def _seeded():
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_generators(0)
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_every_byte_is_put_back(drawn_before):
    for _ in range(drawn_before):
        draw()
    before = state()
    with preserved_random_state():
        draw()
        seed_generators(5)
        assert state() != before
    assert state() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_also_on_an_exception(error):
    def fail():
        draw()
        raise error

    before = state()
    with pytest.raises(error), preserved_random_state():
        fail()
    assert state() == before


def test_guards_may_be_nested():
    before = state()
    with preserved_random_state():
        first = draw()
        inside = state()
        with preserved_random_state():
            draw()
        assert state() == inside
    assert state() == before
    assert draw() == first


def test_a_seed_fixes_all_generators_and_seeds_differ():
    seen = []
    for seed in (0, 1, 2**40, 0):
        seed_generators(seed)
        seen.append(draw())
    assert seen[0] == seen[3]
    for i in range(3):
        assert seen[0][i] != seen[1][i] != seen[2][i]


def test_seeding_queues_nothing_for_a_gpu_that_is_not_in_use(monkeypatch):
    """`torch.manual_seed` would: the seed would reach the user's CUDA generator when CUDA starts."""
    queued = []
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda *args, **kwargs: queued.append(args))
    torch.manual_seed(0)
    assert queued
    queued.clear()
    seed_generators(0)
    assert queued == []


def test_gpu_generators_are_kept_where_a_gpu_is_in_use(monkeypatch):
    kept = []
    monkeypatch.setattr(random_state, "_cuda_in_use", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: "state")
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", kept.append)
    with preserved_random_state():
        pass
    assert kept == ["state"]


def test_generators_of_gpus_are_compared_without_drawing(monkeypatch):
    """A draw would start every GPU that is visible, also those of other ranks."""
    states, asked, rand = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)], [], torch.rand

    def watched(*size, device=None, **arguments):
        asked.append(device)
        return rand(*size, **arguments)

    monkeypatch.setattr(random_state, "_cuda_in_use", lambda: True)
    monkeypatch.setattr(torch, "rand", watched)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: states[1].zero_())
    seed_generators(0)
    before = next_numbers()
    assert asked == [None]
    seed_generators(0)
    assert next_numbers() == before
    seed_generators(0)
    states[1][8] += 4  # a draw on the second
    assert next_numbers() != before
