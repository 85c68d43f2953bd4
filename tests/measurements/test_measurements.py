"""What is logged of a real run equals what the tests compute themselves from weights saved around the same steps."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, measure_subspace
from tests.oracles import dense_gradient, dense_hessian, mean_square_cosine, projected_share, top_eigenspace
from tests.thorough import IS_THOROUGH, how_many, usual

# The tightest that float32 gives: spaces are then off by about 1e-4 at a gap of a tenth of the largest eigenvalue.
TIGHT = 1e-5
CLOSE = 2e-4


class Classifier(pl.LightningModule):
    def __init__(self, *widths, activation=nn.Tanh, optimizer=torch.optim.SGD, lr=0.1, **settings):
        super().__init__()
        layers = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), activation()]
        self.net = nn.Sequential(*layers[:-1])
        self.optimizer = lambda parameters: optimizer(parameters, lr=lr, **settings)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class Weights(pl.Callback):
    """Saves the module before and after every step, and the gradient in between before it is clipped."""

    def __init__(self):
        self.at = {}
        self.gradients = {}

    def on_train_start(self, trainer, pl_module):
        self.at[trainer.global_step] = flat(pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients[trainer.global_step] = torch.cat([p.grad.reshape(-1).clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.at[trainer.global_step] = flat(pl_module)

    def module_at(self, module, step):
        nn.utils.vector_to_parameters(self.at[step], module.parameters())
        return module


def flat(module):
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def fit(module, loader, *callbacks, **kwargs):
    settings = {"accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**{**settings, **quiet, **kwargs}, callbacks=list(callbacks))
    trainer.fit(module, loader)
    return trainer


def exact_space(module, weights, step, batch, k=3):
    """The top eigenvectors of the dense Hessian, in float64, at saved weights."""
    there = weights.module_at(module, step).double()
    hessian = dense_hessian(there, lambda m: m.training_step((batch[0].double(), batch[1]), 0))
    module.float()
    return top_eigenspace(hessian, k)[1]


def blobs(count=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return TensorDataset(torch.randn(count, 5, generator=generator) + torch.eye(3, 5)[labels] * 2, labels)


def small(**kwargs):
    torch.manual_seed(0)
    return Classifier(5, 6, 3, **kwargs)


# The step that is taken from the measured point


@pytest.mark.parametrize(
    ("optimizer", "trainer"),
    usual(
        [
            pytest.param({"momentum": 0.9, "weight_decay": 0.1}, {}, id="momentum"),
            pytest.param({"lr": 1.0}, {"gradient_clip_val": 0.05}, id="clipped"),
            pytest.param(
                {"optimizer": torch.optim.Adam, "lr": 0.01},
                {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
                id="adam-accumulated-clipped",
            ),
        ],
        thorough=[
            pytest.param({}, {}, id="sgd"),
            pytest.param({"optimizer": torch.optim.Adam, "lr": 0.01}, {}, id="adam"),
            pytest.param({}, {"accumulate_grad_batches": 4}, id="accumulated"),
        ],
    ),
)
def test_the_fractions_of_update_and_batch_gradient_are_those_of_the_saved_weights(optimizer, trainer):
    module, weights = small(**optimizer), Weights()
    monitor = SubspaceMonitor(k=3, every_n_steps=[0, 3, 4], max_overhead=None, sample="all", tol=TIGHT)
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=5, **trainer)
    assert [record.step for record in monitor.history] == [0, 3, 4]
    for record in monitor.history:
        t = record.step
        basis = exact_space(module, weights, t, blobs().tensors)
        update = weights.at[t + 1] - weights.at[t]
        assert record.metrics["update_fraction"] == pytest.approx(projected_share(basis, update.double()), abs=CLOSE)
        expected = projected_share(basis, weights.gradients[t].double())
        assert record.metrics["batch_gradient_fraction"] == pytest.approx(expected, abs=CLOSE)
    if trainer.get("accumulate_grad_batches"):
        first = list(DataLoader(blobs(), batch_size=8))[:4]  # the loss is divided by 4 before backward
        initial = weights.module_at(module, 0)
        mean = sum(dense_gradient(initial, lambda m, b=b: m.training_step(b, 0)) for b in first) / 4
        torch.testing.assert_close(weights.gradients[0], mean)


def test_a_step_that_changes_nothing_is_left_out():
    module = small(lr=0.0)
    monitor = SubspaceMonitor(k=3, every_n_steps=2, max_overhead=None, sample="all")
    fit(module, DataLoader(blobs(), batch_size=8), monitor, max_steps=4)
    assert [record.step for record in monitor.history] == [0, 2, 4]
    assert not any("update_fraction" in record.metrics for record in monitor.history)
    assert ["batch_gradient_fraction" in record.metrics for record in monitor.history] == [True, True, False]


# Overlaps


def test_overlaps_equal_those_of_eigenvectors_measured_at_saved_weights():
    module, weights = small(), Weights()
    listed = [12, 0, 1, 4, 30]
    monitor = SubspaceMonitor(
        k=3, every_n_steps=listed, max_overhead=None, sample="all", tol=TIGHT, reference_step=2, log="all"
    )
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=31)
    steps = [record.step for record in monitor.history]
    assert steps == sorted(listed)
    bases = [exact_space(module, weights, t, blobs().tensors) for t in steps]
    exact = [[mean_square_cosine(a, b) for b in bases] for a in bases]
    for i, record in enumerate(monitor.history):
        present = {key for key in record.metrics if key.startswith("overlap")}
        assert present == ({"overlap_previous"} if i else set()) | ({"overlap_reference"} if i > 2 else set())
        if i:
            assert record.metrics["overlap_previous"] == pytest.approx(exact[i - 1][i], abs=CLOSE)
        if i > 2:
            assert record.metrics["overlap_reference"] == pytest.approx(exact[2][i], abs=CLOSE)
    matrix_steps, matrix = monitor.overlap_matrix()
    assert matrix_steps == steps
    torch.testing.assert_close(torch.tensor(matrix), torch.tensor(exact, dtype=torch.float64), atol=CLOSE, rtol=0)
    assert min(min(row) for row in exact) < 0.9  # the spaces do move


def test_overlaps_of_a_larger_net_are_estimated_within_the_stated_error():
    torch.manual_seed(0)
    module, weights = Classifier(5, 60, 70, 3, lr=0.5), Weights()
    monitor = SubspaceMonitor(k=3, every_n_steps=[0, 20, 60], max_overhead=None, sample="all", verify="never")
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=60)
    error = monitor._runner.run.overlaps.error
    assert 0.0 < error < 0.02  # n = 4,843 is more than there are cells
    steps, matrix = monitor.overlap_matrix()
    batches = list(DataLoader(blobs(), batch_size=96))
    bases = [measure_subspace(weights.module_at(module, t), batches, k=3, verify="never").subspace.basis for t in steps]
    exact = torch.tensor([[float((a @ b.T).square().sum()) / 3 for b in bases] for a in bases])
    estimate = torch.tensor(matrix, dtype=exact.dtype)
    assert torch.equal(estimate, estimate.T)
    assert (estimate.diagonal() == 1.0).all()
    assert float((estimate - exact).abs().max()) <= 4 * error


# Others


def test_the_cheap_tier_equals_dense_derivatives():
    module, weights = small(), Weights()
    monitor = SubspaceMonitor(k=0, every_n_steps=3, max_overhead=None, sample="all")
    fit(module, DataLoader(blobs(), batch_size=8), weights, monitor, max_steps=6)
    (batch,) = DataLoader(blobs(), batch_size=96)
    for record in monitor.history:
        assert record.subspace is None
        assert {key for key in record.metrics if not key.startswith(("noise/", "solver/", "step/"))} == {
            "gradient_norm",
            "gradient_curvature",
            "gradient_hessian_cosine",
            "sample_loss",
            "training_loss",
        }
        there = weights.module_at(module, record.step).double()
        double = (batch[0].double(), batch[1])
        gradient = dense_gradient(there, lambda m, b=double: m.training_step(b, 0))
        image = dense_hessian(there, lambda m, b=double: m.training_step(b, 0)) @ gradient
        norm, loss = float(gradient.norm()), there.training_step(double, 0).item()
        module.float()
        assert record.metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert record.metrics["sample_loss"] == pytest.approx(loss, rel=1e-5)
        assert record.metrics["gradient_curvature"] == pytest.approx(float(gradient @ image) / norm**2, rel=1e-4)
        cosine = float(gradient @ image) / norm / float(image.norm())
        assert record.metrics["gradient_hessian_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert monitor.overlap_matrix()[0] == []
    monitor.plot()


class Halving(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_the_threshold_is_that_of_the_step_to_come():
    torch.manual_seed(0)
    monitor = SubspaceMonitor(k=2, every_n_steps=1, max_overhead=None, sample="all")
    fit(Halving(5, 6, 3, lr=0.4), DataLoader(blobs(), batch_size=8), monitor, max_steps=3)
    for record in monitor.history:
        threshold = 2.0 / (0.4 * 0.5**record.step)
        expected = record.metrics["sharpness"] / threshold
        assert record.metrics["sharpness_over_threshold"] == pytest.approx(expected, rel=1e-6)


# The curves of a small net on the digits (windows, not single steps: seeds shift the early transient by some 50 steps)

EARLY, LATE = [50, 100], usual([300, 500, 700], thorough=[1000, 2000, 3000])
SEEDS = usual([0], thorough=[1, 2])


def digits(each=1):
    images, labels = (column[::each] for column in load_digits(return_X_y=True))
    return TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))


def digits_run(seed, steps, *callbacks, width=20, full_batch=False, each=1):
    """FC 64-20-20-10 with ReLU; SGD with batches of 64, or descent by the full gradient from the same start."""
    torch.manual_seed(seed)
    module = Classifier(64, width, width, 10, activation=nn.ReLU)
    dataset = digits(each)
    generator = torch.Generator().manual_seed(seed)
    if full_batch:
        loader = DataLoader([dataset.tensors] * max(steps), batch_size=None)
        sample = [dataset.tensors]
    else:
        loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True, generator=generator)
        sample = "all"
    monitor = SubspaceMonitor(
        k=10,
        every_n_steps=steps,
        max_overhead=None,
        sample=sample,
        batch_size=1797,
        verify="never",  # one of the tests below holds eigenvalues against dense ones
        on_failure="raise",
    )
    fit(module, loader, *callbacks, monitor, max_steps=max(steps))
    assert all(record.subspace.trusted for record in monitor.history)
    return monitor, module


def batched_hessian(module, batch):
    """A hundred rows at a time: `tests.oracles.dense_hessian` takes them one by one, and so many of them take long."""
    parameters = list(module.parameters())
    loss = module.training_step(batch, 0)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    blocks = []
    for directions in torch.eye(len(gradient), dtype=gradient.dtype).split(100):
        rows = torch.autograd.grad(gradient, parameters, directions, retain_graph=True, is_grads_batched=True)
        blocks.append(torch.cat([row.reshape(len(directions), -1) for row in rows], dim=1))
    return torch.cat(blocks)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_moves_into_the_top_space_which_stays(seed):
    monitor, _ = digits_run(seed, EARLY + LATE)
    rows = {int(row["step"]): row for row in monitor.to_rows()}
    assert min(rows[t]["gradient_fraction"] for t in EARLY) < 0.1
    assert min(rows[t]["gradient_hessian_cosine"] for t in EARLY) < -0.2
    assert max(rows[t]["gradient_fraction"] for t in EARLY) < 0.2
    assert rows[300]["gradient_fraction"] >= 0.83
    assert all(rows[t]["gradient_fraction"] >= 0.95 for t in LATE if t >= 500)
    steps, matrix = monitor.overlap_matrix()
    assert matrix[steps.index(500), steps.index(LATE[-1])] >= 0.75
    assert all(rows[t]["gap_index"] == 9 for t in LATE if t <= 1000)  # K - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_descent_by_the_full_gradient_is_not_aligned(seed):
    monitor, _ = digits_run(seed, [100, 300, 1000, 2000] if IS_THOROUGH else [100, 300], full_batch=True)
    for row in monitor.to_rows():
        assert row["gradient_fraction"] < 0.1
        assert row["sharpness_over_threshold"] < 1.0


def test_the_curves_are_those_of_dense_hessians_at_saved_weights():
    steps, weights = [0, 50, 300, 500, 1000] if IS_THOROUGH else [50, 300], Weights()
    each = how_many(3, thorough=1)  # of so many digits one
    monitor, module = digits_run(0, steps, weights, width=how_many(10, 20), each=each)  # n = 870, or 1,930
    images, labels = digits(each).tensors
    batch = (images.double(), labels)
    previous = None
    for record in monitor.history:
        there = weights.module_at(module, record.step).double()
        gradient = dense_gradient(there, lambda m: m.training_step(batch, 0))
        hessian = batched_hessian(there, batch)
        module.float()
        values, basis = top_eigenspace(hessian, 11)
        image = hessian @ gradient
        cosine = float(gradient @ image / gradient.norm() / image.norm())
        metrics = record.metrics
        assert metrics["gradient_fraction"] == pytest.approx(projected_share(basis[:10], gradient), abs=0.01)
        assert metrics["gradient_hessian_cosine"] == pytest.approx(cosine, abs=0.01)
        for i in range(1, 11):
            assert metrics[f"eigenvalues/{i:02d}"] == pytest.approx(float(values[i - 1]), rel=1e-3)
        if previous is not None:
            expected = mean_square_cosine(previous[:10], basis[:10])
            assert metrics["overlap_previous"] == pytest.approx(expected, abs=0.01)
        previous = basis


def behind_an_outlier(size, dtype="float32", tol=1e-3, rank=300):
    """A quadratic of 300 parameters whose largest eigenvalue is `size`; the others lie in (0, 1)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    values = torch.rand(300, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    values[0], values[rank:] = size, 0.0
    matrix = (basis * values) @ basis.T
    point = nn.ParameterDict({"x": torch.randn(300, generator=generator)})
    point = point.double() if dtype == "float64" else point
    matrix = ((matrix + matrix.T) / 2).to(point["x"].dtype)
    record = measure_subspace(
        point, [(matrix[None],)], k=3, tol=tol, loss_fn=lambda m, b, _: 0.5 * (m["x"] @ (b[0][0] @ m["x"]))
    )
    return record, values


@pytest.mark.parametrize("size", usual([1e3, 1e4], thorough=[100.0, 1e6]))
def test_what_is_reported_behind_an_outlier_is_right(size):
    record, values = behind_an_outlier(size)
    assert record.subspace.converged
    found = {int(key[-2:]): value for key, value in record.metrics.items() if key.startswith("eigenvalues/")}
    assert 1 in found
    assert record.metrics["sharpness"] == found[1]
    assert (size > 1e3) == (2 not in found)
    for place, value in found.items():
        assert value == pytest.approx(float(values[place - 1]), rel=0.05)
    told = record.subspace.poor_values
    assert (told is None) == ({1, 2, 3} <= found.keys())
    assert told is None or told.startswith("eigenvalues/0")


def test_a_smaller_tolerance_reports_what_lies_behind_an_outlier():
    record, values = behind_an_outlier(1e4, dtype="float64", tol=1e-7)
    assert record.subspace.poor_values is None
    torch.testing.assert_close(record.subspace.eigenvalues, values[:3], rtol=1e-3, atol=0.0)


def test_zero_eigenvalues_are_left_out_and_the_space_of_the_others_is_not_harmed():
    record, values = behind_an_outlier(2.0, rank=2)
    assert set(record.subspace.reported) == {1, 2}
    assert not record.subspace.trusted  # of 298 zeros one was asked for
    torch.testing.assert_close(record.subspace.eigenvalues, values[:3], rtol=1e-3, atol=1e-5)
    full, _ = behind_an_outlier(2.0, rank=3)
    assert full.subspace.trusted
    assert full.metrics["gap_index"] == 3.0  # eigenvalue 4 is not known to 5 %, but that it is small is
    assert "eigenvalues/04" not in full.metrics
