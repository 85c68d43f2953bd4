"""Float64 in every operation, also where the model asks for float32.

Norms and losses often go through float32 whatever they are given (`x.float()`, `dtype=torch.float32`). In the context
these conversions give float64: differences of gradients are then exact, and the code that is differentiated is the
same. An operation that has no float64 version raises, as it would without the context.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_subspace._torch import DispatchMode

NARROW = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
REINTERPRETED = (torch.ops.aten.view.dtype,)  # bits, not values


class Widening(DispatchMode):
    """Context in which float64 stands for every narrower floating-point type.

    Example:
        >>> with Widening():
        ...     print(torch.ones(2, dtype=torch.float64).float().dtype)
        torch.float64
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation with wide types in place of narrow ones."""
        if func in REINTERPRETED:
            return func(*args, **(kwargs or {}))
        narrow = (kwargs or {}).get("dtype")
        if narrow in NARROW and torch.Tag.nondeterministic_seeded in func.tags:
            return func(*args, **kwargs).to(NARROW[narrow])  # the numbers that training draws; wide ones are others
        wide = {key: self._wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(self._wide, args), **wide)

    @staticmethod
    def _wide(argument: Any) -> Any:
        return NARROW.get(argument, argument) if isinstance(argument, torch.dtype) else argument
