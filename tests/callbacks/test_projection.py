"""Training inside and outside of the top space, against descent written by hand with dense Hessians."""

import copy
import csv
import functools
import logging
import os
import pickle
import re
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_subspace import StartWhenAligned, SubspaceMonitor, SubspaceProjection
from lightning_subspace.curvature import Hessian
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.oracles import dense_gradient, dense_hessian, top_eigenspace
from tests.processes import run
from tests.thorough import covering, usual

# Of ModelCheckpoint, which a resumed run does not have here.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
# Spaces to rounding: a basis as large as the space of 35 parameters, and a tolerance that makes use of it.
EXACT = {"tol": 1e-12, "ncv": 35, "dtype": "float64"}
K = 3


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """Steps and spaces are held against dense ones here: no monitor or projection has to check itself first."""
    leave_self_check_out(monkeypatch)
    leave_error_bar_out(monkeypatch)


class Net(pl.LightningModule):
    """A smooth classifier of 35 parameters in float64."""

    def __init__(self, optimizer=None, frozen=()):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self.make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad])


class Path(pl.Callback):
    """theta at every step; `before` sees it as soon as the optimizer has ended."""

    def __init__(self):
        self.at = {}

    def on_train_start(self, trainer, pl_module):
        self.at[trainer.global_step] = flat(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.at[trainer.global_step] = flat(pl_module)


def flat(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.arange(48) % 3
INPUTS += torch.eye(3, 4, dtype=torch.float64)[LABELS]


def loader(batch_size=24):
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=batch_size)


def project(keep, **arguments):
    return SubspaceProjection(keep, **{"k": K, "sample": "all", "on_failure": "raise", **EXACT, **arguments})


def trainer_of(*callbacks, steps, **options):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**settings, **quiet, "max_steps": steps, **options}, callbacks=list(callbacks))


def train(*callbacks, module=None, steps=4, batches=None, ckpt_path=None, **options):
    """The path of theta: {step: (n,)}."""
    path = Path()
    trainer = trainer_of(*callbacks, path, steps=steps, **options)
    trainer.fit(Net() if module is None else module, loader() if batches is None else batches, ckpt_path=ckpt_path)
    return path.at


def whole_loss(module):
    return nn.functional.cross_entropy(module.net(INPUTS), LABELS)


def space_at(module, k=K):
    """(k, n): the top eigenvectors of the dense Hessian of the whole loss."""
    return top_eigenspace(dense_hessian(module, whole_loss), k)[1]


@functools.cache
def by_hand(keep, steps, lr=0.3, refresh=1, start=0, batch_size=24):
    """Dom-SGD and Bulk-SGD in a few lines, on the batches of the loader in order."""
    module, at = Net(), {}
    at[0] = flat(module)
    for step in range(steps):
        if step >= start and (step % refresh == 0 or step == start):
            basis = space_at(module)
        first = (step * batch_size) % len(INPUTS)
        x, y = INPUTS[first : first + batch_size], LABELS[first : first + batch_size]
        gradient = dense_gradient(module, lambda m, x=x, y=y: nn.functional.cross_entropy(m.net(x), y))
        if step >= start:
            inside = basis.T @ (basis @ gradient)
            gradient = inside if keep == "top" else gradient - inside
        at[step + 1] = at[step] - lr * gradient
        nn.utils.vector_to_parameters(at[step + 1].clone(), module.parameters())
    return at


def assert_same_path(found, expected, atol=1e-10):
    assert found.keys() == expected.keys()
    for step in expected:
        torch.testing.assert_close(found[step], expected[step], rtol=0.0, atol=atol, msg=lambda m, s=step: f"{s}: {m}")


keeps = pytest.mark.parametrize("keep", ["top", "bulk"])


# What a step becomes


@keeps
def test_with_plain_sgd_it_is_descent_along_the_projected_gradient(keep):
    assert_same_path(train(project(keep)), by_hand(keep, 4))


