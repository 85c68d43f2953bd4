"""Sharpness in the norm of Muon's steps, against closed forms, dense Hessians and torch's own Muon."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_subspace import Measurement, Needs, SpectralSharpness, measure_subspace
from lightning_subspace.measurements.spectral_norm import Matrix, SpectralNorm, muon_scale
from lightning_subspace.measurements.spectral_sharpness import largest_curvature

from .probes import F64, data, derivatives, loss_fn, metrics, net, step, stepped

SHAPES = {0: (6, 5), 36: (3, 6)}  # of the two weights of the net, by their first coordinates


def muon(module, **settings):
    matrices = [p for p in module.parameters() if p.ndim == 2]
    return torch.optim.Muon(matrices, **{"lr": 0.02, "weight_decay": 0.0, **settings})


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def of(loss, matrix):
    """What is measured of a loss of one weight matrix, started at `matrix`."""
    module = nn.Linear(*reversed(matrix.shape), bias=False).to(F64)
    module.weight.data.copy_(matrix)
    return lambda *args, **settings: metrics(
        module,
        SpectralSharpness(*args, **settings),
        k=0,
        loss_fn=lambda m, batch, i: loss(m.weight) + 0.0 * batch[0].sum(),
    )


# The norm


def test_the_best_direction_has_unit_length_and_the_dual_norm_as_its_product():
    norm = SpectralNorm((Matrix(0, (4, 3), 2.0), Matrix(14, (2, 5), 0.5)))
    for seed in range(5):
        vector, other = random(seed, 30), random(seed + 10, 30)
        best = norm.best(vector)
        assert norm.length(best) == pytest.approx(1.0, abs=1e-12)
        assert float(best @ vector) == pytest.approx(norm.dual(vector), rel=1e-12)
        assert float(other @ vector) <= norm.dual(vector) * norm.length(other)
        assert best[12:14].eq(0).all()
        assert best[24:].eq(0).all()


@pytest.mark.parametrize("adjustment", [None, "original", "match_rms_adamw", "spectral_unclamped"])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_the_scale_is_the_one_that_torch_applies(shape, adjustment):
    weight = torch.zeros(shape, dtype=F64, requires_grad=True)
    settings = {} if adjustment is None else {"adjust_lr_fn": adjustment}
    try:
        optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **settings)
    except ValueError:
        pytest.skip("this torch does not know it")
    weight.grad = random(0, *shape)
    optimizer.step()
    # Its iteration is polar to about a third only, in bfloat16; the mean of the singular values is the scale.
    singular = torch.linalg.svdvals(weight.detach())
    assert float(singular.max()) < 1.25 * muon_scale(shape, adjustment)
    assert float(singular.min()) > 0.6 * muon_scale(shape, adjustment)


# The iteration


def test_a_rank_one_hessian_has_the_square_of_the_nuclear_norm():
    a = random(0, 4, 3)
    found = of(lambda w: 0.5 * (w * a).sum().square(), random(1, 4, 3))(adjust_lr_fn="spectral_unclamped")
    nuclear = float(torch.linalg.matrix_norm(a, "nuc"))
    assert found["spectral_sharpness"] == pytest.approx(4 / 3 * nuclear**2, rel=1e-9)


def test_the_identity_has_the_sum_of_the_squares_of_the_scales():
    found = of(lambda w: 0.5 * w.square().sum(), random(1, 4, 3))()
    assert found["spectral_sharpness"] == pytest.approx(4 / 3 * 3, rel=1e-9)


def test_every_product_raises_the_curvature_where_none_is_negative():
    norm = SpectralNorm((Matrix(0, (6, 5), 1.0), Matrix(36, (3, 6), 0.7)))
    for seed in range(5):
        root, seen = random(seed, 8, 57), []
        hessian = root.T @ root

        def product(d, hessian=hessian, seen=seen):
            seen.append(float(d @ hessian @ d))
            return seen[-1], hessian @ d

        sharpness, direction = largest_curvature(product, norm.best, norm.best(random(seed, 57)), max_products=200)
        assert all(later >= earlier * (1 - 1e-12) for earlier, later in pairwise(seen))
        assert sharpness == seen[-1] == float(direction @ hessian @ direction)
        # It is a maximum: no direction on a path away from it is better.
        for other in range(5):
            away = direction + 0.1 * norm.best(random(other, 57))
            away = away / norm.length(away)
            assert float(away @ hessian @ away) < sharpness * 1.001


def test_what_does_not_settle_and_what_is_not_finite_is_left_out():
    turns = iter(range(100))
    assert largest_curvature(lambda d: (float(next(turns) % 2), d), lambda v: v, torch.ones(3), 9) is None
    assert largest_curvature(lambda d: (float("nan"), d), lambda v: v, torch.ones(3)) is None


# With an optimizer


@pytest.mark.parametrize("adjustment", [None, "match_rms_adamw"])
def test_the_ratio_is_that_of_the_steps_that_muon_takes(adjustment):
    module, optimizer = stepped(lambda m: muon(m, adjust_lr_fn=adjustment), 3)
    gradient, hessian = derivatives(module)
    found = metrics(module, SpectralSharpness(), k=0, optimizer=optimizer)
    norm = SpectralNorm(tuple(Matrix(at, shape, muon_scale(shape, adjustment)) for at, shape in SHAPES.items()))
    search = largest_curvature(lambda d: (float(d @ hessian @ d), hessian @ d), norm.best, norm.best(gradient))
    assert found["spectral_sharpness"] == pytest.approx(search[0], rel=1e-9)
    dual = sum(matrix.scale * float(torch.linalg.matrix_norm(matrix.of(gradient), "nuc")) for matrix in norm.matrices)
    ratio = search[0] * 0.02 / (2.0 * dual)
    assert found["spectral_sharpness_over_threshold"] == pytest.approx(ratio, rel=1e-9)


def test_a_group_of_a_smaller_rate_takes_shorter_steps():
    module = net()
    first, second = (p for p in module.parameters() if p.ndim == 2)
    optimizer = torch.optim.Muon([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.04}])
    by_groups = metrics(module, SpectralSharpness(), k=0, optimizer=optimizer)
    shares = {0: 0.25, 36: 1.0}
    norm = SpectralNorm(tuple(Matrix(at, s, muon_scale(s, None) * shares[at]) for at, s in SHAPES.items()))
    gradient, hessian = derivatives(module)
    search = largest_curvature(lambda d: (float(d @ hessian @ d), hessian @ d), norm.best, norm.best(gradient))
    assert by_groups["spectral_sharpness"] == pytest.approx(search[0], rel=1e-9)
    expected = search[0] * 0.04 / (2.0 * norm.dual(gradient))
    assert by_groups["spectral_sharpness_over_threshold"] == pytest.approx(expected, rel=1e-9)


def test_beside_another_optimizer_the_rate_is_given_and_names_choose_the_matrices():
    module = net()
    alone = metrics(module, SpectralSharpness(params=["2.*"]), k=0)
    assert "spectral_sharpness_over_threshold" not in alone
    with_rate = metrics(module, SpectralSharpness(params=["2.*"], lr=0.02), k=0)
    gradient, _ = derivatives(module)
    dual = float(torch.linalg.matrix_norm(gradient[36:54].view(3, 6), "nuc"))
    expected = alone["spectral_sharpness"] * 0.02 / (2.0 * dual)
    assert with_rate["spectral_sharpness_over_threshold"] == pytest.approx(expected, rel=1e-9)


def test_without_a_matrix_it_is_left_out_with_a_word():
    with pytest.warns(UserWarning, match="params: expected matrices, got none"):
        record = measure_subspace(
            net(), data(), k=0, loss_fn=loss_fn, measurements=[SpectralSharpness(params=["*.bias"])]
        )
    assert "spectral_sharpness" not in record.metrics


# Between probes


class Counted(Measurement):
    """Takes another measurement as if at a later probe, and counts its products."""

    needs = Needs.NOTHING

    def __init__(self, measurement, at, number=1):
        self.measurement, self.at, self.number, self.count = measurement, at, number, 0

    def measure(self, probe):
        own = probe.operator.matvec

        def matvec(v):
            self.count += 1
            return own(v)

        probe.operator.matvec = matvec
        found = self.measurement.measure(replace(probe, number=self.number, step=self.at))
        del probe.operator.matvec
        return found


def searched(measurement, module, optimizer, at, number=1):
    """Its sharpness, and the number of products."""
    counted = Counted(measurement, at, number)
    return metrics(module, counted, k=0, optimizer=optimizer)["spectral_sharpness"], counted.count


def test_the_next_search_begins_where_the_last_one_ended_also_behind_a_checkpoint():
    module, optimizer = stepped(lambda m: muon(m, lr=1e-4), 2)
    measurement = SpectralSharpness()
    _, cold = searched(measurement, module, optimizer, at=5, number=0)
    before = measurement.state_dict()
    step(module, optimizer)
    expected = searched(measurement, module, optimizer, at=6)
    assert expected[1] == 3 < cold
    resumed = SpectralSharpness()
    resumed.load_state_dict(before)
    assert searched(resumed, module, optimizer, at=6) == expected
    again = SpectralSharpness()
    again.load_state_dict(measurement.state_dict())  # the probe of step 6 is taken again
    assert searched(again, module, optimizer, at=6) == expected
    with pytest.raises(ValueError, match="step, start, found: expected a step and two vectors"):
        again.load_state_dict({"step": 5, "found": 3})
    again.load_state_dict({})
    assert searched(again, module, optimizer, at=6)[1] == cold
