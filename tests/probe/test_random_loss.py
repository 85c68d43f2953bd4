"""A loss that is random beside its examples: found, drawn repeatedly, and its error bar holds.

The truth is the fraction of the mean over draws, in float64, with the dense Hessian. Nothing is trained here: the
parameters are those of a network that was fitted a little, so that signal and noise are both there.
"""

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.measurements import GradientFraction, Measurement, Reliability
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from tests.left_out import leave_self_check_out
from tests.processes import run
from tests.thorough import covering, how_many, usual

K = 2
RUNS = how_many(10, thorough=40)


@pytest.fixture(autouse=True)
def _left_out(monkeypatch):
    """The self-check, which evaluates each of many draws in float64."""
    leave_self_check_out(monkeypatch)


def network(*parts):
    torch.manual_seed(0)
    return nn.Sequential(*(part() for part in parts))


def points_network():
    return network(lambda: nn.Linear(1, 6), nn.Tanh, lambda: nn.Linear(6, 1))


def dropout_network():
    return network(lambda: nn.Linear(4, 6), nn.Tanh, lambda: nn.Dropout(0.3), lambda: nn.Linear(6, 3))


def residual(net, points):
    """Poisson's equation u'' = -9 pi^2 sin(3 pi x) on [0, 1], u = 0 at both ends."""
    points = points.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
    ends = net(torch.tensor([[0.0], [1.0]], dtype=points.dtype))
    return (bend + 9 * torch.pi**2 * torch.sin(3 * torch.pi * points)).square().mean() + 10 * ends.square().mean()


def drawn_points(net, batch, batch_idx):
    return residual(net, torch.rand(20, 1, dtype=batch.dtype))


def cross_entropy(net, batch, batch_idx):
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def labelled(count=120):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(3, (count,), generator=generator)
    inputs = torch.randn(count, 4, generator=generator)
    inputs[:, :3] += 2.0 * nn.functional.one_hot(labels, 3)
    return inputs, labels


def whole(batches):
    """The batches as all of the training set."""
    sample = sample_of_batches(batches)
    return replace(sample, population=float(sum(batch.size for batch in sample.hessian)))


def items():
    return whole([torch.zeros(1, 1)])


def quarters():
    return whole(list(zip(*(tensor.split(30) for tensor in labelled()), strict=True)))


def begun(module, given, loss_fn=cross_entropy, ranks=None, **options):
    """A run after its checks."""
    tracker = ProbeRun(ProbeSettings(**{"k": K, "loss_fn": loss_fn, **options}), module, ranks)
    tracker.check(module, given)
    return tracker


# -- the error bar ----------------------------------------------------------------------------------------------------


def fitted(net, step, steps):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    torch.manual_seed(5)
    for _ in range(steps):
        optimizer.zero_grad()
        step(net).backward()
        optimizer.step()
    return net


def dense_fraction(net, losses):
    """Of the mean of the losses: the share of its gradient in the top space of its Hessian."""
    parameters = list(net.parameters())
    gradient, hessian = 0.0, 0.0
    for loss in losses:
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(), parameters, create_graph=True)])
        pieces = torch.autograd.grad(
            flat, parameters, torch.eye(len(flat), dtype=flat.dtype), is_grads_batched=True, allow_unused=True
        )
        rows = [
            torch.zeros(len(flat), p.numel(), dtype=flat.dtype) if piece is None else piece.reshape(len(flat), -1)
            for piece, p in zip(pieces, parameters, strict=True)
        ]
        gradient, hessian = gradient + flat.detach(), hessian + torch.cat(rows, dim=1)
    top = torch.linalg.eigh(hessian)[1][:, -K:]
    return float((top.T @ gradient).square().sum() / gradient.square().sum())


def points_case():
    net = fitted(points_network(), lambda net: residual(net, torch.rand(20, 1)), 100)
    wide = points_network().double()
    wide.load_state_dict(net.state_dict())
    torch.manual_seed(9)
    truth = dense_fraction(wide, [lambda: residual(wide, torch.rand(300 * 20, 1, dtype=torch.float64))])
    return net, drawn_points, items(), truth


