"""ParameterSpace: which tensors, in which order, and that the flat vector and the named tensors are the same thing."""

import pytest
import torch
from torch import nn

from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.storage import overlapping


class Tied(nn.Module):
    """An embedding whose weight is also that of the output layer, which has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_order_and_shapes_are_those_of_named_parameters():
    module = mlp()
    space = ParameterSpace.of(module)
    assert space.names == tuple(name for name, _ in module.named_parameters())
    assert space.shapes == tuple(p.shape for p in module.parameters())
    assert space.numels == (12, 4, 8, 2)
    assert space.n == 26


def test_the_space_is_a_value():
    torch.manual_seed(0)
    assert ParameterSpace.of(mlp()) == ParameterSpace.of(mlp())
    assert hash(ParameterSpace.of(mlp())) == hash(ParameterSpace.of(mlp()))
    assert ParameterSpace.of(mlp()) != ParameterSpace.of(mlp(), ["0.*"])


def test_tied_parameters_appear_once_under_their_first_name():
    module = Tied()
    space = ParameterSpace.of(module)
    assert space.names == ("embed.weight", "head.bias")
    assert space.tensors(module)[0] is module.head.weight


@pytest.mark.parametrize("pattern", ["head.*", "head.weight", "embed.*"])
def test_a_pattern_may_use_any_name_of_a_tied_parameter(pattern):
    assert "embed.weight" in ParameterSpace.of(Tied(), [pattern]).names


def test_frozen_parameters_are_left_out():
    module = mlp()
    module[0].requires_grad_(False)
    assert ParameterSpace.of(module).names == ("2.weight", "2.bias")


def test_scalar_and_empty_parameters_have_their_place():
    module = nn.Module()
    module.scale = nn.Parameter(torch.tensor(2.0))
    module.nothing = nn.Parameter(torch.empty(0, 3))
    module.last = nn.Parameter(torch.ones(2))
    space = ParameterSpace.of(module)
    assert space.numels == (1, 0, 2)
    pieces = space.unflatten(torch.tensor([5.0, 6.0, 7.0]))
    assert [p.shape for p in pieces] == list(space.shapes)
    assert space.flatten(pieces).tolist() == [5.0, 6.0, 7.0]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (["*"], ("0.weight", "0.bias", "2.weight", "2.bias")),
        (["2.*"], ("2.weight", "2.bias")),
        (["*.bias", "0.*"], ("0.weight", "0.bias", "2.bias")),  # order of the module, not of the patterns
        (("?.bias",), ("0.bias", "2.bias")),
        (["[!0].weight"], ("2.weight",)),
    ],
)
def test_patterns_are_shell_style_on_qualified_names(params, names):
    assert ParameterSpace.of(mlp(), params).names == names


def test_patterns_distinguish_case():
    with pytest.raises(ValueError, match="WEIGHT"):
        ParameterSpace.of(mlp(), ["*.WEIGHT"])


@pytest.mark.parametrize("params", [["0.*", "lost.*"], ["lost.*"]])
def test_a_pattern_without_a_match_is_named(params):
    with pytest.raises(ValueError, match=r"'lost\.\*' matches no trainable parameter of Sequential; .*'0\.weight'"):
        ParameterSpace.of(mlp(), params)


def test_a_pattern_that_matches_only_frozen_parameters_has_no_match():
    module = mlp()
    module[0].requires_grad_(False)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        ParameterSpace.of(module, ["0.*"])


@pytest.mark.parametrize("params", [[], "0.*", "*"])
def test_patterns_that_are_not_a_list_of_patterns_are_refused(params):
    with pytest.raises(ValueError, match="expected None or a list of patterns"):
        ParameterSpace.of(mlp(), params)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_nothing_trainable_is_an_error(module):
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        ParameterSpace.of(module)


def test_a_lazy_parameter_is_an_error_until_it_has_a_shape_or_is_left_out():
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"'0\.weight': expected a shape, got a lazy parameter"):
        ParameterSpace.of(module)
    assert ParameterSpace.of(module, ["1.*"]).n == 3
    module(torch.ones(1, 3))
    assert ParameterSpace.of(module).n == 11


def test_a_complex_parameter_has_two_real_coordinates_an_entry():
    waves = torch.tensor([1.0 + 2.0j, 3.0 - 4.0j])
    module = nn.ParameterDict({"real": torch.ones(1), "waves": waves})  # an odd offset: no view of complex type exists
    space = ParameterSpace.of(module)
    flat = space.flatten(space.tensors(module))
    assert flat.tolist() == [1.0, 1.0, 2.0, 3.0, -4.0]
    assert torch.equal(space.unflatten(flat)[1], waves)
    assert ParameterSpace.of(module, ["real"]).n == 1


def test_tensors_are_the_modules_own():
    module = mlp()
    tensors = ParameterSpace.of(module).tensors(module)
    assert all(a is b for a, b in zip(tensors, module.parameters(), strict=True))


def test_tensors_survive_freezing():
    module = mlp()
    space = ParameterSpace.of(module)
    module.requires_grad_(False)
    assert len(space.tensors(module)) == 4


def test_a_vanished_or_reshaped_parameter_is_an_error():
    module = mlp()
    space = ParameterSpace.of(module)
    module[2] = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"'2\.weight' of shape \(2, 4\) is no longer part"):
        space.tensors(module)
    module[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"'2\.weight' of shape \(2, 4\) is no longer part"):
        space.tensors(module)


def test_flatten_and_unflatten_are_inverse():
    space = ParameterSpace.of(mlp())
    flat = torch.arange(space.n, dtype=torch.float64)
    pieces = space.unflatten(flat)
    assert [p.shape for p in pieces] == list(space.shapes)
    assert torch.equal(space.flatten(pieces), flat)
    tensors = [p.detach().double() for p in mlp().parameters()]
    for a, b in zip(space.unflatten(space.flatten(tensors)), tensors, strict=True):
        assert torch.equal(a, b)


def test_flatten_agrees_with_torch():
    module = mlp()
    expected = nn.utils.parameters_to_vector(module.parameters()).detach()
    assert torch.equal(ParameterSpace.of(module).flatten(module.parameters()), expected)


def test_unflatten_gives_views_and_flatten_a_copy_without_a_graph():
    module = mlp()
    space = ParameterSpace.of(module)
    before = [p.detach().clone() for p in module.parameters()]
    flat = space.flatten(module.parameters())
    assert not flat.requires_grad
    space.unflatten(flat)[0].fill_(7.0)
    assert flat[:12].tolist() == [7.0] * 12
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_unflatten_keeps_the_graph():
    """A directional derivative is taken through it."""
    space = ParameterSpace.of(mlp())
    flat = torch.ones(space.n, requires_grad=True)
    sum(i * piece.sum() for i, piece in enumerate(space.unflatten(flat))).backward()
    assert flat.grad.tolist() == [0.0] * 12 + [1.0] * 4 + [2.0] * 8 + [3.0] * 2


def test_a_strided_tensor_is_flattened_by_its_indices():
    space = ParameterSpace(("w",), (torch.Size([2, 3]),))
    transposed = torch.arange(6.0).view(3, 2).T
    assert space.flatten([transposed]).tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]


def test_none_stands_for_zeros():
    space = ParameterSpace.of(mlp())
    flat = space.flatten([None, torch.ones(4), None, None])
    assert flat.tolist() == [0.0] * 12 + [1.0] * 4 + [0.0] * 10


def test_only_none_needs_like():
    space = ParameterSpace.of(mlp())
    with pytest.raises(ValueError, match="pass `like=`"):
        space.flatten([None] * 4)
    flat = space.flatten([None] * 4, like=torch.zeros(1, dtype=torch.float64))
    assert flat.dtype == torch.float64
    assert flat.tolist() == [0.0] * space.n


def test_like_fixes_the_dtype():
    space = ParameterSpace.of(mlp())
    first, *rest = (p.detach() for p in mlp().parameters())
    mixed = [first.half(), *rest]
    assert space.flatten(mixed).dtype == torch.float16
    assert space.flatten(mixed, like=torch.zeros(1)).dtype == torch.float32


def test_sparse_gradients_are_made_dense():
    torch.manual_seed(0)
    gradients = {}
    for sparse in (False, True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 1))
        module(torch.tensor([4, 1, 4])).square().sum().backward()  # a row that is hit twice
        assert module[0].weight.grad.is_sparse == sparse
        gradients[sparse] = ParameterSpace.of(module).flatten([p.grad for p in module.parameters()])
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(gradients[True], gradients[False], rtol=8 * eps, atol=8 * eps)
    assert gradients[True].count_nonzero() == 2 * 3 + 4


def test_a_tensor_of_another_shape_is_refused_not_broadcast():
    space = ParameterSpace(("w", "b"), (torch.Size([2, 3]), torch.Size([3])))
    with pytest.raises(ValueError, match=r"'w': expected shape \(2, 3\), got \(3, 2\)"):
        space.flatten([torch.ones(3, 2), torch.ones(3)])
    with pytest.raises(ValueError, match=r"'b': expected shape \(3,\), got \(1,\)"):
        space.flatten([torch.ones(2, 3), torch.ones(1)])


@pytest.mark.parametrize("count", [1, 3])
def test_the_number_of_tensors_must_agree(count):
    space = ParameterSpace(("w", "b"), (torch.Size([2]), torch.Size([2])))
    with pytest.raises(ValueError, match="zip"):
        space.flatten([torch.ones(2)] * count)
    with pytest.raises(RuntimeError, match="split"):
        space.unflatten(torch.ones(5))


def test_parts_of_one_buffer_are_parameters_of_their_own():
    flat = torch.zeros(10)
    module = nn.Module()
    module.a, module.b = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[4:])
    assert ParameterSpace.of(module).n == 10


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (lambda w: w, lambda w: w.T, True),
        (lambda w: w[:2], lambda w: w[2:], False),
        (lambda w: w[:3], lambda w: w[2:], True),
        (lambda w: w[:, :3], lambda w: w[:, 3:], False),
        (lambda w: w[:, :4], lambda w: w[:, 3:], True),
        (lambda w: w.view(-1)[::2], lambda w: w.view(-1)[1::2], False),
        (lambda w: w.view(-1)[::2], lambda w: w.view(-1)[1::3], True),
        (lambda w: w[:1], lambda w: w[3:], False),
        (lambda w: w.view(torch.int32)[0, :2].view(torch.float32), lambda w: w[0, 1:3], True),
        (lambda w: w[:, 0], lambda w: w.view(torch.int16)[:, 2:4], False),
        (lambda w: w[:, 0], lambda w: w.view(torch.int16)[:, 1:3], True),
    ],
)
def test_overlap_of_two_views(one, other, overlap):
    whole = torch.zeros(4, 6)
    apart = torch.zeros(3)
    tensors = {"one": one(whole), "apart": apart, "other": other(whole)}
    assert overlapping(tensors) in ((("one", "other"), ("other", "one")) if overlap else (None,))
    marked = torch.zeros(4, 6)  # by writing
    one(marked).fill_(1)
    before = other(marked).clone()
    assert bool(before.any()) == overlap
