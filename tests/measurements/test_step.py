"""Numbers of the step that was taken, against dense derivatives at saved weights and against closed forms."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import CriticalSharpness, Step, StepCurvature, SubspaceMonitor
from lightning_subspace.measurements.step import pooled
from lightning_subspace.subspace.record import Record
from tests.measurements.test_measurements import Weights, blobs, fit, small
from tests.oracles import dense_gradient, dense_hessian

F64 = torch.float64


class Regression(pl.LightningModule):
    """A linear regression, whose loss is a quadratic in the parameters."""

    def __init__(self, make_optimizer, start=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3, bias=False).to(F64)
        self.make_optimizer = make_optimizer
        if start is not None:
            nn.utils.vector_to_parameters(start, self.parameters())

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().sum(1).mean()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def targets(count=40):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator, dtype=F64) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2])
    return TensorDataset(inputs, torch.randn(count, 3, generator=generator, dtype=F64))


def probed(module, data, steps, *measurements, batch_size=8, callbacks=(), **settings):
    settings = {"k": 0, "every_n_steps": 1, "max_overhead": None, "sample": "all", "dtype": "float64", **settings}
    monitor = SubspaceMonitor(measurements=measurements, **settings)
    fit(module, DataLoader(data, batch_size=batch_size), *callbacks, monitor, max_steps=steps)
    return monitor.history


def whole(data):
    return next(iter(DataLoader(data, batch_size=len(data))))


OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.01),
    "momentum and decay": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: AdamW(parameters, lr=0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_a_quadratic_all_three_curvatures_are_one(name):
    module, weights, data = Regression(OPTIMIZERS[name]), Weights(), targets()
    wanted = (Step(), StepCurvature(hessian=True), CriticalSharpness(along="taken", max_points=20))
    *records, last = probed(module, data, 6, *wanted, callbacks=[weights])
    assert not any(key.startswith("step/") for key in last.metrics)  # no step was taken from there
    hessian = dense_hessian(module, lambda m: m.training_step(whole(data), 0))
    for record in records:
        found, t = record.metrics, record.step
        there = weights.module_at(module, t)
        gradient, loss = dense_gradient(there, lambda m: m.training_step(whole(data), 0)), there.training_step
        before = loss(whole(data), 0).item()
        after = weights.module_at(module, t + 1).training_step(whole(data), 0).item()
        u = weights.at[t + 1] - weights.at[t]
        gain, bend = -float(gradient @ u), float(u @ hessian @ u)
        assert found["step/gain"] == pytest.approx(gain, rel=1e-9)
        assert found["step/change"] == pytest.approx(after - before, rel=1e-9)
        assert found["step/change"] == pytest.approx(-gain + bend / 2, rel=1e-9)
        for key in ("curvature", "curvature_secant", "curvature_hessian"):
            assert found[f"step/{key}"] == pytest.approx(bend / float(u @ u), rel=1e-9)
        assert found["step/norm"] == pytest.approx(float(u.norm()), rel=1e-12)
        assert found["step/relative_norm"] == pytest.approx(float(u.norm() / weights.at[t].norm()), rel=1e-12)
        if gain > 0.0:
            ratio = bend / (2 * gain)
            for key in ("edge_ratio", "edge_ratio_secant", "edge_ratio_hessian"):
                assert found[f"step/{key}"] == pytest.approx(ratio, rel=1e-9)
            assert found["step/edge_ratio"] == pytest.approx(1 + (after - before) / gain, rel=1e-9)
            if ratio > 0.01:
                assert found["critical_step"] == pytest.approx(1 / ratio, rel=1e-9)  # L(theta + u / rho) = L(theta)
        else:
            assert "step/edge_ratio" not in found
        if t:
            previous = weights.at[t] - weights.at[t - 1]
            cosine = float(u @ previous / u.norm() / previous.norm())
            assert found["step/cosine_previous"] == pytest.approx(cosine, abs=1e-9)
    assert "step/cosine_previous" not in records[0].metrics


def test_descent_on_a_quadratic_has_the_ratio_of_its_curvature_along_the_gradient():
    data, rate = targets(), 0.02
    module = Regression(lambda parameters: SGD(parameters, lr=rate))
    hessian = dense_hessian(module, lambda m: m.training_step(whole(data), 0))
    weights = Weights()
    records = probed(module, data, 4, batch_size=40, callbacks=[weights])[:-1]
    for record in records:
        g = dense_gradient(weights.module_at(module, record.step), lambda m: m.training_step(whole(data), 0))
        expected = rate * float(g @ hessian @ g) / (2 * float(g @ g))
        assert record.metrics["step/edge_ratio"] == pytest.approx(expected, rel=1e-10)


def test_it_is_one_where_descent_steps_across_the_valley():
    """Along v_1 at lr = 2 / lambda_1 the loss is what it was, and the next step goes back."""
    data = targets()
    module = Regression(OPTIMIZERS["sgd"])
    hessian = dense_hessian(module, lambda m: m.training_step(whole(data), 0))
    values, vectors = torch.linalg.eigh(hessian)
    start = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    minimum = start - torch.linalg.solve(hessian, dense_gradient(module, lambda m: m.training_step(whole(data), 0)))
    module = Regression(lambda p: SGD(p, lr=2 / float(values[-1])), minimum + vectors[:, -1])
    for record in probed(module, data, 3, batch_size=40)[:-1]:
        assert record.metrics["step/edge_ratio"] == pytest.approx(1.0, rel=1e-12)
        assert record.metrics["step/edge_ratio_pooled"] == pytest.approx(1.0, rel=1e-9)
        assert record.metrics.get("step/cosine_previous", -1.0) == pytest.approx(-1.0, abs=1e-12)


class Digits(pl.LightningModule):
    """64-20-20-10 on scikit-learn's digits, in float64."""

    def __init__(self, activation, rate, loss):
        super().__init__()
        torch.manual_seed(0)
        widths = (64, 20, 20, 10)
        layers = [nn.Linear(64, 20), activation(), nn.Linear(20, 20), activation(), nn.Linear(*widths[2:])]
        self.net = nn.Sequential(*layers).to(F64)
        self.rate, self.loss = rate, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.rate)


