"""Number formats and kernels while a probe evaluates, and that training has its own before and behind it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.backends import cudnn
from torch.nn import functional as F

from lightning_subspace import SubspaceMonitor, SubspaceProjection, measure_subspace
from lightning_subspace.loss.training_loss import TrainingLoss
from tests.modules import CLASSES, FEATURES, Project, examples

IEEE = {"matmul": "highest", "cudnn.allow_tf32": False, "cudnn.benchmark": False}
TRAINING = {"matmul": "high", "cudnn.allow_tf32": True, "cudnn.benchmark": True}


def formats():
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn.allow_tf32": cudnn.allow_tf32,
        "cudnn.benchmark": cudnn.benchmark,
    }


@pytest.fixture(autouse=True)
def _training(monkeypatch):
    """As on a GPU, by Lightning's advice and cuDNN's default."""
    monkeypatch.setattr(cudnn, "benchmark", True)
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def seen(monkeypatch):
    """What the flags are at each evaluation of the loss, and at each look at its value behind a product."""
    found, evaluate = [], TrainingLoss._evaluate

    def look(self, *arguments, **named):
        found.append(formats() | {"cudnn.enabled": cudnn.enabled, "order": self._order})
        return evaluate(self, *arguments, **named)

    monkeypatch.setattr(TrainingLoss, "_evaluate", look)
    return found


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(FEATURES, 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x[:, None])[0][:, -1])


def measured(module, **options):
    return measure_subspace(module, [examples().tensors], k=2, loss_fn=classify, **options)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "finite-difference", "empirical-fisher"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float32_is_ieee_in_a_probe_and_its_self_check(dtype, curvature, seen):
    measured(nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)), dtype=dtype, curvature=curvature)
    assert seen
    assert all(IEEE.items() <= flags.items() for flags in seen)
    assert formats() == TRAINING


def test_native_is_as_training_has_it_but_for_the_search(seen):
    """What the search for kernels finds would be what training reads."""
    measured(nn.Linear(FEATURES, CLASSES), dtype="native")
    # The self-check goes on in float64, as ever.
    natives = [flags for flags in seen if flags["matmul"] == "high"]
    assert natives
    assert all(flags["cudnn.allow_tf32"] and not flags["cudnn.benchmark"] for flags in natives)
    assert natives[-1] is seen[-1]
    assert formats() == TRAINING


def test_recurrent_kernels_are_off_where_a_second_derivative_is_taken(seen):
    measured(Recurrent())
    assert {flags["order"] for flags in seen} == {2}
    assert not any(flags["cudnn.enabled"] for flags in seen)
    assert cudnn.enabled
    assert formats() == TRAINING


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9 has one interface")
def test_a_probe_of_a_recurrent_network_where_both_interfaces_are_mixed():
    """`torch.backends.cudnn.flags` raises there."""
    before = cudnn.conv.fp32_precision
    try:
        cudnn.conv.fp32_precision = "ieee"
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            _ = cudnn.allow_tf32
        assert measured(Recurrent()).subspace.converged
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            _ = cudnn.allow_tf32
    finally:
        cudnn.conv.fp32_precision = before


def test_they_come_back_where_the_loss_fails(seen):
    def fail(module, batch, batch_idx):
        if len(seen) > 15:
            raise KeyError("in the middle")
        return classify(module, batch, batch_idx)

    batches = [examples(seed).tensors for seed in range(8)]
    with pytest.raises(Exception, match="in the middle"):
        measure_subspace(nn.Linear(FEATURES, CLASSES), batches, k=2, loss_fn=fail)
    assert formats() == TRAINING


class Watch(Callback):
    """What training computes in."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(formats())


@pytest.mark.parametrize("callback", [SubspaceMonitor, SubspaceProjection])
def test_training_computes_in_what_its_user_has_set(callback, seen, tmp_path):
    torch.manual_seed(0)
    watch, chosen = (
        Watch(),
        {"every_n_steps": 2, "max_overhead": None} if callback is SubspaceMonitor else {"keep": "bulk"},
    )
    trainer = pl.Trainer(
        max_steps=4,
        callbacks=[callback(k=2, **chosen), watch],
        accelerator="cpu",
        logger=False,
        benchmark=True,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Project())
    assert seen
    assert all(IEEE.items() <= flags.items() for flags in seen)
    assert len(watch.seen) == 4
    assert all(flags == TRAINING for flags in watch.seen)
