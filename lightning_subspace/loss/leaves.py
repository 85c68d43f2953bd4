"""Copies of parameters as leaves, and whether they were written to.

Values are compared: writes through `.data` (a clamp, a momentum teacher) leave no trace in the version counter. The
flags of all leaves are read together, so that there is one wait for the device. A nan equals a nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_subspace._torch import version_of
from lightning_subspace.parallel.fsdp import is_sharded, local_part, local_slice


@dataclass
class ParameterCopy:
    """A parameter and its copy, made in some round of `Shadow.reset`."""

    original: nn.Parameter
    copy: nn.Parameter
    offset: Tensor | None
    round: int

    def __post_init__(self) -> None:
        self.is_gathered = is_sharded(self.original)
        self._made = (version_of(self.copy), self.copy.data_ptr())

    def comparison(self, value_of: Callable[[nn.Parameter, Tensor | None], Tensor]) -> tuple[Tensor, Tensor] | None:
        """Two tensors, equal unless the copy was written to, or None."""
        if self.copy.requires_grad != self.original.requires_grad:
            return None
        if not self.is_gathered:
            return self.copy.detach(), value_of(self.original, self.offset)  # as it was made
        if (version_of(self.copy), self.copy.data_ptr()) != self._made:
            return None
        # Each rank compares its own shard, with neither a copy of the whole nor a collective.
        part = local_slice(self.copy.detach(), self.original)
        if part is None:
            return self.copy.new_empty(0), self.copy.new_empty(0)
        value = local_part(self.original).detach().to(part)  # from the host, under a CPUOffloadPolicy
        if self.offset is not None:
            value = value + local_slice(self.offset, self.original).to(value)  # type: ignore[union-attr]
        return part, value


def unmodified(pairs: Iterable[tuple[Tensor, Tensor] | None]) -> list[bool]:
    """Whether each pair is equal, with one read from the device.

    Example:
        >>> one = torch.ones(2)
        >>> unmodified([(one, torch.ones(2)), (one, torch.zeros(2)), (one, torch.ones(3)), None])
        [True, False, False, False]
        >>> unmodified([(one * torch.nan, one * torch.nan), (one * torch.nan, one)])
        [True, False]
    """
    flags = [pair is not None and _is_equal(*pair) for pair in pairs]  # lazily: a pair takes memory
    asked = [flag for flag in flags if isinstance(flag, Tensor)]
    answers = iter(torch.stack([flag.to(asked[-1].device) for flag in asked]).tolist() if asked else [])
    return [next(answers) if isinstance(flag, Tensor) else flag for flag in flags]


def _is_equal(a: Tensor, b: Tensor) -> Tensor | bool:
    """A flag on the device, unless it is known at once."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if _is_on_host(a) and torch.equal(a, b):  # twice as fast as the line below
        return True
    return ((a == b) | ((a != a) & (b != b))).all()


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.is_cpu  # a function, so that tests can act as if there were a device
