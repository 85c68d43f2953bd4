"""Which kernels finite differences keep: those of training where they are exact enough, and the solver then converges.

On a GPU the backward pass of fused attention may round its factors to TF32, unseen by any flag. Here a stand-in for
`scaled_dot_product_attention` does so, where fused kernels are allowed and the type is float32, as on a card.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace import measure_subspace
from lightning_subspace.curvature import (
    CheckOutcome,
    CurvatureConfig,
    FiniteDifferenceHessian,
    ForwardDifferenceHessian,
    smoothness_check,
)
from lightning_subspace.curvature.rounding import kernels_check
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg.result import Outcome
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace.solver import Solver
from tests.curvature.test_forward_difference import NETS, built
from tests.curvature.test_forward_difference import batches as rows
from tests.thorough import usual

WIDTH, TOKENS, EXAMPLES = 8, 4, 64


class Rounded(torch.autograd.Function):
    """The identity, whose gradient has the 10 bits of a TF32 number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        mantissa, exponent = torch.frexp(gradient)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        heads = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (TOKENS, WIDTH)), Attention(), nn.LayerNorm(WIDTH), nn.Flatten(), nn.Linear(32, 5)
        )


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, TOKENS * WIDTH, generator=generator)
    return [(x, torch.randint(5, (EXAMPLES,), generator=generator))]


@pytest.fixture
def kernels(monkeypatch):
    """Make fused attention, or all attention, as exact as TF32; returns which were called."""
    exact, called = F.scaled_dot_product_attention, []

    def install(*rounded):
        def attention(*heads):
            is_fused = torch.backends.cuda.flash_sdp_enabled() and heads[0].dtype == torch.float32
            kind = "fused" if is_fused else "math"
            called.append((kind, heads[0].dtype))
            found = exact(*heads)
            return Rounded.apply(found) if kind in rounded and found.dtype == torch.float32 else found

        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        return called

    return install


def chosen(module):
    choice = CurvatureConfig(classify, curvature="finite-difference")
    sample = sample_of_batches(batches())
    choice, notice = choice.after_check(choice.check(module, sample))
    assert notice is None
    with choice.loss(module, ParameterSpace.of(module)) as loss:
        operator = choice.operator(loss, sample)
        return choice, type(operator), torch.backends.cuda.flash_sdp_enabled()


def eigenvalues(**options):
    record = measure_subspace(transformer(), batches(), k=4, loss_fn=classify, **options)
    return record.subspace.outcome, record.subspace.eigenvalues


def test_exact_fused_kernels_are_kept(kernels):
    called = kernels()
    choice, operator, is_fused = chosen(transformer())
    assert (operator, is_fused) == (ForwardDifferenceHessian, True)
    assert "by the kernels of training: rounding leaves" in choice.remark
    called.clear()
    outcome, values = eigenvalues(curvature="finite-difference")
    assert outcome is Outcome.CONVERGED
    assert called[-1] == ("fused", torch.float32)
    assert ("math", torch.float32) not in called  # they were not even tried
    _, exact = eigenvalues()
    assert torch.allclose(values, exact, rtol=0, atol=2e-3 * float(exact[0]))


def test_coarse_fused_kernels_give_way_to_math_attention_and_the_solver_converges(kernels):
    called = kernels("fused")
    choice, operator, is_fused = chosen(transformer())
    assert (operator, is_fused) == (ForwardDifferenceHessian, False)
    assert "with math attention in place of fused one: rounding leaves" in choice.remark
    called.clear()
    outcome, values = eigenvalues(curvature="finite-difference")
    assert outcome is Outcome.CONVERGED
    assert called[-1] == ("math", torch.float32)
    _, exact = eigenvalues()
    assert torch.allclose(values, exact, rtol=0, atol=2e-3 * float(exact[0]))
    assert torch.backends.cuda.flash_sdp_enabled()