def dropout_case():
    inputs, labels = labelled()
    net = fitted(dropout_network(), lambda net: cross_entropy(net, (inputs, labels), 0), 100)
    wide = dropout_network().double()
    wide.load_state_dict(net.state_dict())
    torch.manual_seed(9)
    many = (inputs.double().repeat(300, 1), labels.repeat(300))  # the masks are drawn for each copy
    return net, cross_entropy, quarters(), dense_fraction(wide, [lambda: cross_entropy(wide, many, 0)])


@pytest.mark.parametrize("case", usual([dropout_case], thorough=[points_case]))
def test_the_band_covers_the_mean_over_many_draws(case):
    net, loss_fn, sample, truth = case()
    bands = []
    for seed in range(RUNS):
        # 8 draws of the item for the Hessian and 32 for the gradient: a quarter and an eighth of the default.
        options = {"defaults": False, "verify": "never", "measurements": [GradientFraction(), Reliability()]}
        tracker = begun(net, sample, loss_fn, seed=seed, sample=256, gradient_sample=1024, **options)
        metrics = tracker.measure(net, sample, 0).record.metrics
        bands.append((metrics["gradient_fraction_low"], metrics["gradient_fraction_high"]))
    covered = sum(low <= truth <= high for low, high in bands)
    assert covered >= 0.9 * RUNS
    pairs = list(combinations(bands, 2))
    assert sum(max(a[0], b[0]) <= min(a[1], b[1]) for a, b in pairs) >= 0.95 * len(pairs)
    assert sum(high - low for low, high in bands) < 0.9 * RUNS  # a band of [0, 1] says nothing


# -- what is found random ---------------------------------------------------------------------------------------------


def noisy(net, batch, batch_idx):
    return cross_entropy(net, (batch[0] + torch.empty_like(batch[0]).bernoulli_(0.5), batch[1]), batch_idx)


def by_numpy(net, batch, batch_idx):
    return cross_entropy(net, batch, batch_idx) * np.random.rand()


def by_python(net, batch, batch_idx):
    return cross_entropy(net, batch, batch_idx) * random.random()


def added(net, batch, batch_idx):
    return cross_entropy(net, batch, batch_idx) + torch.rand(())


def by_place(net, batch, batch_idx):
    noise = torch.rand(batch[0].shape, generator=torch.Generator().manual_seed(batch_idx))
    return cross_entropy(net, (batch[0] + noise, batch[1]), batch_idx)


def sometimes_none(net, batch, batch_idx):
    return None if torch.rand((), dtype=torch.float32) < 0.2 else cross_entropy(net, batch, batch_idx)


@pytest.mark.filterwarnings("ignore:The empirical Fisher")
@pytest.mark.parametrize(
    ("loss_fn", "curvature"),
    covering([noisy, by_numpy, by_python], ["hessian", "ggn", "finite-difference", "empirical-fisher"]),
)
def test_random_numbers_of_any_kind_are_found(loss_fn, curvature):
    net = dropout_network().eval()
    assert begun(net, quarters(), loss_fn, mode="eval", curvature=curvature).examples.is_random
    assert not begun(net, quarters(), mode="eval", curvature=curvature).examples.is_random


@pytest.mark.parametrize(("loss_fn", "found"), [(cross_entropy, False), (added, False), (by_place, False)])
def test_noise_that_moves_no_gradient_is_none(loss_fn, found):
    net = network(lambda: nn.Linear(4, 3))
    assert begun(net, quarters(), loss_fn).examples.is_random == found


def test_dropout_before_a_layer_of_zeros_is_found():
    net = dropout_network()
    for parameter in net[-1].parameters():
        nn.init.zeros_(parameter)
    batch = labelled()
    assert cross_entropy(net, batch, 0) == cross_entropy(net, batch, 0)  # the value says nothing
    assert begun(net, quarters()).examples.is_random


@pytest.mark.parametrize("sample", ["current", [labelled()]])
def test_given_draws_are_their_users_choice(sample):
    net = dropout_network()
    tracker = begun(net, quarters(), sample=sample)
    assert not tracker.examples.is_random
    assert tracker.examples.drawn(given := quarters()) is given


