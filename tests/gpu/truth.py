"""The top of the Hessian in float64, on the device, by code that shares nothing with the package."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.gpu.models import Problem

STEPS = 150  # of Lanczos, without a stopping rule


class Double:
    """Hessian of the mean over the batches in float64: a graph each, and double backward."""

    def __init__(self, problem: Problem, module: nn.Module, batches: list[Any]) -> None:
        module = copy.deepcopy(module).double()
        self.parameters = list(module.parameters())
        self.graphs = []
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for batch in batches:
                loss = problem.loss(module, _double(batch), 0) / len(batches)
                self.graphs.append(torch.autograd.grad(loss, self.parameters, create_graph=True))
        self.gradient = sum(_flat(graph) for graph in self.graphs).detach()

    def product(self, v: Tensor) -> Tensor:  # (n,)
        parts = v.split([p.numel() for p in self.parameters])
        pieces = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        total = torch.zeros_like(v)
        for graph in self.graphs:
            total += _flat(torch.autograd.grad(graph, self.parameters, pieces, retain_graph=True))
        return total


@dataclass(frozen=True)
class Truth:
    """Eigenvalues (k,), largest first, their vectors (k, n) as rows, and the share of the gradient in their space."""

    eigenvalues: Tensor
    vectors: Tensor
    fraction: float


def truth(hessian: Double, k: int) -> Truth:
    """By plain Lanczos, orthogonalised twice against all vectors.

    Raises:
        ArithmeticError: when that was not enough for residuals of 1e-8.
    """
    n = len(hessian.gradient)
    steps = min(STEPS, n)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(n, generator=generator, dtype=torch.float64).to(hessian.gradient)
    basis, images = v.new_empty(steps, n), v.new_empty(steps, n)
    for i in range(steps):
        for _ in range(2):
            v = v - basis[:i].T @ (basis[:i] @ v)
        basis[i] = v / v.norm()
        images[i] = v = hessian.product(basis[i])
    small = basis @ images.T
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    rotation = rotation.flip(1)[:, :k].T
    values, vectors = values.flip(0)[:k], rotation @ basis
    residuals = (rotation @ images - values[:, None] * vectors).norm(dim=1)
    if float(residuals.max()) > 1e-8 * float(values[0]):
        raise ArithmeticError(f"residuals {residuals.tolist()} after {steps} products")
    projected = vectors @ hessian.gradient
    return Truth(values, vectors, float(projected.square().sum() / hessian.gradient.square().sum()))


def _flat(pieces: Any) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces])


def _double(batch: Any) -> Any:
    return tuple(piece.double() if piece.is_floating_point() else piece for piece in batch)
