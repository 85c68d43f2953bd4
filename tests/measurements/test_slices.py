"""The loss along eigenvectors and on their plane, against evaluations of the module itself."""

import io
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_subspace import LossSlices, Slices, SpectralSharpness, Stability, SubspaceMonitor, measure_subspace
from lightning_subspace.curvature.batch_mean import BatchMean
from lightning_subspace.measurements.prospect import Prospect
from lightning_subspace.measurements.slices import FORWARD
from lightning_subspace.report.slices_figure import slices_figure
from lightning_subspace.subspace.loss_slices import grid
from lightning_subspace.subspace.solver import Solver
from tests.measurements.test_measurements import blobs, fit, small

from .probes import F64, data, derivatives, flat, loss_fn, metrics, net, objective, top_eigenspace

K = 4


def taken(slices, module=None, **settings):
    module = net() if module is None else module
    found = metrics(module, slices, k=K, verify="never", **settings)
    return module, found, slices.history[-1]


def eigenvectors(module):
    """The first three, dense, uphill."""
    gradient, hessian = derivatives(module)
    values, basis = top_eigenspace(hessian, K)
    basis = basis * torch.sign(basis @ gradient)[:, None]
    return gradient, values[:3], basis[:3]


def loss_at(module, offset):
    """The loss of a copy that is moved."""
    moved = net()
    nn.utils.vector_to_parameters(flat(module) + offset, moved.parameters())
    return float(objective(moved).detach())


def test_lines_and_plane_are_the_loss_there():
    module, found, slices = taken(Slices(points=5, share=0.5))
    _, values, basis = eigenvectors(module)
    loss = loss_at(module, torch.zeros(57, dtype=F64))
    assert slices.loss == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(slices.eigenvalues, values, rtol=1e-8, atol=0)
    # The quadratic term at the ends is c.
    torch.testing.assert_close(slices.ranges**2 * values / 2.0, torch.full((3,), 0.5 * loss, dtype=F64))
    for i in range(3):
        along = [loss_at(module, x * slices.ranges[i] * basis[i]) for x in (-1.0, -0.5, 0.0, 0.5, 1.0)]
        assert slices.lines[i].tolist() == pytest.approx(along, rel=1e-6)
        even = (along[0] + along[-1]) / 2.0 - loss
        assert found[f"slices/even_{i + 1}"] == pytest.approx(even / (0.5 * loss), rel=1e-5)
        assert found[f"slices/range_{i + 1}"] == pytest.approx(math.sqrt(loss / float(values[i])), rel=1e-6)
    for row, y in enumerate(grid(5)):
        for column, x in enumerate(grid(5)):
            there = loss_at(module, x * slices.ranges[0] * basis[0] + y * slices.ranges[1] * basis[1])
            assert float(slices.plane[row, column]) == pytest.approx(there, rel=1e-6)
    torch.testing.assert_close(slices.plane[2], slices.lines[0], rtol=0, atol=0)
    torch.testing.assert_close(slices.plane[:, 2], slices.lines[1], rtol=0, atol=0)