class Seen(Measurement):
    """The sample that a probe takes."""

    def measure(self, probe):
        self.sample = probe.sample
        return {}


def test_a_deterministic_loss_is_measured_on_the_sample_itself():
    net, seen = network(lambda: nn.Linear(4, 3)), Seen()
    sample = quarters()
    tracker = begun(net, sample, sample="all", measurements=[seen])
    metrics = tracker.measure(net, sample, 0).record.metrics
    assert seen.sample is sample
    assert "gradient_fraction_low" not in metrics
    assert tracker.examples.remarks == {}


def test_all_of_a_random_loss_has_an_error_bar_and_one_remark():
    net, seen = dropout_network(), Seen()
    sample = quarters()
    tracker = begun(net, sample, sample="all", measurements=[seen])
    metrics = tracker.measure(net, sample, 0).record.metrics
    assert metrics["gradient_fraction_low"] < metrics["gradient_fraction"] < metrics["gradient_fraction_high"]
    assert (len(seen.sample.hessian), len(seen.sample.hessian) + len(seen.sample.extra)) == (32, 256)
    (text,) = tracker.examples.remarks.values()
    assert (
        "Measured: 256 draws of 4 micro-batches for the gradient, 32 of 4 micro-batches for the Hessian; the error"
        in text
    )
    assert text.endswith("the error bar, where there is one, covers the draws, too.")  # a half may have no space


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"k": 0}, "32 of 4 micro-batches for the Hessian."),
        ({"k": 0, "curvature": "none"}, "32 of 4 micro-batches for the loss after a step."),
    ],
)
def test_without_products_the_remark_names_no_hessian_and_no_joined_ones(options, told):
    net, sample = dropout_network(), quarters()
    tracker = begun(net, sample, sample="all", **options)
    tracker.measure(net, sample, 0)
    remark, *others = tracker.examples.told.values()
    assert remark.endswith(f"Measured: 256 draws of 4 micro-batches for the gradient, {told}")
    assert others == ([] if "curvature" in options else ["micro-batches not joined: the loss is random."])


def test_the_mean_is_over_the_draws():
    net, sample = dropout_network(), quarters()
    tracker = begun(net, sample, sample=256, gradient_sample=512, k=0)  # two and four passes
    metrics = tracker.measure(net, sample, 0).record.metrics
    drawn, total = tracker.examples.drawn(sample), 0.0
    with tracker._choice.loss(net, tracker.space) as loss:
        for batch in (*drawn.hessian, *drawn.extra):
            found = loss(batch)
            total = total + torch.cat([g.reshape(-1) for g in torch.autograd.grad(found.value, found.leaves)])
    assert len({batch.key for batch in (*drawn.hessian, *drawn.extra)}) == 16
    assert metrics["gradient_norm"] == pytest.approx(float((total / 16).norm()), rel=1e-5)


def test_a_draw_without_a_loss_is_left_out():
    net, sample = network(lambda: nn.Linear(4, 3)), quarters()
    tracker = begun(net, sample, sometimes_none, sample=240, gradient_sample=480)
    if not tracker.examples.is_random:  # the first two seeds both gave one
        tracker.examples.is_random = True
    metrics = tracker.measure(net, sample, 0).record.metrics
    assert 0 < metrics["solver/batches_without_loss"] < 16


def test_two_ranks_measure_the_same_draws():
    def measured(ranks=None):
        net, sample = dropout_network(), quarters()
        ranks = Ranks(torch.distributed.group.WORLD) if torch.distributed.is_initialized() else Ranks()
        tracker = begun(net, sample, ranks=ranks, sample=240, gradient_sample=480)
        return dict(tracker.measure(net, sample, 0).record.metrics), tracker.examples.is_random

    alone, _ = measured()
    for metrics, is_random in run(measured, 2):
        assert is_random
        for key in ("gradient_norm", "gradient_fraction", "eigenvalues/01", "gradient_fraction_low"):
            assert metrics[key] == pytest.approx(alone[key], rel=1e-3)
