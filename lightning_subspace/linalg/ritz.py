"""What one diagonalisation of the projected matrix tells."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Neighbour(NamedTuple):
    """The unwanted value closest to the wanted ones at one end."""

    gap: float
    value: float
    residual: float


UNSEEN = Neighbour(gap=math.nan, value=math.nan, residual=math.nan)


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs, the k wanted ones first and best first."""

    values: Tensor  # (m,)
    rotation: Tensor  # (m, m) columns
    reducible: Tensor  # (m,) the part of the residual estimates that further matvecs reduce
    residuals: Tensor  # (m,) the residual estimates


def beside_identity(k: int, rotation: Tensor) -> Tensor:
    """The block diagonal matrix of a (k, k) identity and ``rotation``."""
    size = k + rotation.shape[0]
    block_diagonal = torch.eye(size, k + rotation.shape[1], dtype=torch.float64, device="cpu")
    block_diagonal[k:, k:] = rotation
    return block_diagonal