@pytest.mark.parametrize(("when", "keep"), covering(usual([(3, 0), (1, 2)], thorough=[(3, 2)]), ["top", "bulk"]))
def test_the_space_is_refreshed_and_the_projection_begins_when_asked(when, keep):
    refresh, start = when
    found = train(project(keep, refresh_every_n_steps=refresh, start_when=start))
    assert_same_path(found, by_hand(keep, 4, refresh=refresh, start=start))
    assert not torch.allclose(found[4], by_hand(keep, 4)[4], atol=1e-6)  # it makes a difference


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
OPTIONS = {"plain": {}, "clip": {"gradient_clip_val": 0.1}, "accumulate": {"accumulate_grad_batches": 2}}


# Under LBFGS, which evaluates its closure several times, Lightning accumulates and clips inside of that.
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("lbfgs", "plain"), *covering([name for name in OPTIMIZERS if name != "lbfgs"], list(OPTIONS))],
)
def test_the_two_parts_of_a_step_add_up_to_it(optimizer, options):
    optimizer, options = OPTIMIZERS[optimizer], OPTIONS[options]
    steps = {
        keep: train(*callbacks, module=Net(optimizer), steps=1, **options)
        for keep, callbacks in {"all": [], "top": [project("top")], "bulk": [project("bulk")]}.items()
    }
    updates = {keep: at[1] - at[0] for keep, at in steps.items()}
    torch.testing.assert_close(updates["top"] + updates["bulk"], updates["all"], rtol=0.0, atol=1e-14)
    basis = space_at(Net())
    torch.testing.assert_close(updates["top"], basis.T @ (basis @ updates["all"]), rtol=0.0, atol=1e-11)
    assert float((basis @ updates["bulk"]).norm()) < 1e-11
    assert all(float(update.norm()) > 1e-4 for update in updates.values())


# Steps of others are held against those by hand, and against their parts, above.
@pytest.mark.parametrize(
    ("optimizer", "keep"), covering(usual(["adamw", "momentum"], thorough=["sgd", "lbfgs"]), ["top", "bulk"])
)
def test_every_step_is_in_its_space(optimizer, keep):
    module = Net(OPTIMIZERS[optimizer])
    at = train(project(keep), module=module, steps=2)
    for step in range(2):
        nn.utils.vector_to_parameters(at[step].clone(), module.parameters())
        basis, update = space_at(module), at[step + 1] - at[step]
        inside = basis.T @ (basis @ update)
        wrong = update - inside if keep == "top" else inside
        assert float(wrong.norm()) < 1e-9 * max(float(update.norm()), 1e-2)
        assert float(update.norm()) > 0.0


class Quadratic(pl.LightningModule):
    """A quadratic with the eigenvectors e_1 ... e_n: the top space is the same everywhere."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(1.0, 2.0, 12, dtype=torch.float64))
        self.register_buffer("curvatures", torch.arange(12, 0, -1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.curvatures * self.theta.square()).sum() + 0.0 * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def test_on_a_quadratic_the_top_run_stays_in_the_affine_space_and_each_coordinate_is_that_of_the_whole_run():
    batches = DataLoader(torch.zeros(8, 1, dtype=torch.float64), batch_size=2)
    arguments = {"k": 4, "ncv": 12}
    plain = train(module=Quadratic(), steps=4, batches=batches)
    top = train(project("top", **arguments), module=Quadratic(), steps=4, batches=batches)
    bulk = train(project("bulk", **arguments), module=Quadratic(), steps=4, batches=batches)
    for step in range(5):
        torch.testing.assert_close(top[step][4:], top[0][4:], rtol=0.0, atol=1e-12)
        torch.testing.assert_close(bulk[step][:4], bulk[0][:4], rtol=0.0, atol=1e-12)
    # After one step the runs differ, and with them gradients; but the coordinates of a quadratic do not mix.
    torch.testing.assert_close(top[4][:4], plain[4][:4], rtol=0.0, atol=1e-9)
    torch.testing.assert_close(bulk[4][4:], plain[4][4:], rtol=0.0, atol=1e-9)


def test_two_projections_project_one_after_the_other():
    nothing = train(project("top", name="one"), project("bulk", name="two"), steps=2)
    torch.testing.assert_close(nothing[2], nothing[0], rtol=0.0, atol=1e-11)


def test_in_float32_and_in_bfloat16_it_is_right_to_their_rounding():
    reference = by_hand("bulk", 2)[2]
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        module = Net().to(dtype)
        x = DataLoader(TensorDataset(INPUTS.to(dtype), LABELS), batch_size=24)
        found = train(project("bulk", dtype="float32", tol=1e-4, ncv=None), module=module, steps=2, batches=x)[2]
        assert found.dtype is dtype
        assert float((found.double() - reference).abs().max()) < bound


class Complex(Net):
    """A loss of a complex parameter and a real one of another type."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3, dtype=torch.complex128)
        self.scale = nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0] + 0j).abs() * self.scale, batch[1])


