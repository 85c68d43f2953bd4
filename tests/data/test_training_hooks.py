"""Which hooks count as ones that may change a batch: all that a user has written, and none of Lightning's own."""

import types

import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_subspace import SubspaceMonitor, SubspaceProjection
from lightning_subspace.data.training_hooks import START, TRANSFER, changes_batches


def trainer(module=None, datamodule=None, *callbacks):
    return types.SimpleNamespace(
        lightning_module=LightningModule() if module is None else module, datamodule=datamodule, callbacks=[*callbacks]
    )


def with_hook(base, name):
    """An instance of a class of the user's own, with one method."""
    return type("Own", (base,), {name: lambda self, *args: None, "__module__": __name__})()


def test_hooks_of_lightning_and_of_our_own_change_nothing():
    ours = [SubspaceMonitor(), SubspaceProjection("top")]
    theirs = [ModelCheckpoint(), LearningRateMonitor(), LambdaCallback(on_train_epoch_end=print)]
    assert not changes_batches(trainer(None, None, *ours, *theirs))
    assert not changes_batches(trainer(BoringModel(), BoringDataModule()))


@pytest.mark.parametrize("name", [*TRANSFER, START])
@pytest.mark.parametrize("base", [LightningModule, BoringModel])
def test_every_hook_of_a_module_on_the_way_counts(base, name):
    assert changes_batches(trainer(with_hook(base, name)))


@pytest.mark.parametrize("name", TRANSFER)
def test_transfer_hooks_of_a_data_module_count(name):
    assert changes_batches(trainer(datamodule=with_hook(LightningDataModule, name)))


def test_the_start_of_a_batch_in_a_callback_counts():
    assert changes_batches(trainer(None, None, ModelCheckpoint(), with_hook(Callback, START)))
    assert changes_batches(trainer(None, None, LambdaCallback(on_train_batch_start=lambda *args: None)))


def test_an_inherited_hook_counts():
    class Base(LightningModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    class Derived(Base):
        pass

    assert changes_batches(trainer(Derived()))


@pytest.mark.parametrize("name", [*TRANSFER, START])
def test_a_hook_of_the_instance_counts(name):
    module = LightningModule()
    setattr(module, name, lambda *args: None)
    assert changes_batches(trainer(module))


@pytest.mark.parametrize("name", ["on_train_batch_end", "on_train_epoch_start", "on_validation_batch_start"])
@pytest.mark.parametrize("base", [LightningModule, Callback])
def test_hooks_that_do_not_get_the_batch_before_its_step_do_not_count(base, name):
    one = with_hook(base, name)
    assert not changes_batches(trainer(one) if base is LightningModule else trainer(None, None, one))
