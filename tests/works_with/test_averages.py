"""Weight averaging beside a monitor: what is measured are the weights that were trained, in either order."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, SubspaceMonitor, SubspaceProjection
from lightning_subspace.measurements.base import Needs
from tests.oracles import dense_gradient, dense_hessian, projected_share, top_eigenspace
from tests.thorough import covering, usual

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(48, 6, generator=GENERATOR, dtype=torch.float64)
LABELS = INPUTS[:, :3].argmax(dim=1)
BATCHES = list(zip(INPUTS.split(12), LABELS.split(12), strict=True))
LAST = 3 * 4  # steps in three epochs of four batches


class Net(LightningModule):
    """A float64 classifier that keeps what the last optimizer step has made of it."""

    def __init__(self, norm=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Identity(), nn.Tanh(), nn.Linear(5, 3)
        ).double()
        self.trained = {}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        self.trained.setdefault(self.trainer.global_step, copy.deepcopy(self.net))  # the first batch after a step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


class Seen(Measurement):
    """Parameters at each probe."""

    needs = Needs.NOTHING

    def __init__(self):
        self.theta = {}

    def measure(self, probe):
        self.theta[probe.step] = [p.detach().clone() for p in probe.parameters]
        return {}


class Swapping(Callback):
    """A user's own average, in the module from the end of an epoch, or a validation, until the next batch."""

    def __init__(self, when, until="on_train_epoch_start"):
        setattr(self, when, self.put)
        setattr(self, until, self.take)
        self.held = None

    def put(self, trainer, module):
        if not trainer.sanity_checking:
            self.held = [p.detach().clone() for p in module.parameters()]
            for p in module.parameters():
                p.data.mul_(0.5)

    def take(self, trainer, module):
        held, self.held = self.held, None
        for p, value in zip(module.parameters(), held or [], strict=held is not None):
            p.data.copy_(value)


class StoppedLater(Callback):
    """Ends training at a step in mid-epoch, after the monitor has seen its end."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 6


def fit(*callbacks, norm=False, **settings):
    seed_everything(3, verbose=False)
    module = Net(norm)
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=12)
    trainer = Trainer(**{"max_epochs": 3, "enable_checkpointing": False, **QUIET, **settings}, callbacks=[*callbacks])
    trainer.fit(module, loader, loader)
    return module, trainer


def monitor(every_n_steps=5, **arguments):
    settings = {"k": 2, "max_overhead": None, "sample": BATCHES, "tol": 1e-9, "dtype": "float64", "verify": "never"}
    return SubspaceMonitor(every_n_steps=every_n_steps, **{**settings, "on_failure": "raise", **arguments})


def require_dense(record, net):
    """The record's numbers are those of a dense Hessian at these weights."""

    def objective(module):
        return sum(F.cross_entropy(module(x), y) for x, y in BATCHES) / len(BATCHES)  # batch-norm: not of all at once

    values, basis = top_eigenspace(dense_hessian(net, objective), 2)
    torch.testing.assert_close(record.subspace.eigenvalues[:2], values, rtol=1e-7, atol=1e-9)
    share = projected_share(basis, dense_gradient(net, objective))
    assert record.metrics["gradient_fraction"] == pytest.approx(share, abs=1e-6)


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9),
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "until the next epoch": lambda: Swapping("on_train_epoch_end"),
    "from a validation on": lambda: Swapping("on_validation_start"),
    "around a validation": lambda: Swapping("on_validation_start", "on_validation_end"),
    "at the end": lambda: Swapping("on_train_end"),
}


# With EMA before the monitor: the probe behind a step that was not known to be the last, below.
@pytest.mark.parametrize(("name", "is_first"), covering(list(AVERAGES), [True, False]))
def test_the_last_probe_is_of_the_weights_that_were_trained(name, is_first):
    seen, average = Seen(), AVERAGES[name]()
    one = monitor(measurements=[seen])
    module, _ = fit(*([one, average] if is_first else [average, one]))
    alone, _ = fit(AVERAGES[name]())
    for p, q in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)  # what the user gets is the average, to the bit
    assert [record.step for record in one.history] == [0, 5, 10, LAST]
    for step in (5, 10, LAST):
        for p, q in zip(module.trained[step].parameters(), seen.theta[step], strict=True):
            assert torch.equal(p, q)
    require_dense(one.history[-1], module.trained[LAST])
    if name != "around a validation":
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), seen.theta[LAST], strict=True))


