"""Convolutions for second derivatives: equal to torch's own in float64, whatever their arguments, to the third order."""

import gc
import itertools
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_subspace.loss import convolution
from lightning_subspace.loss.convolution import NODES, SIGNATURES, RegularConvolutions

PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
# Two orders of summation of at most some hundred terms, relative to the largest entry.
TOLERANCE = 1e-12
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(convolution, "DEVICES", frozenset({"cpu"}))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def nodes(tensor):
    """The classes of a graph's nodes."""
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return {type(node) for node in seen}


def is_replaced(tensor):
    return not nodes(tensor).isdisjoint(NODES)


def derivatives(function, tensors, *, order=3):
    """The value, the gradient, and gradients of the gradient's products with fixed vectors, up to an order."""
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad) for t in tensors]
    leaves = [t for t in tensors if t.requires_grad]
    value = function(*tensors)
    # Cubic in the output, so that no derivative of it up to the third is constant.
    scalar = (value * normal(*value.shape, seed=7).to(value.dtype)).sum() + 0.1 * (value**3).sum()
    found = [value]
    for number in range(order):
        if scalar.requires_grad:
            gradient = torch.autograd.grad(scalar, leaves, create_graph=True, materialize_grads=True)
        else:  # the gradient of an empty batch is constant
            gradient = [torch.zeros_like(leaf) for leaf in leaves]
        found += gradient
        scalar = sum((g * normal(*g.shape, seed=11 + number).to(g.dtype)).sum() for g in gradient)
    return found


def assert_equal(function, tensors, *, oracle=None, replaced=True, order=3, tolerance=TOLERANCE):
    """Torch's own, and the replacement: the same numbers, types and shapes; values and gradients in the same layout."""
    expected = derivatives(oracle or function, tensors, order=order)
    with RegularConvolutions():
        actual = derivatives(function, tensors, order=order)
    assert is_replaced(actual[0]) == replaced
    assert not is_replaced(expected[0])
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * scale)
    for ours, theirs in zip(actual[: 1 + len(tensors)], expected, strict=False):
        assert ours.stride() == theirs.stride() or not ours.numel()


def cropped(dims, options):
    """A transposed convolution cut out of the whole one: torch has no third derivative of one with output_padding."""

    def sizes(value):
        return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)

    def function(x, w, b=None):
        whole = TRANSPOSED[dims](x, w, stride=options["stride"], dilation=options["dilation"], groups=options["groups"])
        pairs = zip(sizes(options["padding"]), sizes(options["output_padding"]), strict=True)
        image = F.pad(whole, [side for p, o in reversed(list(pairs)) for side in (-p, o - p)])
        return image.contiguous() if b is None else image + b.reshape(-1, *[1] * dims)

    return function


