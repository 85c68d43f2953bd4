"""`measure_subspace` on what Fabric, torch.compile and DDP make of a module: the numbers of the module inside."""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Stability, measure_subspace
from lightning_subspace.loss.bare import bare_module
from tests.oracles import dense_gradient, dense_hessian, projected_share, top_eigenspace
from tests.processes import run
from tests.thorough import covering

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 4, generator=GENERATOR)
LABELS = torch.randint(3, (40,), generator=GENERATOR)
BATCHES = list(zip(INPUTS.split(16), LABELS.split(16), strict=True))
PRECISIONS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
# Of PyTorch's own: on a CPU there is no autocast to float16 in a GradScaler; of Fabric's: bfloat16 is taken instead.
pytestmark = pytest.mark.filterwarnings("ignore:.*GradScaler.*:UserWarning", "ignore:.*AMP with fp16.*:UserWarning")


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def classify(module, batch, batch_idx):
    assert type(module) in (nn.Sequential, Net)
    return F.cross_entropy(module(batch[0]), batch[1])


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        loss = classify(self, batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def oracle(module, k=2):
    """Largest eigenvalues and gradient fraction of a float64 copy, from its dense Hessian."""
    wide = copy.deepcopy(module).double()

    def objective(m):
        return F.cross_entropy(m(INPUTS.double()), LABELS)

    values, basis = top_eigenspace(dense_hessian(wide, objective), k)
    return values, projected_share(basis, dense_gradient(wide, objective))


def contents(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("precision", "with_optimizer"), covering(list(PRECISIONS), [False, True]))
def test_the_numbers_are_those_of_the_bare_module_in_every_precision(precision, with_optimizer):
    module = network()
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)] if with_optimizer else []
    made = fabric.setup(module, *optimizers)
    wrapped, optimizer = made if with_optimizer else (made, None)
    before, rng = contents(module), torch.get_rng_state()
    tol = 1e-10 if precision == "64-true" else 1e-5
    settings = {"k": 2, "tol": tol, "measurements": [Stability()] if with_optimizer else []}
    record = measure_subspace(wrapped, BATCHES, loss_fn=classify, optimizer=optimizer, **settings)

    # The weights are rounded to the type of training; from there on the loss is at least float32.
    values, share = oracle(module)
    close = 1e-8 if precision == "64-true" else 2e-5
    torch.testing.assert_close(record.subspace.eigenvalues, values, rtol=close, atol=0.0)
    assert record.metrics["gradient_fraction"] == pytest.approx(share, rel=10 * close)
    if with_optimizer:
        assert record.metrics["stability"] == pytest.approx(float(values[0]) * 0.1 / 2, rel=close)
    bare = measure_subspace(module, BATCHES, loss_fn=classify, optimizer=(optimizers or [None])[0], **settings)
    assert dict(bare.metrics) == dict(record.metrics)
    assert all(torch.equal(before[name], tensor) for name, tensor in contents(module).items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_a_lightning_module_brings_its_training_step_and_logs_nothing():
    class Told:
        """A logger that nothing is to reach."""

        def __getattr__(self, name):
            raise AssertionError(name)

    module = Net()
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, _ = fabric.setup(module, module.configure_optimizers())
    fabric._loggers = [Told()]
    record = measure_subspace(wrapped, BATCHES, k=2, tol=1e-5)
    torch.testing.assert_close(record.subspace.eigenvalues, oracle(network())[0], rtol=2e-5, atol=0.0)


def test_patterns_are_of_the_names_inside():
    module = network()
    wrapped = Fabric(accelerator="cpu", devices=1).setup(torch.compile(module))
    for given in (wrapped, torch.compile(module)):
        record = measure_subspace(given, BATCHES, k=2, loss_fn=classify, params=["2.*"])
        assert record.subspace.eigenvectors.shape == (2, 18)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_the_module_inside_of_all_wrappers_is_measured(wrap):
    module = network()
    wrapped = wrap(module)
    assert bare_module(wrapped) is module
    settings = {"k": 2, "loss_fn": classify}
    found, expected = measure_subspace(wrapped, BATCHES, **settings), measure_subspace(module, BATCHES, **settings)
    assert dict(found.metrics) == dict(expected.metrics)


def test_a_loader_of_fabrics_is_read_without_counting_as_an_epoch():
    def loader():
        generator = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=16, shuffle=True, generator=generator)

    fabric, own = Fabric(accelerator="cpu", devices=1), loader()
    wrapped, data = fabric.setup(network()), fabric.setup_dataloaders(own)
    record = measure_subspace(wrapped, data, k=2, loss_fn=classify, tol=1e-5)
    torch.testing.assert_close(record.subspace.eigenvalues, oracle(network())[0], rtol=2e-5, atol=0.0)
    assert data._num_iter_calls == 0
    for (a, _), (b, _) in zip(data, loader(), strict=True):  # the next epoch of training is what it would have been
        assert torch.equal(a, b)


def test_what_cannot_be_unwrapped_says_what_to_pass():
    wrapped = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(network())
    with pytest.raises(
        ValueError, match=r"dtype: expected 'float32' or 'float64' .*got 'native'; pass the bare module"
    ):
        measure_subspace(wrapped, BATCHES, k=2, loss_fn=classify, dtype="native")

    class FullyShardedDataParallel(nn.Module):
        """Told by its name."""

        def __init__(self):
            super().__init__()
            self.module = network()

    with pytest.raises(ValueError, match=r"module: expected one that can be differentiated twice, got .*FSDP1"):
        measure_subspace(FullyShardedDataParallel(), BATCHES, k=2, loss_fn=classify)


def measured_under_ddp():
    module = network()
    wrapped = DistributedDataParallel(module)
    record = measure_subspace(wrapped, BATCHES, k=2, loss_fn=classify, tol=1e-5, group=torch.distributed.group.WORLD)
    wrapped(INPUTS).sum().backward()  # its reducer is none the worse
    return record.subspace.eigenvalues, record.metrics["gradient_fraction"]


def test_ddp_is_measured_by_its_group():
    values, share = oracle(network())
    for found, fraction in run(measured_under_ddp, 2):
        torch.testing.assert_close(found, values, rtol=2e-5, atol=0.0)
        assert fraction == pytest.approx(share, rel=2e-4)
