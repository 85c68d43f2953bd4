"""Products with the convolutions of `loss/convolution.py`, on the CPU: the same, and what they ask for."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_subspace.curvature import FiniteDifferenceHessian, ForwardDifferenceHessian, GaussNewton, Hessian
from lightning_subspace.curvature.empirical_fisher import EmpiricalFisher
from lightning_subspace.curvature.gradient_field import GradientField
from lightning_subspace.curvature.graph_memory import SavedBytes
from lightning_subspace.curvature.hessian import GradientGraph
from lightning_subspace.curvature.self_check import CheckOutcome, self_check
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss import convolution
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace

TOLERANCE = 1e-12  # relative to the largest entry: two orders of summation in float64
aten = torch.ops.aten


def forced(monkeypatch):
    """Turn the replacement on for the CPU; a list with one entry a convolution that a forward pass has replaced.

    No fixture: what a fixture returns is in the globals of this file, which a probe puts back.
    """
    calls = []

    class Counted(convolution._Call):
        def result(self):
            calls.append(self.geometry)
            return super().result()

    monkeypatch.setattr(convolution, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(convolution, "_Call", Counted)
    return calls


class Blocks(nn.Module):
    """Convolutions in a row, in checkpoints if wanted."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3, padding="same", groups=2)),
                nn.Sequential(nn.GELU(), nn.Dropout(0.3), nn.Conv2d(4, 3, 2, stride=2, bias=False), nn.GELU()),
                nn.Sequential(nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1, padding=1), nn.GELU()),
            ]
        )
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def compiled():
    module = Blocks()
    module.blocks[0] = torch.compile(module.blocks[0])
    return module


