"""Two ranks measure what one does, on a module that each has whole, and on the shards of FSDP2."""

import functools
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam

from lightning_subspace import (
    BatchSharpness,
    Chi,
    Control,
    CriticalSharpness,
    Density,
    GradientNoise,
    Layers,
    LossChange,
    Measurement,
    Slices,
    SpectralSharpness,
    Stability,
    Trace,
    measure_subspace,
)
from tests.left_out import without_error_bar
from tests.processes import run
from tests.thorough import usual

from .probes import F64, data, loss_fn, metrics, net, objective, step, stepped

OPTIMIZERS = {
    "sgd": lambda module: SGD(module.parameters(), lr=0.1, momentum=0.5),
    "adam": lambda module: Adam(module.parameters(), lr=0.01),
    "groups": lambda module: Adam(
        [{"params": module[0].parameters()}, {"params": [module[2].weight], "lr": 0.03}], lr=0.01
    ),
}


class AfterSteps(Measurement):
    """What the measurements say after a step."""

    def measure(self, probe):
        update = probe.partition.cut(torch.linspace(-1.0, 1.0, 57, dtype=F64))
        metrics = {}
        for measurement in (Chi(), Layers(), LossChange()):
            metrics.update(measurement.after_step(probe, None, update))
        return metrics


class ControlTwice(Measurement):
    """The control compared with spaces that are turned a little, since there is one probe."""

    def measure(self, probe):
        control = Control()
        control.measure(probe)
        held = control._previous
        noise = probe.partition.random(0, 0, F64)
        top, after = (rows + 0.3 * noise / 57**0.5 * rows for rows in held.bases)
        control._previous = replace(held, bases=(top / 2, after / 2))
        return control.measure(replace(probe, number=1))


def everything():
    return [
        AfterSteps(),
        BatchSharpness(),
        Chi(),
        ControlTwice(),
        CriticalSharpness(),
        Density(steps=12),
        GradientNoise(),
        Layers(exact=["0.*"]),
        LossChange(),
        Slices(points=3),
        Stability(),
        Trace(groups="types"),
    ]


SOLVER = {"k": 2, "tol": 1e-8}


def measured(module, optimizer, *, error_bar):
    with nullcontext() if error_bar else without_error_bar():
        record = measure_subspace(
            module,
            data(),
            dtype="float64",
            loss_fn=loss_fn,
            max_matvecs=500,
            optimizer=optimizer,
            measurements=everything(),
            **SOLVER,
            verify="never",
            group=dist.group.WORLD,
        )
    return dict(record.metrics)


def on_whole_modules(name):
    return measured(*stepped(OPTIMIZERS[name], 5), error_bar=False)


def on_shards(name):
    torch.manual_seed(0)
    module = net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = OPTIMIZERS[name](module)
    for _ in range(5):
        step(module, optimizer)
    return measured(module, optimizer, error_bar=True)


def by_differences():
    module = net()
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = OPTIMIZERS["adam"](module)
    for _ in range(5):
        step(module, optimizer)
    with without_error_bar():
        record = measure_subspace(
            module,
            data(),
            k=2,
            dtype="float64",
            curvature="finite-difference",
            loss_fn=loss_fn,
            optimizer=optimizer,
            measurements=[CriticalSharpness(), Stability(), BatchSharpness(), Trace()],
            verify="never",
            group=dist.group.WORLD,
        )
    return dict(record.metrics)


def value():
    class Value(Measurement):
        def measure(self, probe):
            return {"value": probe.operator.value(None)}

    record = measure_subspace(
        net(), data(), k=2, loss_fn=loss_fn, dtype="float64", measurements=[Value()], group=dist.group.WORLD
    )
    return record.metrics["value"]


CASES = usual(
    [(on_whole_modules, "sgd"), (on_shards, "groups")],
    thorough=[(on_whole_modules, "adam"), (on_whole_modules, "groups"), (on_shards, "sgd"), (on_shards, "adam")],
)
# Their products are compared in tests/curvature/test_fsdp_difference.py, and measurements on shards in the cases above.
TASKS = [*CASES, (value,), *usual([], thorough=[(by_differences,)])]


@functools.cache
def on_two_ranks():
    """What both ranks return of each task, all in one start."""
    return run(lambda: {task: task[0](*task[1:]) for task in TASKS}, 2, timeout=30.0 * len(TASKS))


