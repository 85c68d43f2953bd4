"""Any combination of valid arguments trains as without a monitor, or is refused before the first step."""

import functools
import inspect
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.measurements import GradientCurvature, Reliability
from tests.thorough import how_many
from tests.works_with.test_state import QUIET

STEPS, N = 3, 23


class Net(LightningModule):
    """23 parameters, dropout, batch-norm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.Softplus(), nn.Linear(2, 1))
        self.extra = nn.Parameter(torch.zeros(2))

    def training_step(self, batch, batch_idx):
        loss = (self.head(self.body(batch[0]))[:, 0] - batch[1]).square().mean() + self.extra.square().sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def loss_fn(module, batch, batch_idx):
    return module.head(module.body(batch[0])).square().mean()


def examples():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator))


def train(monitor=None):
    """The weights, buffers and optimizer state after three steps, and the random numbers that come next."""
    seed_everything(0, verbose=False)
    module = Net()
    callbacks = [] if monitor is None else [monitor]
    trainer = Trainer(max_steps=STEPS, callbacks=callbacks, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(examples(), batch_size=4, shuffle=True))
    moments = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    return [*module.state_dict().values(), *moments, torch.rand(3)]


@functools.cache
def expected():
    return train()


def batches():
    return [(x[None].repeat(4, 1) + torch.eye(4, 3), y.repeat(4)) for x, y in examples()][:2]


VALID = {
    "k": st.sampled_from([0, 1, 2, 5, N - 1, N, N + 1, 40]),
    "every_n_steps": st.one_of(st.sampled_from([1, 2, 100]), st.lists(st.integers(0, 4), min_size=1, max_size=3)),
    "max_overhead": st.sampled_from([None, 0.2, 0.9]),
    "sample": st.one_of(st.sampled_from([1, 3, 12, 50, "all", "current"]), st.builds(batches)),
    "gradient_sample": st.sampled_from([50, 100, "all"]),
    "resample": st.booleans(),
    "read_timeout": st.sampled_from([1.0, 600.0]),
    "batch_size": st.sampled_from([None, 2, 5]),
    "weight": st.sampled_from([None, lambda batch: 2.0]),
    "reference_step": st.sampled_from([None, 0, 2]),
    "which": st.sampled_from(["LA", "SA", "LM", "BE"]),
    "tol": st.sampled_from([0.1, 1e-3, 1e-8]),
    "max_matvecs": st.sampled_from([40, 100]),
    "ncv": st.sampled_from([None, 43]),
    "basis": st.sampled_from(["auto", "device", "cpu"]),
    "verify": st.sampled_from(["always", "never", 2]),
    "params": st.sampled_from([None, ["head.*"], ["*.bias", "extra"], ["nothing.*"], []]),
    "loss_fn": st.sampled_from([None, loss_fn]),
    "mode": st.sampled_from(["train", "eval"]),
    "dtype": st.sampled_from(["float32", "float64", "native"]),
    "curvature": st.sampled_from(["hessian", "hessian", "finite-difference"]),
    "on_check_fail": st.sampled_from(["warn", "finite-difference", "omit"]),
    "measurements": st.sampled_from([None, [Reliability(2)], [GradientCurvature()]]),
    "log": st.sampled_from(["default", "all"]),
    "on_failure": st.just("warn"),
    "name": st.sampled_from(["subspace", "2nd-run"]),
    "seed": st.sampled_from([0, 7]),
}


@settings(
    max_examples=how_many(6, thorough=60),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_any_combination_trains_as_without_a_monitor_or_is_refused_at_the_start(arguments):
    known = expected()
    arguments = {"max_overhead": None, "every_n_steps": 1, "k": 2, "sample": 12, "gradient_sample": 12, **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a probe cannot stand behind is told; not the point here
        try:
            monitor = SubspaceMonitor(**arguments)
            found = train(monitor)
        except MisconfigurationException:
            return
    assert len(known) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(known, found, strict=True))
    steps = [record.step for record in monitor.history]
    assert steps == sorted(set(steps))


def test_every_argument_is_varied():
    assert list(VALID) == list(inspect.signature(SubspaceMonitor).parameters)


@pytest.mark.parametrize(("k", "refused"), [(N, False), (N + 1, True)])
def test_the_limit_is_the_number_of_parameters(k, refused):
    assert sum(p.numel() for p in Net().parameters()) == N
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if refused:
            with pytest.raises(MisconfigurationException, match=f"expected 0..{N}, the number of parameters, got {k}"):
                train(SubspaceMonitor(k=k))
        else:
            train(SubspaceMonitor(k=k, sample=12, gradient_sample=24))  # by default hundreds of draws of dropout
