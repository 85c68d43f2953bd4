"""The closed forms of cross-entropy and attention on a card: products beside those of the graph of torch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.curvature import GaussNewton, Hessian, gauss_newton
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss import attention_scores
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.workloads import Block
from tests.gpu import device

CLASSES, WIDTH, LENGTH = 2_000, 32, 300


def network():
    torch.manual_seed(0)
    layers = nn.Embedding(CLASSES, WIDTH), Block(WIDTH, 4, causal=True), nn.Linear(WIDTH, CLASSES)
    return nn.Sequential(*layers).to(device.DEVICE)


def next_token(module, tokens, index):
    return F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)


def product(operator, dtype):
    module = network()
    tokens = torch.randint(CLASSES, (3, LENGTH), generator=torch.Generator().manual_seed(1)).to(device.DEVICE)
    with TrainingLoss(module, ParameterSpace.of(module), next_token, dtype=dtype) as loss:
        made = operator(loss, sample_of_batches([tokens]).hessian)
        direction = torch.randn(made.n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return made.matvec(direction.to(device.DEVICE, dtype)).double()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operator", [GaussNewton, Hessian])
def test_products_are_those_of_the_graph_of_torch(operator, dtype, deterministic, monkeypatch):
    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setattr(attention_scores, "free_memory", lambda device: 0.0)
    closed = product(operator, dtype)
    monkeypatch.setattr(attention_scores, "free_memory", lambda device: 1e12)
    monkeypatch.setattr(gauss_newton, "closed_cross_entropy", lambda args, named: None)
    exact = product(operator, torch.float64)
    rounding = 1e-5 if dtype == torch.float32 else 1e-11
    assert float((closed - exact).norm()) <= rounding * float(exact.norm())