def both(*task):
    return [returned[task] for returned in on_two_ranks()]


@pytest.mark.parametrize(("function", "name"), CASES)
def test_two_ranks_measure_what_one_does(function, name):
    module, optimizer = stepped(OPTIMIZERS[name], 5)
    settings = {"optimizer": optimizer, "verify": "never", "error_bar": function is on_shards, **SOLVER}
    alone = metrics(module, *everything(), **settings)
    assert len(alone) > 30
    assert "stability" in alone
    first, second = both(function, name)
    assert first == second
    left_out = {"solver/residual", "solver/subspace_error", "eigenvalues/03"}  # of the last matvec
    assert first.keys() == alone.keys()
    for key in alone.keys() - left_out:
        assert first[key] == pytest.approx(alone[key], rel=1e-6, abs=1e-8), key


@pytest.mark.thorough
def test_differences_on_the_shards_measure_the_same():
    module, optimizer = stepped(OPTIMIZERS["adam"], 5)
    alone = metrics(
        module, CriticalSharpness(), Stability(), BatchSharpness(), Trace(), k=2, optimizer=optimizer, verify="never"
    )
    first, second = both(by_differences)
    assert first == second
    keys = ("critical_sharpness", "critical_step", "stability", "batch_sharpness", "trace", "frobenius_norm")
    noise = ("noise/scale", "noise/scale_high", "noise/variance_bulk")  # in the pass with the eigenvectors
    for key in (*keys, *noise):
        assert first[key] == pytest.approx(alone[key], rel=2e-3), key


def in_norms_of_matrices(sharded):
    """The sharpness in the spectral norm on whole matrices, or what is said on shards."""
    module = net()
    if sharded:
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        record = measure_subspace(
            module,
            data(),
            k=0,
            dtype="float64",
            loss_fn=loss_fn,
            measurements=[SpectralSharpness(lr=0.02)],
            group=dist.group.WORLD,
        )
    found = {key: value for key, value in record.metrics.items() if key.startswith("spectral_sharpness")}
    return found, [str(one.message) for one in told if "SpectralSharpness" in str(one.message)]


def test_matrices_are_put_together_from_the_parts_of_three_ranks_and_not_from_shards():
    alone = metrics(net(), SpectralSharpness(lr=0.02), k=0)
    whole, shards = zip(*run(lambda: [in_norms_of_matrices(sharded) for sharded in (False, True)], 3), strict=True)
    found, told = zip(*whole, strict=True)
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {"spectral_sharpness", "spectral_sharpness_over_threshold"}
    for key, value in found[0].items():
        assert value == pytest.approx(alone[key], rel=1e-9)
    assert told == ([], [], [])
    assert [nothing for nothing, _ in shards] == [{}, {}, {}]
    said = shards[0][1]
    assert "got shards of FSDP2, so that SpectralSharpness is left out" in said[0]


def failing(place):
    """One rank's loss fails at displaced points, or in a product of the density."""

    class Breaks(Measurement):
        def measure(self, probe):
            index = probe.partition.ranks.index
            if place == "value":
                loss = probe.operator._loss
                own = loss.value_at
                loss.value_at = (lambda *args: 1 / 0) if index else own
                return {"value": probe.operator.value(None)}
            own = probe.operator.matvec
            probe.operator.matvec = lambda v: own(v) * (float("nan") if index else 1.0)
            return Trace().measure(probe)

    module, optimizer = stepped(OPTIMIZERS["sgd"], 1)
    try:
        record = measure_subspace(
            module, data(), k=2, loss_fn=loss_fn, measurements=[Breaks()], optimizer=optimizer, group=dist.group.WORLD
        )
    except Exception as error:
        return type(error).__name__
    return sorted(key for key in record.metrics if key in ("value", "trace"))


def test_a_rank_that_fails_takes_the_others_along():
    with without_error_bar():
        first, second = run(lambda: [failing(place) for place in ("value", "product")], 2)
    assert first == ["PeerError", []]
    assert second == ["ZeroDivisionError", []]


def test_the_loss_of_two_ranks_is_the_mean_of_all():
    expected = float(objective(net()).detach())
    assert both(value) == pytest.approx([expected] * 2, rel=1e-12)
