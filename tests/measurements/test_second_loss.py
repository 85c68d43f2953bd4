"""A second loss at theta: against dense derivatives, beside the same loss, and without a trace in training."""

import copy
import math
import pickle
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, Dataset

from lightning_subspace import (
    CriticalSharpness,
    LossError,
    Matrices,
    Measurement,
    Needs,
    SampleError,
    SecondLoss,
    SubspaceMonitor,
    measure_subspace,
)
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.another import another_loss
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements.gradient_pair import GradientPair, noise_of
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks
from tests.left_out import without_error_bar
from tests.measurements.test_measurements import Weights, blobs, fit, small
from tests.oracles import dense_gradient, dense_hessian
from tests.processes import run
from tests.thorough import usual

from .probes import (
    F64,
    data,
    derivatives,
    flat,
    loss_fn,
    metrics,
    net,
    objective,
    stepped,
    top_eigenspace,
)

K = 2


def second_fn(module, batch, batch_idx):
    return (nn.functional.softmax(module(batch[0]), dim=1) - 0.2).square().sum(dim=1).mean()


def second_data():
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(30, 5, generator=generator, dtype=F64)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in inputs.split((20, 10))]


def second_objective(module):
    (one, _), (other, _) = second_data()
    return second_fn(module, (torch.cat([one, other]), None), 0)


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


# In a probe


def test_all_numbers_are_those_of_dense_derivatives():
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.3), 5)
    found = metrics(module, SecondLoss(second_data(), second_fn, overlap=True), k=K)
    gradient, hessian = derivatives(module)
    other, other_hessian = dense_gradient(module, second_objective), dense_hessian(module, second_objective)
    (_, top), (values, own) = (top_eigenspace(h, K) for h in (hessian, other_hessian))
    project, project_own = top.T @ top, own.T @ own
    expected = {
        "loss": float(second_objective(module).detach()),
        "fraction": float((project @ other).square().sum() / other.square().sum()),
        "cosine": cosine(gradient, other),
        "cosine_top": cosine(project @ gradient, project @ other),
        "cosine_bulk": cosine(gradient - project @ gradient, other - project @ other),
        "fraction_own": float((project_own @ other).square().sum() / other.square().sum()),
        "sharpness": float(values[0]),
        "overlap": float((top @ own.T).square().sum() / K),
    }
    for key, value in expected.items():
        assert found[f"second/{key}"] == pytest.approx(value, abs=1e-7), key
    assert found["second/matvecs"] >= K


def test_the_training_loss_as_the_second_one_is_the_training_loss():
    module, optimizer = stepped(lambda m: SGD(m.parameters(), lr=0.1), 5)
    same = SecondLoss(data(), overlap=True, critical=True)
    found = metrics(module, same, CriticalSharpness(), k=K, optimizer=optimizer)
    for key in ("cosine", "cosine_top", "cosine_bulk", "overlap"):
        assert found[f"second/{key}"] == pytest.approx(1.0, abs=1e-9), key
    pairs = {"fraction": "gradient_fraction", "loss": "sample_loss", "sharpness": "sharpness"}
    for key in ("critical_sharpness", "critical_step"):
        pairs[key] = key
    for key, other in pairs.items():
        assert found[f"second/{key}"] == pytest.approx(found[other], rel=1e-9), key
    assert found["second/critical_undefined"] == 0.0


def test_without_eigenpairs_everything_is_bulk():
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.3), 5)
    found = metrics(module, SecondLoss(second_data(), second_fn), k=0)
    expected = cosine(dense_gradient(module, objective), dense_gradient(module, second_objective))
    assert found["second/cosine_bulk"] == found["second/cosine"] == pytest.approx(expected, abs=1e-9)
    assert {key for key in found if key.startswith("second/")} == {"second/loss", "second/cosine", "second/cosine_bulk"}
    without = metrics(module, SecondLoss(second_data(), second_fn), k=0, curvature="none")
    assert without["second/cosine"] == pytest.approx(expected, abs=1e-9)
    assert "second/cosine_bulk" not in without, "the same as where the self-check has left the products out"


