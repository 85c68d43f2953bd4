"""Where half of the sample has no trusted space there is no error bar, and one line tells why."""

import logging
from logging.handlers import BufferingHandler

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_subspace import Measurement, Needs, SubspaceMonitor, measure_subspace
from tests.left_out import leave_figures_out, leave_self_check_out
from tests.processes import run

N = 40
KEYS = {"reliability", "gradient_fraction_low", "gradient_fraction_high"}
BAR = "at step 0, the gradient fraction gets no error bar, as a half of the sample has no trusted space"
WAY_OUT = "A larger sample may help, too."


@pytest.fixture(autouse=True)
def _left_out(monkeypatch):
    leave_self_check_out(monkeypatch)
    leave_figures_out(monkeypatch)


class Quadratic(pl.LightningModule):
    """The batch has the curvatures."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1.0, 2.0, N))

    def training_step(self, batch, batch_idx):
        return 0.5 * (batch.mean(dim=0) * self.theta.square()).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def sample(first):
    """Two micro-batches; `first` are the curvatures of one, and the other has a gap behind its first."""
    other = torch.linspace(0.0, 1.0, N)
    other[0] = 100.0
    return [first[None], other[None]]


def crowded():
    """Curvatures that take many products."""
    return torch.linspace(1.0, 2.0, N)


def level():
    """Converged at once, and without a gap."""
    return torch.linspace(1.0, 1.005, N)


def peaked():
    """With a gap behind the first."""
    curvatures = torch.linspace(0.0, 1.0, N)
    curvatures[0] = 50.0
    return curvatures


def told(caplog, what="error bar"):
    return [message for message in caplog.messages if what in message]


def fit(first, **options):
    settings = {"k": 1, "every_n_steps": 1, "max_overhead": None, "max_matvecs": 15, **options}
    monitor = SubspaceMonitor(sample=sample(first), **settings)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=7, logger=False, accelerator="cpu", callbacks=[monitor], **quiet)
    trainer.fit(Quadratic(), DataLoader(crowded().repeat(8, 1)))
    return monitor


@pytest.mark.parametrize(("first", "reason"), [(crowded, "max_matvecs"), (level, "is so close to the next one")])
def test_a_half_without_a_trusted_space_is_told_once_a_run(first, reason, caplog):
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            monitor = fit(first())
        assert not any(KEYS & set(record.metrics) for record in monitor.history)  # probes 0 and 5
        assert all("gradient_fraction" in record.metrics for record in monitor.history)
        (text,) = told(caplog)
        assert text.startswith(f"SubspaceMonitor: {BAR}")
        assert reason in text
        assert text.endswith(WAY_OUT)


def test_a_probe_with_an_error_bar_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        monitor = fit(peaked())
    assert set(monitor.history[0].metrics) >= KEYS
    assert told(caplog) == []


class Remarking(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        probe.remarks[3] = f"a word of mine at step {probe.step}"  # whatever the cause is
        return {}


def test_a_remark_of_a_measurement_of_the_users_is_told_once(caplog):
    with caplog.at_level(logging.INFO):
        fit(peaked(), measurements=[Remarking()])
    assert told(caplog, "of mine") == ["SubspaceMonitor: a word of mine at step 0"]


def measured(first):
    return measure_subspace(Quadratic(), sample(first), k=1, max_matvecs=15)


def test_a_single_probe_tells_too(caplog):
    with caplog.at_level(logging.INFO, "lightning_subspace"):
        assert set(measured(peaked()).metrics) >= KEYS
        assert told(caplog) == []
        assert not KEYS & set(measured(crowded()).metrics)
    (text,) = told(caplog)
    assert text.startswith(BAR)


def test_of_several_ranks_the_first_one_tells():
    def lines():
        handler, log = BufferingHandler(1_000), logging.getLogger("lightning_subspace")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        measure_subspace(Quadratic(), sample(crowded()), k=1, max_matvecs=15, group=torch.distributed.group.WORLD)
        return [text for text in (line.getMessage() for line in handler.buffer) if "error bar" in text]

    first, second = run(lines, 2)
    assert (len(first), second) == (1, [])
