"""Critical sharpness, batch sharpness, gradient noise and the control, against dense derivatives and closed forms."""

import math

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_subspace import (
    BatchSharpness,
    Chi,
    Control,
    CriticalSharpness,
    GradientNoise,
    LossChange,
    Measurement,
    Needs,
    Subspace,
    SubspaceMonitor,
    eigsh,
)
from lightning_subspace.measurements.critical_sharpness import critical_multiple
from lightning_subspace.measurements.overlap import _mean_sine
from tests.measurements.test_measurements import Weights, blobs, fit, small
from tests.oracles import dense_gradient, dense_hessian, mean_square_cosine, projected_share

from .probes import F64, SIZES, data, derivatives, flat, loss_fn, metrics, net, objective, stepped, top_eigenspace

# The loss at displaced points


class Values(Measurement):
    needs = Needs.NOTHING

    def __init__(self, offset):
        self.offset = offset

    def measure(self, probe):
        offset = probe.partition.cut(self.offset)
        before = probe.operator.matvec(offset)
        self.found = [probe.operator.value(None), probe.operator.value(offset), probe.operator.part([1]).value(offset)]
        self.same = torch.equal(before, probe.operator.matvec(offset))
        return {}


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
def test_the_value_is_the_mean_loss_there_and_nothing_moves(curvature):
    module = net()
    offset = torch.randn(57, generator=torch.Generator().manual_seed(3), dtype=F64)
    before, see = flat(module), Values(offset)
    metrics(module, see, k=0, curvature=curvature)
    assert torch.equal(flat(module), before)
    assert see.same
    moved = net()
    nn.utils.vector_to_parameters(before + offset, moved.parameters())
    expected = [objective(module), objective(moved), loss_fn(moved, data()[1], 0)]
    assert see.found == pytest.approx([float(value.detach()) for value in expected], rel=1e-12)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)


def test_what_is_recomputed_inside_a_product_meets_theta_again():
    module, see = Checkpointed(), Values(torch.ones(57, dtype=F64))
    metrics(module, see, k=0)
    assert see.same


# Critical sharpness


@pytest.mark.parametrize("start", [1e-6, 0.1, 1.0, 50.0, 1e6])
@pytest.mark.parametrize(
    ("change", "slope", "expected"),
    [
        (lambda a: -2.0 * a + 0.5 * a**2, -2.0, 4.0),
        (lambda a: -a + a**4, -1.0, 1.0),
        (lambda a: -a + 0.3 * a**2 - 0.02 * a**3 + 0.001 * a**4, -1.0, 4.3019),
        (lambda a: -a if a < 7.0 else math.inf, -1.0, 7.0),
        (lambda a: -a if a < 7.0 else math.nan, -1.0, 7.0),
    ],
)
def test_the_critical_multiple_is_where_the_change_turns(change, slope, expected, start):
    points = []

    def counted(a):
        points.append(a)
        return change(a)

    found = critical_multiple(counted, slope, start, max_points=25)
    assert found == pytest.approx(expected, rel=0.03)
    if start == 1.0 and expected == 4.0:
        assert len(points) == 2
        assert found == pytest.approx(4.0, rel=1e-12)


def test_a_loss_that_never_rises_or_is_rounding_has_no_critical_multiple():
    assert critical_multiple(lambda a: -a, -1.0, 1.0, max_points=10) is None
    assert critical_multiple(lambda a: -a + a * a, -1.0, 1.0, max_points=10, rounding=0.1) is None


def quadratic(module, batch, batch_idx):
    """A linear regression, whose loss is a quadratic in the parameters."""
    target = torch.eye(3, dtype=F64)[batch[1]]
    return (nn.functional.linear(batch[0], module.weight) - target).square().sum(1).mean()


@pytest.mark.parametrize("k", [0, 2])
def test_on_a_quadratic_it_is_the_curvature_along_the_gradient(k):
    torch.manual_seed(0)
    module = nn.Linear(5, 3, bias=False).to(F64)
    optimizer = SGD(module.parameters(), lr=0.07)
    for measurement in (CriticalSharpness(), CriticalSharpness("gradient")):
        found = metrics(module, measurement, k=k, optimizer=optimizer, loss_fn=quadratic)
        assert found["critical_sharpness"] == pytest.approx(found["gradient_curvature"], rel=1e-3)
        if measurement.along == "update":
            assert found["critical_step"] == pytest.approx(2.0 / (0.07 * found["gradient_curvature"]), rel=1e-3)
            assert measurement.state_dict()["found"] == pytest.approx(found["critical_step"])
        else:
            assert "critical_step" not in found


@pytest.mark.parametrize("make", [lambda m: SGD(m.parameters(), lr=0.3, momentum=0.9), lambda m: Adam(m.parameters())])
def test_the_loss_falls_just_before_the_critical_step_and_rises_just_behind_it(make):
    module, optimizer = stepped(make, 6)
    found = metrics(module, CriticalSharpness(), k=0, optimizer=optimizer)
    before, loss = flat(module), float(objective(module).detach())
    optimizer.zero_grad()
    objective(module).backward()
    optimizer.step()
    step = flat(module) - before
    for factor, rises in ((0.96, False), (1.04, True)):
        nn.utils.vector_to_parameters(before + factor * found["critical_step"] * step, module.parameters())
        assert (float(objective(module).detach()) > loss) == rises


def test_what_has_no_critical_step_is_left_out():
    module, optimizer = stepped(lambda m: SGD(m.parameters(), lr=0.1), 2)
    optimizer.param_groups[0]["lr"] = 0.0
    assert "critical_sharpness" not in metrics(module, CriticalSharpness(), k=0, optimizer=optimizer)
    with pytest.raises(UserWarning, match="no optimizer, or several"):
        metrics(module, CriticalSharpness(), k=0)
    with pytest.raises(ValueError, match="along: expected"):
        CriticalSharpness("newton")
    with pytest.raises(ValueError, match="max_points: expected"):
        CriticalSharpness(max_points=1)