@pytest.mark.parametrize("curvature", ["ggn", "finite-difference", "empirical-fisher"])
def test_every_operator_has_the_same_gradient_of_another_loss(curvature):
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.3), 5)
    second = None if curvature == "ggn" else second_fn
    batches = data()[:2] if curvature == "ggn" else second_data()
    options = {"curvature": curvature, "tol": 1e-3, "verify": "never"}
    found = metrics(module, SecondLoss(batches, second, overlap=True), k=1, **options)
    own = second_objective if second else lambda m: sum(loss_fn(m, b, 0) * len(b[1]) for b in batches) / 40
    expected = cosine(dense_gradient(module, objective), dense_gradient(module, own))
    assert found["second/cosine"] == pytest.approx(expected, abs=1e-7)
    assert found["second/loss"] == pytest.approx(float(own(module).detach()), abs=1e-9)


def linear(module, batch, batch_idx):
    target = torch.eye(3, dtype=F64)[batch[1]]
    return (nn.functional.linear(batch[0], module.weight) - target).square().sum(1).mean()


def test_on_a_quadratic_the_critical_step_is_where_the_parabola_returns():
    torch.manual_seed(0)
    module = nn.Linear(5, 3, bias=False).to(F64)
    optimizer, batches = SGD(module.parameters(), lr=0.07), data()[:1]
    found = metrics(module, SecondLoss(batches, critical=True), k=0, optimizer=optimizer, loss_fn=linear)

    def second(m):
        return linear(m, batches[0], 0)

    gradient = dense_gradient(module, lambda m: sum(linear(m, b, 0) * len(b[1]) for b in data()) / 64)
    step = -0.07 * gradient
    slope = float(dense_gradient(module, second) @ step)
    bend = float(step @ dense_hessian(module, second) @ step)
    assert slope < 0.0
    assert found["second/critical_step"] == pytest.approx(-2.0 * slope / bend, rel=1e-3)
    assert found["second/critical_sharpness"] == pytest.approx(2.0 / (0.07 * found["second/critical_step"]))


def test_a_step_that_raises_the_second_loss_has_no_critical_multiple():
    module, optimizer = stepped(lambda m: SGD(m.parameters(), lr=0.1), 2)
    against = SecondLoss(data(), lambda m, b, i: -loss_fn(m, b, i), critical=True)
    found = metrics(module, against, k=2, optimizer=optimizer)
    assert found["second/critical_undefined"] == 1.0
    assert found["second/cosine_bulk"] == pytest.approx(-1.0, abs=1e-9)
    assert "second/critical_step" not in found
    with pytest.raises(UserWarning, match="SecondLoss: there is no optimizer"):
        metrics(module, SecondLoss(data(), critical=True), k=0)


# Noise


def test_the_noise_of_a_mean_is_right_on_average_over_all_samples():
    """Exactly: over every choice of 4 of 7 micro-batches of a finite set, and in the bulk of a known space."""
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(7, 5, generator=generator, dtype=F64)
    basis = torch.linalg.qr(torch.randn(5, 2, generator=generator, dtype=F64))[0].T
    top = SimpleNamespace(basis=basis)
    probe = SimpleNamespace(
        subspace=top, top=top, dot=lambda a, b: float(a @ b), partition=SimpleNamespace(ranks=Ranks())
    )
    bulk = torch.eye(5, dtype=F64) - basis.T @ basis
    estimates, truths = [], []
    for chosen in combinations(range(7), 4):
        rows = every[list(chosen)]
        pairs = [(MicroBatch(None, 3.0, i), row) for i, row in enumerate(rows)]
        estimates.append(noise_of(probe, pairs, rows.mean(0), share=4 / 7))
        truths.append(float((bulk @ (rows.mean(0) - every.mean(0))).square().sum()))
    assert sum(estimates) == pytest.approx(sum(truths), rel=1e-9)
    assert noise_of(probe, pairs, rows.mean(0), share=1.0) == 0.0
    assert math.isnan(noise_of(probe, pairs[:1], rows[0]))