def test_complex_and_mixed_types_are_coordinates_like_others():
    def vector(module):
        w, b, scale = module.net.weight, module.net.bias, module.scale
        return torch.cat([torch.view_as_real(w).flatten(), torch.view_as_real(b).flatten(), scale.double()]).detach()

    found = {}
    for keep in ("all", "top", "bulk"):
        module = Complex()
        start = vector(module)
        train(*([] if keep == "all" else [project(keep, ncv=33)]), module=module, steps=1)
        found[keep] = vector(module) - start
    torch.testing.assert_close(found["top"] + found["bulk"], found["all"], rtol=0.0, atol=1e-7)
    assert all(float(update.norm()) > 1e-3 for update in found.values())


# Which parameters


def test_frozen_parameters_and_buffers_are_not_touched_and_others_outside_of_params_take_their_full_step():
    frozen = ("net.0.bias",)
    before = Net(frozen=frozen)
    plain, projected = Net(frozen=frozen), Net(frozen=frozen)
    train(module=plain, steps=1)
    train(project("bulk", params=["net.0.*"], ncv=16), module=projected, steps=1)
    for name, parameter in projected.named_parameters():
        start, full = before.get_parameter(name), plain.get_parameter(name)
        assert torch.equal(parameter, start) == (name in frozen)
        assert torch.equal(parameter, full) == (name != "net.0.weight")


class Freezing(pl.Callback):
    """Freezes the first layer after two steps and thaws it after four."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step in (2, 4):
            pl_module.net[0].requires_grad_(trainer.global_step == 4)


def test_parameters_that_are_frozen_on_the_way_stay_where_they_are_and_the_space_is_computed_anew():
    one = project("top", refresh_every_n_steps=100, ncv=15)
    with pytest.warns(UserWarning, match="the set of trainable parameters has changed by step 2"):
        at = train(one, Freezing(), steps=6)
    first = slice(0, 20)
    assert torch.equal(at[4][first], at[2][first])
    assert not torch.equal(at[4][20:], at[2][20:])
    assert not torch.equal(at[6][first], at[4][first])
    assert one._runner.run.num_probes == 3  # at steps 0, 2 and 4


# When it begins


def chi_at(module, basis):
    gradient = dense_gradient(module, whole_loss)
    return float((basis @ gradient).norm() / gradient.norm())


def started():
    """A net that has left the start, where chi is large."""
    module = Net()
    train(module=module, steps=12)
    return module


def test_it_begins_when_the_average_of_chi_has_come_above_the_threshold():
    plain, module, averages = train(module=started(), steps=12), Net(), {}
    for step in range(0, 13, 2):
        nn.utils.vector_to_parameters(plain[step].clone(), module.parameters())
        chi = chi_at(module, space_at(module))
        averages[step] = 0.5 * averages.get(step - 2, chi) + 0.5 * chi
    start = StartWhenAligned(chi=0.14, decay=0.5)
    begin = min(step for step, average in averages.items() if average > 0.14)
    assert 2 < begin < 12
    one = project("bulk", refresh_every_n_steps=2, start_when=start)
    found = train(one, module=started(), steps=begin + 1)
    assert one.is_active
    assert one.chi == pytest.approx(averages[begin], abs=1e-9)
    assert_same_path({s: found[s] for s in range(begin + 1)}, {s: plain[s] for s in range(begin + 1)}, atol=0.0)
    nn.utils.vector_to_parameters(plain[begin].clone(), module.parameters())
    assert float((space_at(module) @ (found[begin + 1] - found[begin])).norm()) < 1e-10


def test_a_step_that_never_comes_costs_nothing(monkeypatch):
    counts = counted_products(monkeypatch)
    one = project("top", start_when=100)
    assert_same_path(train(one), train(), atol=0.0)
    assert not one.is_active
    assert one.chi is None
    assert counts == []


# Beside other callbacks


def counted_products(monkeypatch):
    """A list that grows by one a product with the Hessian of the whole sample."""
    counts, matvec = [], Hessian.matvec

    def counting(self, v):
        counts.append(len(self.batches))
        return matvec(self, v)

    monkeypatch.setattr(Hessian, "matvec", counting)
    return counts


def watch(**arguments):
    settings = {"k": K, "every_n_steps": 1, "max_overhead": None, "sample": "all", "on_failure": "raise", **EXACT}
    return SubspaceMonitor(**{**settings, **arguments})


# True: so it is below, where the monitor probes more rarely
@pytest.mark.parametrize("monitor_first", usual([False], thorough=[True]))
def test_a_monitor_with_the_same_arguments_lends_its_space(monkeypatch, monitor_first):
    counts = counted_products(monkeypatch)
    # the monitor's other measurements take products, too
    train(watch(), steps=2)
    alone = len(counts)
    counts.clear()
    monitor, one = watch(), project("bulk")
    found = train(*([monitor, one] if monitor_first else [one, monitor]), steps=2)
    assert abs(len(counts) - alone) <= 0.2 * alone  # the paths differ, and with them the numbers of products
    assert one._runner.run.num_probes == 0
    assert_same_path(found, by_hand("bulk", 2))
    shares = [record.metrics["update_fraction"] for record in monitor.history[:-1]]
    assert max(shares) < 1e-18  # it sees the projected update


@pytest.mark.parametrize(
    "other",
    usual([{"k": 2}, {"sample": 48}], thorough=[{"which": "LM"}, {"params": ["net.*"]}, {"tol": 1e-3}, {"seed": 1}]),
)
def test_a_monitor_with_other_arguments_does_not(other):
    one = project("bulk")
    found = train(watch(**other), one, steps=1)
    assert one._runner.run.num_probes == 1
    assert_same_path(found, by_hand("bulk", 1))


def test_a_monitor_that_probes_more_rarely_lends_what_it_has():
    one = project("top")
    found = train(watch(every_n_steps=2), one, steps=3)
    assert one._runner.run.num_probes == 1  # at step 1
    assert_same_path(found, by_hand("top", 3))


class Ema(WeightAveraging):
    """Sees the weights directly after the step."""

    def __init__(self):
        super().__init__(avg_fn=lambda average, current, count: current)


class Peeking(Net):
    """A module that looks at its weights directly after the optimizer step."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.seen.append(flat(self))


