"""Edges against torch's own steps with the state held fixed, and the curvature along the preconditioned gradient."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop

from lightning_subspace import Stability
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver

from .probes import F64, alone, data, derivatives, flat, metrics, stepped
from .test_optimizer import RULES, See, of

STEPS = 150
NEAR = 1e-150  # its square is 0, so that gradients so small add nothing to a second moment

# The edge


class Frozen:
    """The state of an optimizer, put back before each step so that the step ends with what there is now.

    Second moments, their age and the schedules are held, averages of gradients are free.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.held = [
            (group, state, {key: value.clone() for key, value in state.items() if torch.is_tensor(value)})
            for group in optimizer.param_groups
            for state in [optimizer.state[p] for p in group["params"]]
        ]
        for _, state, _ in self.held:
            for key in ("exp_avg", "momentum_buffer"):
                if state.get(key) is not None:
                    state[key].zero_()

    def put_back(self):
        for group, state, held in self.held:
            beta = group.get("alpha", group.get("betas", (0.0, 1.0))[1])
            for key in ("exp_avg_sq", "exp_inf", "square_avg", "grad_avg"):
                if key in held:
                    state[key].copy_(held[key] / beta)
            for key in ("sum", "max_exp_avg_sq"):
                if key in held:
                    state[key].copy_(held[key])
            if "step" in held:
                state["step"].copy_(held["step"] - 1.0)
            if "mu_product" in held:
                decay = 0.96 ** (float(held["step"]) * group["momentum_decay"])
                state["mu_product"].copy_(held["mu_product"] / (group["betas"][0] * (1.0 - 0.5 * decay)))


def growth(name, ratio, count):
    """By how much each coordinate grows in `STEPS` steps, on a quadratic that has this ratio along each of them."""
    module, optimizer = stepped(RULES[name], count)
    see = See()
    alone(module, see, optimizer)
    scale, shift = (torch.as_tensor(value, dtype=F64).expand(57) for value in (see.edge.scale, see.edge.shift))
    moved = scale > 0.0
    curvature = torch.where(moved, ratio / scale - shift, 0.0)
    pieces = curvature.split([p.numel() for p in module.parameters()])
    frozen, widest = Frozen(optimizer), []
    for p in module.parameters():
        p.data.fill_(NEAR)
    for _ in range(STEPS):
        frozen.put_back()
        for p, piece in zip(module.parameters(), pieces, strict=True):
            p.grad = piece.view_as(p) * p.detach()
        optimizer.step()
        widest.append(flat(module).abs())
    assert float(widest[-1].max()) < 1e-80
    return (torch.stack(widest[-20:]).amax(0) / torch.stack(widest[20:40]).amax(0))[moved]


# Decoupled decay shrinks the weights outside of the recursion whose edge this is: by lr * decay = 5e-4 a step here.
@pytest.mark.parametrize(("name", "count"), [*((name, 6) for name in RULES), ("nadam", 1), ("radam rectified", 1)])
def test_the_real_optimizer_diverges_just_beyond_the_edge_in_every_coordinate(name, count):
    assert (growth(name, 0.99, count) < 1.0).all()
    assert (growth(name, 1.01, count) > 1.0).all()


# The curvature along the preconditioned gradient


@pytest.mark.parametrize("name", RULES)
def test_the_ratio_along_the_gradient_is_the_dense_quotient_and_at_most_the_largest(name):
    module, optimizer = stepped(RULES[name], 6)
    see = See()
    alone(module, see, optimizer)
    found = alone(module, Stability(eigensolve=False), optimizer)
    gradient, hessian = derivatives(module)
    scale, shift = (torch.as_tensor(value, dtype=F64).expand(57) for value in (see.edge.scale, see.edge.shift))
    gradient = gradient + shift * flat(module)
    step = scale * gradient
    expected = float(step @ (hessian + torch.diag(shift)) @ step / (gradient @ step))
    assert found["gradient_stability"] == pytest.approx(expected, rel=1e-9)
    root = scale.sqrt()
    largest = torch.linalg.eigvalsh(root[:, None] * (hessian + torch.diag(shift)) * root)[-1]
    assert found["gradient_stability"] <= float(largest)
    if math.isnan(see.edge.threshold):
        assert "preconditioned_gradient_curvature" not in found
    else:
        assert found["preconditioned_gradient_curvature"] == pytest.approx(expected * see.edge.threshold, rel=1e-9)


def test_without_a_preconditioner_it_is_the_curvature_along_the_gradient():
    module, optimizer = stepped(of(SGD, lr=0.1), 3)
    found = metrics(module, Stability(), optimizer=optimizer, k=1, tol=1e-3)
    assert found["preconditioned_gradient_curvature"] == pytest.approx(found["gradient_curvature"], rel=1e-9)
    assert found["gradient_stability"] == pytest.approx(found["gradient_curvature"] * 0.1 / 2.0, rel=1e-9)


