"""Copies of batches that share nothing with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def copied(data: Any, copy_tensor: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy of a batch, objects of any class included.

    Args:
        data: the batch.
        copy_tensor: copies the tensors in collections; those inside objects of other classes are deep-copied.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> first, second = copied([x, x], torch.clone)
        >>> first is second, first is x
        (True, False)
    """
    memo: dict[int, Any] = {}

    def remember(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = copy_tensor(tensor)
        return tensor

    apply_to_collection(data, Tensor, remember, allow_frozen=True)
    return copy.deepcopy(data, memo)