@st.composite
def calls(draw):
    """A function of torch, its tensors and its other arguments."""
    dims = draw(st.integers(1, 3))
    is_transposed = draw(st.booleans())
    groups = draw(st.sampled_from((1, 2, 3)))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    stride = [draw(st.integers(1, 3 if dims < 3 else 2)) for _ in range(dims)]
    padding = [draw(st.integers(0, 2)) for _ in range(dims)]
    inner, outer = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    options = {"groups": groups}
    word = None
    if is_transposed:
        options["output_padding"] = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    else:
        word = draw(st.sampled_from((None, None, "same", "valid")))
        if word == "same":
            stride = [1] * dims
    named = {"stride": stride, "padding": padding, "dilation": dilation}
    for name, value in named.items():  # a number, a tuple, or a tuple of one
        form = draw(st.sampled_from((tuple, list, "one", "number")))
        options[name] = form(value) if callable(form) else value[0] if form == "number" else (value[0],)
        if not callable(form):
            named[name] = [value[0]] * dims
    if word is not None:
        options["padding"] = word
        named["padding"] = [0] * dims
    if is_transposed:  # smaller than the stride or the dilation that the call has now
        options["output_padding"] = tuple(
            min(o, max(s, d) - 1)
            for o, s, d in zip(options["output_padding"], named["stride"], named["dilation"], strict=True)
        )
    extent = [d * (k - 1) + 1 for d, k in zip(named["dilation"], kernel, strict=True)]
    # Large enough for one position of the kernel, or for an output of one in the transposed convolution.
    least = [
        max(1, 2 * p - e + 2) if is_transposed else max(1, e - 2 * p)
        for e, p in zip(extent, named["padding"], strict=True)
    ]
    image = [low + draw(st.integers(0, 3)) for low in least]
    batch = draw(st.sampled_from((None, 0, 1, 2)))
    x = normal(*([] if batch is None else [batch]), inner, *image)
    weight = normal(*((inner, outer // groups) if is_transposed else (outer, inner // groups)), *kernel, seed=1)
    tensors = [x, weight]
    if draw(st.booleans()):
        tensors.append(normal(outer, seed=2))
    needed = draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)).filter(any))
    for tensor, needs in zip(tensors, needed, strict=True):
        tensor.requires_grad_(needs)
    return dims, is_transposed, tensors, options


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_every_argument(call):
    dims, is_transposed, tensors, options = call
    function = (TRANSPOSED if is_transposed else PLAIN)[dims]
    oracle = cropped(dims, options) if is_transposed else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'", UserWarning)
        assert_equal(lambda x, w, b=None: function(x, w, b, **options), tensors, oracle=oracle)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_arguments_by_position(function):
    dims = SIGNATURES[function][1]
    # stride, padding, then dilation and groups, or output_padding, groups and dilation
    is_transposed = function in TRANSPOSED.values()
    rest = (2, 1, 1, 2, 2) if is_transposed else (2, 1, 2, 2)
    tensors = [normal(2, 4, *[5] * dims), normal(4, 2, *[3] * dims, seed=1), normal(4, seed=2)]
    order = 2 if is_transposed else 3  # torch has no third one with output_padding
    assert_equal(lambda x, w, b: function(x, w, b, *rest), [t.requires_grad_() for t in tensors], order=order)


LAYERS = {
    "zeros": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="zeros"),
    "reflect": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular", groups=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
    "in-place": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ELU(inplace=True), nn.Conv2d(3, 2, 2)),
    "compiled": lambda: torch.compile(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh())),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", [(2, 2, 5, 6), (2, 5, 6)])
def test_layers(layer, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = LAYERS[layer]().double()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    with torch.compiler.set_stance("force_eager"):
        assert_equal(function, [normal(*shape).requires_grad_(), *parameters])


@pytest.mark.parametrize("which", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_are_kept(which, transposed):
    tensors = [normal(2, 4, 5, 6), normal(4, 4, 3, 3, seed=1), normal(4, seed=2)]
    for i, is_last in enumerate(which):
        tensors[i] = tensors[i].to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    function = F.conv_transpose2d if transposed else F.conv2d
    assert_equal(lambda x, w, b: function(x, w, b, stride=2, padding=1), [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, "mixed"])
def test_autocast_casts_alike(dtype, stored, enabled):
    types = (torch.float32, dtype, torch.float32) if stored == "mixed" else (stored,) * 3
    shapes = (2, 4, 5, 6), (4, 4, 3, 3), (4,)
    tensors = [normal(*shape, seed=i, dtype=t).requires_grad_() for i, (shape, t) in enumerate(zip(shapes, types))]

    def function(x, w, b):
        with torch.autocast("cpu", dtype, enabled=enabled):
            return F.conv2d(x, w, b, padding=1)

    if stored == "mixed" and not enabled:
        with pytest.raises(RuntimeError, match="type"), RegularConvolutions():
            function(*tensors)
        return
    # What is of two terms is rounded before and behind the sum, to a narrow type where autocast is on.
    narrow = dtype if enabled and stored != torch.float64 else stored
    assert_equal(function, tensors, order=2, tolerance=16 * torch.finfo(narrow).eps)
