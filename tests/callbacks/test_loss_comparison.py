"""The second opinion in training: what is recorded, alarms where the sample is not what is trained, none elsewhere."""

import logging
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from lightning_subspace import SubspaceMonitor
from lightning_subspace.probe.second_opinion import BLOCK
from tests.left_out import leave_self_check_out
from tests.thorough import covering, how_many, usual

DIGITS = load_digits()
INPUTS, LABELS = torch.tensor(DIGITS.data / 16.0, dtype=torch.float32), torch.tensor(DIGITS.target)
SHUFFLED = LABELS[torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    leave_self_check_out(monkeypatch)


class Digits(pl.LightningModule):
    def __init__(self, dropout=0.0, *, evaluates=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 10))
        self.evaluates = evaluates
        self.losses = []

    def on_train_start(self):
        self.train(not self.evaluates)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * self.trainer.accumulate_grad_batches)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class Reloaded(Digits):
    """Another task from the third epoch on."""

    def train_dataloader(self):
        return loader(labels=LABELS if self.trainer.current_epoch < 2 else (LABELS + 1) % 10)


def loader(inputs=INPUTS, labels=LABELS, **options):
    options = {"shuffle": "sampler" not in options, "batch_size": 64, "drop_last": True, **options}
    return DataLoader(TensorDataset(inputs, labels), **options)


def batches(labels=LABELS, count=8, size=64):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[: count * size]
    return [(INPUTS[part], labels[part]) for part in order.split(size)]