def digits(count=1797):
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:count] / 16.0, dtype=F64), torch.tensor(labels[:count]))


def half_squares(outputs, labels):
    return 0.5 * (outputs - nn.functional.one_hot(labels, 10)).square().sum(1).mean()


@pytest.mark.thorough  # of the tests: on a quadratic it is exact, see above
def test_at_the_edge_of_stability_the_ratio_is_one_and_steps_turn_back():
    """Full-batch descent on 300 digits: far below the edge at step 50, at it from step 500 on."""
    early, late = list(range(50, 54)), list(range(600, 610))
    module = Digits(nn.Tanh, 0.2, half_squares)
    history = probed(module, digits(300), late[-1] + 1, batch_size=300, every_n_steps=early + late)
    before, at = history[: len(early)], history[len(early) :]
    assert max(record.metrics["step/edge_ratio"] for record in before) < 0.02
    assert min(record.metrics["step/cosine_previous"] for record in before) > 0.99
    assert 0.9 <= pooled(at)["step/edge_ratio_pooled"] <= 1.05
    assert max(record.metrics["step/cosine_previous"] for record in at) < -0.8


@pytest.mark.thorough  # of the tests, as the one above
def test_secants_are_the_curvature_where_it_is_not_small():
    """SGD on digits with GELU from step 300 on, where u.Hu is above .3 lambda_1 |u|^2."""
    module = Digits(nn.GELU, 0.1, nn.functional.cross_entropy)
    history = probed(
        module,
        digits(),
        313,
        Step(),
        StepCurvature(hessian=True),
        batch_size=64,
        sample=300,
        every_n_steps=list(range(300, 312)),
        k=1,
        tol=0.01,
        verify="never",
    )
    apart = []
    for found in (record.metrics for record in history):
        if found["step/curvature_hessian"] > 0.3 * found["sharpness"]:
            secants = (found["step/curvature"], found["step/curvature_secant"])
            apart.append([abs(secant / found["step/curvature_hessian"] - 1.0) for secant in secants])
    errors = torch.tensor(apart)
    assert len(errors) >= 8
    assert errors.median(0).values.max() < 0.1
    assert errors.max() < 0.4


@pytest.mark.parametrize("rate", [1e-6, 1e-3, 1.0])
def test_a_second_order_within_the_rounding_of_the_loss_is_left_out(rate):
    """In float32: else it is that of float64."""
    found = {}
    for dtype in ("float32", "float64"):
        module, data = small(lr=rate), blobs()
        (record, _) = probed(module, data, 1, batch_size=96, dtype=dtype)
        found[dtype] = record.metrics
    exact = found["float64"]
    second = exact["step/curvature"] * exact["step/norm"] ** 2 / 2
    if second < 20 * torch.finfo(torch.float32).eps * exact["sample_loss"] / 2:
        assert "step/curvature" not in found["float32"]
        assert "step/edge_ratio" not in found["float32"]
    else:
        assert second > 40 * torch.finfo(torch.float32).eps * exact["sample_loss"]  # else the rate decides nothing
        assert found["float32"]["step/curvature"] == pytest.approx(exact["step/curvature"], rel=0.05)
    assert found["float32"]["step/gain"] == pytest.approx(exact["step/gain"], rel=1e-4)


class Annealed(Regression):
    """The loss grows with the number of steps."""

    def training_step(self, batch, batch_idx):
        return (1.0 + 0.5 * self.global_step) * super().training_step(batch, batch_idx)