def test_nothing_sees_an_update_that_is_not_projected(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    average, module = Ema(), Peeking()
    at = train(average, keep, project("top"), module=module, steps=3, enable_checkpointing=True)
    expected = by_hand("top", 3)
    for step in range(1, 4):
        torch.testing.assert_close(module.seen[step - 1], expected[step], rtol=0.0, atol=1e-10)
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["current_model_state"]
        torch.testing.assert_close(torch.cat([t.flatten() for t in saved.values()]), expected[step], atol=1e-10, rtol=0)
    assert_same_path(at, expected)


def test_optimizers_are_left_as_they_were():
    module, one = Net(), project("top")
    trainer = trainer_of(one, steps=2)
    trainer.fit(module, loader())
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class Swapping(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 2:
            trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.3)]


def test_an_optimizer_that_takes_the_place_of_another_is_followed():
    assert_same_path(train(project("top"), Swapping(), steps=3), by_hand("top", 3))


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_an_exception_in_training_leaves_them_too_and_the_next_fit_is_right():
    one, module = project("top", loss_fn=lambda m, b, i: nn.functional.cross_entropy(m.net(b[0]), b[1])), Failing()
    trainer = trainer_of(one, steps=4)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert_same_path(train(one, steps=2), by_hand("top", 2))


