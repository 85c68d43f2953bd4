"""Copies of batches that share nothing with the original.

One `copy.deepcopy`, in which every tensor is copied by a given function: also those inside objects of any class, whose
own `__deepcopy__` may not ask `copy` at all. Torch reports each call on a tensor to a `TorchFunctionMode`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_subspace.state.failure import is_out_of_memory
from lightning_subspace.state.fields import walk_leaves


class CopyError(TypeError):
    """A batch holds an object that cannot be copied."""


def copied(
    data: Any,
    copy_tensor: Callable[[Tensor], Tensor],
    copy_array: Callable[[np.ndarray[Any, Any]], Any] | None = None,
) -> Any:
    """A deep copy of a batch, objects of any class included.

    What is shared inside the batch is shared inside the copy, and tensors keep their class and attributes.

    Args:
        data: the batch.
        copy_tensor: copies a tensor. It is called once for each, in an order that the structure fixes: the same for a
            batch, for its copy, and in another process.
        copy_array: copies a NumPy array; None: as it is.

    Raises:
        CopyError: for an object that cannot be copied.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> first, second = copied([x, x], torch.clone)
        >>> first is second, first is x
        (True, False)
    """
    memo: dict[int, Any] = {}
    if copy_array is not None:
        arrays = [array for array in walk_leaves(data, np.ndarray) if not array.dtype.hasobject]
        memo.update({id(array): copy_array(array) for array in arrays})
    mode = _TensorCopies(copy_tensor, memo)
    try:
        with mode:
            new = copy.deepcopy(data, memo)
    except Exception as error:
        # Perhaps there is no memory left: not a matter of what the batch holds.
        if error is mode.failure or is_out_of_memory(error):
            raise
        raise CopyError(
            f"batch: expected data that copy.deepcopy can copy, got {type(data).__name__} with an object that cannot "
            f"be ({type(error).__name__}: {error}); leave it out of the batch, or pass sample=, a list of batches "
            "without it, and loss_fn=, the loss of one."
        ) from error
    finally:
        mode.failure = None  # its traceback refers to the mode, and to this frame
    mode.complete()
    return new


def tensors_of(data: Any) -> list[Tensor]:
    """The tensors in a batch, each once, in the order of copying."""
    found: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    copied(data, remember, lambda array: array)
    return found


class _TensorCopies(TorchFunctionMode):
    """Mode in which copying code meets copies in place of tensors."""

    def __init__(self, copy_tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> None:
        super().__init__()
        self.failure: Exception | None = None  # of `copy_tensor`
        self._copy_tensor = copy_tensor
        self._memo = memo
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # of an id; with the original, so that it stays in use
        self._new: dict[int, Tensor] = {}  # what the copying code has made itself

    def complete(self) -> None:
        """Give attributes to the copies of copies, as of a Parameter."""
        for key, (_, new) in self._copies.items():
            if isinstance(last := self._memo.get(key), Tensor) and last is not new:
                vars(last).update(vars(new))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor):
            args = (self._copy(args[0]), *args[1:])
            if func is Tensor.__deepcopy__:
                return args[0]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._new[id(result)] = result
        return result

    def _copy(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._new:
            return tensor
        if id(tensor) not in self._copies:
            try:
                new = self._copy_tensor(tensor)
            except Exception as failure:
                self.failure = failure
                raise
            # A class that computes by itself (a nested tensor, a DTensor) keeps parts of itself as attributes.
            is_own_kind = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
            if type(new) is not type(tensor) and not is_own_kind and not isinstance(tensor, nn.Parameter):
                new = new.as_subclass(type(tensor))
            self._copies[id(tensor)] = tensor, new
            self._new[id(new)] = new
            for name, value in vars(tensor).items():
                # A capsule is of C code, which makes it anew: sizes that torch 2.6 keeps for nested tensors.
                if not (is_own_kind and (name in vars(new) or type(value).__name__ == "PyCapsule")):
                    with self:
                        attribute = copy.deepcopy(value, self._memo)
                    if new is not tensor:
                        vars(new)[name] = attribute
        return self._copies[id(tensor)][1]