# The last step is a multiple of 6, and the one that Lightning counts behind it is one of 13.
@pytest.mark.parametrize(("every_n_steps", "is_first"), covering(usual([13, 6], thorough=[1, 5]), [True, False]))
def test_the_epoch_that_swa_adds_for_batch_norm_is_not_measured(every_n_steps, is_first, caplog):
    caplog.set_level("INFO")
    one, average = monitor(every_n_steps), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    module, trainer = fit(*([one, average] if is_first else [average, one]), norm=True)
    alone, _ = fit(StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), norm=True)
    for (name, p), q in zip(module.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    assert trainer.global_step > LAST  # Lightning counts a step there
    assert [record.step for record in one.history] == sorted({*range(0, LAST, every_n_steps), LAST})
    require_dense(one.history[-1], module.trained[LAST])
    assert "update_fraction" not in one.history[-1].metrics  # no step was taken from there
    told = [r.getMessage() for r in caplog.records if "runs an epoch for batch-norm alone" in r.getMessage()]
    assert len(told) == 1


def test_which_weights_the_last_probe_is_of_is_said_once(caplog):
    caplog.set_level("INFO")
    fit(AVERAGES["EMA"](), monitor(10_000))
    fit(monitor(10_000))
    told = [r.getMessage() for r in caplog.records if "holds other weights at the end of training" in r.getMessage()]
    assert len(told) == 1


def test_a_step_that_was_not_known_to_be_the_last_is_measured_too():
    one = monitor()
    module, _ = fit(AVERAGES["EMA"](), one, StoppedLater())
    assert [record.step for record in one.history] == [0, 5, 6]
    require_dense(one.history[-1], module.trained[6])


def test_weights_that_cannot_be_kept_or_put_back_leave_the_last_probe_out():
    class Renamed(Callback):
        def on_train_end(self, trainer, module):
            module.other, module.net = module.net, nn.Identity()

    one = monitor(on_failure="warn")
    with pytest.warns(UserWarning, match=r"last probe, of the weights that the last step gave, is left out.*'net\.0"):
        module, _ = fit(Renamed(), one)
    assert [record.step for record in one.history] == [0, 5, 10]
    for p, q in zip(module.other.parameters(), module.trained[LAST].parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_is_copied_where_no_last_probe_can_come():
    one = monitor([0, 5])
    fit(one, AVERAGES["EMA"]())
    assert [record.step for record in one.history] == [0, 5]
    assert one._trained.step == -1


def test_a_large_frozen_part_is_not_copied_and_a_teacher_is():
    from lightning_subspace.callbacks.trained_weights import TrainedWeights

    kept, backbone = TrainedWeights(), nn.ModuleDict({"body": nn.Linear(9, 9), "head": nn.Linear(9, 1)})
    backbone["body"].requires_grad_(False)
    kept.keep(backbone, 1)
    assert set(kept._copies) == {"head.weight", "head.bias"}
    pair = nn.ModuleDict({"student": nn.Linear(3, 3), "teacher": nn.Linear(3, 3).requires_grad_(False)})
    kept.keep(pair, 2)
    assert set(kept._copies) == {name for name, _ in pair.named_parameters()}


def test_a_projection_never_sees_an_average():
    def projected(*others, first=True):
        settings = {"refresh_every_n_steps": 4, "tol": 1e-9, "dtype": "float64", "on_failure": "raise"}
        projection = SubspaceProjection("top", k=2, sample="all", **settings)  # anew behind each validation
        module, _ = fit(*([projection, *others] if first else [*others, projection]))
        return list(module.trained[LAST].parameters())

    plain = projected()
    for is_first in (True, False):
        assert all(map(torch.equal, plain, projected(AVERAGES["EMA"](), first=is_first))), is_first
