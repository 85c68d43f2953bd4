"""The Gauss-Newton product against J^T H_L J, dense, from Jacobians that are taken one output at a time."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace import measure_subspace
from lightning_subspace.curvature import (
    CheckError,
    CheckOutcome,
    CurvatureConfig,
    GaussNewton,
    Hessian,
    gauss_newton,
    gauss_newton_check,
)
from lightning_subspace.curvature.gauss_newton import OutputGraph
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.cross_entropy import NODES
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.custom_functions import KeepsInput, OnceDifferentiable
from tests.oracles import EPS, dense_gradient, dense_hessian, top_eigenspace
from tests.thorough import covering

ROUNDING = 1e4 * EPS
CLASSES = 3


def net(seed=0, act=nn.Tanh):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), act(), nn.Dropout(0.0), nn.Linear(5, CLASSES)).double()


def batches(sizes=(6, 4)):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in sizes]
    return [(x, torch.randint(CLASSES, (len(x),), generator=generator)) for x in inputs]


def one_hot(labels):
    return F.one_hot(labels, CLASSES).double()


def weighted_mean(losses, weights):
    return (losses * weights).sum() / weights.sum()


def input_of(labels):
    """The inputs of the batch that has these labels."""
    return next(x for x, y in batches() if len(y) == len(labels))


def focal(losses):
    return ((1.0 - torch.exp(-losses)).square() * losses).mean()


# Each with the loss as a function of the output and the labels, written without the function that is caught.
LOSSES = {
    "cross-entropy": (
        lambda m, b, i: F.cross_entropy(m(b[0]), b[1]),
        lambda z, y: (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean(),
    ),
    "its module, by keyword, smoothed": (
        lambda m, b, i: nn.CrossEntropyLoss(label_smoothing=0.3)(input=m(b[0]), target=b[1]),
        lambda z, y: ((0.7 * one_hot(y) + 0.1) * (torch.logsumexp(z, 1, keepdim=True) - z)).sum(1).mean(),
    ),
    "nll of log-softmax": (
        lambda m, b, i: F.nll_loss(m(b[0]).log_softmax(dim=-1), b[1]),
        lambda z, y: (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean(),
    ),
    "masked mean of single losses": (
        lambda m, b, i: 2.0 * F.cross_entropy(m(b[0]), b[1], reduction="none")[1:].mean(),
        lambda z, y: 2.0 * (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y])[1:].mean(),
    ),
    "class weights, without a class": (
        lambda m, b, i: F.cross_entropy(m(b[0]), b[1], torch.arange(1.0, 4.0, dtype=torch.float64), ignore_index=1),
        lambda z, y: weighted_mean(torch.logsumexp(z, 1) - z[torch.arange(len(y)), y], (y + 1.0) * (y != 1)),
    ),
    "soft targets": (
        lambda m, b, i: F.cross_entropy(m(b[0]), (b[0][:, :CLASSES]).softmax(1)),
        lambda z, y: ((input_of(y)[:, :CLASSES]).softmax(1) * (torch.logsumexp(z, 1, keepdim=True) - z)).sum(1).mean(),
    ),
    "sequences, a sum, a factor": (
        lambda m, b, i: F.cross_entropy(m(b[0]).unflatten(0, (2, -1)).mT, b[1].view(2, -1), reduction="sum") / 7.0,
        lambda z, y: (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).sum() / 7.0,
    ),
    "focal, no linear function of the losses": (
        lambda m, b, i: focal(F.cross_entropy(m(b[0]), b[1], reduction="none")),
        lambda z, y: focal(torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]),
    ),
    "mean square": (
        lambda m, b, i: F.mse_loss(m(b[0]), one_hot(b[1])),
        lambda z, y: (z - one_hot(y)).square().mean(),
    ),
    "logistic": (
        lambda m, b, i: F.binary_cross_entropy_with_logits(m(b[0]), one_hot(b[1])),
        lambda z, y: ((1 + z.exp()).log() - z * one_hot(y)).mean(),
    ),
    "Poisson": (
        lambda m, b, i: F.poisson_nll_loss(m(b[0]), one_hot(b[1])),
        lambda z, y: (z.exp() - z * one_hot(y)).mean(),
    ),
}


def dense_gauss_newton(module, batches, of_output):
    total = sum(len(labels) for _, labels in batches)
    matrix = 0.0
    parameters = list(module.parameters())
    for inputs, labels in batches:
        z = module(inputs)
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in z.reshape(-1)]
        jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        inner = torch.autograd.functional.hessian(lambda z, y=labels: of_output(z, y), z.detach())
        matrix = matrix + len(labels) / total * jacobian.T @ inner.reshape(2 * [z.numel()]) @ jacobian
    return matrix


def opened(module, loss_fn, **options):
    return TrainingLoss(module, ParameterSpace.of(module), loss_fn, **{"dtype": torch.float64} | options)


def as_matrix(operator):
    return torch.stack([operator.matvec(column) for column in torch.eye(operator.n, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize(("name", "memory"), covering(list(LOSSES), [None, 0.0]))  # graphs retained, and rebuilt
def test_products_and_gradient_are_dense_ones(name, memory):
    loss_fn, of_output = LOSSES[name]
    module = net()
    expected = dense_gauss_newton(module, batches(), of_output)
    with opened(module, loss_fn) as loss:
        operator = GaussNewton(loss, sample_of_batches(batches()).hessian, memory=memory)
        matrix, gradient = as_matrix(operator), operator.gradient()
    torch.testing.assert_close(matrix, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))
    objective = lambda m: sum(len(y) * of_output(m(x), y) for x, y in batches()) / 10  # noqa: E731
    torch.testing.assert_close(gradient, dense_gradient(module, objective), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", [name for name in LOSSES if "cross_entropy" in LOSSES[name][0].__code__.co_names])
def test_a_cross_entropy_is_taken_in_closed_form_with_the_products_of_the_graph_of_torch(name, monkeypatch):
    loss_fn, _ = LOSSES[name]
    found = []
    with opened(net(), loss_fn) as loss:
        sample = sample_of_batches(batches()).hessian
        graph = OutputGraph.build(loss, sample[0])
        assert isinstance(graph.slope.node, NODES)
        found.append(as_matrix(GaussNewton(loss, sample)))
        monkeypatch.setattr(gauss_newton, "closed_cross_entropy", lambda args, named: None)
        assert not isinstance(OutputGraph.build(loss, sample[0]).slope.node, NODES)
        found.append(as_matrix(GaussNewton(loss, sample)))
    torch.testing.assert_close(*found, rtol=0, atol=ROUNDING * float(found[1].abs().max()))


def test_logits_that_the_step_overwrites_behind_the_loss():
    """Training allows it: the graph of torch keeps the probabilities."""

    def loss_fn(module, batch, batch_idx):
        logits = module(batch[0])
        value = F.cross_entropy(logits, batch[1])
        logits.detach().zero_()
        return value

    expected = dense_gauss_newton(net(), batches(), LOSSES["cross-entropy"][1])
    with opened(net(), loss_fn) as loss:
        matrix = as_matrix(GaussNewton(loss, sample_of_batches(batches()).hessian))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


def test_in_float32_products_are_as_exact_as_those_of_the_graph_of_torch(monkeypatch):
    loss_fn, _ = LOSSES["cross-entropy"]
    sample = sample_of_batches([(x.float(), y) for x, y in batches()]).hessian
    direction = torch.randn(net().double()[0].weight.numel() + 23, generator=torch.Generator().manual_seed(3))

    def product(module, dtype):
        with opened(module, loss_fn, dtype=dtype) as loss:
            return GaussNewton(loss, sample).matvec(direction.to(dtype)).double()

    exact, mine = product(net().float(), torch.float64), product(net().float(), torch.float32)
    monkeypatch.setattr(gauss_newton, "closed_cross_entropy", lambda args, named: None)
    general = product(net().float(), torch.float32)
    assert float((mine - exact).norm()) <= 1e-6 * float(exact.norm())
    assert float((general - exact).norm()) <= 1e-6 * float(exact.norm())


def test_a_graph_keeps_the_logits_once(monkeypatch):
    tokens, classes = 40, 1000
    module = nn.Linear(3, classes)
    data = (torch.randn(tokens, 3), torch.arange(tokens))
    nbytes = {}
    for name in ("closed", "general"):
        with opened(module, lambda m, b, i: F.cross_entropy(m(b[0]), b[1]), dtype=torch.float32) as loss:
            footprint = Footprint()
            GaussNewton(loss, sample_of_batches([data]).hessian, footprint=footprint)
        nbytes[name] = footprint.largest / (4 * tokens * classes)
        monkeypatch.setattr(gauss_newton, "closed_cross_entropy", lambda args, named: None)
    assert nbytes["closed"] < 1.3  # and what the linear layer keeps, and gradients of its 4,000 parameters, twice
    assert nbytes["general"] > 2.9


def test_without_curvature_of_the_network_it_is_the_hessian():
    module = nn.Linear(4, CLASSES).double()
    loss_fn, _ = LOSSES["cross-entropy"]
    with opened(module, loss_fn) as loss:
        sample = sample_of_batches(batches()).hessian
        expected = as_matrix(Hessian(loss, sample))
        torch.testing.assert_close(as_matrix(GaussNewton(loss, sample)), expected, rtol=0, atol=ROUNDING)


def test_parameters_that_the_output_does_not_depend_on_have_zeros():
    module = nn.ModuleDict({"used": net(), "unused": nn.Linear(2, 2).double()})
    loss_fn = lambda m, b, i: F.cross_entropy(m["used"](b[0]), b[1])  # noqa: E731
    with opened(module, loss_fn) as loss:
        operator = GaussNewton(loss, sample_of_batches(batches()).hessian)
        image = operator.matvec(torch.ones(operator.n, dtype=torch.float64))
    assert image[:-6].all()
    assert not image[-6:].any()


def test_sparse_gradients_of_an_embedding():
    module = nn.Sequential(nn.Embedding(6, CLASSES, sparse=True)).double()
    loss_fn = lambda m, b, i: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    data = [(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 2, 0]))]
    with opened(module, loss_fn) as loss:
        sample = sample_of_batches(data).hessian
        dense = nn.Sequential(nn.Embedding(6, CLASSES, _weight=module[0].weight.detach().clone()))
        expected = dense_hessian(dense, lambda m: loss_fn(m, data[0], 0))  # linear in its parameters
        torch.testing.assert_close(as_matrix(GaussNewton(loss, sample)), expected, rtol=0, atol=ROUNDING)


def test_a_loss_logged_without_a_graph_is_none():
    def loss_fn(module, batch, batch_idx):
        output = module(batch[0])
        F.cross_entropy(output.detach(), batch[1])
        return F.mse_loss(output, one_hot(batch[1]))

    with opened(net(), loss_fn) as loss:
        assert float(GaussNewton(loss, sample_of_batches(batches()).hessian).gradient().norm()) > 0.0


REFUSED = {
    "none": (lambda m, b, i: m(b[0]).square().mean(), "got these calls: none"),
    "two": (
        lambda m, b, i: F.cross_entropy(m(b[0]), b[1]) + F.mse_loss(m(b[0]), one_hot(b[1])),
        "got these calls: cross_entropy, mse_loss",
    ),
    "penalty": (
        lambda m, b, i: F.cross_entropy(m(b[0]), b[1]) + 0.1 * m[0].weight.square().sum(),
        "also in another way",
    ),
    "second use of the output": (
        lambda m, b, i: (lambda z: F.cross_entropy(z, b[1]) + z.square().mean())(m(b[0])),
        "also in another way",
    ),
    "linear": (lambda m, b, i: F.nll_loss(m(b[0]), b[1]), "linear in the first argument of nll_loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_output_is_refused(name):
    loss_fn, message = REFUSED[name]
    with opened(net(), loss_fn) as loss, pytest.raises(LossError, match=message):
        GaussNewton(loss, sample_of_batches(batches()).hessian)
    with pytest.raises(LossError, match=message):
        measure_subspace(net(), batches(), k=2, loss_fn=loss_fn, curvature="ggn")


def test_a_probe_finds_its_top_space():
    loss_fn, of_output = LOSSES["cross-entropy"]
    module = net(act=nn.ReLU)
    values, vectors = top_eigenspace(dense_gauss_newton(module, batches(), of_output), 3)
    record = measure_subspace(module, batches(), k=3, tol=1e-6, loss_fn=loss_fn, curvature="ggn", dtype="float64")
    torch.testing.assert_close(record.subspace.eigenvalues, values.detach(), rtol=1e-8, atol=0)
    overlap = (record.subspace.basis @ vectors.T).square().sum() / 3
    assert float(overlap) == pytest.approx(1.0, abs=1e-8)


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def test_the_check():
    loss_fn, _ = LOSSES["cross-entropy"]
    batch = sample_of_batches(batches()).hessian[0]
    for act, outcome in (
        (nn.ReLU, CheckOutcome.PASSED),
        (lambda: Through(KeepsInput), CheckOutcome.PASSED),  # only the Hessian needs what is missing there
        (lambda: Through(OnceDifferentiable), CheckOutcome.FAILED),
    ):
        assert gauss_newton_check(opened(net(act=act), loss_fn), batch).outcome is outcome
    choice = CurvatureConfig(loss_fn, curvature="ggn")
    broken = net(act=lambda: Through(OnceDifferentiable))
    check = choice.check(broken, sample_of_batches(batches()))
    after, notice = choice.after_check(check)
    assert not after.has_products
    assert "curvature='hessian'" in notice
    with pytest.raises(CheckError, match="curvature='hessian'"):
        replace(choice, on_check_fail="raise").after_check(check)