class Taught(Regression):
    """The targets are those of an average of the weights, which a step moves."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.teacher = copy.deepcopy(self.layer).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - self.teacher(batch[0]) - batch[1]).square().sum(1).mean()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        for own, other in zip(self.teacher.parameters(), self.layer.parameters(), strict=True):
            own.lerp_(other.detach(), 0.5)


class Partial(Regression):
    """A trained part beside the one that is measured."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.bias = nn.Parameter(torch.zeros(3, dtype=F64))

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) + self.bias - batch[1]).square().sum(1).mean()


@pytest.mark.parametrize(("kind", "params"), [(Annealed, None), (Taught, None), (Partial, ["layer.*"])])
def test_changes_are_left_out_where_the_loss_is_another_one_after_the_step(kind, params):
    wanted = (Step(), StepCurvature(hessian=True), CriticalSharpness(along="taken"))
    *records, _ = probed(kind(OPTIMIZERS["sgd"]), targets(), 3, *wanted, params=params)
    for record in records:
        found = {key for key in record.metrics if key.startswith(("step/", "critical"))}
        assert found - {"step/cosine_previous"} == {"step/gain", "step/norm", "step/relative_norm"}


def test_with_all_parameters_the_partial_one_has_its_change():
    *records, _ = probed(Partial(OPTIMIZERS["sgd"]), targets(), 3)
    assert all("step/edge_ratio" in record.metrics for record in records)


class ByHand(Partial):
    """Two optimizers that step one after the other in one batch."""

    def __init__(self, make_optimizer):
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def loss(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [self.make_optimizer([self.layer.weight]), AdamW([self.bias], lr=0.05)]


def test_of_several_optimizers_the_step_of_a_batch_has_its_numbers_and_a_multiple_but_no_rate():
    wanted = (Step(), StepCurvature(), CriticalSharpness(along="taken", max_points=20))
    data, module = targets(), ByHand(OPTIMIZERS["sgd"])
    *records, _ = probed(module, data, 8, *wanted, every_n_steps=2, loss_fn=ByHand.loss)
    assert [record.step for record in records] == [0, 2, 4, 6]
    for record in records:
        assert record.metrics["critical_step"] == pytest.approx(1 / record.metrics["step/edge_ratio"], rel=1e-9)
        assert "critical_sharpness" not in record.metrics


class EveryThird(SubspaceMonitor):
    def should_measure(self, step):
        return step % 3 == 0


def test_where_no_schedule_says_so_every_update_is_at_hand():
    monitor = EveryThird(k=0, sample="all", max_overhead=None)
    fit(small(), DataLoader(blobs(), batch_size=8), monitor, max_steps=7)
    assert [record.step for record in monitor.history] == [0, 3, 6, 7]
    assert ["step/cosine_previous" in record.metrics for record in monitor.history] == [False, True, True, False]


class Seen(Step):
    """Counts what it is shown."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def see_update(self, step, update, partition):
        self.count += 1


def test_parameters_are_copied_before_the_steps_of_probes_alone():
    seen = Seen()
    monitor = SubspaceMonitor(k=0, sample="all", every_n_steps=4, max_overhead=None, measurements=[seen])
    fit(small(), DataLoader(blobs(), batch_size=8), monitor, max_steps=11)
    assert seen.count == 2  # before steps 4 and 8


def test_a_default_one_makes_way_for_the_users():
    kinds = [type(one) for one in SubspaceMonitor(k=0, measurements=[Step(pool=3)])._settings.taken]
    assert kinds.count(Step) == 1


def test_pooled_ratios_are_ratios_of_sums():
    def record(gain, curvature, norm):
        return Record(0, {"step/gain": gain, "step/curvature": curvature, "step/norm": norm})

    found = pooled([record(3.0, 2.0, 1.0), record(-1.0, 4.0, 0.5), Record(1, {"step/gain": 100.0})])
    assert found == {"step/uphill": 0.5, "step/edge_ratio_pooled": (1.0 + 0.5) / 2.0}
    assert pooled([record(-1.0, 1.0, 1.0)]) == {"step/uphill": 1.0}
    assert pooled([]) == {}


def test_without_second_derivatives_the_step_is_measured_all_the_same():
    """And the eigensolver is not asked for."""
    data = blobs()
    with_products = probed(small(), data, 3, StepCurvature(), k=1)
    without = probed(small(), data, 3, StepCurvature(), k=0, curvature="none")
    for one, other in zip(with_products[:-1], without[:-1], strict=True):
        assert other.subspace is None
        keys = [key for key in one.metrics if key.startswith("step/")]
        assert len(keys) >= 8
        assert {key: other.metrics[key] for key in keys} == pytest.approx({key: one.metrics[key] for key in keys})
        assert not any(math.isnan(value) for value in other.metrics.values())
