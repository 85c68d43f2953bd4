"""Parts of a batch: a few examples, in all that it holds.

A batch is cut only if everything in it has one number of examples. A tensor with another first dimension, a sparse or
nested one, an object of a class of its own: any of them may belong to the whole, so the batch stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_subspace.data.example_count import majority, readings
from lightning_subspace.state.fields import fields, with_fields

PLAIN = (str, bytes, int, float, complex, type(None))


class UncuttableError(TypeError):
    """A batch, or something in it, that cannot be cut."""


def common_length(batch: Any, size: int = 0) -> int | None:
    """The number of examples that everything in a batch has, or None.

    Args:
        batch: the batch.
        size: the number of examples if it is known; otherwise it is told from this batch alone.
    """
    for length in (size, majority(readings(batch))):
        if length:
            try:
                cut(batch, length, slice(0, 1))
            except UncuttableError:
                continue
            return length
    return None


def cut(value: Any, length: int, part: slice) -> Any:
    """The part of `length` examples that a slice takes, as views.

    Raises:
        UncuttableError: when something in it does not have `length` examples.

    Example:
        >>> cut({"x": torch.arange(4), "name": ["a", "b", "c", "d"], "split": "train"}, 4, slice(0, 2))
        {'x': tensor([0, 1]), 'name': ['a', 'b'], 'split': 'train'}
    """
    if isinstance(value, Tensor | np.ndarray):
        is_dense = isinstance(value, np.ndarray) or (value.layout is torch.strided and not value.is_nested)
        if not is_dense or value.ndim == 0 or len(value) != length or length == 0:
            raise UncuttableError
        return value[part]
    if isinstance(value, PLAIN):
        return value
    items = fields(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        if items and all(isinstance(item, PLAIN) for item in items.values()):
            if len(value) != length:
                raise UncuttableError
            return value[part]
        try:
            return with_fields(value, {key: cut(item, length, part) for key, item in items.items()})
        except UncuttableError:
            if len(value) != length or any(isinstance(item, PLAIN) for item in items.values()):
                raise
            return value[part]  # a list of examples
    if isinstance(value, PackedSequence) or not (isinstance(value, Mapping | tuple) or _is_dataclass(value)):
        raise UncuttableError
    try:
        return with_fields(value, {key: cut(item, length, part) for key, item in items.items()})
    except UncuttableError:
        raise
    except Exception as error:  # a collection with rules of its own
        raise UncuttableError from error


def _is_dataclass(value: Any) -> bool:
    return hasattr(type(value), "__dataclass_fields__")
