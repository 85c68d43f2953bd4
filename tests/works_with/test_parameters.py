"""Which parameters are measured: complex ones, sparse gradients, adapters on a frozen backbone, patterns, tied ones."""

import copy
import warnings
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.curvature import CheckOutcome, CurvatureConfig, Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import measure_subspace
from tests.modules import CLASSES
from tests.oracles import STEP, dense_hessian
from tests.thorough import covering
from tests.works_with.numbered import by_index, loader
from tests.works_with.same_run import Classifier, compare

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(6, (12, 3), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (12,), generator=torch.Generator().manual_seed(2))


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def matrix(module, inputs, params=None):
    """The operator as a matrix, in float64."""
    sample = sample_of_batches([(inputs, LABELS)]).hessian
    with TrainingLoss(module, ParameterSpace.of(module, params), classify, dtype=torch.float64) as loss:
        operator = Hessian(loss, sample)
        return torch.stack([operator.matvec(row) for row in torch.eye(operator.n, dtype=torch.float64)])


class Waves(nn.Module):
    """Complex weights between real ones, as in a Fourier layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))  # an odd number of coordinates before the complex ones
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        waves = torch.fft.fft(self.scale * x) @ self.weight.T + self.phase
        return self.head(torch.tanh(waves.real) + waves.abs().square().log1p())


def differences(module, space):
    """Rows of central differences of `.grad`, one real coordinate of the flat vector after the other."""
    base = space.flatten(space.tensors(module))

    def gradient(theta):
        moved = copy.deepcopy(module)
        tensors = space.tensors(moved)
        with torch.no_grad():
            for tensor, value in zip(tensors, space.unflatten(theta), strict=True):
                tensor.copy_(value)
        classify(moved, (INPUTS, LABELS), 0).backward()
        return space.flatten([tensor.grad for tensor in tensors])

    steps = STEP * torch.eye(space.n, dtype=torch.float64)
    return torch.stack([(gradient(base + step) - gradient(base - step)) / (2 * STEP) for step in steps])


def test_complex_parameters_are_pairs_of_real_coordinates():
    module = built(Waves)
    space = ParameterSpace.of(module)
    assert space.n == 1 + 2 * 12 + 2 * 3 + 12
    expected = differences(module, space)
    assert (matrix(module, INPUTS) - expected).norm() < 1e-8 * expected.norm()
    assert (expected - expected.T).norm() < 1e-8 * expected.norm()
    sample = sample_of_batches([(INPUTS, LABELS)])
    assert CurvatureConfig(classify).check(module, sample).outcome is CheckOutcome.PASSED


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference"])
def test_complex_parameters_through_a_whole_probe(curvature):
    module = built(Waves)
    record = measure_subspace(module, [(INPUTS, LABELS)], k=3, loss_fn=classify, curvature=curvature, tol=1e-6)
    expected = torch.linalg.eigvalsh(differences(module, ParameterSpace.of(module))).flip(0)[:3]
    assert torch.allclose(record.subspace.eigenvalues.double(), expected, rtol=1e-6)
    assert record.subspace.eigenvectors.dtype == torch.float64


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embedding = nn.Embedding(6, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens).mean(dim=1)))


class Adapted(nn.Module):
    """A frozen layer with a trainable update of rank two."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))
        self.head = nn.Linear(5, 3).requires_grad_(False)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + x @ self.down.T @ self.up.T))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.unused = nn.Linear(4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.outer(torch.tanh(self.inner(x)))))


CASES = {
    "sparse-embedding": (lambda: Bag(True), TOKENS),
    "dense-embedding": (lambda: Bag(False), TOKENS),
    "adapters-on-a-frozen-backbone": (Adapted, INPUTS),
    "tied-and-unused": (Tied, INPUTS),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_hessian(name):
    make, inputs = CASES[name]
    module = built(make)
    expected = dense_hessian(module, lambda net: classify(net, (inputs, LABELS), 0))
    assert (matrix(module, inputs) - expected).norm() < 1e-12 * expected.norm()
    sample = sample_of_batches([(inputs, LABELS)])
    assert CurvatureConfig(classify).check(module, sample).outcome is CheckOutcome.PASSED


def test_patterns_choose_a_block():
    module = built(Tied)
    whole = dense_hessian(module, lambda net: classify(net, (INPUTS, LABELS), 0))
    block = matrix(module, INPUTS, ["head.*"])
    assert torch.allclose(block, whole[-15:, -15:], rtol=0, atol=1e-14)


class Finetuned(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fine_tuned(*callbacks):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Finetuned()
        trainer = Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05), *callbacks],
        )
        trainer.fit(module, DataLoader(TensorDataset(INPUTS.float(), LABELS), batch_size=4))
    return [p.detach().clone() for p in module.parameters()]


