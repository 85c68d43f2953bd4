"""Gradients of single matrices, against torch's SVD of dense gradients."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from lightning_subspace import Matrices, measure_subspace
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.measurements.dealt_matrices import chosen_matrices
from lightning_subspace.measurements.left_space import LeftSpace, space_overlap
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver
from tests.oracles import dense_gradient

from .probes import F64, data, derivatives, loss_fn, metrics, net, stepped, top_eigenspace

R = 2


def shorter_side(matrix):
    return matrix if len(matrix) <= matrix.shape[1] else matrix.T


def left(matrix, r=R):
    return torch.linalg.svd(shorter_side(matrix))[0][:, :r]


def mean_cosine(one, other):
    return float((one.T @ other).square().sum()) / one.shape[1]


# One matrix


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_a_rank_one_matrix_has_rank_one():
    found = LeftSpace.of(torch.outer(random(6), random(9, seed=1)), rank=1)
    assert [found.energy, found.stable_rank, found.effective_rank] == pytest.approx([1.0] * 3, abs=1e-9)


def test_an_orthogonal_matrix_has_all_ranks():
    found = LeftSpace.of(torch.linalg.qr(random(12, 7))[0].T, rank=3)
    assert [found.stable_rank, found.effective_rank, found.norm] == pytest.approx([7.0, 7.0, 1.0], abs=1e-9)
    assert found.energy == pytest.approx(3 / 7, abs=1e-9)


def test_spaces_of_all_dimensions_are_the_same():
    one, other = (LeftSpace.of(random(4, 9, seed=seed), rank=8).basis for seed in (0, 1))
    assert one.shape == (4, 4)
    assert space_overlap(one, other) == pytest.approx(1.0, abs=1e-9)


def test_a_matrix_of_zeros_has_no_space():
    found = LeftSpace.of(torch.zeros(3, 4), rank=2)
    assert not found.basis.any()
    assert found.norm == 0.0
    assert all(map(math.isnan, (found.energy, found.stable_rank, found.effective_rank)))
    assert math.isnan(space_overlap(found.basis, torch.eye(3)[:, :2]))
    assert math.isnan(LeftSpace.of(torch.full((3, 4), math.inf), rank=2).norm)


def test_a_large_matrix_is_found_from_an_earlier_space_and_from_none():
    """As gradients are: a spectrum that falls, and a space that has moved a little."""
    factors = torch.linalg.qr(random(300, 300))[0], torch.linalg.qr(random(400, 300, seed=1))[0].T
    spectrum = 1.0 / torch.arange(1, 301, dtype=F64)
    matrix = factors[0] * spectrum @ factors[1]
    exact = LeftSpace.of(matrix, rank=8)
    before = LeftSpace.of(matrix + 0.01 * random(300, 400, seed=2) / 20.0, rank=8).basis
    for start in (None, before):
        found = LeftSpace.of(matrix, rank=8, start=start, exact_side=100)
        assert found.energy == pytest.approx(exact.energy, abs=1e-4)
        assert found.norm == pytest.approx(1.0, abs=1e-9)
        assert found.stable_rank == pytest.approx(exact.stable_rank, abs=1e-9)
        assert math.isnan(found.effective_rank)
        assert space_overlap(exact.basis, found.basis) > 0.999


def test_the_largest_singular_value_is_found_where_there_is_no_gap():
    matrix = random(300, 300)
    found = LeftSpace.of(matrix, rank=1, exact_side=100)
    assert found.norm == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=0.01)


# The choice of matrices


def partition(module):
    return Partition.even(ParameterSpace.of(module))


def test_kernels_are_matrices_and_small_ones_are_left_out():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Linear(6, 1))
    shapes = {one.name: (one.rows, one.columns) for one in chosen_matrices(partition(module), None, 1)}
    assert shapes == {"0.weight": (4, 27), "2.weight": (6, 5)}
    assert [one.name for one in chosen_matrices(partition(module), None, 4)] == ["2.weight"]


def test_patterns_name_parameters_or_their_modules():
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "ab": nn.Linear(3, 3)})
    for patterns, names in ((["a"], ["a"]), (["a*"], ["a", "ab"]), (["b.weight"], ["b"])):
        found = chosen_matrices(partition(module), patterns, 8)
        assert [one.name.removesuffix(".weight") for one in found] == names
    with pytest.raises(ValueError, match=r"modules: expected patterns .* got 'c', which matches none"):
        chosen_matrices(partition(module), ["a", "c"], 8)
    for wrong in ("a", [], [1]):
        with pytest.raises(ValueError, match="modules: expected a list of patterns"):
            Matrices(modules=wrong)
    with pytest.raises(ValueError, match="anchor_step: expected an integer of at least 0"):
        Matrices(anchor_step=-1)


# In a probe


def test_all_numbers_are_those_of_dense_gradients():
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.3), 5)
    found = metrics(module, Matrices(rank=R))
    gradient, hessian = derivatives(module)
    _, top = top_eigenspace(hessian, 4)
    batches = data()
    halves = [
        dense_gradient(module, lambda m, own=own: sum(loss_fn(m, b, 0) * len(b[1]) for b in own))
        for own in (batches[::2], batches[1::2])
    ]
    places = {"0.weight": (slice(0, 30), (6, 5)), "2.weight": (slice(36, 54), (3, 6))}
    energies = []
    for name, (place, shape) in places.items():
        matrix = gradient[place].view(shape)
        squares = torch.linalg.svdvals(matrix).square()
        shares = squares / squares.sum()
        parts = [shorter_side(v[place].view(shape)) for v in top]
        inside = sum(float((left(matrix).T @ part).square().sum()) for part in parts)
        energies.append(float(shares[:R].sum()))
        expected = {
            "energy": energies[-1],
            "stable_rank": 1.0 / float(shares[0]),
            "effective_rank": math.exp(-float((shares * shares.log()).sum())),
            "overlap_halves": mean_cosine(*(left(half[place].view(shape)) for half in halves)),
            "hessian_inside": inside / sum(float(part.square().sum()) for part in parts),
            "weight_top_singular": float(torch.linalg.matrix_norm(module.get_parameter(name).detach(), 2)),
        }
        for key, value in expected.items():
            assert found[f"matrices/{key}/{name}"] == pytest.approx(value, abs=1e-7), (key, name)
    assert found["matrices/energy"] == pytest.approx(sum(energies) / 2, abs=1e-7)
    assert not any("previous" in key or "anchor" in key for key in found)


def test_it_needs_neither_eigenpairs_nor_two_batches():
    found = metrics(net(), Matrices(rank=R), k=0)
    assert "matrices/overlap_halves" in found
    assert "matrices/hessian_inside" not in found
    one = Matrices(rank=R, modules=["0"])
    assert "matrices/overlap_halves/0.weight" not in one_batch(one)


def one_batch(measurement):
    inputs, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    record = measure_subspace(
        net(), [(inputs, labels)], k=0, loss_fn=loss_fn, dtype="float64", measurements=[measurement]
    )
    return record.metrics


def convolutional(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).to(F64)


def of_images(module, batch, batch_idx):
    return nn.functional.cross_entropy(module(batch), torch.arange(len(batch)) % 3)


def measured(measurement, module, step, number):
    """One probe of a run, without the rest of it."""
    images = random(12, 2, 4, 4, seed=5)
    choice = CurvatureConfig(of_images, dtype="float64")
    space = ParameterSpace.of(module)
    with choice.loss(module, space) as loss:
        sample = sample_of_batches([images[:6], images[6:]])
        _, record = take_probe(
            loss, sample, Solver(k=0), [measurement], operator=choice.operator, step=step, number=number
        )
    return record.metrics


def test_spaces_are_compared_with_those_of_earlier_probes_also_after_a_resume():
    modules = [convolutional(seed) for seed in range(4)]
    images = random(12, 2, 4, 4, seed=5)
    spaces = [
        left(
            dense_gradient(module, lambda m: of_images(m, images[:6], 0) + of_images(m, images[6:], 0))[:72].view(4, 18)
        )
        for module in modules
    ]
    one, resumed = Matrices(rank=R, modules=["0"], anchor_step=10), Matrices(rank=R, modules=["0"], anchor_step=10)
    for number, module in enumerate(modules):
        before = one.state_dict()
        found = measured(one, module, 10 * number, number)
        key = "matrices/overlap_{}/0.weight"
        assert (key.format("previous") in found) == (number > 0)
        if number > 0:
            expected = mean_cosine(spaces[number], spaces[number - 1])
            assert found[key.format("previous")] == pytest.approx(expected, abs=1e-9)
        assert (key.format("anchor") in found) == (number > 1)
        if number > 1:
            assert found[key.format("anchor")] == pytest.approx(mean_cosine(spaces[number], spaces[1]), abs=1e-9)
            resumed.load_state_dict(before)
            again = measured(resumed, module, 10 * number, number)
            assert again == found
    again = measured(one, modules[-1], 30, 3)  # behind a checkpoint that was written there
    assert "matrices/overlap_previous/0.weight" not in again
    assert "matrices/overlap_anchor/0.weight" in again
    assert not any("overlap_previous" in key for key in measured(one, modules[0], 0, 0))


def test_a_state_of_another_kind_is_refused_and_the_old_one_stays():
    one = Matrices(rank=R, modules=["0"])
    measured(one, convolutional(0), 0, 0)
    good = one.state_dict()
    assert good["previous"]["bases"]["0.weight"].shape == (4, R)
    bad = torch.full((4, R), math.nan)
    for previous in (3, {"step": -1, "bases": {}}, {"step": 1}, {"step": 1, "bases": {"0.weight": bad}}):
        with pytest.raises(ValueError, match="expected"):
            one.load_state_dict({"previous": previous})
    assert one.state_dict() == good
    one.load_state_dict({})
    assert one.state_dict() == {}


def test_the_forecast_has_the_gradients_of_the_halves():
    sample = SimpleNamespace(hessian=(1, 2), extra=(3, 4))
    assert Matrices().expected_products(SimpleNamespace(sample=sample)) == pytest.approx(1.4)


def test_a_rank_of_the_whole_side_holds_everything():
    module = nn.Linear(5, 3).to(F64)
    assert not any("matrices/" in key for key in metrics(module, Matrices(rank=3), k=2))
    found = metrics(module, Matrices(rank=3, modules=["weight"]), k=2)
    for key in ("energy", "overlap_halves", "hessian_inside"):
        assert found[f"matrices/{key}/weight"] == pytest.approx(1.0, abs=1e-9)
