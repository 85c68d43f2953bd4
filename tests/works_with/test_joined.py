"""Joined micro-batches in a Trainer: told once, invisible to training, kept by a resumed run; refused ones, too."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.callbacks import notices
from lightning_subspace.curvature.joining import Joined
from lightning_subspace.probe import randomness

STEPS = 6


class Net(LightningModule):
    def __init__(self, *parts, reduction="mean"):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *parts, nn.Linear(6, 3))
        self.reduction = reduction

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layers(batch[0]), batch[1], reduction=self.reduction)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (32,), generator=generator)
    inputs = torch.randn(32, 4, generator=generator)
    return DataLoader(TensorDataset(inputs + 2.0 * F.one_hot(labels, 4), labels), batch_size=2, shuffle=True)


def monitor():
    return SubspaceMonitor(
        k=2, sample="all", every_n_steps=3, max_overhead=None, on_failure="raise", dtype="float64", tol=1e-6
    )


def fit(folder, *callbacks, steps=STEPS, ckpt_path=None, module=None):
    seed_everything(0)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=steps, callbacks=list(callbacks), accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(Net() if module is None else module, data(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def products(monkeypatch):
    """The number of micro-batches behind every joined product."""
    seen, matvec = [], Joined.matvec
    monkeypatch.setattr(Joined, "matvec", lambda self, v: (seen.append(len(self.batches)), matvec(self, v))[1])
    return seen


def test_it_is_told_once_and_training_does_not_notice(tmp_path, products, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        watched = fit(tmp_path, monitor())
    told = [text for text in caplog.messages if "micro-batches" in text and "joined" in text]
    assert told == ["SubspaceMonitor: micro-batches joined for products: 16 -> 2."]
    assert set(products) == {16}
    bare = fit(tmp_path)
    for name, value in bare.lightning_module.state_dict().items():
        assert torch.equal(value, watched.lightning_module.state_dict()[name])
    for one, other in zip(bare.optimizers, watched.optimizers, strict=True):
        for key, state in one.state_dict()["state"].items():
            assert torch.equal(state["momentum_buffer"], other.state_dict()["state"][key]["momentum_buffer"])


def test_that_none_are_joined_is_told_once_a_process_and_another_reason_again(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_TOLD_IN_PROCESS", set())
    monkeypatch.setattr(randomness, "HESSIAN", 64)  # evaluations of a random loss, not hundreds
    monkeypatch.setattr(randomness, "GRADIENT", 64)
    random, told = Net(nn.Dropout(0.3)), []
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        modules = random, random, Net(nn.Dropout(0.5)), Net(reduction="sum"), Net(nn.Tanh(), reduction="sum")
        for module in modules:
            caplog.clear()
            fit(tmp_path, SubspaceMonitor(k=0, sample="all", every_n_steps=[0]), steps=1, module=module)
            told.append([text for text in caplog.messages if "micro-batches not joined" in text])
    first, again, other, of_sums, of_other_sums = told
    assert first == ["SubspaceMonitor: micro-batches not joined: the loss is random."]
    assert len(of_sums) == 1
    assert "is not the mean of theirs" in of_sums[0]
    assert again == other == of_other_sums == []  # the last one differs by its numbers alone


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_goes_on_with_them(tmp_path, products):
    whole = monitor()
    fit(tmp_path, whole)
    first, second = monitor(), monitor()
    fit(tmp_path, first, steps=3).save_checkpoint(tmp_path / "last.ckpt")
    products.clear()
    fit(tmp_path, second, ckpt_path=tmp_path / "last.ckpt")
    assert products
    assert [record.step for record in second.history] == [record.step for record in whole.history] == [0, 3, 6]
    found = {record.step: record.metrics for record in second.history}
    for record in list(whole.history)[:2]:  # behind it Lightning gives the batches of the epoch anew
        for key in ("sharpness", "gradient_fraction", "gradient_norm", "eigenvalues/02"):
            if key in record.metrics:
                assert found[record.step][key] == pytest.approx(record.metrics[key], rel=1e-5), (record.step, key)