def test_the_corrected_cosine_divides_by_the_reliabilities():
    pair = GradientPair((4.0, 1.5, 2.0), (1.0, 0.5, 0.5), k=2)
    found = pair.corrected(0.75, 0.3)
    assert found["training_reliability_bulk"] == pytest.approx(0.75)
    assert found["reliability_bulk"] == pytest.approx(0.8)
    assert found["cosine_bulk_corrected"] == pytest.approx(1.0 / (3.0 * 1.5 * 0.75 * 0.8) ** 0.5)
    assert "cosine_bulk_corrected" not in pair.corrected(2.9, 0.3)
    assert "cosine_bulk_corrected" not in pair.corrected(math.nan, 0.3)


def test_reliabilities_are_measured_in_a_probe():
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.3), 5)
    found = metrics(module, SecondLoss(second_data(), second_fn, reliability=True), k=K)
    _, hessian = derivatives(module)
    _, top = top_eigenspace(hessian, K)
    bulk = torch.eye(57, dtype=F64) - top.T @ top
    rows = [dense_gradient(module, lambda m, b=b: second_fn(m, b, 0)) for b in second_data()]
    mean = (2 * rows[0] + rows[1]) / 3
    noise = 2.0 * sum(w**2 * float((bulk @ (g - mean)).square().sum()) for w, g in zip((2, 1), rows, strict=True)) / 9
    expected = 1.0 - noise / float((bulk @ mean).square().sum())
    assert found["second/reliability_bulk"] == pytest.approx(expected, abs=1e-7)
    assert found["second/training_reliability_bulk"] < 1.0


# Another loss within an open one


def opened(module, **options):
    return TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=F64, **options)


def test_both_losses_move_together_and_come_back_together():
    module, offset = net(), torch.full((57,), 0.1, dtype=F64)
    batch, other_batch = MicroBatch(data()[0], 24.0, 0), MicroBatch(second_data()[0], 20.0, 0)
    there = second_fn(module, other_batch.data, 0).detach(), loss_fn(module, batch.data, 0).detach()
    moved = copy.deepcopy(module)
    nn.utils.vector_to_parameters(flat(module) + offset, moved.parameters())
    with opened(module) as loss:
        other = another_loss(loss, second_fn)
        assert other.value_at(offset, [(other_batch, 1.0)]) == pytest.approx(
            float(second_fn(moved, other_batch.data, 0).detach()), rel=1e-12
        )
        assert loss.value_at(offset, [(batch, 1.0)]) == pytest.approx(
            float(loss_fn(moved, batch.data, 0).detach()), rel=1e-12
        )
        assert torch.equal(other(other_batch).value.detach(), there[0])
        assert torch.equal(loss(batch).value.detach(), there[1])
        assert len(loss.values) == len(other.values) == 1
    with pytest.raises(RuntimeError, match="is a context manager"):
        other(other_batch)
    with pytest.raises(RuntimeError, match="not open"):
        another_loss(loss, second_fn)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.norm = net(), nn.BatchNorm1d(5).to(F64)

    def forward(self, x):
        return self.net(nn.functional.dropout(self.norm(x), training=self.training))


def test_random_numbers_are_those_of_the_place_and_buffers_stay():
    module = Dropped()
    state = copy.deepcopy(module.state_dict())
    found = metrics(module, SecondLoss(data()), k=0)
    assert found["second/cosine"] == pytest.approx(1.0, abs=1e-12)
    assert found["second/loss"] == found["sample_loss"]
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def in_eval_mode(module, batch, batch_idx):
    module.eval()
    return loss_fn(module, batch, batch_idx)


