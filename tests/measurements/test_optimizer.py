"""Where an optimizer would step and how much curvature it stands, against torch's own steps."""

import copy

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

from lightning_subspace import Chi, LossChange, Measurement, Needs, Stability, measure_subspace
from lightning_subspace.measurements.optimizer_rules import edge, next_step, why_unknown

from .probes import F64, alone, data, derivatives, flat, loss_fn, metrics, objective, step, stepped, top_eigenspace


class See(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        self.step, self.edge, self.why = next_step(probe), edge(probe), why_unknown(probe.optimizer)
        return {}


def of(kind, **settings):
    return lambda module: kind(module.parameters(), **settings)


def grouped(kind, **settings):
    """Two groups with settings of their own; the last bias is not the optimizer's."""

    def make(module):
        first, last = list(module[0].parameters()), [module[2].weight]
        return kind([{"params": last, "lr": 0.003}, {"params": first}], lr=0.02, **settings)

    return make


class Lion(torch.optim.Optimizer):
    """Not in torch; what counts here is its name."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})


RULES = {
    "sgd": of(SGD, lr=0.1),
    "momentum": of(SGD, lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": of(SGD, lr=0.1, momentum=0.8, nesterov=True),
    "sgd by groups": grouped(SGD, momentum=0.5),
    "adam": of(Adam, lr=0.01),
    "adam with decay": of(Adam, lr=0.01, betas=(0.8, 0.95), weight_decay=0.05),
    "amsgrad": of(Adam, lr=0.01, amsgrad=True, eps=1e-3),
    "adamw": of(AdamW, lr=0.01, weight_decay=0.05),
    "adam by groups": grouped(Adam),
    "rmsprop": of(RMSprop, lr=0.01),
    "rmsprop centered": of(RMSprop, lr=0.01, centered=True, momentum=0.5, weight_decay=0.01),
    "adagrad": of(Adagrad, lr=0.1, lr_decay=0.3, weight_decay=0.05, initial_accumulator_value=0.01),
    "adagrad by groups": grouped(Adagrad),
    "adamax": of(Adamax, lr=0.01, weight_decay=0.05),
    "adamax by groups": grouped(Adamax),
    "nadam": of(NAdam, lr=0.01),
    "nadam with decay": of(NAdam, lr=0.01, betas=(0.8, 0.95), weight_decay=0.05, momentum_decay=0.5),
    "nadam decoupled": of(NAdam, lr=0.01, weight_decay=0.05, decoupled_weight_decay=True),
    "radam": of(
        RAdam, lr=0.01, weight_decay=0.05
    ),  # not rectified yet after 7 steps with b2 = .999: the first five are
    "radam rectified": of(RAdam, lr=0.01, betas=(0.8, 0.9)),
    "radam decoupled": of(RAdam, lr=0.01, weight_decay=0.05, decoupled_weight_decay=True),
    "radam without": of(RAdam, lr=0.01, betas=(0.9, 0.5)),  # never rectified
}


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("name", RULES)
def test_the_next_step_is_the_one_that_torch_takes(name, count):
    module, optimizer = stepped(RULES[name], count)
    before, state, see = flat(module), copy.deepcopy(optimizer.state_dict()), See()
    alone(module, see, optimizer)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    step(module, optimizer)
    torch.testing.assert_close(see.step, flat(module) - before, rtol=1e-9, atol=1e-13)


def dense_stability(make, count):
    """The edge, and the largest eigenvalue of the dense S^1/2 (H + D) S^1/2 from it."""
    module, optimizer = stepped(make, count)
    see = See()
    alone(module, see, optimizer)
    _, hessian = derivatives(module)
    scale = torch.as_tensor(see.edge.scale, dtype=F64).expand(len(hessian))
    matrix = hessian + torch.diag(torch.as_tensor(see.edge.shift, dtype=F64).expand(len(hessian)))
    return see, float(torch.linalg.eigvalsh(scale.sqrt()[:, None] * matrix * scale.sqrt())[-1])


# Each way to an edge, and each way in which settings differ; the edges of all are in test_stability.py.
@pytest.mark.parametrize(
    "name", ["momentum", "sgd by groups", "adam with decay", "adam by groups", "rmsprop centered", "nadam with decay"]
)
def test_stability_is_the_largest_eigenvalue_of_the_dense_preconditioned_hessian(name):
    module, optimizer = stepped(RULES[name], 6)
    see, expected = dense_stability(RULES[name], 6)
    for k in (0, 4):
        found = metrics(module, Stability(), optimizer=optimizer, k=k, verify="never")
        assert found["stability"] == pytest.approx(expected, rel=1e-6)
        if "adam" in name and "groups" not in name:
            assert found["preconditioned_sharpness"] == pytest.approx(expected * see.edge.threshold, rel=1e-6)


def test_the_formula_for_adam_is_that_of_the_paper():
    module, optimizer = stepped(RULES["adam"], 6)
    see = See()
    alone(module, see, optimizer)
    assert see.edge.threshold == pytest.approx(38 / 0.01)
    second = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in module.parameters()])
    divisor = ((second / (1 - 0.999**6)).sqrt() + 1e-8) * (1 - 0.9**6)
    torch.testing.assert_close(see.edge.scale, 0.01 / (38 * divisor))


def swings(kind, curvature, settings):
    """How much wider a one-dimensional quadratic swings after 500 steps than after 300, from very close to 0.

    There the second moment of an adaptive optimizer is nothing beside eps = 1, which is then all of P.
    """
    x = torch.full((1,), 1e-150, dtype=F64, requires_grad=True)
    optimizer, seen = kind([x], **settings), []
    for _ in range(500):
        x.grad = curvature * x.detach()
        optimizer.step()
        seen.append(abs(x.item()))
    assert max(seen) < 1e-5
    return max(seen[-40:]) / max(seen[300:340])


@pytest.mark.thorough  # of the factors above; test_stability.py has the edges themselves against torch's steps
@pytest.mark.parametrize(
    ("kind", "settings", "threshold"),
    [
        (SGD, {"lr": 0.1}, 20.0),
        (SGD, {"lr": 0.1, "momentum": 0.9}, 38.0),
        (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 3.8 / 0.28),
        (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 3.0}, 35.0),
        (Adam, {"lr": 0.1, "eps": 1.0}, 380.0),
        (Adam, {"lr": 0.1, "eps": 1.0, "betas": (0.5, 0.9), "weight_decay": 3.0}, 57.0),
        (AdamW, {"lr": 0.1, "eps": 1.0, "weight_decay": 0.0}, 380.0),
        (RMSprop, {"lr": 0.1, "eps": 1.0}, 20.0),
        (RMSprop, {"lr": 0.1, "eps": 1.0, "momentum": 0.5}, 30.0),
        (Adagrad, {"lr": 0.1, "initial_accumulator_value": 4.0}, 40.0),
        (Adamax, {"lr": 0.1, "eps": 1.0}, 380.0),
        (NAdam, {"lr": 0.1, "eps": 1.0, "momentum_decay": 9.0}, 380.0 / 2.8),
        (NAdam, {"lr": 0.1, "eps": 1.0, "momentum_decay": 0.0}, 38.0 / (0.55 * 1.9 + 0.45 * 0.1)),
        (RAdam, {"lr": 0.1, "eps": 1.0, "betas": (0.9, 0.9)}, 380.0),
        (RAdam, {"lr": 0.1, "betas": (0.9, 0.5)}, 380.0),
    ],
)
def test_a_quadratic_diverges_beyond_an_edge_of_one(kind, settings, threshold):
    assert swings(kind, 0.99 * threshold, settings) < 0.9
    assert swings(kind, 1.01 * threshold, settings) > 1.1


def test_stability_and_the_default_cross_one_together():
    module, optimizer = stepped(of(SGD, lr=0.1, weight_decay=0.2), 3)
    found = metrics(module, Stability(), optimizer=optimizer)
    edge_without = 20.0
    assert found["stability"] == pytest.approx((found["sharpness"] + 0.2) / edge_without)
    assert found["sharpness_over_threshold"] == pytest.approx(found["sharpness"] / (edge_without - 0.2))


def test_before_its_first_step_an_adaptive_optimizer_has_no_edge():
    module, optimizer = stepped(RULES["adam"], 0)
    assert "stability" not in metrics(module, Stability(), optimizer=optimizer)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda module: None, "there is no optimizer, or several"),
        (of(torch.optim.Rprop, lr=0.1), "the rule of Rprop is not known here .*`step/edge_ratio` needs no rule"),
        (of(Lion, lr=0.1), "Lion moves every coordinate by the same length"),
        (of(SGD, lr=0.1, maximize=True), "the optimizer maximizes"),
        (of(SGD, lr=0.1, momentum=0.9, dampening=0.5), "its momentum is dampened"),
    ],
)
def test_what_is_not_known_is_left_out_and_said_once(make, reason):
    module, measurement = stepped(of(SGD, lr=0.1), 0)[0], Stability()
    optimizer = make(module)

    def measured():
        return measure_subspace(module, data(), k=0, loss_fn=loss_fn, measurements=[measurement], optimizer=optimizer)

    with pytest.warns(UserWarning, match=reason):
        assert "stability" not in measured().metrics
    assert "stability" not in measured().metrics  # without a warning, which would be an error


def test_learning_rates_of_zero_have_no_edge_and_no_step():
    module, optimizer = stepped(of(SGD, lr=0.0), 1)
    assert "stability" not in metrics(module, Stability(), optimizer=optimizer)


# The split


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_the_expected_change_is_the_dense_quadratic_form(name):
    module, optimizer = stepped(RULES[name], 4)
    see = See()
    found = metrics(module, LossChange(), Chi(), see, optimizer=optimizer)
    gradient, hessian = derivatives(module)
    _, basis = top_eigenspace(hessian, 4)
    projector = basis.T @ basis
    for key, part in (("top", projector), ("bulk", torch.eye(len(gradient), dtype=F64) - projector)):
        expected = gradient @ part @ see.step + 0.5 * see.step @ part @ hessian @ part @ see.step
        assert found[f"expected_change_{key}"] == pytest.approx(float(expected), rel=1e-6)
    assert found["chi_gradient"] == pytest.approx(float((projector @ gradient).norm() / gradient.norm()), rel=1e-6)
    assert found["chi_gradient"] ** 2 == pytest.approx(found["gradient_fraction"])


def test_the_two_parts_add_to_the_change_of_the_loss():
    module, optimizer = stepped(of(SGD, lr=0.01), 4)
    found = metrics(module, LossChange(), optimizer=optimizer)
    before = float(objective(module).detach())
    step(module, optimizer)
    change = float(objective(module).detach()) - before
    assert found["expected_change_top"] + found["expected_change_bulk"] == pytest.approx(change, rel=1e-3)
