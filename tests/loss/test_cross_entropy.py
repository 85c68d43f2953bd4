"""The cross-entropy in closed form against torch's own, and what is left to torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.loss import cross_entropy
from lightning_subspace.loss.cross_entropy import NODES, closed_cross_entropy
from tests.oracles import EPS

CLASSES = 7
LAYOUTS = {
    "one": (CLASSES,),
    "rows": (6, CLASSES),
    "sequences": (3, CLASSES, 5),
    "images": (2, CLASSES, 4, 3),
}
OPTIONS = {
    "plain": {},
    "ignored": {"ignore_index": 2},
    "smoothed": {"label_smoothing": 0.3},
    "weights": {"weight": True},
    "all": {"ignore_index": 2, "label_smoothing": 0.2, "weight": True},
    "soft": {"soft": True},
    "soft, smoothed, weights": {"soft": True, "label_smoothing": 0.2, "weight": True},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Two rows at a time, and rows cut in two where a third dimension allows it."""
    monkeypatch.setitem(cross_entropy.ENTRIES, "cpu", 2 * CLASSES)


def case(shape, soft=False, weight=False, **options):
    generator = torch.Generator().manual_seed(len(shape))
    z = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    axis = min(len(shape) - 1, 1)
    if soft:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(axis)
    else:
        target = torch.randint(CLASSES, shape[:axis] + shape[axis + 1 :], generator=generator)
        if target.dim():
            target.view(-1)[0] = options.get("ignore_index", 0)
        elif options.get("ignore_index") == int(target):
            target = target - 1  # all ignored: 0 / 0, in torch as here
    if weight:
        options["weight"] = torch.rand(CLASSES, generator=generator, dtype=torch.float64) + 0.5
    return z, target, options


def derivatives(function, z):
    """Value, gradient and two products with the Hessian of a curved and a linear function of all losses."""
    found = []
    for of_losses in (lambda losses: losses.sum(), lambda losses: losses.square().sum()):
        place = z.detach().requires_grad_()
        value = of_losses(function(place))
        (slope,) = torch.autograd.grad(value, place, create_graph=True)
        direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
        (curved,) = torch.autograd.grad(slope, place, direction)
        found += [value.detach(), slope.detach(), curved]
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_both_derivatives_are_those_of_torch(layout, options, reduction):
    z, target, given = case(LAYOUTS[layout], **OPTIONS[options])
    closed = closed_cross_entropy((z, target), given | {"reduction": reduction})
    expected = derivatives(lambda place: F.cross_entropy(place, target, reduction=reduction, **given), z)
    for mine, torchs in zip(derivatives(closed, z), expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=1e3 * EPS * max(1.0, float(torchs.abs().max())))


def test_logits_whose_classes_are_not_in_the_second_place_in_memory():
    z, target, _ = case((3, 5, CLASSES))
    z, target = z.transpose(1, 2), torch.randint(CLASSES, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = derivatives(lambda place: F.cross_entropy(place, target), z)
    for mine, torchs in zip(derivatives(closed_cross_entropy((z, target), {}), z), expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=0, atol=1e3 * EPS)


def test_a_piece_is_as_small_as_it_says():
    z = torch.randn(2, CLASSES, 5)
    assert [tuple(z[logits].shape) for logits, _ in cross_entropy.pieces(z)] == 2 * [
        (1, CLASSES, 2),
        (1, CLASSES, 2),
        (1, CLASSES, 1),
    ]
    assert [len(z[:, :, 0][logits]) for logits, _ in cross_entropy.pieces(z[:, :, 0])] == [2]


def test_a_third_derivative_is_refused_not_wrong():
    z, target, _ = case((6, CLASSES))
    place = z.requires_grad_()
    (slope,) = torch.autograd.grad(closed_cross_entropy((z, target), {})(place), place, create_graph=True)
    with pytest.raises(RuntimeError, match="at most two derivatives"):
        torch.autograd.grad(slope.square().sum(), place, create_graph=True)


class Own(torch.Tensor):
    pass


Z, Y = torch.randn(4, CLASSES), torch.arange(4)
LEFT = {
    "a class of tensors": ((Z.as_subclass(Own), Y), {}),
    "16 bits": ((Z.bfloat16(), Y), {}),
    "a target that is learnt": ((Z, Z.softmax(1).requires_grad_()), {}),
    "weights that are learnt": ((Z, Y), {"weight": torch.ones(CLASSES, requires_grad=True)}),
    "weights of another type": ((Z, Y), {"weight": torch.ones(CLASSES, dtype=torch.float64)}),
    "bytes": ((Z, Y.to(torch.uint8)), {}),
    "old words": ((Z, Y), {"size_average": False}),
    "no such reduction": ((Z, Y), {"reduction": "median"}),
    "other shapes": ((Z, Y[:3]), {}),
    "no such argument": ((Z, Y), {"targets": Y}),
    "nothing": ((Z[:0], Y[:0]), {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_torch(name):
    args, named = LEFT[name]
    assert closed_cross_entropy(args, named) is None


def test_left_inside_of_transforms():
    seen = []

    def loss(z):
        seen.append(closed_cross_entropy((z, Y), {}))
        return F.cross_entropy(z, Y)

    torch.func.grad(loss)(Z)
    assert seen == [None]


def test_a_class_that_does_not_exist_is_the_error_of_torch():
    closed = closed_cross_entropy((Z, Y + CLASSES), {})
    with pytest.raises(IndexError, match="out of bounds"):
        closed(Z)


def test_the_graph_keeps_the_logits_once():
    kept = set()
    place = torch.randn(64, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        closed = closed_cross_entropy((place, torch.arange(64)), {})
        value = nn.Identity()(closed(place))
        (slope,) = torch.autograd.grad(value, place, create_graph=True)
    assert isinstance(slope.grad_fn, NODES)
    assert place.untyped_storage().data_ptr() in kept
    assert slope.untyped_storage().data_ptr() not in kept
    large = [t for t in (slope.grad_fn.saved_tensors) if t is not None and t.numel() == place.numel()]
    assert [t.data_ptr() for t in large] == [place.data_ptr()]
