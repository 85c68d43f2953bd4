"""Manual optimisation: a loss function is asked for in `setup`; with it, training is bit for bit the same."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_subspace import SubspaceMonitor
from tests.modules import BATCH, FEATURES, differences, examples
from tests.thorough import usual
from tests.works_with.same_run import Classifier, compare

pytestmark = pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step")  # two eigenvalues may lie close together

LATENT = 3


def loader():
    return DataLoader(examples(), batch_size=BATCH, shuffle=True)


class GAN(LightningModule):
    """A generator and a discriminator with an optimizer each, which are toggled; two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(LATENT, 6), nn.Tanh(), nn.Linear(6, FEATURES))
        self.discriminator = nn.Sequential(nn.Linear(FEATURES, 6), nn.Softplus(), nn.Dropout(0.1), nn.Linear(6, 1))
        self.calls = 0

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.discriminator)]

    def generator_loss(self, x):
        made = self.generator(torch.randn(len(x), LATENT, dtype=x.dtype))
        return F.softplus(-self.discriminator(made)).mean()

    def discriminator_loss(self, x):
        made = self.generator(torch.randn(len(x), LATENT, dtype=x.dtype)).detach()
        return F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(made)).mean()

    def training_step(self, batch, batch_idx):
        self.calls += 1
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.discriminator_loss), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss(batch[0]))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


class Alternating(GAN):
    """Each network every other batch: one step a batch."""

    def training_step(self, batch, batch_idx):
        turn = batch_idx % 2
        optimizer = self.optimizers()[turn]
        optimizer.zero_grad()
        self.manual_backward((self.generator_loss, self.discriminator_loss)[turn](batch[0]))
        optimizer.step()


class Manual(Classifier):
    """One optimizer, with accumulation, clipping and a schedule by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class TwoParts(Classifier):
    """Two optimizers on the halves of one classifier; the loss is one."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[2].parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def of_generator(module, batch, batch_idx):
    return module.generator_loss(batch[0])


def of_discriminator(module, batch, batch_idx):
    return module.discriminator_loss(batch[0])


def of_classifier(module, batch, batch_idx):
    return F.cross_entropy(module.net(batch[0]), batch[1])


# case: module, loss function, patterns of parameters, interval, the steps that are probed in eight batches
CASES = {
    "generator": (GAN, of_generator, ["generator.*"], 4, [0, 4, 8, 12, 16]),
    "discriminator": (GAN, of_discriminator, ["discriminator.*"], 4, [0, 4, 8, 12, 16]),
    "all parameters": (GAN, of_generator, None, 4, [0, 4, 8, 12, 16]),
    "an odd interval": (GAN, of_generator, ["generator.*"], 3, [0, 4, 6, 10, 12, 16]),  # 3, 6, 9, 12, 15 are crossed
    "every step": (GAN, of_generator, ["generator.*"], 1, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
    "listed steps": (GAN, of_generator, ["generator.*"], [1, 5, 8], [2, 6, 8]),
    "alternating": (Alternating, of_generator, ["generator.*"], 2, [0, 2, 4, 6, 8]),
    "one optimizer, accumulated by hand": (Manual, of_classifier, None, 2, [0, 2, 4]),
    "several optimizers, one loss": (TwoParts, of_classifier, None, 4, [0, 4, 8, 12, 16]),
}


# The generator alone is measured at an odd interval and at listed steps, too.
MORE = ("generator", "every step")


@pytest.mark.parametrize("case", usual([case for case in CASES if case not in MORE], thorough=MORE))
def test_training_is_the_same_with_a_loss_function(case, tmp_path):
    module, loss_fn, params, every, steps = CASES[case]
    run = compare(tmp_path, module, loader, monitor={"loss_fn": loss_fn, "params": params, "every_n_steps": every})
    assert run.differing == []
    assert run.steps == steps
    assert all("sharpness" in record.metrics for record in run.monitor.history)


@pytest.mark.parametrize("module", [GAN, Alternating, Manual, TwoParts])
def test_without_a_loss_function_setup_says_so(module, tmp_path):
    made = []

    def make():
        made.append(module())
        return made[-1]

    with pytest.raises(MisconfigurationException, match=r"optimizes manually.*; pass loss_fn=, a function \(pl_module"):
        fit(SubspaceMonitor(k=2), make())
    assert getattr(made[0], "calls", 0) == 0


def fit(monitor, module, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[monitor], **{"max_epochs": 2, **quiet, **options})
    trainer.fit(module, loader())
    return trainer


def test_a_monitor_for_each_network(tmp_path):
    second = SubspaceMonitor(
        k=2,
        every_n_steps=8,
        max_overhead=None,
        sample=16,
        gradient_sample=32,
        on_failure="raise",
        loss_fn=of_discriminator,
        params=["discriminator.*"],
        name="subspace_discriminator",
    )
    first = {"loss_fn": of_generator, "params": ["generator.*"], "every_n_steps": 8}
    alone = compare(tmp_path / "alone", GAN, loader, monitor=first)
    both = compare(tmp_path / "both", GAN, loader, monitor=first, callbacks=lambda: [second])
    assert alone.differing == []
    assert differences(alone.seen, both.seen) == []
    assert len(second.history) == 3
    assert sharpness(second) != sharpness(both.monitor)
    assert sharpness(alone.monitor) == sharpness(both.monitor)


def sharpness(monitor):
    return [record.metrics["sharpness"] for record in monitor.history]


def test_a_second_fit_of_a_gan_with_the_same_monitor():
    options = {"sample": 16, "gradient_sample": 32, "max_overhead": None, "on_failure": "raise"}
    monitor = SubspaceMonitor(k=2, every_n_steps=4, loss_fn=of_generator, params=["gen*"], **options)
    torch.manual_seed(0)
    module = GAN()
    trainer = fit(monitor, module, max_epochs=1)
    assert [record.step for record in monitor.history] == [0, 4, 8]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [record.step for record in monitor.history] == [0, 4, 8, 12, 16]
    assert all("overlap_previous" in record.metrics for record in monitor.history[1:] if record.subspace.trusted)
    fit(monitor, GAN())
    assert [record.step for record in monitor.history] == [0, 4, 8, 12, 16]