class TrainingValue(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        return {"again": probe.operator.value(None)}


def test_a_second_loss_may_be_in_eval_mode_beside_one_in_train_mode():
    module = Dropped()
    module.norm.running_mean.fill_(0.3)
    found = metrics(module, SecondLoss(data(), in_eval_mode), TrainingValue(), k=0)
    module.eval()
    inputs, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    expected = float(loss_fn(module, (inputs, labels), 0).detach())
    assert found["second/loss"] == pytest.approx(expected, rel=1e-9)
    assert found["again"] == found["sample_loss"]
    assert abs(found["sample_loss"] - expected) > 1e-3


def test_a_second_loss_that_is_none_or_not_of_the_module_is_refused():
    with pytest.raises(LossError, match=r"expected a tensor or .* for every batch, got none"):
        metrics(net(), SecondLoss(data(), lambda m, b, i: None), k=0)
    with pytest.raises(LossError, match="does not depend on the parameters"):
        metrics(net(), SecondLoss(data(), lambda m, b, i: torch.tensor(1.0)), k=0)


def test_arguments_that_are_wrong_are_named():
    with pytest.raises(SampleError, match="batches: expected a loader or a list of batches, got one batch"):
        SecondLoss(data()[0])
    with pytest.raises(ValueError, match="loss_fn: expected a function of 3 positional arguments"):
        SecondLoss(data(), lambda m: None)
    with pytest.raises(ValueError, match="overlap: expected True or False"):
        SecondLoss(data(), overlap=1)


def test_it_is_over_with_its_probe():
    class Keeps(Measurement):
        needs = Needs.NOTHING

        def measure(self, probe):
            self.operator = probe.another(second_data(), second_fn)
            self.found = self.operator.matvec(probe.gradient)
            return {}

    keeps = Keeps()
    metrics(net(), keeps, k=0)
    expected = dense_hessian(net(), second_objective) @ dense_gradient(net(), objective)
    assert torch.allclose(keeps.found, expected, atol=1e-12)
    with pytest.raises(RuntimeError):
        keeps.operator.matvec(keeps.found)


# In a run


class Noisy(Dataset):
    """Counts what is asked for, and draws random numbers of its own and of torch."""

    def __init__(self):
        self.asked = 0
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return 48

    def __getitem__(self, index):
        self.asked += 1
        noise = torch.randn(5) + torch.randn(5, generator=self.generator)
        return noise, index % 3


class Spy(Measurement):
    """The files of a loader's dataset are read before the probe, with the module as training has it."""

    def prepare(self, partition):
        self.weights = [id(parameter) for parameter in self.module.parameters()]


def test_training_is_the_same_and_the_gain_is_that_of_the_step():
    runs, noisy = [], Noisy()
    torch.manual_seed(5)
    before = noisy.generator.get_state()
    spy = Spy()
    for is_measured in (False, True):
        module, weights = small(optimizer=Adam, lr=0.01), Weights()
        spy.module = module
        own = list(map(id, module.parameters()))
        extra = [
            SecondLoss(DataLoader(noisy, batch_size=16, shuffle=True), every=2, critical=True, reliability=True),
            Matrices(rank=2),
            spy,
        ]
        monitor = SubspaceMonitor(
            k=1,
            every_n_steps=[0, 2, 3],
            max_overhead=None,
            sample="all",
            verify="never",
            on_failure="raise",
            measurements=extra,
        )
        loader = DataLoader(blobs(), batch_size=8, shuffle=True)
        torch.manual_seed(1)
        fit(module, loader, *([weights, monitor] if is_measured else [weights]), max_steps=6)
        runs.append((weights.at, torch.get_rng_state()))
    (plain, state), (with_it, state_with) = runs
    assert all(torch.equal(plain[step], with_it[step]) for step in plain)
    assert torch.equal(state, state_with)
    assert noisy.asked == 0, "the attributes of the dataset are put back"
    assert torch.equal(noisy.generator.get_state(), before)
    assert spy.weights == own
    assert ["second/gain" in record.metrics for record in monitor.history] == [True, False, True]
    assert all("matrices/energy" in record.metrics for record in monitor.history)
    batches = [batch.data for batch in extra[0]._read]
    assert [len(batch[1]) for batch in batches] == [16, 16, 16]
    for record in monitor.history:
        if "second/gain" in record.metrics:
            there = weights.module_at(module, record.step)
            gradient = dense_gradient(there, lambda m: sum(m.training_step(batch, 0) for batch in batches) / 3)
            update = with_it[record.step + 1] - with_it[record.step]
            assert record.metrics["second/gain"] == pytest.approx(-float(gradient @ update), rel=1e-4)


def test_what_has_been_read_is_left_behind_by_a_copy_and_read_once():
    one = SecondLoss(second_data(), weight=lambda batch: 2.0)
    metrics(net(), one, k=0)
    held = one._read
    metrics(net(), one, k=0)
    assert one._read is held
    assert [batch.weight for batch in held] == [2.0, 2.0]
    assert pickle.loads(pickle.dumps(SecondLoss([torch.zeros(3, 2)])))._read == ()
    assert copy.copy(one)._read == ()


def test_the_forecast_counts_what_was_asked_for():
    sample = SimpleNamespace(hessian=[SimpleNamespace(size=32)] * 2, extra=())
    prospect = SimpleNamespace(sample=sample, solve=lambda k=None: 20.0)
    one = SecondLoss(second_data())
    assert one.expected_products(prospect) == pytest.approx(0.7)
    one.prepare(SimpleNamespace(ranks=Ranks()))
    assert one.expected_products(prospect) == pytest.approx(0.7 * 30 / 64)
    everything = SecondLoss(second_data(), overlap=True, critical=True, reliability=True)
    assert everything.expected_products(prospect) == pytest.approx(0.7 + 20.7 + 1.0 + 0.7)


# Among ranks


def on_ranks():
    """Both measurements of a module that each rank has whole, and on the shards of FSDP2."""
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        module = net()
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(module[0], mesh=mesh)
            fully_shard(module, mesh=mesh)
        found.append(taken(module, dist.group.WORLD))
    return found


def taken(module, group=None):
    optimizer = SGD(module.parameters(), lr=0.1)
    second = SecondLoss(second_data(), second_fn, overlap=True, critical=True, reliability=True)
    settings = {"k": K, "tol": 1e-8, "dtype": "float64", "loss_fn": loss_fn, "max_matvecs": 500, "verify": "never"}
    with without_error_bar():
        record = measure_subspace(
            module, data(), measurements=[second, Matrices(rank=2)], optimizer=optimizer, group=group, **settings
        )
    return {key: value for key, value in record.metrics.items() if key.startswith(("second/", "matrices/"))}


@pytest.mark.parametrize("count", usual([3], thorough=[2]))  # of the second batches one of three ranks has none
def test_any_number_of_ranks_measures_what_one_does(count):
    alone = taken(net())
    assert len(alone) == 33
    for ways in zip(*run(on_ranks, count, timeout=60.0), strict=True):
        assert all(way == ways[0] for way in ways)
        assert ways[0].keys() == alone.keys()
        for key in alone.keys() - {"second/matvecs"}:
            assert ways[0][key] == pytest.approx(alone[key], rel=1e-6, abs=1e-8), key


def failing():
    """The second loss of one rank's batch cannot be evaluated."""

    def breaks(module, batch, batch_idx):
        if batch_idx == 1:
            raise ArithmeticError("no such batch")
        return second_fn(module, batch, batch_idx)

    try:
        measure_subspace(
            net(),
            data(),
            k=0,
            loss_fn=loss_fn,
            measurements=[SecondLoss(second_data(), breaks)],
            group=dist.group.WORLD,
        )
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_a_rank_that_fails_takes_the_others_along():
    assert run(failing, 2) == ["PeerError", "ArithmeticError"]
