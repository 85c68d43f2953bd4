"""Is an answer right? Judged in float64 by code that shares nothing with the package.

An answer counts when every residual |H x - lambda x| is at most tol * lambda_1, every eigenvalue is within that of the
true one at its place (a residual alone does not notice a pair that was missed), and the vectors are orthonormal.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from tests.benchmarks.workloads import Case, cross_entropy

ORTHONORMAL = 1e-3


@dataclass(frozen=True)
class Answer:
    """What a solver returned, and what it took.

    Attributes:
        values: (k,), in any order.
        vectors: (k, n) rows.
        matvecs: products with the Hessian.
        claims: whether the solver itself says that it has converged; None where it says nothing.
        note: for the table.
    """

    values: Tensor
    vectors: Tensor
    matvecs: int
    claims: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Accuracy:
    """Errors of an answer, the first two in units of lambda_1."""

    residual: float
    eigenvalue: float
    defect: float

    def reaches(self, tol: float) -> bool:
        return self.residual <= tol and self.eigenvalue <= tol and self.defect <= ORTHONORMAL


class Judge:
    """The float64 Hessian of a case, and its largest eigenvalues by ARPACK.

    Args:
        case: the network and its batch.
        k: the most eigenvalues that will be asked about.
    """

    def __init__(self, case: Case, k: int) -> None:
        module = copy.deepcopy(case.module).double()
        self._parameters = list(module.parameters())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = cross_entropy(module, (case.batch[0].double(), case.batch[1]))
        self._gradients = torch.autograd.grad(loss, self._parameters, create_graph=True)
        n = sum(p.numel() for p in self._parameters)
        operator = LinearOperator((n, n), matvec=lambda v: self.product(torch.tensor(v).view(-1)).numpy(), dtype=float)
        start = np.random.default_rng(7).standard_normal(n)
        found = eigsh(operator, k, which="LA", ncv=2 * k + 20, tol=1e-5, v0=start, return_eigenvectors=False)
        self.eigenvalues = torch.tensor(np.sort(found)[::-1].copy())

    def product(self, v: Tensor) -> Tensor:  # (n,)
        sizes = [p.numel() for p in self._parameters]
        pieces = [piece.view_as(p) for piece, p in zip(v.split(sizes), self._parameters, strict=True)]
        images = torch.autograd.grad(self._gradients, self._parameters, pieces, retain_graph=True)
        return torch.cat([image.reshape(-1) for image in images])

    def judge(self, answer: Answer) -> Accuracy:
        order = answer.values.double().argsort(descending=True)
        values, vectors = answer.values.double()[order], answer.vectors.double()[order]
        largest = float(self.eigenvalues[0])
        residuals = [float((self.product(x) - value * x).norm()) for value, x in zip(values, vectors, strict=True)]
        gram = vectors @ vectors.T
        return Accuracy(
            residual=max(residuals) / largest,
            eigenvalue=float((values - self.eigenvalues[: len(values)]).abs().max()) / largest,
            defect=float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()),
        )
