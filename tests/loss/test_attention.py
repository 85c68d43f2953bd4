"""Attention in blocks against torch's math attention, and what is left to torch."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_subspace.loss import attention
from lightning_subspace.loss.attention import NODES, AttentionCall, blocks

SIZES = {"square": (6, 6), "more keys": (5, 8), "more queries": (8, 5)}
SHAPES = {"a matrix": (), "heads": (3,), "a batch of heads": (2, 3)}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}


def masked(kind, shape):
    """A mask that leaves one query without a key."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.6
    seen[..., 0, :] = False
    seen[..., 1, 0] = True
    if kind == "bool":
        return seen
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.where(seen, bias, -math.inf)


MASKS = {
    "none": lambda lead, t, s: {},
    "causal": lambda lead, t, s: {"is_causal": True},
    "bool": lambda lead, t, s: {"attn_mask": masked("bool", (t, s))},
    "float": lambda lead, t, s: {"attn_mask": masked("float", (t, s))},
    "a mask a head": lambda lead, t, s: {"attn_mask": masked("float", (*lead, t, s))},
    "keys": lambda lead, t, s: {"attn_mask": (torch.arange(s) > 1).expand(*lead, 1, s)},
    "scale": lambda lead, t, s: {"scale": 0.3, "is_causal": True},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two queries at a time of three heads and five keys."""
    monkeypatch.setitem(attention.ENTRIES, "cpu", 30)


def inputs(lead, t, s, dtype=torch.float64, key_lead=None):
    generator = torch.Generator().manual_seed(t + len(lead))
    shapes = (*lead, t, 4), (*(key_lead or lead), s, 4), (*(key_lead or lead), s, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def in_blocks(*tensors, **named):
    return AttentionCall.of(tensors, named).result()


def by_torch(*tensors, **named):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*tensors, **named)


def derivatives(function, tensors, **named):
    """Value, gradient and a product with the Hessian of a loss that is not linear in the output."""
    places = [t.detach().requires_grad_() for t in tensors]
    output = function(*places, **named)
    gradient = torch.autograd.grad(output.sin().sum(), places, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]
    return [t.detach() for t in (output, *gradient)] + [*torch.autograd.grad(gradient, places, directions)]


def require_equal(found, expected, dtype=torch.float64):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        error = float((mine.double() - theirs.double()).norm())
        assert error <= TOLERANCES[dtype] * max(1.0, float(theirs.double().norm()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_gradient_and_product_are_those_of_math(shape, size, mask, dtype):
    lead, (t, s) = SHAPES[shape], SIZES[size]
    named = MASKS[mask](lead, t, s)
    given = inputs(lead, t, s)
    exact = derivatives(by_torch, given, **named)
    cast = {
        key: value.to(dtype) if key == "attn_mask" and value.is_floating_point() else value
        for key, value in named.items()
    }
    require_equal(derivatives(in_blocks, [t.to(dtype) for t in given], **cast), exact, dtype)


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_queries_with_one_head_of_keys(groups):
    given = inputs((2, 4), 6, 7, key_lead=(2, groups))
    named = {"enable_gqa": True, "is_causal": True}
    require_equal(derivatives(in_blocks, given, **named), derivatives(by_torch, given, **named))


def whole_factors(tensors, dropout, seed):
    """The factors by which the blocks of a call drop out, as one tensor."""
    q, k, _ = tensors
    factors = torch.zeros(*q.shape[:-1], k.shape[-2], dtype=q.dtype)
    for block in blocks(q, k, attention.Options(False, 1.0, dropout, seed)):
        _, drop = block.probabilities(q, k, None)
        factors[block.rows] = drop(torch.ones_like(factors[block.rows]))
    return factors


def test_dropout_masks_are_replayed_in_every_derivative():
    given, dropout = inputs((2, 3), 6, 7), 0.4
    torch.manual_seed(9)
    seed = int(torch.randint(2**62, ()))
    factors = whole_factors(given, dropout, seed)
    assert 0.2 < float((factors == 0.0).double().mean()) < 0.6
    assert factors[factors != 0.0].sub(1.0 / 0.6).abs().max() < 1e-15

    def plainly(q, k, v):
        return (factors * (q @ k.mT / 2.0).softmax(-1)) @ v

    torch.manual_seed(9)
    require_equal(derivatives(in_blocks, given, dropout_p=dropout), derivatives(plainly, given))


def test_a_third_derivative_is_right():
    given = inputs((2,), 4, 5)

    def third(function):
        places = [t.detach().requires_grad_() for t in given]
        value = function(*places).sin().sum()
        for _ in range(2):
            gradient = torch.autograd.grad(value, places, create_graph=True)
            value = sum(g.square().sum() for g in gradient)
        return torch.autograd.grad(value, places)

    require_equal(third(in_blocks), third(by_torch))


def test_one_tensor_for_all_three():
    x = inputs((3,), 6, 6)[0]
    found = [derivatives(lambda t, f=f: f(t, t, t), [x]) for f in (in_blocks, by_torch)]
    require_equal(*found)


@pytest.mark.parametrize("asked", range(4))
def test_one_second_derivative_of_four(asked):
    """Towards g alone, which leaves out half of the work, or towards one of the others."""

    def second(function):
        places = [t.detach().requires_grad_() for t in inputs((2,), 4, 5)]
        output = function(*places)
        g = output.detach().cos().requires_grad_()
        gradient = torch.autograd.grad(output, places, g, create_graph=True)
        return torch.autograd.grad([t.sin().sum() for t in gradient], [g, *places][asked])

    require_equal(second(in_blocks), second(by_torch))


def test_a_graph_keeps_no_scores():
    q, k, v = (torch.randn(2, 64, 4).requires_grad_() for _ in range(3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        output = in_blocks(q, k, v)
        gradient = torch.autograd.grad(output, (q, k, v), output.detach(), create_graph=True)
    assert isinstance(output.grad_fn, NODES)
    assert isinstance(gradient[0].grad_fn.next_functions[0][0], NODES)  # behind that of a view
    assert kept
    assert max(kept) == q.numel()


class Own(torch.Tensor):
    pass


Q = torch.randn(2, 4, 8)
LEFT = {
    "a class of tensors": ((Q.as_subclass(Own), Q, Q), {}),
    "16 bits": ((Q.half(), Q.half(), Q.half()), {}),
    "two types": ((Q, Q.double(), Q), {}),
    "a mask that is learnt": ((Q, Q, Q), {"attn_mask": torch.zeros(4, 4, requires_grad=True)}),
    "a mask of another shape": ((Q, Q, Q), {"attn_mask": torch.zeros(3, 4)}),
    "a mask and a causal one": ((Q, Q, Q), {"attn_mask": torch.zeros(4, 4), "is_causal": True}),
    "leading sizes of one": ((Q, Q[:1], Q), {}),
    "heads that do not divide": ((Q, Q.repeat(2, 1, 1)[:3], Q), {"enable_gqa": True}),
    "all dropped out": ((Q, Q, Q), {"dropout_p": 1.0}),
    "no such argument": ((Q, Q, Q), {"heads": 2}),
    "no keys": ((Q, Q[:, :0], Q[:, :0]), {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torch(name):
    args, named = LEFT[name]
    assert AttentionCall.of(args, named) is None


def test_left_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert AttentionCall.of((Q, Q, Q), {}) is None


def test_no_module_is_needed():
    assert isinstance(AttentionCall.of((nn.Parameter(Q), Q, Q), {}), AttentionCall)