def test_slope_and_curvature_at_the_middle_are_those_of_the_quadratic():
    # c = 1e-6 of the loss: differences over so short a line.
    module, _, slices = taken(Slices(points=3, share=1e-6, plane=False))
    gradient, values, basis = eigenvectors(module)
    assert (slices.slopes >= 0.0).all()
    torch.testing.assert_close(slices.slopes, basis @ gradient, rtol=1e-6, atol=1e-12)
    a, (low, middle, high) = slices.ranges, slices.lines.T
    torch.testing.assert_close((high - low) / (2.0 * a), slices.slopes, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close((high + low - 2.0 * middle) / a.square(), values, rtol=1e-4, atol=0)
    torch.testing.assert_close(slices.even_ratios, torch.ones(3, 1, dtype=F64), rtol=1e-4, atol=0)
    torch.testing.assert_close(slices.quadratic_lines, slices.lines, rtol=1e-9, atol=0)


def quadratic(signs):
    def loss(module, batch, batch_idx):
        theta = torch.cat([p.reshape(-1) for p in module.parameters()])
        return 1.0 + 0.5 * (signs * (theta - 0.1).square()).sum() + 0.0 * batch[0].sum()

    return loss


@pytest.mark.parametrize(("which", "share"), [("LA", 1.0), ("SA", 0.2)])
def test_of_a_quadratic_loss_all_points_are_those_of_the_model_also_where_it_bends_down(which, share):
    signs = torch.linspace(-2.0, 3.0, 57, dtype=F64)
    _, found, slices = taken(Slices(points=7, share=share), loss_fn=quadratic(signs), which=which)
    torch.testing.assert_close(slices.lines, slices.quadratic_lines, rtol=1e-9, atol=0)
    torch.testing.assert_close(slices.plane, slices.quadratic_plane, rtol=1e-9, atol=0)
    assert [found[f"slices/even_{i}"] for i in (1, 2, 3)] == pytest.approx([1.0] * 3, rel=1e-7)


def test_the_module_is_left_as_it_was():
    module = net()
    before = flat(module)
    taken(Slices(points=3), module)
    assert torch.equal(flat(module), before)


def test_with_fewer_eigenvectors_there_are_fewer_lines_and_without_them_none():
    slices = Slices(points=3)
    assert "slices/even_1" not in metrics(net(), slices, k=0, verify="never")
    found = metrics(net(), slices, k=1, verify="never")
    assert {key for key in found if key.startswith("slices/")} == {"slices/even_1", "slices/range_1"}
    assert slices.history[-1].plane is None


def test_a_loss_of_zero_has_no_range():
    slices = Slices(points=3)
    found = metrics(net(), slices, k=2, loss_fn=lambda m, b, i: quadratic(torch.ones(57, dtype=F64))(m, b, i) * 0.0)
    assert "slices/even_1" not in found
    assert not slices.history


@pytest.mark.parametrize(("directions", "points", "plane"), [(3, 5, True), (2, 3, False), (1, 3, True)])
def test_the_forecast_is_the_number_of_forward_passes(directions, points, plane, monkeypatch):
    count, own = [], BatchMean.value
    monkeypatch.setattr(BatchMean, "value", lambda self, offset: count.append(1) or own(self, offset))
    slices = Slices(directions=directions, points=points, plane=plane)
    metrics(net(), slices, k=K, verify="never")
    expected = slices.expected_products(Prospect(0, Solver(K), None))
    assert expected == pytest.approx(FORWARD * len(count))


# Along a run


def run(slices, steps, **trainer):
    monitor = SubspaceMonitor(k=2, every_n_steps=steps, max_overhead=None, verify="never", measurements=[slices])
    fit(small(), DataLoader(blobs(), batch_size=32), monitor, max_steps=max(steps) + 1, **trainer)
    return monitor


def test_listed_steps_are_taken_at_the_first_probe_at_or_after_them():
    slices = Slices(at=[0, 3, 4], points=3, plane=False)
    monitor = run(slices, [0, 2, 4, 6])
    assert [found.step for found in slices.history] == [0, 4]
    assert [r.step for r in monitor.history if "slices/even_1" in r.metrics] == [0, 4]


def test_what_is_kept_is_bounded_and_goes_on_from_a_state():
    slices = Slices(points=3, keep=4)
    run(slices, list(range(7)))
    assert [found.step for found in slices.history] == [0, 4, 5, 6]
    other, file = Slices(points=3, keep=4), io.BytesIO()
    torch.save(slices.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [one.step for one in other.history] == [one.step for one in slices.history]
    torch.testing.assert_close(other.history[-1].plane, slices.history[-1].plane, rtol=0, atol=0)
    other.load_state_dict({})
    assert not other.history
    broken = dict(slices.state_dict()["history"][0])
    broken["lines"] = broken["lines"][:, :2]
    with pytest.raises(ValueError, match="slices: expected tensors for d directions and an odd number of points"):
        other.load_state_dict({"history": [broken]})
    with pytest.raises(ValueError, match="slices: expected a step, a loss and tensors"):
        other.load_state_dict({"history": [{"step": 3}]})


def test_figures_are_new_once(tmp_path):
    slices = Slices(at=[0, 2], points=3)
    run(slices, [0, 2], logger=CSVLogger(tmp_path))
    names = sorted(path.name for path in tmp_path.rglob("*slices*.png"))
    assert names == ["subspace_slices_000000.png", "subspace_slices_000002.png"]
    assert list(slices.figures()) == []
    assert len(slices.plot().axes) >= 3


def test_figures_stand_for_none_for_infinite_values_and_for_lines_alone():
    assert slices_figure(None).axes[0].texts[0].get_text() == "no slices yet"
    wall = torch.tensor([[math.inf, 1.0, 3.0], [2.0, 1.0, 2.0]], dtype=F64)
    ones = torch.ones(2, dtype=F64)
    plane = torch.full((3, 3), math.nan, dtype=F64)
    plane[1] = wall[0]
    for given in (None, plane):
        figure = slices_figure(LossSlices(7, 1.0, ones, ones * 0.1, ones, wall, given))
        figure.canvas.draw()
        assert "step 7" in figure.axes[0].get_title(loc="left")


def test_batch_normalisation_in_train_mode_uses_the_batches_of_the_eigensolve():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    statistics = module[1].running_mean.clone()
    slices = Slices(points=3, share=1e-6, plane=False)
    measure_subspace(
        module, data(), k=2, tol=1e-8, dtype="float64", loss_fn=loss_fn, measurements=[slices], max_matvecs=500
    )
    assert torch.equal(module[1].running_mean, statistics)
    torch.testing.assert_close(slices.history[-1].even_ratios, torch.ones(2, 1, dtype=F64), rtol=1e-3, atol=0)


def test_training_is_the_same_to_the_bit_with_and_without():
    weights = []
    for measurements in ([], [Slices(points=3), Stability(), SpectralSharpness(max_products=5)]):
        monitor = SubspaceMonitor(k=2, every_n_steps=2, max_overhead=None, verify="never", measurements=measurements)
        module = small(optimizer=torch.optim.NAdam, lr=0.01)
        torch.manual_seed(1)
        fit(module, DataLoader(blobs(), batch_size=32, shuffle=True), monitor, max_steps=5)
        weights.append(flat(module))
    assert torch.equal(*weights)
    assert {"slices/even_1", "gradient_stability"} <= monitor.history[-1].metrics.keys()
