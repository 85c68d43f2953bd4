"""The copy of a parameter that graphs end in, and whether it still is what it was made as.

Compared are values: writes through `.data` (a clamp, a momentum teacher) leave no trace in the version counter. All
leaves are compared at once, so that a device is waited for once and not for every parameter. A nan is equal to a nan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_subspace._torch import version_of
from lightning_subspace.parallel.fsdp import is_sharded, local_part, local_slice


@dataclass
class ParameterCopy:
    """A parameter and its copy, made in some round of `Shadow.reset` with some displacement."""

    original: nn.Parameter
    copy: nn.Parameter
    offset: Tensor | None
    round: int

    def __post_init__(self) -> None:
        self.is_gathered = is_sharded(self.original)
        self._made = (version_of(self.copy), self.copy.data_ptr())

    def comparison(self, value: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Two tensors that are equal if nobody has written to the copy; None where somebody has for certain.

        Args:
            value: what the copy was made with; not needed for the whole of a sharded parameter.
        """
        if self.copy.requires_grad != self.original.requires_grad:
            return None
        if value is not None:
            return self.copy.detach(), value
        return (
            self._comparison_of_local_slice() if (version_of(self.copy), self.copy.data_ptr()) == self._made else None
        )

    def _comparison_of_local_slice(self) -> tuple[Tensor, Tensor]:
        """The same for this rank's shard: each rank guards its own, with neither a copy nor a collective."""
        part = local_slice(self.copy.detach(), self.original)
        if part is None:
            return self.copy.new_empty(0), self.copy.new_empty(0)
        value = local_part(self.original).detach().to(part.dtype)
        if self.offset is not None:
            value = value + local_slice(self.offset, self.original).to(value)  # type: ignore[union-attr]
        return part, value


def unmodified(evidence: Iterable[tuple[Tensor, Tensor] | None]) -> list[bool]:
    """For each piece of `ParameterCopy.evidence` whether it holds, with one read from the device.

    Example:
        >>> one = torch.ones(2)
        >>> unmodified([(one, torch.ones(2)), (one, torch.zeros(2)), (one, torch.ones(3)), None])
        [True, False, False, False]
        >>> unmodified([(one * torch.nan, one * torch.nan), (one * torch.nan, one)])
        [True, False]
    """
    flags = [pair is not None and _is_equal(*pair) for pair in evidence]  # one pair at a time takes memory
    asked = [flag for flag in flags if isinstance(flag, Tensor)]
    answers = iter(torch.stack([flag.to(asked[-1].device) for flag in asked]).tolist() if asked else [])
    return [next(answers) if isinstance(flag, Tensor) else flag for flag in flags]


def _is_equal(a: Tensor, b: Tensor) -> Tensor | bool:
    """A flag on the device, where it is not known at once."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if _is_on_host(a) and torch.equal(a, b):  # twice as fast as what follows
        return True
    return ((a == b) | ((a != a) & (b != b))).all()


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.is_cpu
