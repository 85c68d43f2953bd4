"""Every precision of the Trainer: products in float32 at least, whatever is trained in, and training left alone.

"16-mixed" is bf16-mixed on a CPU, which is where this runs: its GradScaler is untested here, since it needs a GPU.
"""

import copy
from functools import partial
from types import ModuleType

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import measure_subspace
from lightning_subspace.curvature import CurvatureConfig, Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.sample import sample_of_current
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from tests.oracles import dense_hessian
from tests.thorough import covering

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
STORED = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
INPUTS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
# A module, as what training steps write to in globals of other kinds is put back.
SEEN = ModuleType("seen")
SEEN.types = set()  # (batch, activations, default type) of the training steps

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*precision=.16-mixed. with AMP on CPU is not supported"),
    pytest.mark.filterwarnings("ignore:You passed `Trainer.*16-mixed"),
]


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))

    def training_step(self, batch, batch_idx):
        hidden = self.first(batch[0])
        SEEN.types.add((batch[0].dtype, hidden.dtype, torch.get_default_dtype()))
        return F.cross_entropy(self.head(torch.tanh(self.norm(hidden)) * self.scale), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class At(Callback):
    """Call a function after the second batch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.function(pl_module, batch)


def fit(precision, *callbacks):
    SEEN.types.clear()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net()
        trainer = Trainer(
            precision=precision,
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8))
    return module


def reference(module, inputs):
    """The dense Hessian of a float64 copy."""
    module = copy.deepcopy(module).double()
    module._trainer = None
    return dense_hessian(module, lambda net: net.training_step((inputs.double(), LABELS), 0))


@pytest.mark.parametrize(("precision", "dtype"), covering(list(PRECISIONS), ["float32", "float64"]))
def test_products_are_those_of_float64(precision, dtype):
    errors = []

    def measure(module, batch):
        space = ParameterSpace.of(module)
        SEEN.types.clear()
        with CurvatureConfig(dtype=dtype).loss(module, space) as loss:
            operator = Hessian(loss, sample_of_batches([(INPUTS, LABELS)]).hessian)
            v = torch.randn(space.n, generator=torch.Generator().manual_seed(2), dtype=operator.dtype)
            product = operator.matvec(v)
        wide = torch.float64 if dtype == "float64" or precision == "64-true" else torch.float32
        assert set(SEEN.types) == {(wide, wide, wide)}
        assert product.dtype == wide
        expected = reference(module, INPUTS) @ v.double()
        errors.append(float((product.double() - expected).norm() / expected.norm()))

    fit(precision, At(measure))
    assert errors
    assert max(errors) < (1e-5 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_native_is_the_loss_as_it_is_trained(precision):
    seen = []

    def measure(module, batch):
        trained = set(SEEN.types)
        SEEN.types.clear()
        for sample in (sample_of_batches([(INPUTS, LABELS)]), sample_of_current(batch)):
            with CurvatureConfig(dtype="native").loss(module, ParameterSpace.of(module)) as loss:
                operator = Hessian(loss, sample.hessian)
                product = operator.matvec(torch.ones(operator.n))
            assert product.dtype == (torch.float64 if precision == "64-true" else torch.float32)
            assert bool(product.isfinite().all())
        assert set(SEEN.types) == trained
        seen.append(trained)

    fit(precision, At(measure))
    stored = STORED.get(precision, torch.float32)
    computed = torch.bfloat16 if precision.endswith("mixed") else stored
    assert seen == [{(stored, computed, stored)}]


@pytest.mark.parametrize(("precision", "dtype"), covering(list(PRECISIONS), ["float32", "float64", "native"]))
def test_training_is_left_alone(precision, dtype):
    records = []

    def measure(module, batch):
        tracker = ProbeRun(ProbeSettings(k=2, dtype=dtype), module)
        sample = sample_of_batches([(INPUTS, LABELS)])
        tracker.check(module, sample)
        records.append(tracker.close(tracker.measure(module, sample, 2)))

    with_probe, without = fit(precision, At(measure)), fit(precision)
    for (name, value), other in zip(with_probe.state_dict().items(), without.state_dict().values(), strict=True):
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name
    assert torch.get_default_dtype() == torch.float32
    (record,) = records
    assert record.metrics["gradient_norm"] > 0


def test_without_a_trainer_native_means_the_own_types():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net().bfloat16()
    batches = [(INPUTS.bfloat16(), LABELS)]
    measure = partial(measure_subspace, module, batches, k=0)
    SEEN.types.clear()
    native = measure(dtype="native")
    assert (torch.bfloat16, torch.bfloat16, torch.float32) in SEEN.types
    assert native.metrics["gradient_norm"] == pytest.approx(measure().metrics["gradient_norm"], rel=0.05)


@pytest.mark.parametrize("dtype", ["float16", "double", ""])
def test_a_type_that_is_not_a_choice(dtype):
    with pytest.raises(ValueError, match=r"dtype: expected one of 'float32', 'float64', 'native', got"):
        measure_subspace(Net(), [(INPUTS, LABELS)], k=1, dtype=dtype)


def test_a_torch_dtype_will_do():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net()
    one, other = (measure_subspace(module, [(INPUTS, LABELS)], k=1, dtype=d) for d in ("float64", torch.float64))
    assert torch.equal(one.subspace.eigenvalues, other.subspace.eigenvalues)
    assert one.subspace.eigenvectors.dtype == torch.float64


def test_differences_of_the_native_loss_are_refused():
    with pytest.raises(ValueError, match="finite differences are taken in float64"):
        measure_subspace(Net(), [(INPUTS, LABELS)], k=1, dtype="native", curvature="finite-difference")
