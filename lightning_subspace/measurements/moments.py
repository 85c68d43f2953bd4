"""Mean and covariance of rows, added up in parts.

    n = sum n_i,   mean = sum n_i mean_i / n,   S = sum S_i + sum n_i (mean_i - mean)(mean_i - mean)^T

with S = sum_x (x - mean)(x - mean)^T (Chan, Golub and LeVeque 1983): nothing is subtracted from a sum of squares, so a
mean that is large beside the spread does no harm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_subspace.parallel.ranks import Ranks


class Moments:
    """Count, mean and scatter of rows of d numbers, in float64.

    Args:
        d: length of a row.
        device: of the sums.

    Attributes:
        count: number of rows.
        mean: (d,).
        scatter: (d, d), the sum of the squares around the mean.

    Example:
        >>> moments = Moments(2)
        >>> moments.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
        (2, [2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(d, d, dtype=torch.float64, device=device)

    @property
    def covariance(self) -> Tensor:  # (d, d)
        """S/n; zeros without a row."""
        return self.scatter / max(self.count, 1)

    def add(self, rows: Tensor) -> None:  # (n, d)
        """Add rows."""
        if len(rows) == 0:
            return
        wide = rows.double()
        mean = wide.mean(0)
        centred = wide - mean
        self._add(len(rows), mean, centred.T @ centred)

    def join(self, other: Moments) -> None:
        """Add the rows of another one."""
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def total(self, ranks: Ranks) -> Moments:
        """Those of the rows of all ranks. A collective."""
        count = torch.tensor([float(self.count)], dtype=torch.float64, device=self.mean.device)
        first = ranks.all_reduce(torch.cat([count, self.count * self.mean]))
        whole = Moments(len(self.mean), self.mean.device)
        whole.count = int(first[0])
        whole.mean = first[1:] / max(whole.count, 1)
        shift = self.mean - whole.mean
        whole.scatter = ranks.all_reduce(self.scatter + self.count * torch.outer(shift, shift))
        return whole

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        shift, total = mean - self.mean, self.count + count
        self.scatter += scatter + (self.count * count / total) * torch.outer(shift, shift)
        self.mean += shift * (count / total)
        self.count = total
