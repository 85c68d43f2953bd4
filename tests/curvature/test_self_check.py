"""The self-check against wrong second derivatives, against right ones, and where it cannot know."""

import copy
import importlib
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_subspace.curvature import CheckOutcome, Hessian, self_check
from lightning_subspace.curvature.self_check import LARGEST_ERROR, NARROW_ERROR
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import measure_subspace
from tests.custom_functions import KeepsInput, OnceDifferentiable
from tests.oracles import EPS, dense_hessian_by_differences
from tests.thorough import covering, how_many

SEEDS = range(how_many(2, thorough=3))
INPUTS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (8,), generator=torch.Generator().manual_seed(1))


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def check(module, batch=(INPUTS, LABELS), loss_fn=classify, seed=0, mode="train", dtype=torch.float64):
    loss = TrainingLoss(module, ParameterSpace.of(module), loss_fn, mode=mode, dtype=dtype)
    return self_check(loss, sample_of_batches([batch]).hessian[0], seed=seed)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def around(make_middle):
    """A small network with something in the middle, whose derivatives are used on both sides."""
    return built(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), make_middle(), nn.Linear(4, 3)))


# Functions whose first derivative is right


class KeepsIntermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.cos()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class KeepsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.y = y.clone()
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.y.square())


class ComputesDetached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            slope = x.cos()
        return grad * slope


