"""Everything that the package takes from torch beneath its public interface.

Each entry says what it is for and why nothing public does. Seen in torch 2.6 to 2.14.
"""

from __future__ import annotations

from torch import Tensor

# A mode that sees every operation of ATen, also those of backward passes; torch.overrides sees calls from Python alone.
# Documented in torch's notes on extending it, under this name and nowhere public.
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "base_of", "storages_of"]


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that this is a view of, or the tensor itself.

    `untyped_storage` tells whether memory is shared, not whether its owner is a parameter.
    """
    return tensor if tensor._base is None else tensor._base


def storages_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that hold a tensor's memory: itself, or a sparse one's parts.

    The public `indices()` and `values()` want a coalesced tensor, and `coalesce()` copies: it is not what is held.
    """
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
