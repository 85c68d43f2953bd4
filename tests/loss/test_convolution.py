"""Convolutions for second derivatives: equal to torch's own in float64, for all arguments, to the third order."""

import contextlib
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
from tests.thorough import how_many

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


def layout(tensor):
    """Strides, as far as they mean something."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]


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
    for ours, theirs in zip(actual, derivatives(function, tensors, order=1), strict=False):
        assert layout(ours) == layout(theirs)


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


@settings(max_examples=how_many(50, thorough=150), deadline=None, derandomize=True)
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
    tensors = [
        normal(*shape, seed=i, dtype=t).requires_grad_() for i, (shape, t) in enumerate(zip(shapes, types, strict=True))
    ]

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


class Counts(TorchDispatchMode):
    """Convolutions that are asked for, by what they are towards, and the largest kernels among them."""

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(("C", "D", "W", "b"), 0)
        self.kernels = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.convolution.default:
            self.counts["C"] += 1
            self.kernels.add(tuple(args[1].shape[2:]))
        elif func is aten.convolution_backward.default:
            self.kernels.add(tuple(args[2].shape[2:]))
            for key, asked in zip("DWb", args[-1], strict=True):
                self.counts[key] += asked
        return func(*args, **(kwargs or {}))


def counted(function):
    with Counts() as counts:
        function()
    return counts.counts


def parts(*, weight=True):
    """The tensors of a convolution."""
    shapes = (2, 4, 5, 6), (4, 4, 3, 3), (4,)
    x, w, b = (normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    return x, w.requires_grad_(weight), b


def test_what_nobody_asks_for_costs_nothing():
    x, w, b = parts()
    with RegularConvolutions():
        y = F.conv2d(x, w, b).sin()
    asked = {"x": x, "w": w, "b": b}
    for chosen in [*itertools.combinations(asked, 1), *itertools.combinations(asked, 2), tuple(asked)]:
        found = counted(lambda c=chosen: torch.autograd.grad(y.sum(), [asked[i] for i in c], retain_graph=True))
        assert found == {"C": 0, "D": int("x" in chosen), "W": int("w" in chosen), "b": int("b" in chosen)}
    gradients = torch.autograd.grad(y.sum(), [x, w, b], create_graph=True)
    of_x, of_w, of_b = (g.square().sum() for g in gradients)

    def second(scalar, leaf):
        return counted(lambda: torch.autograd.grad(scalar, leaf, retain_graph=True))

    # Along dx, by way of g = cos(y) towards x: C(dx, w), then D; towards w: W(dx, g), and by way of g: C and W.
    assert second(of_x, x) == {"C": 1, "D": 1, "W": 0, "b": 0}
    assert second(of_x, w) == {"C": 1, "D": 0, "W": 2, "b": 0}
    assert second(of_w, x) == {"C": 1, "D": 2, "W": 0, "b": 0}
    assert second(of_w, w) == {"C": 1, "D": 0, "W": 1, "b": 0}
    assert second(of_b, w) == {"C": 0, "D": 0, "W": 1, "b": 0}
    assert second(of_b, b) == {"C": 0, "D": 0, "W": 0, "b": 1}
    with RegularConvolutions():
        y = F.conv2d(x, w.detach(), b).sin()
    assert counted(y.sum().backward) == {"C": 0, "D": 1, "W": 0, "b": 1}


def test_a_product_has_no_kernel_of_the_size_of_the_image():
    x, w, b = parts()
    for replaced in (False, True):
        with Counts() as counts, RegularConvolutions() if replaced else contextlib.nullcontext():
            gradient = torch.autograd.grad(F.conv2d(x, w, b).sin().sum(), [x, w], create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in gradient), [x, w])
        assert (max(counts.kernels) == (3, 3)) == replaced


@pytest.mark.parametrize(
    "tensors",
    [
        (normal(1, 2, 5, 5).to(torch.complex128), normal(2, 2, 3, 3).to(torch.complex128)),
        (normal(1, 2, 5, 5).as_subclass(type("Own", (torch.Tensor,), {})), normal(2, 2, 3, 3)),
    ],
    ids=["complex", "a class of its own"],
)
def test_left_to_torch(tensors):
    with RegularConvolutions():
        assert not is_replaced(F.conv2d(tensors[0].requires_grad_(), tensors[1]))


def test_left_to_torch_without_a_gradient():
    x, w, _ = parts()
    with RegularConvolutions():
        assert F.conv2d(x.detach(), w.detach()).grad_fn is None
        with torch.no_grad():
            assert F.conv2d(x, w).grad_fn is None


def test_left_to_torch_on_a_cpu(monkeypatch):
    monkeypatch.undo()
    x, w, _ = parts()
    with RegularConvolutions():
        assert not is_replaced(F.conv2d(x, w))
    assert not isinstance(convolution.regular_convolutions(torch.device("cpu")), RegularConvolutions)
    assert isinstance(convolution.regular_convolutions(torch.device("cuda")), RegularConvolutions)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((normal(5, 5), normal(2, 2, 3, 3)), {}),
        ((normal(1, 3, 5, 5), normal(2, 2, 3, 3)), {}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"padding": "both"}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"padding": "same", "stride": 2}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"padding": -1}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"stride": (1, 1, 1)}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"stride": 0}),
        ((normal(1, 2, 2, 2), normal(2, 2, 3, 3)), {}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"groups": 3}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3), normal(3)), {}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3), None, 1, 0, 1, 1, 1), {}),
        ((normal(1, 2, 5, 5), normal(2, 2, 3, 3)), {"size": 3}),
        ((normal(1, 2, 5, 5),), {}),
    ],
)
def test_mistakes_get_the_error_of_torch(args, named):
    args = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        F.conv2d(*args, **named)
    with pytest.raises(expected.type) as actual, RegularConvolutions():
        F.conv2d(*args, **named)
    assert str(actual.value) == str(expected.value)


# Torch's formulas of forward mode are scripts, which its own import makes.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
def test_transforms_and_forward_mode_are_left_to_torch():
    x, w, b = (t.detach() for t in parts())

    def scalar(x, w):
        return (F.conv2d(x, w, b) ** 3).sum()

    def all_of_them():
        forward = torch.func.jvp(scalar, (x, w), (w.new_ones(x.shape), w))
        batched = torch.func.vmap(torch.func.grad(scalar), (0, None))(torch.stack([x, 2 * x]), w)
        curved = torch.func.hessian(scalar, argnums=1)(x, w[:1, :, :2, :2].repeat(4, 1, 1, 1))
        over = torch.func.jvp(torch.func.grad(scalar), (x, w), (x, w))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(w.clone().requires_grad_(), w.flip(0))
            (gradient,) = torch.autograd.grad(scalar(x.clone().requires_grad_(), dual), dual)
            tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
        return [*forward, batched, curved, *over, tangent]

    expected = all_of_them()
    with RegularConvolutions():
        actual = all_of_them()
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected[-2].abs().max()))


# Torch's formulas of forward mode are scripts, which its own import makes.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning", "ignore:`torch.jit.script:DeprecationWarning")
def test_transforms_of_a_backward_pass():
    x, w, b = parts()
    directions = normal(3, 2, 4, 3, 4, seed=5)

    def all_of_them():
        y = F.conv2d(x, w, b)
        batched = torch.autograd.grad(y, (x, w), directions, is_grads_batched=True, retain_graph=True)
        gradients = torch.autograd.grad((y**3).sum(), (x, w), create_graph=True)
        pair = torch.stack([x.detach(), 2 * x.detach()]), torch.stack([w.detach(), w.detach().flip(1)])
        product = torch.vmap(lambda v, u: torch.autograd.grad(gradients, (x, w, b), (v, u), retain_graph=True))(*pair)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(directions[0], directions[1])
            (gradient,) = torch.autograd.grad(y, w, dual)
            tangent = torch.autograd.forward_ad.unpack_dual(gradient).tangent
        return [*batched, *product, tangent]

    expected = all_of_them()
    with RegularConvolutions():
        actual = all_of_them()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=TOLERANCE * float(theirs.abs().max()))


def test_nothing_is_kept_without_a_garbage_collection():
    x, w, b = parts()
    gc.disable()
    try:
        with RegularConvolutions():
            image = x.sin()
            y = F.conv2d(image, w, b)
            gradients = torch.autograd.grad((y**3).sum(), (x, w, b), create_graph=True)
            product = torch.autograd.grad(gradients, (x, w), [t.detach() for t in (x, w, b)], create_graph=True)
        held = [weakref.ref(value) for value in (image, y, y.grad_fn, *gradients, *product)]
        del image, y, gradients, product
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
