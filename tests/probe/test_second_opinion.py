"""Whether the loss of a sample is that of training: alarms where it is not, and none where losses move or spread."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.measurements.sample_loss import SampleMean
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.loss_window import LossWindow
from lightning_subspace.probe.second_opinion import BLOCK, KEPT, SecondOpinion, compare
from tests.processes import run

BATCH = 32
POPULATION = 2000
STEPS, EVERY = 200, 40

# The level of the losses, by step.
LEVELS = {
    "flat": lambda t: 1.0,
    "falling": lambda t: 2.3 * math.exp(-t / 60) + 0.02,
    "to nothing": lambda t: 2.3 * math.exp(-t / 15) + 1e-6,
    "a smaller learning rate": lambda t: 2.0 if t < 83 else 0.5,
    "warm-up": lambda t: 2.3 + 6 * math.exp(-(((t - 45) / 8) ** 2)) if t < 120 else 1.0,
    "spikes": lambda t: (1 + 8 * math.exp(-(t % 37) / 3)) * math.exp(-t / 150),
    "stairs": lambda t: 0.75 ** (t // 60),
    "waves": lambda t: 1 + 0.6 * math.sin(t / 9),
}
# The losses of examples, relative to their level.
EXAMPLES = {
    "exponential": lambda rng, n: rng.exponential(size=n),
    "heavy tails": lambda rng, n: np.exp(2 * rng.normal(size=n)),
    "outliers": lambda rng, n: 0.05 * rng.exponential(size=n) + 5 * (rng.random(n) < 0.01),
}
# Sizes: of a batch of training, of a micro-batch, and the number of these.
SIZES = {"usual": (32, 32, 32), "a batch": (64, 256, 1), "two": (32, 32, 2), "all at once": (2000, 500, 4)}


def simulated(level, examples, sizes, rng, factor=1.0, every=EVERY):
    """A run in which the sample's loss is `factor` times what it should be."""
    size, micro, count = sizes
    losses = examples(rng, POPULATION)
    losses = losses / losses.mean()
    sample = [losses[rng.choice(POPULATION, micro, replace=False)].mean() for _ in range(count)]
    batches = [MicroBatch(None, float(micro), index, size=micro) for index in range(count)]
    opinion, seen = SecondOpinion(), []
    for step in range(STEPS):
        if step % every == 0:
            opinion.ask(SampleMean.of([factor * level(step) * loss for loss in sample], batches), step)
        seen.append(level(step) * losses[rng.integers(POPULATION, size=size)].mean())
        opinion.start = seen[0]
        if opinion.is_due(len(seen)):
            opinion.answer(seen[-KEPT:], len(seen), size)
        if opinion.is_confirmed:
            return True
    return False


@pytest.mark.parametrize("sizes", SIZES)
def test_nothing_is_said_where_the_sample_is_of_what_is_trained(sizes):
    rng = np.random.default_rng(0)
    found = [
        (name, kind)
        for name, level in LEVELS.items()
        for kind, examples in EXAMPLES.items()
        for _ in range(3)
        if simulated(level, examples, SIZES[sizes], rng)
    ]
    assert found == []


@pytest.mark.parametrize("every", [3, 40])  # probes closer than the losses that a comparison needs, or further apart
@pytest.mark.parametrize("factor", [0.3, 2.0, 5.0])
@pytest.mark.parametrize("name", ["flat", "falling", "stairs"])
def test_a_loss_of_another_height_is_found(name, factor, every):
    rng = np.random.default_rng(0)
    assert all(simulated(LEVELS[name], EXAMPLES["exponential"], SIZES["usual"], rng, factor, every) for _ in range(3))


def sample(*losses, size=BATCH):
    return SampleMean.of(losses, [MicroBatch(None, 1.0, index, size=size) for index in range(len(losses))])


def losses(level=1.0, count=BLOCK):
    return [level + 0.1 * (-1) ** index for index in range(count)]


def test_too_few_losses_decide_nothing():
    assert compare(sample(*[9.0] * 8), losses(count=BLOCK - 1), losses(), size=BATCH) is None
    assert compare(sample(*[9.0] * 8), [math.nan, *losses(count=BLOCK - 1)], losses(), size=BATCH) is None
    assert compare(sample(math.nan), losses(), losses(), size=BATCH) is None
    assert compare(sample(*[9.0] * 8), losses(), losses(), size=BATCH).side == 1


