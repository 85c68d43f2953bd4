"""Oracles: operators of known spectrum, and what a right answer looks like."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_subspace.linalg import EigshResult, Which
from lightning_subspace.linalg.selection import best_first, merit


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=torch.float64)


def normal(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Operator:
    """A symmetric operator with prescribed eigenvalues: a reflection H takes the axes to its eigenvectors.

    It computes in float64, whatever the dtype of the vector, and can add noise of a size relative to its norm: the
    rounding of a real Hessian product in float32 is about 1e-7.
    """

    eigenvalues: Tensor  # (n,) float64
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        mirror = normal(self.n, self.seed + 1000)
        object.__setattr__(self, "_mirror", mirror / mirror.norm())
        object.__setattr__(self, "_generator", generator(self.seed))

    @property
    def n(self) -> int:
        return self.eigenvalues.numel()

    @property
    def norm(self) -> float:
        return float(self.eigenvalues.abs().max())

    def reflect(self, rows: Tensor) -> Tensor:
        return rows - 2 * (rows @ self._mirror)[..., None] * self._mirror

    def __call__(self, vector: Tensor) -> Tensor:
        image = self.reflect(self.eigenvalues * self.reflect(vector.double()))
        if self.noise:
            error = torch.randn(self.n, generator=self._generator, dtype=torch.float64)
            image += self.noise * self.norm * vector.norm() * error / error.norm()
        return image.to(vector.dtype)

    def dense(self) -> Tensor:
        return self.reflect(self.reflect(torch.eye(self.n, dtype=torch.float64)) * self.eigenvalues)

    def wanted(self, k: int, which: Which) -> tuple[Tensor, Tensor]:
        """The k wanted eigenvalues, best first, and the eigenvectors as rows."""
        order = best_first(self.eigenvalues, which)[:k]
        return self.eigenvalues[order], self.reflect(torch.eye(self.n, dtype=torch.float64)[order])

    def true_gap(self, k: int, which: Which) -> float:
        """The smallest distance between a wanted and an unwanted eigenvalue."""
        order = best_first(self.eigenvalues, which)
        wanted, unwanted = self.eigenvalues[order[:k]], self.eigenvalues[order[k:]]
        if which == "LM":  # equal magnitudes of opposite sign cannot be told apart in the order
            wanted, unwanted = wanted.abs(), unwanted.abs()
        return float((wanted[:, None] - unwanted).abs().min()) if unwanted.numel() else float("inf")

    def residuals(self, result: EigshResult) -> Tensor:
        """|A x - theta x| in float64, from the returned pairs alone."""
        vectors = self.reflect(result.eigenvectors.double())
        return (vectors * self.eigenvalues - result.eigenvalues[:, None] * vectors).norm(dim=1)


def shortfall(operator: Operator, result: EigshResult, which: Which) -> Tensor:
    """By how much each eigenvalue found is worse than the true one in its place, in units of the norm; (k,)."""
    found = result.eigenvalues[best_first(result.eigenvalues, which)]
    true, _ = operator.wanted(len(found), which)
    return (merit(true, which) - merit(found, which)) / (operator.norm or 1.0)


def num_missed(operator: Operator, result: EigshResult, which: Which, margin: float = 0.03, tol: float = 1e-3) -> int:
    """How many eigenvalues are not there although they lie beyond the last one found by more than ``margin``.

    Within the margin copies are passed over by design.
    """
    found = merit(result.eigenvalues[best_first(result.eigenvalues, which)], which)
    true = merit(operator.wanted(len(found), which)[0], which)
    missed = 0
    for end in [slice(0, None, 2), slice(1, None, 2)] if which == "BE" else [slice(None)]:
        if found[end].numel():
            matters = true[end] > found[end].min() + (margin + 1e-6) * operator.norm
            wrong = (true[end] - found[end]).abs() > 2 * tol * operator.norm
            missed += int((matters & wrong).sum())
    return missed


def spectra(n: int) -> dict[str, Tensor]:
    """The spectra on which plain Lanczos goes wrong, and ordinary ones, for dimension n >= 200."""
    index = torch.arange(1, n + 1, dtype=torch.float64)
    outliers = 10 * index[:10] ** -1.2

    def with_bulk(top: Tensor | list[float], bulk: Tensor) -> Tensor:
        top = torch.as_tensor(top, dtype=torch.float64)
        return torch.cat([top, bulk[: n - len(top)]])

    bulk = 0.05 * normal(n, 0)
    zeros = torch.zeros(n, dtype=torch.float64)
    ninefold = (index[: n // 9] ** -1.3).repeat_interleave(9)
    return {
        "ten equal": with_bulk([1.0] * 10, bulk),
        "six and six equal": with_bulk([1.0] * 6 + [0.35] * 6, bulk),
        "softmax model": with_bulk([1.0] * 10 + [0.1] * 80, zeros),
        "clusters": with_bulk([c + 1e-7 * i for c in (1.0, 0.7, 0.5, 0.3) for i in range(3)], 0.4 * bulk),
        "ninefold": with_bulk(ninefold, zeros),
        "doubled": torch.cat([outliers, 0.4 * bulk[: n // 2 - 10]]).repeat_interleave(2),
        "ten equal, all negative": with_bulk([-0.1] * 10, -0.2 - 0.8 * uniform(n, 5)),
        "zero": zeros,
        "identity": zeros + 1,
        "minus identity": zeros - 1,
        "rank five": with_bulk([5.0, 4.0, 3.0, 2.0, 1.0], zeros),
        "four equal": with_bulk([1.0] * 4, zeros),
        "power law": 10 * index**-1.5,
        "outliers": with_bulk(outliers, 0.01 * normal(n, 1)),
        "indefinite": with_bulk(torch.cat([outliers, -0.3 * outliers]), 0.01 * normal(n, 2)),
        "heavy tail": with_bulk(uniform(40, 3) ** 3, 0.02 * normal(n, 4).abs() * normal(n, 6).exp().clamp(max=5)),
    }


def copies_behind_an_outlier(n: int) -> Tensor:
    """A linear layer of four outputs under MSE, on features with a mean: each eigenvalue four times, most are small.

    Copies of all but the first lie closer to the 6th, and to the 8th, than 3 % of the largest.
    """
    bulk = 0.04 * uniform(n // 4 - 3, 7) + 1e-3
    return torch.cat([bulk.new_tensor([89.5, 1.87, 0.5]), bulk]).sort(descending=True)[0].repeat_interleave(4)


def mirrored(eigenvalues: Tensor, which: Which) -> Tensor:
    """The spectrum with what is interesting about it turned to where ``which`` looks."""
    if which in ("LA", "SA"):
        return eigenvalues if which == "LA" else -eigenvalues
    signs = 1.0 - 2.0 * (torch.arange(eigenvalues.numel()) % 2)
    return eigenvalues * signs
