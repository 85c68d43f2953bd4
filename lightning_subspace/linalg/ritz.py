"""What one diagonalisation of the projected matrix tells."""

import math
from dataclasses import dataclass
from typing import NamedTuple

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