def test_a_trainable_set_that_changes_in_mid_run():
    monitor = SubspaceMonitor(k=2, every_n_steps=1, max_overhead=None, on_failure="raise")
    with pytest.warns(UserWarning, match=r"set of measured parameters has changed by step 4; overlaps start anew"):
        with_monitor = fine_tuned(monitor)
    assert all(torch.equal(a, b) for a, b in zip(with_monitor, fine_tuned(), strict=True))
    assert [record.step for record in monitor.history] == list(range(7))
    has_overlap = {r.step for r in monitor.history if "overlap_previous" in r.metrics}
    assert has_overlap <= {1, 2, 3, 5, 6}
    assert {1, 2, 5, 6} & has_overlap
    assert all(step >= 4 for step in monitor.overlap_matrix()[0])


class Penalised(Classifier):
    """A penalty on parameters that are taken from elsewhere than the module."""

    registry: ClassVar[list[nn.Parameter]] = []

    def __init__(self, way):
        super().__init__()
        self.way = way
        type(self).registry = list(self.parameters())

    def training_step(self, batch, batch_idx):
        places = {
            "self.optimizers()": lambda: [p for group in self.optimizers().param_groups for p in group["params"]],
            "a class attribute": lambda: self.registry,
            "the trainer": lambda: self.trainer.lightning_module.parameters(),
        }
        return super().training_step(batch, batch_idx) + 0.1 * sum(p.square().sum() for p in places[self.way]())


@pytest.mark.parametrize("way", ["self.optimizers()", "a class attribute"])
def test_parameters_that_the_loss_takes_from_elsewhere_are_refused_and_training_is_unchanged(tmp_path, way):
    with pytest.warns(UserWarning, match=r"left out.*ElsewhereError: loss: expected every .* 'net\.0\.") as told:
        run = compare(
            tmp_path,
            lambda: Penalised(way),
            loader,
            monitor={"on_failure": "warn"},
            accumulate_grad_batches=2,
        )
    assert not run.differing
    assert run.steps == []
    assert sum("SubspaceMonitor" in str(w.message) for w in told) == 1


def test_parameters_by_the_trainer_are_those_of_the_module(tmp_path):
    run = compare(tmp_path, lambda: Penalised("the trainer"), loader)
    assert not run.differing
    assert run.steps == [0, 2, 4, 6, 8]


def tied_by_data():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight.data = net[0].weight.data
    return net


def test_two_parameters_over_one_storage_are_refused():
    with pytest.raises(ValueError, match=r"module: expected parameters .* got '0\.weight' and '2\.weight' over one"):
        measure_subspace(tied_by_data(), [(INPUTS.float(), LABELS)], k=2, loss_fn=classify)


def test_a_frozen_parameter_over_the_storage_of_another_is_a_constant():
    net = tied_by_data()
    net[2].weight.requires_grad_(False)
    found = measure_subspace(net, [(INPUTS.float(), LABELS)], k=2, loss_fn=classify)
    alone = copy.deepcopy(net)
    alone[2].weight.data = net[2].weight.data.clone()
    assert (
        found.metrics["sharpness"]
        == measure_subspace(alone, [(INPUTS.float(), LABELS)], k=2, loss_fn=classify).metrics["sharpness"]
    )


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(CLASSES))


@pytest.mark.parametrize(("data", "sample"), covering([loader, by_index], [16, "all", "current"]))
def test_lazy_parameters_are_measured_from_the_first_batch_on(tmp_path, data, sample, caplog):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[lL]azy", module="torch|lightning")
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            run = compare(tmp_path, Lazy, data, monitor={"sample": sample, "every_n_steps": 1})
    assert not run.differing
    assert run.steps == list(range(1, 9))
    assert caplog.text.count("lazy parameters have no shape before the first batch") == 1


def test_lazy_parameters_are_named_where_no_batch_comes_before():
    with pytest.raises(ValueError, match=r"'net\.0\.weight': expected a shape, got a lazy parameter"):
        measure_subspace(Lazy(), [(INPUTS.float(), LABELS)], k=2, loss_fn=classify)
