"""Projection into, and out of, a space that the user gives, against steps written by hand."""

import copy
import csv
import os
import pickle
import re
from contextlib import nullcontext
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import StartWhenAligned, SubspaceProjection
from lightning_subspace.callbacks.projector import Projector
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.sample import Sample
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.probe.given_basis import GivenBasis
from tests.callbacks import test_projection
from tests.processes import run

# Of ModelCheckpoint, which a resumed run does not have here.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

F64 = torch.float64
N = 57
GENERATOR = torch.Generator().manual_seed(1)
LABELS = torch.arange(48) % 3
INPUTS = torch.randn(48, 5, generator=GENERATOR, dtype=F64) + torch.eye(3, 5, dtype=F64)[LABELS]
RETAINED = [(torch.randn(size, 5, generator=GENERATOR, dtype=F64), torch.arange(size) % 3) for size in (6, 4, 4)]
SIZES = torch.tensor([6.0, 4.0, 4.0], dtype=F64)


class Net(pl.LightningModule):
    """A smooth classifier of 57 parameters in float64."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.3))
        self.given = []

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


def gradient_of(module):
    return torch.cat([p.grad.detach().flatten() for p in module.parameters()])


def flat(module):
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def gradient(net, batch):
    """(n,): the gradient of the mean loss of a batch."""
    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def retained_gradients(theta, batches=RETAINED):
    """(m, n): of the retained batches at theta."""
    net = copy.deepcopy(Net().net)
    nn.utils.vector_to_parameters(theta.clone(), net.parameters())
    return torch.stack([gradient(net, batch) for batch in batches])


def basis_of(rows):
    return torch.linalg.svd(rows, full_matrices=False).Vh


class Path(pl.Callback):
    """theta at every step."""

    def __init__(self):
        self.at = {}

    def on_train_start(self, trainer, pl_module):
        self.at[trainer.global_step] = flat(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.at[trainer.global_step] = flat(pl_module)


def loader(batch_size=8):
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=batch_size)


def project(keep="bulk", basis=RETAINED, **arguments):
    return SubspaceProjection(keep, basis=basis, **{"on_failure": "raise", "dtype": "float64", **arguments})


def by_function(function, keep="bulk", **arguments):
    return SubspaceProjection(keep, basis=function, **{"on_failure": "raise", **arguments})


def train(*callbacks, module=None, steps=6, batches=None, ckpt_path=None, **options):
    """The path of theta: {step: (n,)}."""
    path = Path()
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": steps}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**{**settings, **quiet, **options}, callbacks=[*callbacks, path])
    trainer.fit(Net() if module is None else module, loader() if batches is None else batches, ckpt_path=ckpt_path)
    return path.at


def by_hand(steps, keep="bulk", refresh=1, start=0, lr=0.3, rows=retained_gradients):
    net, at = copy.deepcopy(Net().net), {}
    at[0] = flat(net)
    for step in range(steps):
        if step >= start and (step % refresh == 0 or step == start):
            basis = basis_of(rows(at[step]))
        first = (step * 8) % len(INPUTS)
        g = gradient(net, (INPUTS[first : first + 8], LABELS[first : first + 8]))
        if step >= start:
            inside = basis.T @ (basis @ g)
            g = inside if keep == "top" else g - inside
        at[step + 1] = at[step] - lr * g
        nn.utils.vector_to_parameters(at[step + 1].clone(), net.parameters())
    return at


assert_same_path = partial(test_projection.assert_same_path, atol=1e-12)

wheres = pytest.mark.parametrize("where", ["update", "gradient"])
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
}


# What a step becomes


@wheres
@pytest.mark.parametrize("keep", ["top", "bulk"])
def test_with_plain_sgd_both_places_are_descent_along_the_projected_gradient(keep, where):
    assert_same_path(train(project(keep, where=where)), by_hand(6, keep))


@wheres
def test_it_is_refreshed_and_begins_when_asked(where):
    found = train(project(where=where, refresh_every_n_steps=3, start_when=2))
    assert_same_path(found, by_hand(6, refresh=3, start=2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_update_of_any_optimizer_changes_the_retained_loss_to_first_order(name):
    at = train(project(), module=Net(OPTIMIZERS[name]))
    for step in range(6):
        update, rows = at[step + 1] - at[step], retained_gradients(at[step])
        assert float(update.norm()) > 1e-2
        assert float((rows @ update).abs().max()) < 1e-12


class Spied(Net):
    """Keeps the gradient that the optimizer has got."""

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.given.append(gradient_of(self))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_gets_the_projected_gradient_clipped_before(name):
    module = Spied(OPTIMIZERS[name])
    # by value: it would leave the space if it came after the projection
    at = train(project(where="gradient"), module=module, gradient_clip_val=0.02, gradient_clip_algorithm="value")
    for step in range(6):
        rows, first = retained_gradients(at[step]), 8 * step
        net = copy.deepcopy(module.net)
        nn.utils.vector_to_parameters(at[step].clone(), net.parameters())
        clipped = gradient(net, (INPUTS[first : first + 8], LABELS[first : first + 8])).clamp(-0.02, 0.02)
        basis = basis_of(rows)
        torch.testing.assert_close(module.given[step], clipped - basis.T @ (basis @ clipped), rtol=0.0, atol=1e-14)
        if step > 0:  # the moments of other steps, or weight decay, lead back
            assert float((rows @ (at[step + 1] - at[step])).abs().max()) > 1e-6


def test_it_is_idempotent():
    module = nn.Linear(5, 3).double()
    rows = torch.randn(4, 18, generator=torch.Generator().manual_seed(0), dtype=F64)
    projector = Projector(basis_of(rows), Partition.even(ParameterSpace.of(module)), keep="bulk", gradient=rows[0])
    theta = projector.theta(module)
    with torch.no_grad():
        module.weight.add_(1.0)
    first = projector.project(module, theta, measured=True)
    once = projector.theta(module)
    second = projector.project(module, theta, measured=True)
    torch.testing.assert_close(projector.theta(module), once, rtol=0.0, atol=1e-15)
    assert first["removed"] > 0.1
    assert second["removed"] < 1e-28
    assert abs(first["change"]) < 1e-12


@wheres
def test_an_empty_space_leaves_everything_as_it_is(where):
    one = by_function(lambda module: torch.zeros(0, N), where=where)
    optimizer = OPTIMIZERS["adamw"]
    assert_same_path(train(one, module=Net(optimizer)), train(module=Net(optimizer)), atol=0.0)
    assert one.is_active


def test_batches_that_come_twice_count_once():
    assert_same_path(train(project(basis=[*RETAINED, *RETAINED]), steps=3), train(project(), steps=3), atol=1e-11)


def test_a_loader_is_read_as_its_batches():
    inputs, labels = (torch.cat(parts) for parts in zip(*RETAINED, strict=True))
    read = DataLoader(TensorDataset(inputs, labels), batch_size=6)
    assert_same_path(train(project(basis=read), steps=2), train(project(basis=list(read)), steps=2), atol=0.0)


def other_loss(module, batch, batch_idx):
    return module.net(batch[0]).square().mean()


def test_the_batches_may_have_a_loss_of_their_own():
    def rows(theta):
        net = copy.deepcopy(Net().net)
        nn.utils.vector_to_parameters(theta.clone(), net.parameters())
        losses = [net(x).square().mean() for x, _ in RETAINED]
        return torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(a, list(net.parameters()))]) for a in losses]
        )

    assert_same_path(train(project(loss_fn=other_loss)), by_hand(6, rows=rows))


# A function


FIXED = torch.randn(3, N, generator=torch.Generator().manual_seed(5), dtype=F64)


@wheres
@pytest.mark.parametrize("keep", ["top", "bulk"])
def test_a_function_gives_the_rows(keep, where):
    seen = []

    def rows(module):
        seen.append(flat(module))
        return FIXED

    at = train(by_function(rows, keep, where=where, refresh_every_n_steps=2))
    assert_same_path(at, by_hand(6, keep, refresh=2, rows=lambda theta: FIXED))
    assert len(seen) == 3
    assert all(torch.equal(theta, at[2 * i]) for i, theta in enumerate(seen))


def test_what_a_function_draws_and_differentiates_does_not_reach_training():
    def rows(module):
        other_loss(module, RETAINED[0], 0).backward()
        torch.rand(3)
        return torch.zeros(0, N)

    class Noisy(Net):
        def training_step(self, batch, batch_idx):
            assert all(p.grad is None or p.grad.abs().sum() > 0.0 for p in self.parameters())
            return super().training_step((batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), batch_idx)

    plain = train(module=Noisy(), accumulate_grad_batches=2, steps=3)
    assert_same_path(train(by_function(rows), module=Noisy(), accumulate_grad_batches=2, steps=3), plain, atol=0.0)


def test_parameters_outside_of_params_take_the_full_step():
    head = torch.eye(21, dtype=F64)[:20]  # all but one of the 21 parameters of the head
    at = train(by_function(lambda module: head, params=["net.2.*"]), steps=1)
    update, plain = at[1] - at[0], train(steps=1)[1] - at[0]
    torch.testing.assert_close(update[:36], plain[:36], rtol=0.0, atol=0.0)
    assert float(update[36:-1].abs().max()) < 1e-16
    assert float(update[-1]) == pytest.approx(float(plain[-1]))


class HalfTrained(Net):
    def configure_optimizers(self):
        return self.make(self.net[2].parameters())


def test_a_gradient_of_what_the_optimizer_does_not_move_is_no_part_of_it():
    row = torch.zeros(1, N, dtype=F64)
    row[0, 0], row[0, -1] = 3.0, 4.0  # one parameter of each layer; the first is not trained
    one = by_function(lambda module: row, where="gradient")
    at, plain = train(one, module=HalfTrained(), steps=1), train(module=HalfTrained(), steps=1)
    update, full = at[1] - at[0], plain[1] - plain[0]
    # u - v (v.u) with v = (.6, 0 ..., .8), of which the first number is not moved
    expected = full.clone()
    expected[-1] -= 0.64 * full[-1]
    torch.testing.assert_close(update, expected, rtol=0.0, atol=1e-15)


def test_a_parameter_without_a_gradient_gets_its_part():
    class Bare(Net):
        def training_step(self, batch, batch_idx):
            return self.net[2](torch.ones(1, 6, dtype=F64)).square().sum()  # the first layer has no gradient

    row = torch.ones(1, N, dtype=F64)
    found = {
        where: train(by_function(lambda module: row, where=where), module=Bare(), steps=2)
        for where in ("update", "gradient")
    }
    assert_same_path(found["gradient"], found["update"], atol=1e-14)
    assert float((found["gradient"][1] - found["gradient"][0])[:36].abs().min()) > 1e-3


# What is logged


@wheres
def test_what_was_done_is_logged_at_the_step_it_was_done_from(where, tmp_path):
    one = project(where=where, refresh_every_n_steps=2)
    module = Spied(OPTIMIZERS["momentum"])
    at = train(one, module=module, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))

    def logged(key):
        return {int(row["step"]): float(row[f"projection/{key}"]) for row in rows if row[f"projection/{key}"]}

    assert logged("rank") == {0: 3.0, 2: 3.0, 4: 3.0}
    net = copy.deepcopy(module.net)
    velocity = torch.zeros(N, dtype=F64)
    for step in range(6):
        refreshed = step - step % 2
        gradients = retained_gradients(at[refreshed])
        mean, basis = SIZES @ gradients / SIZES.sum(), basis_of(gradients)
        nn.utils.vector_to_parameters(at[step].clone(), net.parameters())
        whole = gradient(net, (INPUTS[8 * step : 8 * step + 8], LABELS[8 * step : 8 * step + 8]))
        velocity = 0.9 * velocity + (whole if where == "update" else whole - basis.T @ (basis @ whole))
        taken_from = velocity if where == "update" else whole
        share = float((basis @ taken_from).square().sum() / taken_from.square().sum())
        assert logged("removed")[step] == pytest.approx(share, rel=1e-9)
        update = at[step + 1] - at[step]
        change = float(mean @ update)
        assert logged("change")[step] == pytest.approx(change, rel=1e-9, abs=1e-14)
        cosine = change / float(mean.norm() * update.norm())
        assert logged("cosine")[step] == pytest.approx(cosine, rel=1e-9, abs=1e-13)
        assert (abs(cosine) < 1e-12) == (where == "update" or step < 2)
        if step % 2 == 0:
            losses = [float(nn.functional.cross_entropy(net(x), y).detach()) for x, y in RETAINED]
            assert logged("loss")[step] == pytest.approx(float(SIZES @ torch.tensor(losses, dtype=F64) / SIZES.sum()))


def test_of_a_function_there_is_no_gradient_to_compare_with():
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1,
                         callbacks=[by_function(lambda module: FIXED)], enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    trainer.fit(Net(), loader())
    assert set(trainer.callback_metrics) == {"projection/rank", "projection/removed"}


# What is refused


REFUSED = {
    "word": ("all", {}, "basis: expected a function of the module, a loader or a list of batches, got 'all'"),
    "no batch": ([], {}, "basis: expected at least one batch, got []"),
    "one batch": (RETAINED[0], {}, "basis: expected a function of the module, a loader or a list of batches, got one"),
    "no argument": (lambda: FIXED, {}, "basis: expected a function of 1 positional arguments (module)"),
    "class": (Net, {}, "basis: expected a function of the module, a loader or a list of batches, got the class Net"),
    "module": (nn.Linear(5, 3), {}, "or a list of batches, got an object of type Linear"),
    "k": (RETAINED, {"k": 3}, "k: expected its default beside basis=, 10, got 3; no eigenvectors are computed"),
    "which": (RETAINED, {"which": "SA"}, "which: expected its default beside basis=, 'LA', got 'SA'"),
    "tol": (RETAINED, {"tol": 1e-2}, "tol: expected its default beside basis="),
    "curvature": (RETAINED, {"curvature": "ggn"}, "curvature: expected its default beside basis="),
    "sample": (RETAINED, {"sample": RETAINED}, "sample: expected its default beside basis=, 1024, got "),
    "batch_size": (RETAINED, {"batch_size": 4}, "batch_size: expected its default beside basis=, None, got 4"),
    "alignment": (RETAINED, {"start_when": StartWhenAligned()}, "start_when: expected a step beside basis="),
    "loss_fn": (lambda m: FIXED, {"loss_fn": other_loss}, "loss_fn: expected its default beside basis=, None, got"),
    "weight": (lambda m: FIXED, {"weight": len}, "the function evaluates nothing here, so leave it out"),
}


@pytest.mark.parametrize(("basis", "arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused(basis, arguments, words):
    with pytest.raises(MisconfigurationException, match=re.escape(words)) as caught:
        SubspaceProjection("bulk", basis=basis, **arguments)
    assert str(caught.value).startswith("SubspaceProjection: ")


ROWS = {
    "columns": (torch.zeros(2, N - 1), "basis: expected a real tensor of shape (m, 57), got torch.float32 of shape"),
    "one": (torch.zeros(N), "basis: expected a real tensor of shape (m, 57)"),
    "nothing": (None, "basis: expected a real tensor of shape (m, 57), got None"),
    "all": (torch.eye(N), "basis: expected fewer rows than the 57 parameters, got 57; that many may span the whole"),
    "nan": (torch.full((1, N), torch.nan), "basis: expected finite numbers, got nan or infinity."),
}


@pytest.mark.parametrize(("rows", "words"), ROWS.values(), ids=ROWS)
def test_rows_that_span_no_space_are_refused(rows, words):
    partition = Partition.even(ParameterSpace.of(Net().net))
    given = GivenBasis(lambda module: rows)
    with pytest.raises(ValueError, match=re.escape(words)):
        given.space(CurvatureConfig(), Net().net, Sample(given.sample), partition)


def test_where_there_is_no_space_steps_are_left_as_they_are():
    one = by_function(lambda module: torch.full((1, N), torch.nan), on_failure="warn")
    with pytest.warns(UserWarning, match=r"the space of basis= could not be computed at step 0; .* finite numbers"):
        at = train(one, steps=2)
    assert_same_path(at, train(steps=2), atol=0.0)
    assert not one.is_active


def test_as_many_batches_as_parameters_are_refused():
    words = r"SubspaceProjection: basis: expected fewer batches than the 57 parameters, got 57; .*into each"
    with pytest.raises(MisconfigurationException, match=words):
        train(project(basis=[RETAINED[0]] * N, on_failure="warn"))


def test_so_they_are_where_training_has_frozen_parameters():
    batches = [RETAINED[0]] * (N - 1)

    class Freezing(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.net[0].requires_grad_(False)

    words = (
        r"basis= could not be computed at step 1; .* ValueError: basis: expected fewer batches than the \d+ parameters"
    )
    with pytest.warns(UserWarning, match="has changed by step 1"), pytest.warns(UserWarning, match=words):
        train(Freezing(), project(basis=batches, on_failure="warn"), steps=2)


class TwoOptimizers(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def test_with_several_optimizers_the_update_alone_is_projected():
    with pytest.raises(MisconfigurationException, match="where: expected 'update' where there are several optimizers"):
        train(by_function(lambda module: FIXED, where="gradient"), module=TwoOptimizers())
    at = train(by_function(lambda module: FIXED), module=TwoOptimizers(), steps=2)
    assert float((FIXED @ (at[2] - at[0])).abs().max()) < 1e-12


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@wheres
def test_steps_without_a_closure_are_projected_alike(where):
    found = train(by_function(lambda module: FIXED, where=where), module=Manual())
    assert_same_path(found, by_hand(6, rows=lambda theta: FIXED))


# Runs that go on, and what goes wrong


def test_the_last_good_space_stays_in_use_where_a_refresh_fails():
    def rows(module):
        if module.global_step >= 2:
            raise ZeroDivisionError("mine")
        return FIXED

    one = by_function(rows, on_failure="warn")
    words = "at step 2; the last good space stays in use, .*ZeroDivisionError: mine"
    with pytest.warns(UserWarning, match=words) as caught:
        at = train(one)
    assert len([w for w in caught if "basis=" in str(w.message)]) == 1
    assert_same_path(at, by_hand(6, rows=lambda theta: FIXED))


def test_a_resumed_run_is_the_straight_run(tmp_path):
    epochs, optimizer = {"batches": loader(48)}, OPTIMIZERS["momentum"]  # one step an epoch
    straight = train(project(where="gradient"), module=Net(optimizer), steps=4, **epochs)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    train(project(where="gradient"), keep, module=Net(optimizer), steps=2, enable_checkpointing=True, **epochs)
    path = tmp_path / "step=2.ckpt"
    resumed = train(project(where="gradient"), module=Net(optimizer), steps=4, ckpt_path=path, **epochs)
    assert_same_path({s: resumed[s] for s in (3, 4)}, {s: straight[s] for s in (3, 4)})


def test_copies_can_be_used():
    one = project()
    first = train(one, steps=2)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(one)))
    assert_same_path(train(twin, steps=2), first, atol=0.0)


# Several processes


def test_three_ranks_take_the_path_of_one_and_a_function_that_differs_is_told():
    def ranked():
        size = int(os.environ.get("WORLD_SIZE", "1"))
        ranks = {"strategy": "ddp" if size > 1 else "auto", "devices": size, "batches": loader(48 // size), "steps": 3}
        found = {}
        for where in ("update", "gradient"):
            at = train(project(where=where, basis=[*RETAINED, RETAINED[0]]), module=Net(OPTIMIZERS["adamw"]), **ranks)
            found[where] = {step: theta.numpy().copy() for step, theta in at.items()}
        at = train(by_function(lambda module: FIXED), **ranks)
        found["function"] = {step: theta.numpy().copy() for step, theta in at.items()}
        index = int(os.environ.get("RANK", "0"))
        if size > 1:
            words = "basis: expected the same rows on every rank, got different ones"
            one = by_function(lambda module: FIXED + index, on_failure="warn")
            with pytest.warns(UserWarning, match=words) if index == 0 else nullcontext():
                train(one, **ranks)
            assert not one.is_active
        return found

    alone = ranked()
    results = run(ranked, 3, group=False, timeout=120.0)
    for kind, path in alone.items():
        for step, theta in path.items():
            parts = [torch.from_numpy(result[kind][step]) for result in results]
            assert all(torch.equal(parts[0], part) for part in parts[1:])
            torch.testing.assert_close(parts[0], torch.from_numpy(theta), rtol=0.0, atol=1e-9)
