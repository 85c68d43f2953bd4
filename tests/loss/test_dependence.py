"""A loss that takes a parameter from elsewhere than the module is refused before anything is differentiated."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_subspace import measure_subspace
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.oracles import dense_hessian
from tests.thorough import covering

BATCH = (torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3)
WIDE = (BATCH[0].double(), BATCH[1])


class Net(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *[layer for _ in range(depth) for layer in (nn.Linear(5, 5), nn.Tanh())], nn.Linear(5, 3)
        )


def cross_entropy(net, batch, index):
    return F.cross_entropy(net.net(batch[0]), batch[1])


def squares(parameters):
    return 5.0 * sum(p.square().sum() for p in parameters)


# What is kept of a network, and how its parameters are read from it.
WAYS = {
    "a list in a closure": (lambda net: list(net.parameters()), lambda kept: kept),
    "one parameter": (lambda net: net.net[0].bias, lambda kept: [kept]),
    "a view that was made before": (lambda net: net.net[0].weight.view(-1), lambda kept: [kept]),
    "weak references": (lambda net: [weakref.ref(p) for p in net.parameters()], lambda kept: [r() for r in kept]),
    "a frozenset": (lambda net: frozenset(net.parameters()), lambda kept: kept),
    "an optimizer": (lambda net: torch.optim.SGD(net.parameters(), 0.1), lambda kept: kept.param_groups[0]["params"]),
}


@pytest.mark.parametrize(
    ("way", "curvature"), covering(list(WAYS), ["hessian", "ggn", "finite-difference", "empirical-fisher"])
)
def test_a_parameter_from_elsewhere_is_refused_by_its_name(way, curvature):
    net = Net()
    keep, read = WAYS[way]
    kept = keep(net)
    with pytest.raises(LossError, match=r"loss: expected every parameter from the module.* 'net\.0\.(weight|bias)'"):
        measure_subspace(
            net,
            [BATCH],
            k=2,
            curvature=curvature,
            loss_fn=lambda m, b, i: cross_entropy(m, b, i) + squares(read(kept)),
        )
    assert all(p.grad is None and p._backward_hooks is None for p in net.parameters())


def test_the_same_penalty_by_the_module_is_measured():
    net = Net()
    found = measure_subspace(
        net, [BATCH], k=2, loss_fn=lambda m, b, i: cross_entropy(m, b, i) + squares(m.parameters()), tol=1e-5
    )
    exact = dense_hessian(net, lambda m: cross_entropy(m, BATCH, 0) + squares(m.parameters()))
    torch.testing.assert_close(
        found.subspace.eigenvalues, torch.linalg.eigvalsh(exact).flip(0)[:2], rtol=1e-4, atol=0.0, check_dtype=False
    )


@pytest.mark.parametrize("read", [lambda p: p.detach(), lambda p: p.data, lambda p: p.clone().detach()])
def test_values_without_a_gradient_may_come_from_elsewhere(read):
    net = Net()
    kept = list(net.parameters())
    scale = 1.0 + float(sum(p.detach().square().sum() for p in kept))

    def loss(m, b, i):
        return cross_entropy(m, b, i) * (1.0 + sum(read(p).square().sum() for p in kept))

    found = measure_subspace(net, [BATCH], k=2, loss_fn=loss, tol=1e-5)
    exact = dense_hessian(net, lambda m: cross_entropy(m, BATCH, 0) * scale)
    torch.testing.assert_close(
        found.subspace.eigenvalues, torch.linalg.eigvalsh(exact).flip(0)[:2], rtol=1e-4, atol=0.0, check_dtype=False
    )


def test_a_parameter_that_is_not_measured_may_come_from_elsewhere():
    net = Net().double()
    last = net.net[2].weight
    found = measure_subspace(
        net,
        [WIDE],
        k=2,
        params=["net.0.*"],
        loss_fn=lambda m, b, i: cross_entropy(m, b, i) + last.square().sum(),
    )
    alone = measure_subspace(net, [WIDE], k=2, params=["net.0.*"], loss_fn=cross_entropy)
    torch.testing.assert_close(found.subspace.eigenvalues, alone.subspace.eigenvalues)


def test_gradients_of_other_networks_stay_as_they_are():
    net, critic = Net(), nn.Linear(3, 1)
    critic.bias.grad = before = torch.ones(1)

    def loss(m, b, i):
        return cross_entropy(m, b, i) + critic(m.net(b[0])).square().mean()

    with pytest.warns(UserWarning, match="could not be checked"):  # the critic stays in float32
        measure_subspace(net, [BATCH], k=2, loss_fn=loss)
    assert critic.bias.grad is before
    assert before.item() == 1.0
    assert critic.weight.grad is None


def test_a_use_inside_of_a_reentrant_checkpoint_is_refused_without_a_trace():
    net = Net()
    kept = net.net[0].weight
    kept.grad = before = torch.ones_like(kept)
    space = ParameterSpace.of(net)

    def loss(m, b, i):
        return cross_entropy(m, (checkpoint(lambda x: x @ kept, b[0].requires_grad_(), use_reentrant=True), b[1]), i)

    with TrainingLoss(net, space, loss, order=1) as opened:
        value = opened(MicroBatch(BATCH, 16.0, 0)).value
        with pytest.raises(LossError, match=r"'net\.0\.weight'"):
            value.backward()
    assert kept.grad is before
    assert torch.equal(before, torch.ones_like(kept))
    assert kept._backward_hooks is None


def test_hooks_of_the_user_are_left_as_they_are():
    net = Net()
    kept, calls = net.net[0].weight, []
    kept.register_hook(lambda gradient: calls.append(gradient))
    hooks = kept._backward_hooks

    def loss(m, b, i):
        return cross_entropy(m, (checkpoint(torch.tanh, b[0].requires_grad_(), use_reentrant=True), b[1]), i)

    with TrainingLoss(net, ParameterSpace.of(net), loss, order=1) as opened:
        opened(MicroBatch(BATCH, 16.0, 0)).value.backward()
    assert kept._backward_hooks is hooks
    assert len(hooks) == 1
    assert not calls  # the copy's gradient is not the parameter's
    cross_entropy(net, BATCH, 0).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "finite-difference"])
def test_a_loss_of_another_network_is_refused(curvature):
    other = Net().double()
    with pytest.raises(LossError, match=r"loss: expected one that depends on net\.0\.weight, .* of Net, got none"):
        measure_subspace(Net(), [WIDE], k=2, curvature=curvature, loss_fn=lambda m, b, i: cross_entropy(other, b, i))


def test_parameters_without_a_part_in_the_loss_are_refused():
    net = Net()
    net.unused = nn.Linear(2, 2)
    with pytest.raises(LossError, match=r"depends on unused\.weight, unused\.bias"):
        measure_subspace(net, [BATCH], k=2, params=["unused.*"], loss_fn=cross_entropy)


def test_micro_batches_whose_loss_depends_on_nothing_are_measured_beside_others():
    """A batch without an object gives `tensor(0.0, requires_grad=True)` in many a detector."""

    def loss(m, b, i):
        return cross_entropy(m, b, i) if i else torch.zeros((), requires_grad=True)

    net = Net()
    found = measure_subspace(net, [BATCH] * 4, k=2, loss_fn=loss)
    alone = measure_subspace(net, [BATCH], k=2, loss_fn=cross_entropy)
    torch.testing.assert_close(found.subspace.eigenvalues, 0.75 * alone.subspace.eigenvalues, rtol=1e-3, atol=1e-6)


def test_a_gradient_of_zero_is_no_lack_of_dependence():
    net = Net()
    for p in net.parameters():
        nn.init.zeros_(p)
    found = measure_subspace(net, [BATCH], k=2, loss_fn=lambda m, b, i: squares(m.parameters()))
    assert found.metrics["sharpness"] == pytest.approx(10.0)
    assert found.metrics["gradient_norm"] == 0.0


def test_a_graph_is_followed_once_a_micro_batch_and_context(monkeypatch):
    seen = []
    monkeypatch.setattr("lightning_subspace.loss.dependence._ends", lambda loss: (seen.append(loss), ({}, []))[1])
    net = Net()
    with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as opened:
        for index in (0, 1, 0, 1, 1):
            opened(MicroBatch(BATCH, 16.0, index))
    assert len(seen) == 2