def loss_fn(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def penalised(module, batch, batch_idx):
    """With a penalty on the gradient: products take third derivatives."""
    x = batch[0].requires_grad_()
    loss = F.cross_entropy(module(x), batch[1])
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 10.0 * gradient.square().sum()


def mixed(module, batch, batch_idx):
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(module(batch[0]), batch[1])


def made(factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory()


def sample(size=4, channels=2, width=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, channels, width, width, generator=generator)
    return sample_of_batches([(images, torch.arange(size) % 3)] * 2).hessian


def products(module, function=loss_fn, *, operator=Hessian, dtype=torch.float64, params=None, batches=None, **options):
    """The gradient, and products with three vectors."""
    space = ParameterSpace.of(module, params)
    with TrainingLoss(module, space, function, dtype=dtype) as loss:
        hessian = operator(loss, batches or sample(), **options)
        found = [hessian.gradient()]
        for seed in range(3):
            v = torch.randn(hessian.n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            found.append(hessian.matvec(v.to(hessian.dtype)))
    return torch.stack(found)


# The factory of the module, the loss, and other arguments of `products`.
CASES = {
    "plain": (Blocks, loss_fn, {}),
    "rebuilt graphs": (Blocks, loss_fn, {"memory": 0.0}),
    "checkpointed": (lambda: Blocks(reentrant=False), loss_fn, {}),
    "checkpointed, rebuilt": (lambda: Blocks(reentrant=False), loss_fn, {"memory": 0.0}),
    "compiled": (compiled, loss_fn, {}),
    "gradient penalty": (Blocks, penalised, {}),
    "gradient penalty, checkpointed": (lambda: Blocks(reentrant=False), penalised, {}),
    "some parameters": (Blocks, loss_fn, {"params": ["blocks.1.*", "head.*"]}),
    "Gauss-Newton": (Blocks, loss_fn, {"operator": GaussNewton}),
    "Gauss-Newton, checkpointed": (lambda: Blocks(reentrant=False), loss_fn, {"operator": GaussNewton}),
    "Gauss-Newton, rebuilt": (Blocks, loss_fn, {"operator": GaussNewton, "memory": 0.0}),
    "channels last": (lambda: Blocks().to(memory_format=torch.channels_last), loss_fn, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_torch(case, monkeypatch):
    replacements = forced(monkeypatch)
    factory, function, options = CASES[case]
    module = made(factory)
    actual = products(module, function, **options)
    assert len(replacements) >= 4
    replacements.clear()
    monkeypatch.setattr(convolution, "DEVICES", frozenset())
    if function is penalised:  # torch has no third derivative of a transposed convolution with output_padding
        expected = products(made(lambda: without_output_padding(module)), function, **options)
    else:
        expected = products(module, function, **options)
    assert not replacements
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=TOLERANCE * float(theirs.abs().max()))


class Cropped(nn.Module):
    """A transposed convolution of stride 2 and a kernel of 3, cut out of the whole one."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        whole = F.conv_transpose2d(x, self.weight, stride=2)
        return whole[:, :, 1:, 1:] + self.bias[:, None, None]


def without_output_padding(module):
    module = copy.deepcopy(module)
    module.blocks[2][0] = Cropped(module.blocks[2][0])
    return module


def test_a_reentrant_checkpoint_is_refused_as_ever(monkeypatch):
    forced(monkeypatch)

    def function(module, batch, batch_idx):
        return loss_fn(module, (batch[0].requires_grad_(), batch[1]), batch_idx)  # as such a checkpoint wants it

    with pytest.raises(RuntimeError, match="is an activation checkpoint with use_reentrant=True"):
        products(made(lambda: Blocks(reentrant=True)), function)


def test_autocast_of_the_loss(monkeypatch):
    replacements = forced(monkeypatch)
    module = made(Blocks)
    actual = products(module, mixed, dtype=None)
    assert replacements
    monkeypatch.setattr(convolution, "DEVICES", frozenset())
    expected = products(module, mixed, dtype=None)
    assert actual.dtype == expected.dtype
    # Rounding of bfloat16, whose last bit is 2^-8, in some ten operations in a row.
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=10 * 2**-8 * float(expected.abs().max()))
    torch.testing.assert_close(actual[0], expected[0], rtol=0.0, atol=0.0)  # first derivatives ask for the same


@pytest.mark.parametrize(
    "operator",
    [FiniteDifferenceHessian, ForwardDifferenceHessian, EmpiricalFisher],
    ids=lambda o: o.__name__,
)
def test_other_matrices_keep_the_convolutions_of_torch(operator, monkeypatch):
    replacements = forced(monkeypatch)
    products(made(Blocks), operator=operator)
    assert not replacements


def test_the_self_check_has_the_same_convolutions(monkeypatch):
    replacements = forced(monkeypatch)
    module = made(Blocks)
    loss = TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64)
    assert self_check(loss, sample()[0]).outcome is CheckOutcome.PASSED
    assert len(replacements) == 4  # one graph; the differences beside it are those of torch's own gradients
    replacements.clear()
    assert GradientField.of(loss, sample()[0]).asymmetry < 1e-6
    assert len(replacements) == 4


def test_a_wrong_second_derivative_is_found_by_the_self_check(monkeypatch):
    forced(monkeypatch)
    backward = convolution.ConvolutionGradient.backward

    def wrong(ctx, dx, dw, db):
        by_g, by_x, by_w, *rest = backward(ctx, dx, dw, db)
        return by_g, by_x, None if by_w is None else 1.01 * by_w, *rest

    monkeypatch.setattr(convolution.ConvolutionGradient, "backward", staticmethod(wrong))
    module = made(Blocks)
    loss = TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64)
    assert self_check(loss, sample()[0]).outcome is CheckOutcome.FAILED


def test_what_a_loss_depends_on_is_not_hidden(monkeypatch):
    forced(monkeypatch)
    module = made(Blocks)
    other = nn.Conv2d(2, 2, 3)
    with (
        TrainingLoss(
            module, ParameterSpace.of(module), dtype=torch.float32, loss_fn=lambda m, b, i: other(b[0]).sum()
        ) as loss,
        convolution.regular_convolutions(torch.device("cpu")),
    ):
        loss(sample()[0])
        assert not loss.dependence.reaches_copies
        assert set(loss.dependence.others) == set(map(id, other.parameters()))


class Convolutions(TorchDispatchMode):
    """Counts convolutions: "C" forward, "D" towards the image, "W" towards the weight; and sizes of kernels."""

    def __init__(self):
        super().__init__()
        self.counts, self.kernels = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.convolution.default:
            self.counts["C"] += 1
            self.kernels.add(tuple(args[1].shape[2:]))
        elif func is aten.convolution_backward.default:
            self.counts["D"] += args[-1][0]
            self.counts["W"] += args[-1][1]
            self.kernels.add(tuple(args[2].shape[2:]))
        return func(*args, **(kwargs or {}))


def asked_for(module, batches, *, params=None, operator=Hessian):
    """What one product asks for, its graphs being there."""
    with TrainingLoss(module, ParameterSpace.of(module, params), loss_fn) as loss:
        hessian = operator(loss, batches)
        v = hessian.gradient()
        with Convolutions() as found:
            hessian.matvec(v)
    return found


def three_convolutions():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Conv2d(4, 3, 3), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def test_what_a_product_asks_for(monkeypatch):
    forced(monkeypatch)
    module, batches = made(three_convolutions), sample(width=12)[:1]
    found = asked_for(module, batches)
    # Of an image without gradient: C(x, dw), and W for the weight. Of the others C(dx, w), C(x, dw), D(g, dw) and
    # W(dx, g), and D and W of the gradient that these give. Nothing else.
    assert found.counts == {"C": 1 + 2 * 2, "D": 2 * 2, "W": 1 + 2 * 2}
    assert found.kernels == {(3, 3)}
    found = asked_for(module, batches, params=["4.*"])
    assert found.counts == {"C": 1, "W": 1, "D": 0}
    found = asked_for(module, batches, operator=GaussNewton)
    assert found.counts == {"C": 1 + 2 * 2, "D": 2, "W": 3}  # J v, by C alone, and a gradient
    assert found.kernels == {(3, 3)}
    monkeypatch.setattr(convolution, "DEVICES", frozenset())
    assert max(asked_for(module, batches).kernels) > (3, 3)
    assert max(asked_for(module, batches, operator=GaussNewton).kernels) > (3, 3)


def test_graphs_keep_the_same_tensors(monkeypatch):
    def saved():
        module, batches = made(Blocks), sample()
        memory = SavedBytes()
        with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss, memory:
            graph = GradientGraph.build(loss, batches[0])
        return memory.count(graph.held, graph.leaves)

    expected = saved()
    replacements = forced(monkeypatch)
    assert saved() == expected > 0
    assert replacements


class Residual(nn.Module):
    """The block of a ResNet (He et al. 2016), with group normalisation."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.GroupNorm(8, outer), nn.ReLU()),
            *(nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.GroupNorm(8, outer)),
        )
        is_same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet18(width):
    """ResNet-18 for images of 32 x 32, of another width than 64."""
    sizes = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        nn.Sequential(Residual(inner, outer, 1 if inner == outer else 2), Residual(outer, outer, 1))
        for inner, outer in itertools.pairwise(sizes)
    ]
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


def test_checkpoints_run_them_again(monkeypatch):
    replacements = forced(monkeypatch)
    module, (batch, *_) = made(lambda: Blocks(reentrant=False)), sample()
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        graph = GradientGraph.build(loss, batch)
        assert len(replacements) == 2 * 4  # in the forward pass, and again in the backward pass
        replacements.clear()
        graph.product([torch.ones_like(leaf) for leaf in graph.leaves])
        assert len(replacements) == 4


# In convolutions six (or four) of a layer for the three of its gradient, as above, and fewer at the image.
@pytest.mark.parametrize(("operator", "most"), [(Hessian, 2.0), (GaussNewton, 4 / 3)])
def test_operations_of_a_product_with_a_resnet(operator, most, monkeypatch):
    replacements = forced(monkeypatch)
    module, (batch, *_) = made(lambda: resnet18(8)), sample(2, 3, 32)
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        with FlopCounterMode(display=False) as gradient:
            evaluation = loss(batch)
            torch.autograd.grad(evaluation.value, evaluation.leaves)
        matrix = operator(loss, [batch])
        v = matrix.gradient()
        with FlopCounterMode(display=False) as product:
            matrix.matvec(v)
    assert len(replacements) == 20  # the convolutions of the one graph
    assert product.get_total_flops() <= most * gradient.get_total_flops()
