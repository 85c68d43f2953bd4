"""Every way of running the loop: training is bit for bit what it is without the monitor, with several probes taken."""

import csv

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_subspace import Measurement, Needs, SubspaceMonitor
from tests.left_out import leave_figures_out
from tests.modules import BATCH, examples
from tests.thorough import usual
from tests.works_with.same_run import Classifier, Validated, compare

pytestmark = pytest.mark.filterwarnings(
    "ignore:SubspaceMonitor. at step",  # two eigenvalues may lie close together
)


def loader(**options):
    return DataLoader(examples(), **{"batch_size": BATCH, "shuffle": True, **options})


def validation():
    return DataLoader(examples(seed=1), batch_size=BATCH)


class BySteps(Classifier):
    """A schedule of the learning rate that moves at every step."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Normalised(Validated):
    """Batch-norm and dropout, for callbacks that average weights and recompute statistics."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*self.net[:1], nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), *self.net[2:])


class ByLBFGS(Classifier):
    """Evaluates its training step several times a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


class Clipping(Classifier):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class Swa(StochasticWeightAveraging):
    def __init__(self):
        super().__init__(swa_lrs=0.05, swa_epoch_start=1)


class Averaging(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx % 2 == 0


# case: module, arguments of the Trainer, further callbacks, steps that are probed
FOURTH = [0, 4, 8]
LOOPS = {
    "accumulate_grad_batches": (Classifier, {"accumulate_grad_batches": 2, "max_epochs": 4}, [], FOURTH),
    "accumulation by epoch": (
        Classifier,
        {"max_epochs": 3},
        [lambda: GradientAccumulationScheduler({0: 2, 1: 1})],
        [0, 4, 8, 10],
    ),
    "clipping by norm": (Classifier, {"gradient_clip_val": 0.01}, [], FOURTH),
    "clipping of the user's own": (Clipping, {}, [], FOURTH),
    "a learning rate by step": (BySteps, {}, [], FOURTH),
    "LBFGS": (ByLBFGS, {}, [], FOURTH),
    "val_check_interval": (Validated, {"val_check_interval": 2}, [], FOURTH),
    "fast_dev_run": (Validated, {"fast_dev_run": 3}, [], [0, 3]),
    "EMAWeightAveraging": (Normalised, {}, [lambda: EMAWeightAveraging(decay=0.9)], FOURTH),
    "StochasticWeightAveraging": (Normalised, {"max_epochs": 3}, [Swa], [*FOURTH, 12]),  # 13 is of no training
    "barebones": (Classifier, {"barebones": True}, [], FOURTH),
    "reload_dataloaders_every_n_epochs": (Classifier, {"reload_dataloaders_every_n_epochs": 1}, [], FOURTH),
    "profiler": (Validated, {"profiler": "simple"}, [], FOURTH),
    "detect_anomaly": (Classifier, {"detect_anomaly": True}, [], FOURTH),
    "inference_mode=False": (Validated, {"inference_mode": False}, [], FOURTH),
}
# Those that differ in a detail from one above.
MORE_LOOPS = {
    "WeightAveraging": (Normalised, {}, [Averaging], FOURTH),  # what EMAWeightAveraging is derived from
    "clipping by value": (Classifier, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, [], FOURTH),
    "max_epochs=-1": (Classifier, {"max_epochs": -1, "max_steps": 9}, [], [*FOURTH, 9]),
    "no sanity check": (Validated, {"num_sanity_val_steps": 0}, [], FOURTH),
    "validation across epochs": (Validated, {"val_check_interval": 3, "check_val_every_n_epoch": None}, [], FOURTH),
    "num_sanity_val_steps": (Validated, {"num_sanity_val_steps": 3}, [], FOURTH),
    "deterministic": (Classifier, {"deterministic": True}, [], FOURTH),
    "max_steps": (Classifier, {"max_steps": 5, "max_epochs": -1}, [], [0, 4, 5]),
    "limit_val_batches": (Validated, {"limit_val_batches": 1}, [], FOURTH),
}


@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled",
    "ignore:Swapping scheduler",
    "ignore:Detected call of",  # the scheduler that SWA swaps in
)
@pytest.mark.parametrize("case", usual(list(LOOPS), thorough=list(MORE_LOOPS)))
def test_training_is_the_same_however_the_loop_runs(case, tmp_path):
    module, options, callbacks, steps = (LOOPS | MORE_LOOPS)[case]
    if case == "barebones":  # allows none of these to be given
        options = {**options, "logger": None, "enable_checkpointing": None, "enable_progress_bar": None}
        options["enable_model_summary"] = None
    run = compare(
        tmp_path,
        module,
        loader,
        callbacks=lambda: [make() for make in callbacks],
        validation=validation if issubclass(module, Validated) else None,
        monitor={"every_n_steps": 4},
        **options,
    )
    assert run.differing == []
    assert run.steps == steps
    assert all("gradient_fraction" in record.metrics or record.subspace for record in run.monitor.history)
    again = [[batch.data for batch in sample.hessian] for sample in run.samples.values()]
    assert all(torch.equal(a[0], b[0]) for other in again for a, b in zip(again[0], other, strict=True))


@pytest.mark.parametrize("every", usual([3], thorough=[5]))
def test_an_epoch_that_ends_inside_an_accumulation(every, tmp_path):
    run = compare(tmp_path, Classifier, loader, accumulate_grad_batches=every, monitor={"every_n_steps": 1})
    assert run.differing == []
    assert run.steps == list(range(run.trainer.global_step + 1))


def test_several_optimizers_need_manual_optimisation(tmp_path):
    class Two(Classifier):
        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        compare(tmp_path, Two, loader)  # already without the monitor; with loss_fn=, see test_manual.py


# -- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """A Timer's clock that only the tests here move."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    return clock


class Slow(Measurement):
    """Makes the probe of one step a long one."""

    needs = Needs.NOTHING

    def __init__(self, step, seconds, clock):
        self.step, self.seconds, self.clock = step, seconds, clock

    def measure(self, probe):
        if probe.step == self.step:
            self.clock.now += self.seconds
        return {"took": 1.0}


def fit(folder, monitor, **options):
    """A run of eight steps with files, and without what is shown."""
    torch.manual_seed(0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        callbacks=[monitor],
        **{"max_epochs": 2, **quiet, **options},
    )
    trainer.fit(Classifier(), loader())
    return trainer


def test_a_time_limit_reached_inside_a_probe_ends_training_after_it(clock, tmp_path, monkeypatch):
    leave_figures_out(monkeypatch)
    slow = Slow(4, 4.0, clock)
    monitor = SubspaceMonitor(
        k=1, every_n_steps=2, max_overhead=None, sample=16, on_failure="raise", measurements=[slow]
    )
    limited = fit(tmp_path, monitor, max_time={"seconds": 4})
    assert limited.global_step == 4  # the step that was probed is the last
    assert [record.step for record in monitor.history] == [0, 2, 4]
    assert all(record.metrics["took"] == 1.0 for record in monitor.history)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "2", "4"]
    slow.step = -1
    assert fit(tmp_path, monitor).global_step == 8  # the same monitor in another run
    assert [record.step for record in monitor.history] == [0, 2, 4, 6, 8]


def test_a_time_limit_apart_from_the_time_of_probes(clock, tmp_path):
    class Ticking(Classifier):
        def on_train_batch_end(self, *args):
            clock.now += 1.0

    run = compare(tmp_path, Ticking, loader, max_time={"seconds": 5}, max_epochs=-1)
    assert run.differing == []
    assert run.steps == [0, 2, 4, run.trainer.global_step]
