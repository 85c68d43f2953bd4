"""One monitor for several models, folds and stages: each has a history of its own, or goes on with its own."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, SubspaceProjection, measure_subspace, read_history
from lightning_subspace.callbacks.end_point import EndPoint

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(24, 6, generator=GENERATOR)
LABELS = INPUTS[:, :3].argmax(dim=1)
BATCHES = [(INPUTS, LABELS)]
GIVEN_UP = "does not start where the last one ended"
# Of fits without validation, and without the callbacks of the checkpoint.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


class Net(LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        self.lr = 0.1

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def loader():
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=24)  # one step an epoch


def monitor(**arguments):
    settings = {"k": 1, "every_n_steps": 2, "max_overhead": None, "sample": BATCHES, "on_failure": "raise"}
    return SubspaceMonitor(**{**settings, **arguments})


def trainer(*callbacks, steps=4, **settings):
    options = {"max_steps": steps, "enable_checkpointing": False, "limit_val_batches": 0, **QUIET, **settings}
    return Trainer(**options, callbacks=list(callbacks))


def go_on(same, module, steps=4):
    """Fit again with a trainer that has reached its last step."""
    same.fit_loop.epoch_loop.max_steps += steps
    same.fit(module, loader())


def steps_of(one):
    return [record.step for record in one.history]


def sharpness(module):
    return measure_subspace(module, BATCHES, k=1).metrics["sharpness"]


def given_up(caplog):
    return sum(GIVEN_UP in record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level("INFO")


def test_one_trainer_and_module_go_on(caplog):
    one, module = monitor(), Net()
    same = trainer(one)
    same.fit(module, loader())
    same.validate(module, loader(), verbose=False)
    go_on(same, module)
    assert steps_of(one) == [0, 2, 4, 6, 8]
    assert "overlap_previous" in one.history[3].metrics
    assert one.history[-1].metrics["sharpness"] == pytest.approx(sharpness(module), rel=1e-3)
    assert given_up(caplog) == 0


def test_models_that_take_turns_have_a_history_each(caplog):
    one, first, second = monitor(), Net(0), Net(1)
    a, b = trainer(one), trainer(one)
    a.fit(first, loader())
    held = one.history
    b.fit(second, loader())
    go_on(b, second)
    assert steps_of(one) == [0, 2, 4, 6, 8]
    assert one.history[-1].metrics["sharpness"] == pytest.approx(sharpness(second), rel=1e-3)
    go_on(a, first, 4)
    assert steps_of(one) == [4, 6, 8]  # not behind those of the other model
    assert "overlap_previous" not in one.history[0].metrics
    assert one.overlap_matrix()[0] == [4, 6, 8]
    assert one.history[-1].metrics["sharpness"] == pytest.approx(sharpness(first), rel=1e-3)
    assert [record.step for record in held] == [0, 2, 4]  # what was read before stays
    assert given_up(caplog) == 2


def another_module(same, module):
    return Net(1)


def reset(same, module):
    for layer in (module.net[0], module.net[2]):
        layer.reset_parameters()
    return module


@pytest.mark.parametrize("change", [another_module, reset])
def test_another_start_at_a_later_step_is_another_run(change, caplog):
    one, module = monitor(), Net()
    same = trainer(one)
    same.fit(module, loader())
    module = change(same, module)
    go_on(same, module)
    assert steps_of(one) == [4, 6, 8]
    assert one.history[-1].metrics["sharpness"] == pytest.approx(sharpness(module), rel=1e-3)
    assert given_up(caplog) == 1


def test_a_checkpoint_without_a_state_is_another_run(tmp_path, caplog):
    other, one, module = Net(1), monitor(), Net(0)
    plain = trainer(steps=6)
    plain.fit(other, loader())
    plain.save_checkpoint(tmp_path / "other.ckpt")
    trainer(one).fit(module, loader())
    trainer(one, steps=10).fit(other, loader(), ckpt_path=tmp_path / "other.ckpt")
    assert steps_of(one) == [6, 8, 10]
    assert given_up(caplog) == 1


def test_a_checkpoint_of_one_model_does_not_hold_the_run_of_another(tmp_path, caplog):
    one, first, second = monitor(), Net(0), Net(1)
    projection = SubspaceProjection("bulk", k=1, sample=BATCHES)
    a, b = trainer(one, projection), trainer(one, projection)
    a.fit(first, loader())
    a.save_checkpoint(tmp_path / "before.ckpt")
    b.fit(second, loader())
    a.save_checkpoint(tmp_path / "a.ckpt")
    b.save_checkpoint(tmp_path / "b.ckpt")
    assert [record.step for record in read_history(tmp_path / "before.ckpt")] == [0, 2, 4]
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"] == {}
    assert len(torch.load(tmp_path / "b.ckpt", weights_only=True)["callbacks"]) == 2
    told = [record.getMessage() for record in caplog.records if "written without what was measured" in record.msg]
    assert len(told) == 2  # by each callback

    again = trainer(one, steps=8)
    with pytest.warns(UserWarning, match="SubspaceProjection"):  # Lightning: it is not in this Trainer
        again.fit(first, loader(), ckpt_path=tmp_path / "before.ckpt")
    assert steps_of(one) == [0, 2, 4, 6, 8]  # resumed from what the checkpoint holds
    assert one.history[-1].metrics["sharpness"] == pytest.approx(sharpness(first), rel=1e-3)


def test_stages_and_folds_begin_at_step_0(caplog):
    one, module, last = monitor(), Net(), []
    for _ in range(2):  # fine-tuning in stages: a new Trainer for the same module
        trainer(one).fit(module, loader())
        last.append(one.to_rows()[-1]["sharpness"])
        assert steps_of(one) == [0, 2, 4]
        assert last[-1] == pytest.approx(sharpness(module), rel=1e-3)
    assert given_up(caplog) == 1

    start = Net(2)
    for _ in range(2):  # folds with copies of a model, and of a monitor that has been used
        fold, model = copy.deepcopy(one), copy.deepcopy(start)
        same = trainer(fold)
        same.fit(model, loader())
        go_on(same, model)
        assert steps_of(fold) == [0, 2, 4, 6, 8]
    assert steps_of(one) == [0, 2, 4]


def test_searches_for_a_rate_or_a_batch_size_leave_no_trace(tmp_path, caplog):
    one, module = monitor(), Net()
    same = trainer(one, LearningRateFinder(num_training_steps=5), default_root_dir=tmp_path)
    same.fit(module, loader())
    assert steps_of(one) == [0, 2, 4]
    Tuner(trainer(one, default_root_dir=tmp_path)).lr_find(module, loader(), num_training=5)
    assert steps_of(one) == [0, 2, 4]
    assert given_up(caplog) == 0


def test_an_interrupted_fit_goes_on_and_a_failed_validation_of_another_model_does_not_matter():
    class Broken(Callback):
        is_broken = True

        def on_train_batch_start(self, trainer, *args):
            if self.is_broken and trainer.global_step == 3:
                raise OSError("the disk is full")

        def on_validation_start(self, *args):
            raise OSError("the disk is full")

    one, module, other, broken = monitor(), Net(), Net(1), Broken()
    same = trainer(one, broken, limit_val_batches=None, val_check_interval=None, check_val_every_n_epoch=100)
    with pytest.raises(OSError, match="full"):
        same.fit(module, loader())
    broken.is_broken = False
    with pytest.raises(OSError, match="full"):
        same.validate(other, loader(), verbose=False)
    for each in (module, other):
        each.train()
    go_on(same, module, 1)
    assert steps_of(one)[:2] == [0, 2]
    assert steps_of(one)[-1] == 5
    assert one.history[-1].metrics["sharpness"] == pytest.approx(sharpness(module), rel=1e-3)
    go_on(same, other)
    assert steps_of(one)[0] >= 5


def test_a_state_loaded_to_validate_is_not_resumed_from(tmp_path, caplog):
    one, module = monitor(), Net()
    same = trainer(one, limit_val_batches=1)
    same.fit(module, loader())
    same.save_checkpoint(tmp_path / "end.ckpt")
    go_on(same, module, 2)
    kept = [p.detach().clone() for p in module.parameters()]
    same.validate(module, loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    with torch.no_grad():
        for p, value in zip(module.parameters(), kept, strict=True):
            p.copy_(value)
    go_on(same, module, 2)
    assert steps_of(one) == [0, 2, 4, 6, 8]
    assert given_up(caplog) == 0


def test_an_average_that_is_trained_on_is_another_run(caplog):
    one, module = monitor(every_n_steps=3), Net()
    same = trainer(EMAWeightAveraging(decay=0.5), one)
    same.fit(module, loader())
    go_on(same, module)
    assert steps_of(one) == [4, 6, 8]
    assert given_up(caplog) == 1


def test_a_projection_does_not_use_the_space_of_another_model():
    projection = SubspaceProjection("top", k=1, sample=BATCHES, refresh_every_n_steps=100, on_failure="raise")
    alone = SubspaceProjection("top", k=1, sample=BATCHES, refresh_every_n_steps=100, on_failure="raise")
    first, second, twin = Net(0), Net(1), Net(1)
    same = trainer(projection)
    same.fit(first, loader())
    go_on(same, second)
    trainer(alone).fit(twin, loader())  # from the same start, with the space of the start
    for p, q in zip(second.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_an_end_point_sees_every_bit_of_every_parameter(dtype):
    def module():
        return nn.ParameterDict({"a": torch.arange(6.0).view(2, 3).T.to(dtype), "b": torch.ones(3, dtype=dtype)})

    end = EndPoint.of(module())
    assert end.is_at(module())
    for name in ("a", "b"):
        other = module()
        other[name].data.view(-1 if name == "b" else other[name].shape)[0] += 0.25
        assert not end.is_at(other)
    assert not end.is_at(nn.ParameterDict({"a": module()["a"]}))
    assert copy.deepcopy(end).is_at(module())