def fitted(module, data, *callbacks, steps=120, monitor=None, **options):
    """A monitor after training, and what it has said."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = {"k": 0, "every_n_steps": 30, "max_overhead": None, "sample": 256, "gradient_sample": 1024}
    watching = SubspaceMonitor(**{**settings, "on_failure": "raise", **(monitor or {})})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps, enable_model_summary=False, callbacks=[*callbacks, watching], **{**quiet, **options}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data)
    said = [str(w.message) for w in caught if "at two probes in a row" in str(w.message)]
    return watching, said


class Average(pl.Callback):
    """Puts an average of the weights into the module between steps, where a probe finds it."""

    def __init__(self, decay):
        self.decay, self.average, self.trained = decay, None, None

    def on_train_batch_end(self, trainer, module, *_):
        self.trained = [parameter.detach().clone() for parameter in module.parameters()]
        self.average = self.average or [parameter.clone() for parameter in self.trained]
        for mean, parameter in zip(self.average, self.trained, strict=True):
            mean.lerp_(parameter, 1.0 - self.decay)
        self.put(module, self.average)

    def on_train_batch_start(self, trainer, module, *_):
        if self.trained is not None:
            self.put(module, self.trained)

    @torch.no_grad()
    def put(self, module, values):
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)


def few_classes():
    return SubsetRandomSampler(torch.where(LABELS < 5)[0].tolist())


def preferring_two():
    return WeightedRandomSampler(torch.where(LABELS < 2, 1.0, 0.02).tolist(), len(LABELS))


# What is measured is not what is trained: module, data, other callbacks, and the rest of `fitted`.
MISMATCHES = {
    "sampler of some classes": lambda: (Digits(), loader(sampler=few_classes()), [], {"sample": batches()}),
    "sampler with weights": lambda: (Digits(), loader(sampler=preferring_two()), [], {"sample": batches()}),
    "one batch": lambda: (Digits(), loader(sampler=few_classes()), [], {"sample": batches(count=1)}),
    "reloaded data": lambda: (Reloaded(), None, [], {"sample": batches()}),
    "averaged weights": lambda: (Digits(), loader(), [Average(0.99)], {}),
    "eval mode in training": lambda: (Digits(0.8, evaluates=True), loader(), [], {}),
    "mode='eval'": lambda: (Digits(0.8), loader(), [], {"mode": "eval"}),
    "other labels": lambda: (Digits(), loader(), [], {"sample": batches(SHUFFLED)}),
}


# Others have their sampler, and their labels.
MORE_MISMATCHES = ["sampler of some classes", "one batch", "other labels"]


@pytest.mark.parametrize(
    "name", usual([name for name in MISMATCHES if name not in MORE_MISMATCHES], thorough=MORE_MISMATCHES)
)
def test_what_is_measured_is_not_what_is_trained(name):
    module, data, callbacks, monitor = MISMATCHES[name]()
    # Where the sample is ours, another one is taken first, which may take the place of a comparison.
    options = {"reload_dataloaders_every_n_epochs": 1, "steps": 180} if data is None else {"steps": 150}
    watching, said = fitted(module, data, *callbacks, monitor=monitor, **options)
    assert len(said) == 1
    assert watching._recorder.losses.opinion.differs
    for cause in ("sampler", "reloaded", "weights", "random", "mode"):
        assert cause in said[0]
    assert ("Usual causes: mode='eval'" in said[0]) == (name == "mode='eval'")


# What is trained is measured.
MATCHES = {
    "usual": lambda: (Digits(), loader(), {}, {}),
    "dropout": lambda: (Digits(0.5), loader(), {}, {}),
    "everything": lambda: (Digits(), loader(), {"sample": "all"}, {}),
    "one batch": lambda: (Digits(), loader(), {"sample": batches(count=1)}, {}),
    "current batch": lambda: (Digits(), loader(batch_size=8), {"sample": "current"}, {}),
    "full batch": lambda: (Digits(), loader(batch_size=len(LABELS)), {"sample": batches(count=1)}, {}),
    "accumulated": lambda: (
        Digits(),
        loader(batch_size=16),
        {},
        {"accumulate_grad_batches": 4, "steps": how_many(60, thorough=120)},
    ),
    "the sampler's own": lambda: (Digits(), loader(sampler=preferring_two()), {}, {}),
    "in order": lambda: (Digits(), loader(shuffle=False), {}, {}),
    "interpolating": lambda: (
        Digits(),
        loader(INPUTS[:64], LABELS[:64], batch_size=16),
        {},
        {"steps": how_many(200, thorough=400)},
    ),
    "learnt by heart": lambda: (Digits(), loader(INPUTS[:512], SHUFFLED[:512]), {}, {"steps": 400}),
    "every step": lambda: (
        Digits(),
        loader(),
        {"every_n_steps": 1, "gradient_sample": 256},
        {"steps": how_many(20, thorough=80)},
    ),
}


# Other samples of the same data, a loader of another order, and small losses: "usual" and "interpolating".
MORE_MATCHES = ["everything", "one batch", "full batch", "in order", "learnt by heart"]


@pytest.mark.parametrize("name", usual([name for name in MATCHES if name not in MORE_MATCHES], thorough=MORE_MATCHES))
def test_what_is_trained_is_measured(name):
    module, data, monitor, options = MATCHES[name]()
    watching, said = fitted(module, data, monitor=monitor, **options)
    assert said == []
    assert watching._recorder.losses.opinion.last is not None  # something has been compared


def test_another_loss_on_purpose_is_recorded_and_not_warned_of():
    def larger(module, batch, batch_idx):
        return 5.0 * module.training_step(batch, batch_idx)

    watching, said = fitted(Digits(), loader(), monitor={"loss_fn": larger}, steps=how_many(60, thorough=120))
    assert said == []
    last = watching.history[-1].metrics
    assert last["sample_loss"] > 3.0 * last["training_loss"]


def over_sample(module, parts):
    """The mean loss in float64 over examples in batches of any size."""
    twin = Digits().double()
    twin.load_state_dict(module.state_dict())
    inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return float(F.cross_entropy(twin.net(inputs.double()), labels))


@pytest.mark.parametrize(
    ("curvature", "k"),
    covering(usual(["hessian", "empirical-fisher"], thorough=["ggn", "finite-difference"]), [0, 2]),
)
def test_the_loss_of_the_sample_and_the_running_mean(curvature, k):
    parts, expected = [(INPUTS[:24], LABELS[:24]), (INPUTS[24:40], LABELS[24:40])], {}

    def keep(trainer, module, *_):
        expected[trainer.global_step] = over_sample(module, parts)

    module = Digits()
    callback = LambdaCallback(on_train_start=keep, on_train_batch_end=keep)
    monitor = {"sample": parts, "curvature": curvature, "k": k, "every_n_steps": 10}
    watching, _ = fitted(module, loader(batch_size=16), callback, monitor=monitor, steps=30, accumulate_grad_batches=2)
    assert [record.step for record in watching.history] == [0, 10, 20, 30]
    for record in watching.history:
        assert record.metrics["sample_loss"] == pytest.approx(expected[record.step], rel=1e-5)
        seen = 2 * (record.step + (record.step < 30))  # with the step from that point
        recent = module.losses[max(seen - BLOCK, 0) : seen]
        assert record.metrics["training_loss"] == pytest.approx(sum(recent) / len(recent), rel=1e-5)


class Odd(Digits):
    """Returns its loss in a dict, and none for every fourth batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "beside": 1.0} if batch_idx % 4 != 3 else None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(math.nan if not outputs or outputs.get("loss") is None else float(outputs["loss"]))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_batches_without_a_loss_are_left_out():
    module = Odd()
    watching, said = fitted(module, loader(), monitor={"sample": batches(count=3)}, steps=60)
    assert said == []
    finite = [loss for loss in module.losses[-BLOCK:] if math.isfinite(loss)]
    assert len(finite) < BLOCK
    assert watching.history[-1].metrics["training_loss"] == pytest.approx(sum(finite) / len(finite), rel=1e-5)