def test_along_an_eigenvector_of_the_preconditioned_hessian_it_is_the_stability():
    # f = sum of h x^2 / 2 with the gradient in one coordinate alone.
    curvature = torch.tensor([3.0, 1.0], dtype=F64)
    module = nn.Linear(2, 1, bias=False).to(F64)
    optimizer = Adam(module.parameters(), lr=0.01)
    module.weight.grad = torch.tensor([[2.0, 1.0]], dtype=F64)
    optimizer.step()
    module.weight.data.copy_(torch.tensor([[0.0, 0.7]]))
    found = metrics(
        module,
        Stability(),
        optimizer=optimizer,
        k=1,
        loss_fn=lambda m, batch, i: 0.5 * (curvature * m.weight[0].square()).sum() + 0.0 * batch[0].sum(),
    )
    # P = (1 - .9) |g| there: the second coordinate has 1/(.1 * 1), the first 3/(.1 * 2).
    assert found["preconditioned_gradient_curvature"] == pytest.approx(10.0, rel=1e-6)
    assert found["preconditioned_sharpness"] == pytest.approx(15.0, rel=1e-6)


@pytest.mark.parametrize("second", [0.9, 0.999])
def test_adam_without_momentum_on_a_quadratic_has_twice_the_edge_ratio_over_the_rate(second):
    # u = -lr P^-1 g, so that u.Hu / (-2 g.u) = lr gamma / 2: for the state that made the step.
    torch.manual_seed(0)
    matrix = torch.randn(6, 6, dtype=F64)
    matrix = matrix @ matrix.T
    module = nn.Linear(6, 1, bias=False).to(F64)
    optimizer = Adam(module.parameters(), lr=0.01, betas=(0.0, second), eps=0.0)

    def quadratic(m, batch, i):
        return 0.5 * m.weight[0] @ matrix @ m.weight[0] + 0.0 * batch[0].sum()

    for _ in range(4):
        theta = flat(module)
        optimizer.zero_grad()
        quadratic(module, data()[0], 0).backward()
        optimizer.step()
    gradient, update = matrix @ theta, flat(module) - theta
    ratio = float(update @ matrix @ update / (-2.0 * gradient @ update))
    module.weight.data.copy_(theta[None])  # back to where the step began, with the state that made it
    found = metrics(module, Stability(eigensolve=False), optimizer=optimizer, k=0, loss_fn=quadratic)
    assert found["gradient_stability"] == pytest.approx(ratio, rel=1e-9)
    assert found["preconditioned_gradient_curvature"] == pytest.approx(2.0 * ratio / 0.01, rel=1e-9)


def test_the_product_alone_costs_no_eigensolve_and_any_end_of_the_spectrum_will_do():
    module, optimizer = stepped(RULES["nadam"], 6)
    expected = metrics(module, Stability(), optimizer=optimizer, k=0, tol=1e-3)["gradient_stability"]
    for measurement, settings in ((Stability(eigensolve=False), {"k": 0}), (Stability(), {"k": 1, "which": "SA"})):
        found = metrics(module, measurement, optimizer=optimizer, tol=1e-3, **settings)
        assert "stability" not in found
        assert found["gradient_stability"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", [Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop])
def test_before_the_first_step_nothing_is_said_also_where_there_is_a_state(kind):
    module, optimizer = stepped(of(kind, lr=0.01), 1)
    for state in optimizer.state.values():  # some versions of torch make it at once
        state["step"].zero_()
    assert "gradient_stability" not in alone(module, Stability(), optimizer)


# A spike of Adam's loss: the fit of two sines with 481 parameters, full batch. Its steps and heights are known from
# code that shares nothing with this one; examples/reproduce/spikes.py has all the spikes.

X = torch.linspace(-1.0, 1.0, 200).double()[:, None]
Y = torch.sin(math.pi * X) + torch.sin(5.0 * math.pi * X)


def along_a_fit(rate, steps):
    """Loss and ratio along the preconditioned gradient at these steps."""
    torch.manual_seed(0)
    layers = [nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)]
    module = nn.Sequential(*layers).to(F64)
    optimizer = Adam(module.parameters(), lr=rate)
    sample = sample_of_batches([(X, Y)])
    losses, ratios = {}, {}
    for at in range(steps[-1] + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(module(X), Y)
        if at in steps:
            losses[at] = loss.item()
            space = ParameterSpace.of(module)
            with TrainingLoss(module, space, lambda m, b, i: nn.functional.mse_loss(m(b[0]), b[1])) as taken:
                _, record = take_probe(taken, sample, Solver(0), [Stability(eigensolve=False)], optimizer=optimizer)
            ratios[at] = record.metrics["gradient_stability"]
        loss.backward()
        optimizer.step()
    return losses, ratios


def test_the_ratio_crosses_one_a_few_steps_before_the_loss_spikes():
    losses, ratios = along_a_fit(0.02, range(780, 841))
    lowest = min(losses, key=losses.get)
    rise = next(at for at in losses if at > lowest and losses[at] > 1.5 * losses[lowest])
    assert rise == 833
    assert max(losses.values()) / losses[lowest] == pytest.approx(6.46, rel=0.02)
    crossing = max(at for at in ratios if at <= rise and ratios[at] > 1.0 >= ratios[at - 1])
    assert 0 <= rise - crossing <= 20
    assert max(ratios[at] for at in range(780, 813)) < 1.0


def test_far_below_the_edge_the_ratio_is_small():
    losses, ratios = along_a_fit(0.001, range(600, 603))
    assert losses[602] < losses[600]
    assert max(map(abs, ratios.values())) < 0.01
