"""Mode of torch functions that stays on in backward passes.

A `TorchFunctionMode` belongs to its thread, and autograd hands it on to the threads of a backward pass, where hooks and
activation checkpoints run. But torch sets it aside while `backward` and `grad` begin, so these are called in a way that
keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_subspace._torch import undispatched

PLAIN: Any = Tensor.__torch_function__
BACKWARD = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})


class LastingMode(TorchFunctionMode):
    """Context whose `called` sees every call of a torch function.

    Example:
        >>> class Names(LastingMode):
        ...     def called(self, func, args, named):
        ...         names.append(getattr(func, "__name__", ""))
        ...         return func(*args, **named)
        >>> names, x = [], torch.ones(2, requires_grad=True)
        >>> with Names():
        ...     y = torch.sin(x)
        ...     _ = y.register_hook(lambda gradient: torch.cos(gradient))
        ...     y.sum().backward()
        >>> "sin" in names, "cos" in names
        (True, True)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; a backward pass with the mode on."""
        named = dict(kwargs or {})
        if func in BACKWARD and all(map(_is_plain, types)):
            with self:  # for what runs in the backward pass; torch has set it aside for this call
                return undispatched(func)(*args, **named)
        return self.called(func, args, named)

    def called(self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Call a function of torch, in the way of this mode."""
        return func(*args, **named)


def _is_plain(kind: type) -> bool:
    """Whether a class of tensors leaves torch's functions as they are."""
    return getattr(getattr(kind, "__torch_function__", None), "__func__", None) is PLAIN.__func__
