"""A probe that runs out of memory: training goes on, and what the probe had is free again, without a collection."""

import gc
import warnings
from functools import partial

import torch
from lightning.pytorch import Callback, seed_everything
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_subspace import measure_subspace
from tests.benchmarks.workloads import colour_images, cross_entropy
from tests.gpu import fresh, memory, training
from tests.gpu.device import DEVICE, IS_CARD, shows_warnings

pytestmark = shows_warnings
BATCH, WIDTH = (128, 32) if IS_CARD else (16, 2)
PARTS = 6  # micro-batches, of which not all graphs shall fit
PROBE = 3  # the step, when all that training keeps is there
# What training itself may come to keep in the steps behind: small beside one activation of this network.
SLACK = BATCH * WIDTH * 32 * 32


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))

    def forward(self, x):
        for convolution in self.convolutions:
            x = memory.noted(torch.tanh(convolution(x)))
        return x


class Deep(nn.Module):
    """Eight layers of three convolutions each, with wide activations and few parameters.

    With `saving` a training step keeps those between the layers alone, while a graph of the gradient needs all of
    them: so there is a limit at which training fits, and a probe does not.
    """

    def __init__(self, *, saving):
        super().__init__()
        self.saving = saving
        self.first, self.head = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Linear(WIDTH, 10)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(8))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.saving else layer(x)
        return self.head(x.mean(dim=(2, 3)))


class Limit(Callback):
    """Measures what a step takes, allows half as much again in front of the probe, and watches what is taken after."""

    def __init__(self):
        self.before, self.after, self.step = 0, [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            memory.forget_peak()  # of the first step, whose kernels are chosen
        elif batch_idx == PROBE - 1:
            self.step = memory.peak()
            memory.limit(1.5 * self.step)
            self.before = memory.taken()
        elif batch_idx >= PROBE:
            self.after.append(memory.taken())


def trained_under_a_limit():
    """Training with a probe that does not fit: steps taken, records, bytes before and after, and what was told."""
    seed_everything(1, verbose=False)
    limit = Limit()
    data = training.loader(BATCH)
    watching = training.monitor(k=1, every_n_steps=[PROBE], sample=BATCH, gradient_sample=BATCH, on_failure="warn")
    gc.disable()  # nothing may wait for it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = training.fit(training.Classifier(Deep(saving=True)), [limit, watching], data=data, deterministic=False)
    told = [str(warning.message) for warning in caught if "SubspaceMonitor" in str(warning.message)]
    steps = len({name.split(":")[0] for name in seen})
    return steps, len(watching.history), limit.before, limit.after, limit.step, told


def test_training_goes_on_after_a_probe_that_had_no_room():
    ((steps, num_records, before, after, step, told),) = fresh.run(trained_under_a_limit)
    assert steps == training.STEPS
    assert num_records == 0
    assert any("memory" in text for text in told), told
    assert max(after) <= before + SLACK < step


def measured_under_a_limit():
    """Eigenvalues of all micro-batches with all the room there is, then with room for some of their graphs.

    After a few products they need not have converged: the same products give the same.
    """
    module = Deep(saving=False).to(DEVICE)
    images, labels = (piece.to(DEVICE) for piece in colour_images(count=PARTS * BATCH))
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    measure = partial(measure_subspace, module, k=1, max_matvecs=12, verify="never", loss_fn=cross_entropy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure(batches[:1])  # kernels are chosen
        memory.forget_peak()
        start = memory.taken()
        measure(batches[:1])
        one = memory.peak()
        free = measure(batches)
        memory.limit(2.5 * one)
        gc.disable()
        limited = measure(batches)
    values = [record.subspace.eigenvalues.tolist() for record in (free, limited)]
    del free, limited
    return values, start, memory.taken(), one


def test_a_probe_with_room_for_some_graphs_gives_the_same_eigenvalues():
    (((free, limited), before, after, one),) = fresh.run(measured_under_a_limit)
    torch.testing.assert_close(torch.tensor(limited), torch.tensor(free), rtol=1e-3, atol=0.0)
    assert after <= before + SLACK < one