def test_the_level_lies_between_what_comes_before_and_behind():
    for level, side in ((5.0, 0), (3.0, 0), (1.0, 0), (8.0, 1), (0.3, -1)):
        assert compare(sample(*[level] * 8), losses(5.0), losses(1.0), size=BATCH).side == side
    # where training has ended, it may have fallen as far again as it did within the losses that are known
    fallen = [*losses(5.0), *losses(3.0)]
    assert [compare(sample(*[level] * 8), fallen, [], size=BATCH).side for level in (3.0, 1.0, 0.1, 5.0)] == [
        0,
        0,
        -1,
        1,
    ]


def test_the_loss_at_the_point_itself_counts():
    spike = [9.0, *losses(count=BLOCK - 1)]
    assert compare(sample(*[9.0] * 8), losses(), spike, size=BATCH).side == 0


def test_one_micro_batch_has_the_spread_of_training():
    wild = [0.2, 1.8] * (BLOCK // 2)
    assert compare(sample(4.0), wild, wild, size=BATCH).side == 0
    assert compare(sample(4.0), losses(), losses(), size=BATCH).side == 1
    # one of fewer examples spreads further
    assert compare(sample(4.0, size=2), losses(), losses(), size=BATCH).side == 0


def test_two_in_a_row_on_one_side_are_needed_and_only_one_probe_waits():
    opinion = SecondOpinion()
    assert not opinion.is_due(100)
    seen = 0

    def found(level):
        nonlocal seen
        seen += BLOCK
        opinion.ask(sample(*[level] * 8), seen)
        opinion.ask(sample(*[1.0] * 8), seen + 1)  # passed over
        seen += BLOCK
        assert not opinion.is_due(seen - 1)
        assert opinion.is_due(seen)
        opinion.answer(losses(count=2 * BLOCK), seen, BATCH)
        assert not opinion.is_pending
        return opinion.differs, opinion.is_confirmed

    assert found(3.0) == (True, False)
    assert found(1.0) == (False, False)
    assert found(3.0) == (True, False)
    assert found(0.1) == (True, False)
    assert found(0.1) == (True, True)
    opinion.forget()
    assert found(0.1) == (True, False)


def test_statistics_of_a_sample():
    batches = [MicroBatch(None, weight, index, size=size) for index, (weight, size) in enumerate([(3.0, 8), (1.0, 0)])]
    found = SampleMean.of([1.0, 5.0], batches)
    assert (found.mean, found.plain, found.count, found.size) == (2.0, 3.0, 1.6, 4.5)
    assert found.spread == pytest.approx(math.sqrt(8.0))
    assert SampleMean.of([1.0, math.nan], batches).mean == 1.0
    assert math.isnan(SampleMean.of([], batches).mean)


# The window


class Reads(TorchDispatchMode):
    """Counts reads of a value by the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


def test_the_last_losses_are_kept_without_reading_them():
    window = LossWindow(4)
    loss = torch.tensor([1.0], requires_grad=True) * 3.0
    with Reads() as reads:
        for outputs in ({"loss": loss}, loss, {"loss": loss / 2}, None, {}, {"loss": torch.tensor(math.nan)}):
            window.add(outputs, scale=2.0)
    assert reads.count == 0
    assert window.seen == 6
    assert window.read(Ranks()) == pytest.approx([3.0, math.nan, math.nan, math.nan], nan_ok=True)
    window.add(torch.ones(2))  # no scalar
    window.clear()
    assert (window.seen, window.read(Ranks())) == (0, [])


def test_losses_are_the_mean_over_ranks():
    def in_a_process():
        ranks, window = Ranks(torch.distributed.group.WORLD), LossWindow(4)
        window.add(torch.tensor(1.0 + ranks.index))
        window.add(torch.tensor(5.0) if ranks.index else None)
        window.add(None)
        return window.read(ranks)

    for found in run(in_a_process, 2):
        assert found == pytest.approx([1.5, 5.0, math.nan], nan_ok=True)