class TwoOptimizers(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.seen.append(flat(self))

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def test_manual_optimization_projects_every_step_of_every_optimizer():
    def loss_fn(module, batch, batch_idx):
        return nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    module = TwoOptimizers()
    start, basis = flat(module), space_at(module)
    train(project("top", loss_fn=loss_fn), module=module, steps=2)
    first, second = module.seen
    for update in (first - start, second - first):
        assert float(update.norm()) > 1e-4
        assert float((update - basis.T @ (basis @ update)).norm()) < 1e-10


class Wrapped(torch.optim.SGD):
    """An optimizer whose step calls that of its base class."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_inside_of_a_step_is_projected_once():
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # torch puts hooks around the base's step when the first one is made
    found = train(project("top"), module=Net(lambda p: Wrapped(p, lr=0.3)), steps=2)
    assert_same_path(found, by_hand("top", 2))


# What is logged


def test_the_share_removed_is_logged_at_the_step_it_was_taken_from(tmp_path):
    plain_updates = {}

    class Unprojected(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            before = flat(self)
            twin = copy.deepcopy(self.net)
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            batch = INPUTS[8 * batch_idx : 8 * batch_idx + 8], LABELS[8 * batch_idx : 8 * batch_idx + 8]
            nn.functional.cross_entropy(twin(batch[0]), batch[1]).backward()
            plain_updates[self.global_step] = torch.cat([-0.3 * p.grad.flatten() for p in twin.parameters()])
            self.seen.append(flat(self) - before)

    module, one = Unprojected(), project("bulk", start_when=1, refresh_every_n_steps=4)
    trainer = trainer_of(one, steps=6, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    trainer.fit(module, loader(8))
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["projection/removed"]]
    assert [int(row["step"]) for row in rows] == [2, 4]
    for row in rows:
        step = int(row["step"])
        full, kept = plain_updates[step], module.seen[step]
        expected = float((full - kept).square().sum() / full.square().sum())
        assert float(row["projection/removed"]) == pytest.approx(expected, rel=1e-9)
    assert float(trainer.callback_metrics["projection/removed"]) == pytest.approx(
        float(rows[-1]["projection/removed"]), rel=1e-6
    )


def test_the_average_of_chi_is_logged_until_it_begins(tmp_path):
    one = project("top", start_when=StartWhenAligned(0.999), refresh_every_n_steps=2, name="dom")
    train(one, steps=6, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["dom/chi"]] == [0, 2, 4]
    assert 0.0 < one.chi < 0.999
    assert "dom/removed" not in rows[0]


# What goes wrong


def summary(caplog):
    return [text for text in caplog.messages if "refreshes" in text]


def test_a_space_that_is_not_converged_is_not_used_and_is_told_once(caplog):
    one = project("top", max_matvecs=3)
    infos = caplog.at_level(logging.INFO, "lightning.pytorch")
    warned = pytest.warns(UserWarning, match="SubspaceProjection: at step 0, the space is not used.*max_matvecs")
    with infos, warned as caught:
        at = train(one)
    assert len([w for w in caught if "SubspaceProjection" in str(w.message)]) == 1
    (text,) = summary(caplog)  # every one counts, whatever their numbers are
    steps = len(at) - 1
    assert text.startswith(f"SubspaceProjection: {steps} of {steps} refreshes gave no new space. The space is not used")
    assert_same_path(at, train(), atol=0.0)
    assert not one.is_active


class NoGap(Quadratic):
    def __init__(self):
        super().__init__()
        self.curvatures[3:6] = 8.0


def test_a_space_without_a_gap_is_not_used():
    batches = DataLoader(torch.zeros(8, 1, dtype=torch.float64), batch_size=2)
    with pytest.warns(UserWarning, match="eigenvalue 4 is so close to the next one that the space of the first 4"):
        # only the first probe, and every tenth after it, excludes that a copy of eigenvalue 4 was missed
        at = train(project("top", k=4, ncv=12, refresh_every_n_steps=10), module=NoGap(), batches=batches)
    assert_same_path(at, train(module=NoGap(), batches=batches), atol=0.0)


def fails_at_2(module, batch, batch_idx):
    if module.global_step == 2:
        raise ZeroDivisionError("mine")
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1])


def test_the_last_good_space_stays_in_use_when_a_probe_fails(caplog):
    infos = caplog.at_level(logging.INFO, "lightning.pytorch")
    warned = pytest.warns(
        UserWarning, match="the probe at step 2 failed and is left out; the last good space stays in use"
    )
    with infos, warned:
        found = train(project("top", loss_fn=fails_at_2, on_failure="warn"), steps=3)
    assert summary(caplog) == ["SubspaceProjection: 1 of 3 refreshes gave no new space. ZeroDivisionError: mine"]
    stale = train(project("top", refresh_every_n_steps=1, loss_fn=fails_at_2, on_failure="warn", seed=0), steps=2)
    assert_same_path({s: found[s] for s in stale}, stale, atol=0.0)
    module = Net()
    nn.utils.vector_to_parameters(found[1].clone(), module.parameters())
    basis, update = space_at(module), found[3] - found[2]
    assert float((update - basis.T @ (basis @ update)).norm()) < 1e-10
    with pytest.raises(ZeroDivisionError, match="mine"):
        train(project("top", loss_fn=fails_at_2, start_when=2))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (50, "start_when=50 was not reached."),
        (StartWhenAligned(0.999), r"start_when=StartWhenAligned\(chi=0.999, .*\)"),
    ],
)
def test_a_projection_that_never_begins_says_so(start, words, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        train(project("top", start_when=start), steps=3)
        train(project("top", start_when=2), steps=3)
    (text,) = [text for text in caplog.messages if "no step was projected" in text]
    assert re.match(f"SubspaceProjection: no step was projected: {words}", text)
    assert ("the average of chi is 0." in text) == (start != 50)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(INPUTS, LABELS, strict=True)


def test_with_an_iterable_dataset_it_begins_when_the_sample_is_full():
    one = project("top", sample=24, gradient_sample=24)
    at = train(one, batches=DataLoader(Stream(), batch_size=8), steps=4)
    plain = train(batches=DataLoader(Stream(), batch_size=8), steps=4)
    assert_same_path({s: at[s] for s in range(3)}, {s: plain[s] for s in range(3)}, atol=0.0)
    assert one.is_active
    assert not torch.equal(at[3], plain[3])


def test_the_current_batch_can_be_the_sample():
    one = project("top", sample="current")
    assert len(train(one, steps=3)) == 4
    assert one._runner.run.num_probes == 3


# Runs that go on


@pytest.mark.parametrize(("stop", "start"), usual([(2, 0), (2, StartWhenAligned(0.3, 0.5))], thorough=[(1, 0)]))
def test_a_resumed_run_is_the_straight_run(tmp_path, stop, start):
    arguments = {"start_when": start, "refresh_every_n_steps": 1}
    straight_one, first, second = (project("bulk", **arguments) for _ in range(3))
    momentum = OPTIMIZERS["momentum"]
    epochs = {"batches": loader(48)}  # one step an epoch: every step can be resumed from
    straight = train(straight_one, module=Net(momentum), steps=3, **epochs)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    train(first, keep, module=Net(momentum), steps=stop, enable_checkpointing=True, **epochs)
    resumed = train(second, module=Net(momentum), steps=3, ckpt_path=tmp_path / f"step={stop}.ckpt", **epochs)
    assert_same_path({s: t for s, t in resumed.items() if s > stop}, {s: t for s, t in straight.items() if s > stop})
    assert second.chi == pytest.approx(straight_one.chi) if straight_one.chi is not None else second.chi is None
    state = torch.load(tmp_path / f"step={stop}.ckpt", weights_only=True)["callbacks"]
    assert len(pickle.dumps(state["SubspaceProjection{'name': 'projection'}"])) < 1000


def test_between_refreshes_a_resumed_run_computes_the_space_where_it_is_and_keeps_to_the_schedule(tmp_path):
    epochs, arguments = {"batches": loader(48)}, {"refresh_every_n_steps": 3}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    train(project("top", **arguments), keep, steps=4, enable_checkpointing=True, **epochs)
    one = project("top", **arguments)
    at = train(one, steps=8, ckpt_path=tmp_path / "step=4.ckpt", **epochs)
    module = Net()
    for step, refreshed in {4: 4, 5: 4, 6: 6, 7: 6}.items():
        nn.utils.vector_to_parameters(at[refreshed].clone(), module.parameters())
        basis, update = space_at(module), at[step + 1] - at[step]
        assert float((update - basis.T @ (basis @ update)).norm()) < 1e-10
    assert one._runner.run.num_probes == 2 + 2


def test_a_state_of_another_k_is_not_used(tmp_path):
    epochs = {"batches": loader(48)}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    train(project("top", start_when=1), keep, steps=2, enable_checkpointing=True, **epochs)
    with pytest.warns(UserWarning, match="is not used: it was written with k=3, and this projection has k=2"):
        train(project("top", k=2, start_when=1), steps=3, ckpt_path=tmp_path / "step=2.ckpt", **epochs)


def test_what_another_start_has_begun_is_not_taken_over(tmp_path):
    epochs = {"batches": loader(48)}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    train(project("top"), keep, steps=2, enable_checkpointing=True, **epochs)
    for start in (3, StartWhenAligned(0.999)):
        one = project("top", start_when=start)
        at = train(one, steps=3, ckpt_path=tmp_path / "step=2.ckpt", **epochs)
        assert not one.is_active
        module = Net()
        nn.utils.vector_to_parameters(at[2].clone(), module.parameters())
        torch.testing.assert_close(at[3], at[2] - 0.3 * dense_gradient(module, whole_loss), rtol=0.0, atol=1e-14)


def test_from_a_checkpoint_one_can_go_on_with_the_other_part(tmp_path):
    epochs = {"batches": loader(48)}
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    train(project("top"), keep, steps=2, enable_checkpointing=True, **epochs)
    at = train(project("bulk"), steps=3, ckpt_path=tmp_path / "step=2.ckpt", **epochs)
    module = Net()
    nn.utils.vector_to_parameters(at[2].clone(), module.parameters())
    assert float((space_at(module) @ (at[3] - at[2])).norm()) < 1e-10


def test_a_second_fit_goes_on_where_the_first_one_ended():
    straight = train(project("top", refresh_every_n_steps=3), max_epochs=2, steps=-1)
    one, path, module = project("top", refresh_every_n_steps=3), Path(), Net()
    trainer = trainer_of(one, path, steps=-1, max_epochs=1)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert_same_path(path.at, straight)


def test_a_fresh_run_starts_anew_and_a_copy_can_be_used():
    one = project("top", start_when=2)
    first = train(one, steps=3)
    assert_same_path(train(one, steps=3), first, atol=0.0)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert not {"log", "log_dict"} & vars(twin).keys()
        assert_same_path(train(twin, steps=3), first, atol=0.0)


# Several processes


def test_two_ranks_take_the_path_of_one_and_are_equal_to_the_bit():
    def ranked(keep, refresh):
        at = train(
            project(keep, refresh_every_n_steps=refresh, params=["net.0.*", "net.2.weight"]),
            SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, sample="all", **EXACT),
            module=Net(OPTIMIZERS["adamw"]),
            batches=loader(48 // int(os.environ.get("WORLD_SIZE", "1"))),  # all of it, since Lightning shuffles
            steps=3,
            strategy="ddp" if "WORLD_SIZE" in os.environ else "auto",
            devices=int(os.environ.get("WORLD_SIZE", "1")),
        )
        return {step: theta.numpy().copy() for step, theta in at.items()}

    for keep, refresh in usual([("bulk", 2)], thorough=[("top", 1)]):
        alone = {step: torch.from_numpy(theta) for step, theta in ranked(keep, refresh).items()}
        results = run(ranked, 2, keep, refresh, group=False, timeout=120.0)
        for step in alone:
            first, second = (torch.from_numpy(result[step]) for result in results)
            assert torch.equal(first, second)
            torch.testing.assert_close(first, alone[step], rtol=0.0, atol=1e-9)


def test_two_ranks_share_the_space_of_a_monitor_and_a_failure():
    def ranked():
        one = project("top", loss_fn=fails_on_the_last_rank, on_failure="warn")
        is_first = os.environ["RANK"] == "0"
        with pytest.warns(UserWarning, match="rank 1: ZeroDivisionError: mine") if is_first else nullcontext():
            at = train(
                one, watch(every_n_steps=2, on_failure="warn"), batches=loader(12), steps=2, strategy="ddp", devices=2
            )
        return {step: theta.numpy().copy() for step, theta in at.items()}, one._runner.run.num_probes

    (first, probes), (second, others) = run(ranked, 2, group=False, timeout=120.0)
    assert probes == others
    for step in first:
        assert (first[step] == second[step]).all()


def fails_on_the_last_rank(module, batch, batch_idx):
    if module.global_step == 1 and os.environ["RANK"] == "1":
        raise ZeroDivisionError("mine")
    return nn.functional.cross_entropy(module.net(batch[0]), batch[1])
