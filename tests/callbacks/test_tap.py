"""Covers of a batch's way to the training step: one call, and nothing of it stays."""

import types

import pytest

from lightning_subspace.callbacks.tap import before_hooks, before_training_step, forget_batches


class Strategy:
    def __init__(self):
        self.taken = []

    def training_step(self, batch, batch_idx, *, dataloader_idx=0):
        self.taken.append(batch)
        return batch, batch_idx, dataloader_idx


class Precision:
    def convert_input(self, batch):
        return batch.upper()


@pytest.fixture
def trainer():
    return types.SimpleNamespace(strategy=Strategy(), precision_plugin=Precision())


def is_covered(trainer):
    return "training_step" in vars(trainer.strategy)


def test_one_call_is_covered(trainer):
    seen = []

    def see(batch):
        assert trainer.strategy.taken == []  # before the step
        assert not is_covered(trainer)
        seen.append(batch)

    before_training_step(trainer, self := object(), see)
    assert is_covered(trainer)
    assert trainer.strategy.training_step("a", 3, dataloader_idx=1) == ("a", 3, 1)
    assert trainer.strategy.training_step("b", 4) == ("b", 4, 0)  # such as a second closure of LBFGS
    assert seen == ["a"]
    assert trainer.strategy.taken == ["a", "b"]
    assert not is_covered(trainer)
    forget_batches(trainer, self)
    assert not is_covered(trainer)


def test_owners_have_one_function_each(trainer):
    first, second, seen = object(), object(), []
    before_training_step(trainer, first, lambda batch: seen.append(("given up", batch)))
    before_training_step(trainer, second, lambda batch: seen.append(("second", batch)))
    before_training_step(trainer, first, lambda batch: seen.append(("first", batch)))
    trainer.strategy.training_step("a", 0)
    assert sorted(seen) == [("first", "a"), ("second", "a")]
    assert trainer.strategy.taken == ["a"]
    assert not is_covered(trainer)


def test_a_function_is_forgotten(trainer):
    first, second, seen = object(), object(), []
    before_training_step(trainer, first, lambda batch: seen.append("first"))
    before_training_step(trainer, second, lambda batch: seen.append("second"))
    forget_batches(trainer, first)
    assert is_covered(trainer)
    forget_batches(trainer, object())  # who has never asked
    trainer.strategy.training_step("a", 0)
    assert seen == ["second"]

    before_training_step(trainer, first, lambda batch: seen.append("first"))
    forget_batches(trainer, first)
    assert not is_covered(trainer)
    trainer.strategy.training_step("b", 1)
    assert seen == ["second"]


def test_a_step_that_never_comes(trainer):
    """A hook may skip the batch; the function is then called with a later one, or forgotten."""
    owner, seen = object(), []
    before_training_step(trainer, owner, lambda batch: seen.append(("skipped", batch)))
    before_training_step(trainer, owner, lambda batch: seen.append(("taken", batch)))
    trainer.strategy.training_step("b", 1)
    assert seen == [("taken", "b")]
    before_training_step(trainer, owner, lambda batch: seen.append(("never", batch)))
    forget_batches(trainer, owner)
    assert not is_covered(trainer)


def test_an_exception_leaves_the_method_uncovered(trainer):
    def fail(batch):
        raise OSError("on purpose")

    seen = []
    before_training_step(trainer, owner := object(), fail)
    with pytest.raises(OSError, match="on purpose"):
        trainer.strategy.training_step("a", 0)
    assert not is_covered(trainer)
    assert trainer.strategy.taken == []
    before_training_step(trainer, owner, seen.append)
    trainer.strategy.training_step("b", 1)
    assert (seen, trainer.strategy.taken) == (["b"], ["b"])


class Cover:
    """Somebody else's cover of the method."""

    def __init__(self, strategy):
        self.inner, self.seen = strategy.training_step, []
        strategy.training_step = self

    def __call__(self, batch, *args, **kwargs):
        self.seen.append(batch)
        return self.inner(f"{batch}!", *args, **kwargs)


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_a_cover_beneath_stays(is_forgotten, trainer):
    cover, owner, seen = Cover(trainer.strategy), object(), []
    before_training_step(trainer, owner, seen.append)
    if is_forgotten:
        forget_batches(trainer, owner)
        assert trainer.strategy.training_step is cover
    for batch in ("a", "b"):
        assert trainer.strategy.training_step(batch, 0)[0] == f"{batch}!"
        assert trainer.strategy.training_step is cover
    assert seen == ([] if is_forgotten else ["a"])
    assert cover.seen == ["a", "b"]
    assert trainer.strategy.taken == ["a!", "b!"]


def test_a_cover_above_stays(trainer):
    owner, seen = object(), []
    before_training_step(trainer, owner, seen.append)
    cover = Cover(trainer.strategy)  # calls ours for good
    for batch in ("a", "b"):
        assert trainer.strategy.training_step(batch, 0)[0] == f"{batch}!"
        assert trainer.strategy.training_step is cover
    assert seen == ["a!"]
    before_training_step(trainer, owner, seen.append)
    trainer.strategy.training_step("c", 0)
    assert trainer.strategy.training_step is cover
    assert seen == ["a!", "c"]
    assert trainer.strategy.taken == ["a!", "b!", "c!"]
    assert cover.seen == ["a", "b", "c"]


def test_a_batch_before_all_hooks_is_what_the_conversion_gives(trainer):
    seen, owner = [], object()
    before_hooks(trainer, owner, seen.append)
    assert [trainer.precision_plugin.convert_input(batch) for batch in ("a", "b")] == ["A", "B"]
    assert seen == ["A"]
    assert vars(trainer.precision_plugin) == {}
    before_hooks(trainer, owner, seen.append)
    forget_batches(trainer, owner)
    assert vars(trainer.precision_plugin) == {}
