"""With the random numbers of a training step replayed, the probe's gradient is `.grad`, to the last bit."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace.curvature.gradient import backward_gradient, pruned_gradient
from lightning_subspace.data.sample import sample_of_current
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.state.rng import RandomState

INPUTS = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True), nn.GRU(8, 6, batch_first=True)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0][:, -1]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0].flatten(1)


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout2d(0.3),
        nn.GroupNorm(2, 4), nn.Mish(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip


def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))


def transformer():
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True), nn.Flatten())


BODIES = {
    "batch-norm-dropout": dense,
    "conv-batch-norm-dropout": convolutional,
    "recurrent-dropout": Recurrent,
    "transformer-dropout": transformer,
    "fused-attention": Attending,
}


class Net(LightningModule):
    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.LazyLinear(3)
        self.head(self.body(INPUTS))
        self.noise = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        hidden = self.body(batch[0])
        hidden = hidden + 0.1 * self.noise * torch.randn_like(hidden)  # a random number of the step's own
        return F.cross_entropy(self.head(hidden), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Replay(Callback):
    """Take each step's gradient once more, before it is clipped, and compare."""

    def __init__(self, gradient_of):
        self.gradient_of = gradient_of
        self.equal = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.state, self.sample = RandomState.now(), sample_of_current(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        space = ParameterSpace.of(pl_module)
        trained = space.flatten([p.grad for p in space.tensors(pl_module)])
        with TrainingLoss(pl_module, space, random_state=self.state, order=1) as loss:
            measured = self.gradient_of(loss, self.sample.hessian[0])
        self.equal.append(torch.equal(measured, trained))  # a callback's attributes are put back before


@pytest.mark.parametrize("gradient_of", [backward_gradient, pruned_gradient])
@pytest.mark.parametrize("name", BODIES)
def test_the_gradient_is_that_of_the_step(name, gradient_of):
    replay = Replay(gradient_of)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net(BODIES[name]())
        trainer = Trainer(
            max_epochs=2,
            gradient_clip_val=0.1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[replay],
        )
        trainer.fit(module, DataLoader(TensorDataset(INPUTS, LABELS), batch_size=6, shuffle=True))
    assert replay.equal == [True] * 8


def test_with_a_seed_the_random_numbers_are_others():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net(dense())
    batch, space = sample_of_current((INPUTS, LABELS)).hessian[0], ParameterSpace.of(module)
    state = RandomState.now()
    before = torch.get_rng_state()
    gradients = []
    for options in ({"random_state": state}, {"random_state": state}, {}):
        with TrainingLoss(module, space, **options) as loss:
            gradients += [backward_gradient(loss, batch), backward_gradient(loss, batch)]
    assert all(torch.equal(gradients[0], g) for g in gradients[:4])
    assert not torch.equal(gradients[0], gradients[4])
    assert torch.equal(torch.get_rng_state(), before)
