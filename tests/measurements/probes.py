"""One small float64 net, its dense derivatives, and one probe of it with one more measurement."""

import warnings
from contextlib import nullcontext

import torch
from torch import nn

from lightning_subspace import measure_subspace
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver
from tests.left_out import without_error_bar
from tests.oracles import dense_gradient, dense_hessian, top_eigenspace

F64 = torch.float64
SIZES = (24, 16, 16, 8)  # unequal micro-batches


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)


def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(sum(SIZES)) % 3
    inputs = torch.randn(sum(SIZES), 5, generator=generator, dtype=F64) + 2 * torch.eye(3, 5, dtype=F64)[labels]
    return list(zip(inputs.split(SIZES), labels.split(SIZES), strict=True))


def loss_fn(module, batch, batch_idx):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def objective(module):
    inputs, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    return loss_fn(module, (inputs, labels), 0)


def derivatives(module):
    return dense_gradient(module, objective), dense_hessian(module, objective)


def flat(module):
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


def stepped(make_optimizer, count=5, seed=0):
    """A net and its optimizer after some full-batch steps."""
    module = net(seed)
    optimizer = make_optimizer(module)
    for _ in range(count):
        step(module, optimizer)
    return module, optimizer


def step(module, optimizer):
    optimizer.zero_grad()
    objective(module).backward()
    optimizer.step()
    optimizer.zero_grad()


def metrics(module, *measurements, k=4, error_bar=False, **options):
    """What `measure_subspace` finds, in float64 and to the last digits."""
    settings = {"tol": 1e-10, "dtype": "float64", "loss_fn": loss_fn, "max_matvecs": 500}
    with warnings.catch_warnings(), nullcontext() if error_bar else without_error_bar():
        warnings.simplefilter("error")
        record = measure_subspace(module, data(), k=k, measurements=measurements, **{**settings, **options})
    return record.metrics


def alone(module, measurement, optimizer):
    """What this measurement finds without the default ones, eigenpairs and a self-check, which take most time."""
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=F64) as loss:
        _, record = take_probe(loss, sample_of_batches(data()), Solver(0), [measurement], optimizer=optimizer)
    return record.metrics


__all__ = ["F64", "top_eigenspace"]