# Mini-batches


@pytest.mark.parametrize("batches", [2, 16])
def test_batch_sharpness_and_noise_are_those_of_dense_derivatives(batches):
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.3), 5)
    found = metrics(module, BatchSharpness(batches), GradientNoise(batches), k=0)
    whole, hessian = derivatives(module)
    chosen = [0, 2] if batches == 2 else range(4)
    weights = torch.tensor([SIZES[i] for i in chosen], dtype=F64)
    weights = weights / weights.sum()
    gradients = [dense_gradient(module, lambda m, i=i: loss_fn(m, data()[i], 0)) for i in chosen]
    hessians = [dense_hessian(module, lambda m, i=i: loss_fn(m, data()[i], 0)) for i in chosen]
    squares = torch.stack([g @ g for g in gradients])
    own = torch.stack([g @ h @ g for g, h in zip(gradients, hessians, strict=True)])
    common = torch.stack([g @ hessian @ g for g in gradients])
    expected = {
        "batch_sharpness": (weights * own / squares).sum(),
        "batch_sharpness_pooled": (weights * own).sum() / (weights * squares).sum(),
        "gradient_noise_interaction": (weights * common).sum() / (whole @ whole),
        "interaction_sharpness": (weights * common).sum() / (weights * squares).sum(),
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(float(value), rel=1e-9), key


def test_they_are_taken_at_every_so_many_probes():
    torch.manual_seed(0)
    monitor = SubspaceMonitor(
        k=0, every_n_steps=[0, 1, 2, 3, 4], max_overhead=None, sample="all", measurements=[BatchSharpness(every=2)]
    )
    fit(small(), DataLoader(blobs(), batch_size=8), monitor, max_steps=5)
    assert ["batch_sharpness" in record.metrics for record in monitor.history] == [True, False, True, False, True]


# What is known after the step, and the control, in a run


def test_a_run_with_all_of_them():
    module, weights = small().double(), Weights()
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(module.net(batch[0].double()), batch[1])
    extra = [Chi(), LossChange(), Control(reference_step=2)]
    monitor = SubspaceMonitor(
        k=3,
        every_n_steps=[0, 3, 4, 20],
        max_overhead=None,
        sample="all",
        tol=1e-9,
        max_matvecs=1000,
        dtype="float64",
        on_failure="raise",
        measurements=extra,
    )
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=21)
    (batch,) = DataLoader(blobs(), batch_size=96)
    bases = {}
    for record in monitor.history:
        there = weights.module_at(module, record.step)
        found, update = record.metrics, weights.at[record.step + 1] - weights.at[record.step]
        gradient = dense_gradient(there.net, lambda m: nn.functional.cross_entropy(m(batch[0].double()), batch[1]))
        hessian = dense_hessian(there.net, lambda m: nn.functional.cross_entropy(m(batch[0].double()), batch[1]))
        values, basis = top_eigenspace(hessian, 7)
        bases[record.step] = basis
        top = basis[:3].T @ basis[:3]
        bulk = torch.eye(57, dtype=F64) - top
        assert found["chi_update"] == pytest.approx(projected_share(basis[:3], update) ** 0.5, abs=1e-5)
        expected = gradient @ top @ update + 0.5 * update @ top @ hessian @ top @ update
        assert found["loss_change_top"] == pytest.approx(float(expected), rel=1e-4)
        assert found["loss_change_bulk"] == pytest.approx(float(gradient @ bulk @ update), rel=1e-4)
        full = found["loss_change_bulk"] + 0.5 * float(update @ bulk @ hessian @ bulk @ update)
        assert full <= found["loss_change_bulk_high"] + 1e-12
        assert values[0] > 0
    previous = None
    for record in monitor.history:
        found, basis = record.metrics, bases[record.step]
        if previous is not None:
            for key, rows in (("top", slice(0, 3)), ("next", slice(3, 6))):
                expected = mean_square_cosine(basis[rows], bases[previous][rows])
                assert found[f"overlap_{key}_previous"] == pytest.approx(expected, abs=1e-5)
                if previous >= 3:
                    expected = mean_square_cosine(basis[rows], bases[3][rows])
                    assert found[f"overlap_{key}_reference"] == pytest.approx(expected, abs=1e-5)
            assert found["overlap_top_previous"] == pytest.approx(found["overlap_previous"], abs=1e-5)
        else:
            assert not any(key.startswith("overlap") for key in found)
        previous = record.step


def test_the_control_knows_the_next_space_as_well_as_it_says():
    """On a spectrum without a gap behind 2k, at the solver's default tolerance in float32."""
    eigenvalues = torch.cat([torch.tensor([9.0, 7.0, 5.0]), 1.0 / torch.arange(1, 58)]).double()
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=F64))[0].T
    matrix = (basis.T * eigenvalues) @ basis
    found = eigsh(lambda v: (matrix @ v.double()).float(), 60, 6, verify="never", tol=1e-2, subspace_tol=None)
    space = Subspace.of(found)
    true = basis[3:6]
    assert 1.0 - mean_square_cosine(found.eigenvectors[3:].double(), true) > 0.0
    stated = _mean_sine(space, 3)
    for other in (true, basis[6:9], basis[:3]):
        off = mean_square_cosine(found.eigenvectors[3:].double(), other) - mean_square_cosine(true, other)
        assert abs(off) <= stated < 0.3


def test_the_control_needs_room_for_twice_k():
    assert not any("next" in key for key in metrics(net(), Control(), k=29))
