"""The transfer hooks, of a module and of a data module, are applied to each batch once."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from tests.works_with.numbered import Numbered, Stream, loader
from tests.works_with.same_run import Classifier, compare

pytestmark = pytest.mark.filterwarnings(
    "ignore:SubspaceMonitor. at step",  # two eigenvalues may lie close together
    "ignore:You have overridden `on_.*_batch_transfer` in `LightningModule`",  # beside a data module
)


class VectorBuffers:
    """Doubles before the transfer, adds one after it; both show in what training_step gets."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 1, batch[1]


class TransferringModule(VectorBuffers, Classifier):
    def training_step(self, batch, batch_idx):
        assert isinstance(batch, tuple)
        self.got = getattr(self, "got", [])
        self.got.append(batch[0])
        return super().training_step(batch, batch_idx)


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)


class TransferringData(VectorBuffers, Data):
    pass


def assert_transferred_once(seen: list[Tensor]) -> None:
    raw = Numbered().x.double()
    assert len(seen) > 0
    for row in torch.cat(seen):
        assert (row - (2 * raw + 1)).abs().amax(dim=1).min() < 1e-6


def measured(seen: list[Tensor]) -> Any:
    """The training loss, as loss_fn that keeps what it gets."""

    def loss_fn(module, batch, batch_idx):
        seen.append(batch[0].double())
        return module.training_step(batch, batch_idx)

    return loss_fn


@pytest.mark.parametrize(
    ("module", "data"),
    [(TransferringModule, Data), (TransferringModule, lambda: loader(shuffle=True)), (Classifier, TransferringData)],
    ids=["module", "module, no data module", "data module"],
)
def test_transfer_hooks_are_applied_once(module, data, tmp_path):
    seen = []
    run = compare(tmp_path, module, data, monitor={"k": 0, "loss_fn": measured(seen)})
    assert run.differing == []
    assert_transferred_once(seen)


@pytest.mark.parametrize("sample", ["current", 8])
def test_batches_of_training_do_not_go_through_the_hooks_again(sample, tmp_path):
    seen = []
    data = (lambda: loader(Stream())) if sample == 8 else Data
    monitor = {"k": 0, "loss_fn": measured(seen), "sample": sample}
    run = compare(tmp_path, TransferringModule, data, monitor=monitor)
    assert run.differing == []
    assert_transferred_once(seen)


def test_a_data_module(tmp_path):
    run = compare(tmp_path, Classifier, Data)
    assert run.differing == []
    assert run.steps == [0, 2, 4, 6, 8]
