"""With warnings as errors a number that is left out is left out, training goes on, and the log says what was said."""

import logging
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import (
    CriticalSharpness,
    PeerError,
    Stability,
    SubspaceMonitor,
    SubspaceProjection,
    eigsh,
    measure_subspace,
)
from lightning_subspace.data.micro_batch import MicroBatch, with_equal_weights
from lightning_subspace.report import figures, loggers
from tests.processes import run
from tests.thorough import usual
from tests.works_with.faults import OnCtx

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
LEFT_OUT = "fractions and overlaps are left out: eigenvalue 2 is so close to the next one"


class Net(pl.LightningModule):
    """Three equal outputs, so three equal eigenvalues: a space of two is not determined."""

    def __init__(self, rule=torch.optim.SGD):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.rule = nn.Linear(5, 3), rule

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.rule(self.parameters(), lr=0.1)


class Single(Net):
    """With a gap behind its only large eigenvalue."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0])[:, 0].square().mean()


class WithoutLoss(Single):
    def training_step(self, batch, batch_idx):
        return None if batch[0].sum() > 0 else super().training_step(batch, batch_idx)


class Wrong(Single):
    def training_step(self, batch, batch_idx):
        return OnCtx.apply(self.net(batch[0])[:, 0]).mean()


class Broken(Single):
    def training_step(self, batch, batch_idx):
        if id(self.net.weight) != weight[0]:
            raise ValueError("on purpose")
        return super().training_step(batch, batch_idx)


class BrokenOnOne(Broken):
    def training_step(self, batch, batch_idx):
        return (super() if self.global_rank == 1 else super(Broken, self)).training_step(batch, batch_idx)


weight = [0]  # of the module itself; a global, since a probe puts attributes back


class FailingLogger(Logger):
    name = version = "failing"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if any("subspace" in key for key in metrics):
            raise OSError("disk full")


def data():
    return DataLoader(TensorDataset(torch.randn(32, 5, generator=torch.Generator().manual_seed(1))), batch_size=8)


def fit(module, *callbacks, steps=4, **options):
    weight[0] = id(module.net.weight)
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[*callbacks], **{**QUIET, "enable_checkpointing": False, **options}
    )
    trainer.fit(module, data())
    assert trainer.global_step == steps


def monitor(**options):
    return SubspaceMonitor(**{"k": 2, "every_n_steps": 2, "max_overhead": None, **options})


def fit_with(module, **options):
    fit(module, monitor(**options))


def measure(module, **options):
    record = measure_subspace(module, list(data()), k=1, **options)
    assert record.metrics  # the function gives what it has found


OURS = (
    *("SubspaceMonitor", "SubspaceProjection", "Stability", ".*Rprop", ".*Logger raised", "EarlyStopping"),
    *("ModelCheckpoint", "tol: ", ".*gave no loss", ".*second derivatives", "the figures"),
)


def draw_no_figures(tmp_path, patch):
    def fail(*args):
        raise OSError("disk full")

    patch.setattr(figures, "spectrum_figure", fail)
    fit(Single(), monitor(k=1, every_n_steps=[0]), logger=CSVLogger(tmp_path))


def write_no_entries(tmp_path, patch):
    def fail(*args):
        raise OSError("disk full")

    patch.setattr(loggers, "summary_of", fail)
    fit(Single(), monitor(k=1, every_n_steps=[0]), logger=TensorBoardLogger(tmp_path))


def weigh_equally():
    batches = [MicroBatch(torch.ones(2, 3), 1.0, index, is_counted=False) for index in range(2)]
    assert [batch.weight for batch in with_equal_weights(batches)] == [1.0, 1.0]


def find_eigenvalues():
    found = eigsh(lambda v: 2.0 * v, 8, k=1, tol=1e-9, dtype=torch.float32, verify="never")
    assert found.eigenvalues[0] == pytest.approx(2.0)


# Everything in the package that has a word to say; what is said then.
PLACES = {
    "numbers left out": (lambda: fit_with(Net()), LEFT_OUT),
    "a failed probe": (lambda: fit_with(Broken()), "the probe at step 0 failed and is left out, training goes on"),
    "the budget": (lambda: fit_with(Single(), k=1, max_overhead=1e-6, every_n_steps=1), "steps (1, 2, 3"),
    "the self-check": (lambda: fit_with(Wrong(), k=1), "What rests on them is marked"),
    "callbacks that stop": (
        lambda: fit(Single(), monitor(k=1), EarlyStopping("subspace/sharpness", strict=True)),
        "EarlyStopping(monitor='subspace/sharpness', strict=True) will end the run",
    ),
    "a space that is not used": (lambda: fit(Net(), SubspaceProjection("bulk", k=2)), "the space is not used"),
    "a rule that is not known": (
        lambda: fit(Single(torch.optim.Rprop), monitor(k=1, measurements=[Stability()])),
        "Stability: the rule of Rprop is not known",
    ),
    "another one": (
        lambda: fit(Single(torch.optim.Rprop), monitor(k=1, measurements=[CriticalSharpness()])),
        "the rule of Rprop is not known",
    ),
    "a logger": (lambda: fit(Single(), monitor(k=1), logger=FailingLogger()), "FailingLogger raised OSError"),
    "weights": (weigh_equally, "all batches count the same"),
    "a tolerance": (find_eigenvalues, "tol: expected at least"),
    "measure_subspace": (lambda: measure(Wrong()), "What rests on them is marked"),
    "measure_subspace without a loss": (lambda: measure(WithoutLoss()), "micro-batches gave no loss"),
}


# Their words are those of others.
MORE_PLACES = ["another one", "measure_subspace"]


@pytest.mark.parametrize("name", usual([name for name in PLACES if name not in MORE_PLACES], thorough=MORE_PLACES))
def test_nothing_stops_and_the_log_tells(name, logged):
    act, text = PLACES[name]
    with warnings.catch_warnings():
        act_with_warnings_as_errors(act)
    assert sum(text in line for line in logged) == 1, logged


def act_with_warnings_as_errors(act):
    # Of this package alone: Lightning has a word to say of its own.
    warnings.simplefilter("ignore")
    for text in OURS:
        warnings.filterwarnings("error", message=text)
    act()


@pytest.mark.parametrize(
    ("act", "text"), [(draw_no_figures, "could not be drawn"), (write_no_entries, "an entry for TensorBoard's tab")]
)
def test_nor_do_pictures(act, text, logged, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        act_with_warnings_as_errors(lambda: act(tmp_path, monkeypatch))
    assert sum(text in line for line in logged) == 1, logged


def test_a_callback_that_saves_is_told_of(logged, tmp_path):
    saving = ModelCheckpoint(tmp_path, monitor="subspace/sharpness", every_n_train_steps=1)
    with warnings.catch_warnings():
        act_with_warnings_as_errors(lambda: fit(Single(), saving, monitor(k=1), enable_checkpointing=True))
    assert any("ModelCheckpoint(monitor='subspace/sharpness') saves nothing" in line for line in logged)


def test_what_is_left_out_is_left_out_and_the_rest_is_there(logged):
    one = monitor(log="all")
    with warnings.catch_warnings():
        act_with_warnings_as_errors(lambda: fit(Net(), one))
    assert [record.step for record in one.history] == [0, 2, 4]
    for record in one.history:
        assert "gradient_fraction" not in record.metrics
        assert any(key.startswith("eigenvalues") for key in record.metrics)
    assert len(logged) == 1


def test_on_failure_raise_still_raises(logged):
    with warnings.catch_warnings(), pytest.raises(ValueError, match="on purpose"):
        act_with_warnings_as_errors(lambda: fit_with(Broken(), on_failure="raise"))
    assert logged == []


def test_a_warning_is_one_where_it_may_be():
    with pytest.warns(UserWarning, match=LEFT_OUT):
        fit_with(Net())


def test_a_function_of_the_users_that_shows_warnings_may_raise(logged, monkeypatch):
    def show(*args, **kwargs):
        raise OSError("closed")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="SubspaceMonitor")
        monkeypatch.setattr(warnings, "showwarning", show)
        fit_with(Net())
    assert len(logged) == 1


# -- two ranks --------------------------------------------------------------------------------------------------------


def fit_on_a_rank(kind, options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    texts, error = [], None
    log = logging.getLogger("lightning_subspace")
    log.handlers[:] = [handler := logging.Handler()]
    handler.emit = lambda record: texts.append(record.getMessage())
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="SubspaceMonitor")
    module, one = kind(), monitor(**options)
    try:
        fit(module, one, strategy="ddp", devices=2)
    except Exception as raised:
        error = type(raised)
    return [record.step for record in one.history], texts, error, module.net.weight.tolist()


def test_two_ranks_go_on_together():
    first, second = run(fit_on_a_rank, 2, Net, {}, group=False)
    assert first[0] == second[0] == [0, 2, 4]
    assert (len(first[1]), second[1]) == (1, [])
    assert first[2:] == second[2:]
    assert first[2] is None


def test_two_ranks_without_a_probe_go_on_together():
    for options, errors in (({}, (None, None)), ({"on_failure": "raise"}, (PeerError, ValueError))):
        first, second = run(fit_on_a_rank, 2, BrokenOnOne, options, group=False)
        assert first[0] == second[0] == []
        assert (len(first[1]), second[1]) == (errors[0] is None, [])
        assert (first[2], second[2]) == errors
