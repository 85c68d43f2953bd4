"""Random spectra with copies far below the largest eigenvalue, and what is wrong about a solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_subspace.linalg import eigsh
from lightning_subspace.subspace.subspace import TRUSTED_ERROR

from .spectra import Operator, generator


def few_copies(seed: int) -> tuple[Operator, int]:
    """Groups of one to three equal eigenvalues, all but the first below 3 % of it, and how many to ask for."""
    source = generator(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand(1, generator=source, dtype=torch.float64))

    def one_to(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=source))

    n, k = 120 + one_to(300), one_to(8)
    values, value = [1.0] * one_to(3), between(0.003, 0.03)
    while len(values) < k + 3:
        values += [value] * one_to(3)
        value *= between(0.3, 0.95)
    bulk = value * between(0.3, 1.0) * torch.rand(n - len(values), generator=source, dtype=torch.float64)
    top = torch.tensor(values, dtype=torch.float64)
    return Operator(torch.cat([top, bulk if seed % 2 else bulk - 0.5 * value]), seed=seed), k


@dataclass(frozen=True)
class Solved:
    """What a solution claims, and whether it is so.

    Attributes:
        is_trusted: a space is claimed.
        has_gap: there is one.
        undetermined: a space is claimed whose gap is not there.
        wrong: an eigenvalue is verified that is off by more than 5 %.
        misled: the next one is given, and off by more.
    """

    is_trusted: bool
    has_gap: bool
    undetermined: bool
    wrong: bool
    misled: bool

    @classmethod
    def of(cls, seed: int, delta: float) -> Solved:
        """The solution for a spectrum of `few_copies`, at a risk."""
        operator, k = few_copies(seed)
        result = eigsh(operator, operator.n, k, dtype=torch.float64, delta=delta, seed=seed)
        true, true_gap = operator.wanted(k, "LA")[0], operator.true_gap(k, "LA")
        following = float(operator.eigenvalues.sort(descending=True)[0][k])
        is_trusted = result.subspace_error <= TRUSTED_ERROR
        errors = (true - result.eigenvalues) / (0.05 * true).clamp(min=1e-3)
        known = 0.05 * abs(result.next_eigenvalue)
        return cls(
            is_trusted=is_trusted,
            has_gap=true_gap > 0.05 * float(true[-1]),
            undetermined=is_trusted and true_gap < 9.9 * float(result.residuals.max()),
            wrong=result.verified and bool((errors > 1.0).any()),
            misled=result.next_residual <= known and abs(result.next_eigenvalue - following) > 1.2 * known,
        )