def test_where_math_attention_is_as_coarse_differences_are_taken_in_float64(kernels):
    called = kernels("fused", "math")
    choice, operator, _ = chosen(transformer())
    assert operator is FiniteDifferenceHessian
    assert "central ones of float64 gradients: rounding leaves" in choice.remark
    outcome, values = eigenvalues(curvature="finite-difference")
    assert outcome is Outcome.CONVERGED
    assert called[-1][1] == torch.float64
    kernels()
    _, exact = eigenvalues()
    assert torch.allclose(values, exact, rtol=0, atol=1e-3 * float(exact[0]))


def test_by_the_coarse_kernels_there_is_no_convergence(kernels):
    """What the check is for: the same operator without it."""
    kernels("fused")
    choice = CurvatureConfig(classify, curvature="finite-difference", has_passed=True)
    module, sample = transformer(), sample_of_batches(batches())
    with choice.loss(module, ParameterSpace.of(module)) as loss:
        found = Solver(k=4).solve(choice.operator(loss, sample))
    assert found.outcome is Outcome.ASYMMETRIC


def test_a_run_whose_differences_have_become_coarse_goes_on_in_float64(kernels):
    """As where a network learns its examples by heart, long after the self-check."""
    kernels()
    settings = ProbeSettings(k=4, measurements=(), loss_fn=classify, curvature="finite-difference")
    module, sample = transformer(), sample_of_batches(batches())
    run = ProbeRun(settings, module)
    run.check(module, sample)
    called, outcomes = kernels("fused"), []
    for step in range(3):
        called.clear()
        opened = run.measure(module, sample, step)
        outcomes.append((opened.record.subspace.outcome, called[-1][1]))
        run.close(opened)
    assert outcomes == [
        (Outcome.ASYMMETRIC, torch.float32),
        (Outcome.CONVERGED, torch.float64),
        (Outcome.CONVERGED, torch.float64),
    ]
    first, second = [text for text in run.examples.remarks if text.startswith("finite differences")]
    assert "forward ones of float32 gradients, by the kernels of training: rounding leaves" in first
    assert "central ones of float64 gradients: in a probe the solver has found forward ones asymmetric." in second


@pytest.mark.parametrize("name", NETS)
def test_the_kernels_of_training_are_kept_without_another_number_format(name):
    """Where dropout is among them, since masks in another type would be others."""
    net, sample = built(NETS[name], 0), sample_of_batches(rows())

    def loss_of(order):
        return TrainingLoss(net, ParameterSpace.of(net), classify, order=order)

    found = kernels_check(loss_of, sample.hessian[0])
    assert (found.outcome, found.is_plain) == (CheckOutcome.PASSED, False), found.reason


@pytest.mark.parametrize("seed", usual([0], thorough=[1, 2]))
def test_a_network_that_knows_its_examples_by_heart_is_measured_in_float64(seed):
    """Its Hessian is small beside the gradients of single examples, so float32 differences are rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5))
    optimizer, (batch,) = torch.optim.Adam(net.parameters(), 1e-2), batches()
    for _ in range(80):
        optimizer.zero_grad()
        classify(net, batch, 0).backward()
        optimizer.step()
    sample, space = sample_of_batches(batches()), ParameterSpace.of(net)

    def loss_of(dtype, order):
        return TrainingLoss(net, space, classify, dtype=dtype, order=order)

    assert smoothness_check(loss_of(torch.float64, 1), sample.hessian[0]).outcome is CheckOutcome.PASSED
    found = kernels_check(lambda order: loss_of(torch.float32, order), sample.hessian[0])
    assert found.outcome is CheckOutcome.SKIPPED
    record = measure_subspace(net, [batch], k=4, loss_fn=classify, curvature="finite-difference")
    exact = measure_subspace(net, [batch], k=4, loss_fn=classify, dtype="float64").subspace.eigenvalues
    assert record.subspace.outcome is Outcome.CONVERGED
    assert torch.allclose(record.subspace.eigenvalues, exact, rtol=0, atol=2e-3 * float(exact[0]))