class KeepsGraphInput(torch.autograd.Function):
    """Against the rules as well, but the tensor kept is the one in the graph, so its derivative is found."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.x.cos()


class SavesForBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


FUNCTIONS = [
    OnceDifferentiable,
    KeepsInput,
    KeepsIntermediate,
    KeepsOutput,
    ComputesDetached,
    KeepsGraphInput,
    SavesForBackward,
]
RIGHT = {KeepsGraphInput, SavesForBackward}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_it_fails_exactly_where_the_dense_hessian_is_wrong(function):
    module = around(lambda: Apply(function.apply)).double()
    batch = (INPUTS.double(), LABELS)
    with TrainingLoss(module, ParameterSpace.of(module), classify) as loss:
        hessian = Hessian(loss, sample_of_batches([batch]).hessian)
        matrix = torch.stack([hessian.matvec(e) for e in torch.eye(hessian.n, dtype=torch.float64)])
    truth = dense_hessian_by_differences(module, lambda m: classify(m, batch, 0))
    wrong = float((matrix - truth).abs().max() / truth.abs().max())
    assert wrong > 0.01 if function not in RIGHT else wrong < EPS**0.5
    for seed in SEEDS:
        result = check(module, batch, seed=seed)
        assert result.outcome is (CheckOutcome.PASSED if function in RIGHT else CheckOutcome.FAILED)


# Gradients that are not the derivative of the loss


def straight_through(x):
    return x + (torch.round(4 * x) / 4 - x).detach()


class RoundFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


def scaled_by_hook(x):
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda grad: 3 * grad)
    return x


def quantised():
    layer = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Apply(straight_through))
    return layer


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


UNFAITHFUL = {
    "straight-through": lambda: around(lambda: Apply(straight_through)),
    "straight-through-function": lambda: around(lambda: Apply(RoundFunction.apply)),
    "quantised-weights": lambda: around(quantised),
    "gradient-scaling-hook": lambda: around(lambda: Apply(scaled_by_hook)),
}


@pytest.mark.parametrize(("seed", "name"), covering(list(SEEDS), list(UNFAITHFUL)))
def test_it_fails_on_gradients_that_are_not_derivatives(name, seed):
    assert check(UNFAITHFUL[name](), seed=seed).outcome is CheckOutcome.FAILED


def test_a_failure_says_where_and_by_how_much():
    module = around(lambda: Apply(KeepsInput.apply))
    result = check(module)
    assert result.parameter in dict(module.named_parameters())
    assert result.error > 100 * LARGEST_ERROR
    assert f"{result.error:.1%} in {result.parameter}" in result.reason
    with pytest.warns(UserWarning, match=f"{result.error:.1%} in {result.parameter}"):
        measure_subspace(module, [(INPUTS, LABELS)], k=1, loss_fn=classify)


def test_a_reentrant_checkpoint_is_never_measured_silently():
    module = around(lambda: Checkpointed(use_reentrant=True))
    result = check(module)
    assert result.outcome is CheckOutcome.FAILED
    assert "use_reentrant" in result.reason
    with pytest.warns(UserWarning, match="use_reentrant.*finite differences of float64"):
        measure_subspace(module, [(INPUTS, LABELS)], k=1, loss_fn=classify)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_of_the_first_layer_has_no_gradient_and_fails():
    module = built(lambda: nn.Sequential(Checkpointed(use_reentrant=True), nn.Linear(4, 3)))
    assert check(module).outcome is CheckOutcome.FAILED


# What is right must pass


def zero_bias(module):
    for layer in module.modules():
        if getattr(layer, "bias", None) is not None and not isinstance(layer, nn.LayerNorm):
            nn.init.zeros_(layer.bias)
    return module


def relu_conv_net():
    return zero_bias(
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16, 3),
        )
    )  # fmt: skip


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), layer, nn.Flatten(), nn.Linear(8, 3))


IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(2))
BLANK = IMAGES.clone()
BLANK[:, :, :, :4] = 0.0  # at zero bias every ReLU of the left half sits on its kink
TIES = IMAGES.sign()  # equal maxima in most windows


FAITHFUL = {
    "blank-patches-at-zero-bias": (relu_conv_net, BLANK),
    "max-pool-ties": (
        lambda: nn.Sequential(nn.MaxPool2d(2), *relu_conv_net()[:2], nn.Flatten(), nn.Linear(64, 3)),
        TIES,
    ),
    "transformer": (transformer, INPUTS),
    "batch-norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), INPUTS),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)), INPUTS),
    "lstm": (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LSTM(2, 3), Apply(lambda out: out[0][:, -1])), INPUTS),
    "non-reentrant-checkpoint": (lambda: around(lambda: Checkpointed(use_reentrant=False)), INPUTS),
    "bfloat16-weights": (lambda: around(nn.Tanh).bfloat16(), INPUTS),
}


@pytest.mark.parametrize(("name", "mode"), covering(list(FAITHFUL), ["train", "eval"]))
def test_it_passes_with_a_wide_margin(name, mode):
    make, inputs = FAITHFUL[name]
    results = [check(built(make), (inputs, LABELS), seed=seed, mode=mode) for seed in range(how_many(3, thorough=8))]
    assert {result.outcome for result in results} == {CheckOutcome.PASSED}
    assert max(result.error for result in results) < 1e-3 * LARGEST_ERROR


def test_without_the_jitter_blank_patches_would_be_a_false_alarm(monkeypatch):
    # By its full name: the package has a function called like its module.
    monkeypatch.setattr(importlib.import_module("lightning_subspace.curvature.self_check"), "JITTER", 0.0)
    assert check(built(relu_conv_net), (BLANK, LABELS)).outcome is not CheckOutcome.PASSED


# Where float64 cannot be had


class NormInFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        narrow = x.float()
        narrow = narrow * torch.rsqrt(narrow.square().mean(dim=-1, keepdim=True) + 1e-6)
        return self.weight * narrow.to(x.dtype)


class RecurrentFromFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        start = torch.zeros(1, len(x), 4, dtype=torch.float32)
        return self.lstm(x[:, None], (start, start))[0][:, -1]


@pytest.mark.parametrize("middle", [NormInFloat32, RecurrentFromFloat32])
def test_what_asks_for_float32_is_checked_in_float64(middle):
    results = [check(around(middle), seed=seed) for seed in range(how_many(4, thorough=10))]
    assert {result.outcome for result in results} == {CheckOutcome.PASSED}
    assert max(result.error for result in results) < 1e-3 * LARGEST_ERROR
    wrong = around(lambda: nn.Sequential(middle(), Apply(KeepsInput.apply)))
    assert check(wrong).outcome is CheckOutcome.FAILED


class Float32Only(torch.autograd.Function):
    """An operation that exists in float32 alone; `slope` is what its backward pass takes for its derivative."""

    @staticmethod
    def forward(ctx, x, exponent):
        if x.dtype != torch.float32:
            raise NotImplementedError("expected float32")
        ctx.save_for_backward(x)
        ctx.exponent = exponent
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x if ctx.exponent == 1 else x.detach()).cos(), None


@pytest.mark.parametrize("seed", range(10))
def test_an_operation_of_float32_alone_proves_a_fault_or_nothing(seed):
    module = around(lambda: Apply(lambda x: Float32Only.apply(x, 1)))
    result = check(module, seed=seed)
    assert result.outcome is CheckOutcome.INCONCLUSIVE
    assert math.isnan(result.error)
    assert "NotImplementedError in float64: expected float32" in result.reason
    result = check(module, seed=seed, dtype=torch.float32)
    assert result.outcome is CheckOutcome.INCONCLUSIVE
    assert "agrees with differences of gradients within" in result.reason
    result = check(around(lambda: Apply(lambda x: Float32Only.apply(x, 0))), seed=seed, dtype=torch.float32)
    assert result.outcome is not CheckOutcome.PASSED
    assert (result.outcome is CheckOutcome.FAILED) == (result.error > NARROW_ERROR)


@pytest.mark.parametrize("seed", range(10))
def test_kinks_in_float32_accuse_nobody(seed):
    module = built(lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))
    assert check(module, seed=seed, dtype=torch.float32).outcome is CheckOutcome.INCONCLUSIVE


def test_a_loss_that_is_drawn_anew_decides_nothing():
    generator = torch.Generator().manual_seed(0)

    def noisy(module, batch, batch_idx):
        return classify(module, (batch[0] + torch.randn(8, 4, generator=generator), batch[1]), batch_idx)

    result = check(around(nn.Tanh), loss_fn=noisy)
    assert result.outcome is CheckOutcome.INCONCLUSIVE
    assert "noise" in result.reason


def squared_distance_to_labels(module, batch, batch_idx):
    return F.mse_loss(module(batch[0]), F.one_hot(batch[1], 3).float())


def squared_distance_to_targets(module, batch, batch_idx):
    return F.mse_loss(module(batch[0])[:, 0], batch[0][:, 0].float())


def with_a_metric(module, batch, batch_idx):
    logits = module(batch[0])
    module.running = logits.float().mean()
    return F.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("loss_fn", [squared_distance_to_labels, squared_distance_to_targets, with_a_metric])
def test_float32_that_the_gradient_does_not_pass_through_does_not_blind_it(loss_fn):
    assert check(around(lambda: Apply(KeepsInput.apply)), loss_fn=loss_fn).outcome is CheckOutcome.FAILED
    assert check(around(nn.Tanh), loss_fn=loss_fn).outcome is CheckOutcome.PASSED


# Conduct


@pytest.mark.parametrize(
    "make", [transformer, lambda: around(NormInFloat32), lambda: around(lambda: Apply(KeepsInput.apply))]
)
def test_it_leaves_everything_as_it_was(make):
    module = built(lambda: nn.Sequential(make(), nn.BatchNorm1d(3), nn.Dropout(0.3)))
    module[1].eval()
    tensors = [*module.parameters(), *module.buffers()]
    before = copy.deepcopy(module.state_dict())
    modes = [m.training for m in module.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dtype = torch.get_default_dtype()
    check(module)
    assert all(a is b for a, b in zip(tensors, [*module.parameters(), *module.buffers()], strict=True))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert torch.get_default_dtype() == dtype


def test_it_gives_the_same_answer_again():
    module = built(transformer)
    assert check(module) == check(module)
    assert check(module, seed=1) != check(module)
