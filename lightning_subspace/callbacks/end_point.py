"""Point in parameter space where a fit has ended.

Steps alone do not tell whether the next fit goes on from there: a callback may be handed from one model to another, or
a model be reset between two folds. What tells is whether the next fit starts from the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_subspace.parallel.bit_sums import bit_sum
from lightning_subspace.parallel.fsdp import local_part


@dataclass(frozen=True)
class EndPoint:
    """Trainable parameters of a module, as one sum of bits each.

    Attributes:
        sums: shape and sum of this rank's part, by the parameter's name.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> end = EndPoint.of(module)
        >>> end.is_at(module), end.is_at(nn.Linear(2, 1))
        (True, False)
    """

    sums: dict[str, tuple[torch.Size, torch.dtype, int]]

    @classmethod
    def of(cls, module: nn.Module) -> EndPoint | None:
        """The point where a module is; None where that cannot be told."""
        try:
            return cls({name: _summed(p) for name, p in module.named_parameters() if p.requires_grad})
        except Exception:  # after an error of the device there may be nothing to read
            return None

    def is_at(self, module: nn.Module) -> bool:
        """Whether a module has these values, trainable or not. Never raises."""
        named = dict(module.named_parameters())
        try:
            return all(name in named and _summed(named[name]) == kept for name, kept in self.sums.items())
        except Exception:  # such as a lazy parameter
            return False


def _summed(parameter: Tensor) -> tuple[torch.Size, torch.dtype, int]:
    part = local_part(parameter.detach())
    return part.shape, part.dtype, int(bit_sum(part))
