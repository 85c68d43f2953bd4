"""A CUDA device that is none: tensors that say they lie on one, compute on the CPU, and count what makes a host wait.

The code under test takes the branch of a device, and every number that it reads there, or sends there, is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CARD = torch.device("cuda", 0)
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}


class OnCard(Tensor):
    """A tensor on the card; its numbers are in `held`."""

    held: Tensor
    waits: ClassVar[Counter[str]] = Counter()
    launches: ClassVar[Counter[str]] = Counter()

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What Python code sees; torch's own is "meta", since it would start CUDA for another one."""
        return CARD

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_from_card = isinstance(args[0] if func is not aten.copy_.default else args[1], OnCard)
        is_to_card = isinstance(args[0], OnCard)
        if func is aten._to_copy.default:
            is_to_card = torch.device(kwargs.pop("device", None) or leaves[0].device).type in ("cuda", "meta")
        elif "device" in kwargs:  # new_zeros, empty_like
            is_to_card = torch.device(kwargs.pop("device") or CARD).type in ("cuda", "meta")
        else:
            is_to_card = is_to_card or func is not aten.copy_.default
        if func in READS or (func in (aten._to_copy.default, aten.copy_.default) and is_from_card is not is_to_card):
            cls.waits[func.__name__.split(".")[0] + (" to the host" if is_from_card else " to the card")] += 1
        elif not func.is_view:
            cls.launches[func.__name__.split(".")[0]] += 1
        held_args, held_kwargs = pytree.tree_map_only(OnCard, lambda tensor: tensor.held, (args, kwargs))
        found = func(*held_args, **held_kwargs)
        if func._schema.is_mutable:  # in place
            return args[0]
        return pytree.tree_map_only(Tensor, OnCard, found) if is_to_card else found


class _Placing(TorchFunctionMode):
    """Makes on the card what is asked for there: torch itself would look for a driver first."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to and not isinstance(args[0], OnCard):
            device = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, OnCard | torch.device)), None)
            if device is not None and torch.device(getattr(device, "device", device)).type in ("cuda", "meta"):
                OnCard.waits["to to the card"] += 1
                dtype = device.dtype if isinstance(device, OnCard) else args[0].dtype
                dtype = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)), dtype)
                return OnCard(args[0].to(dtype))
        if func is Tensor.to and isinstance(args[0], OnCard) and isinstance(args[1], OnCard):
            return args[0].to(args[1].dtype)
        device = kwargs.get("device")
        if device is not None and func is not Tensor.to and torch.device(device).type in ("cuda", "meta"):
            return OnCard(func(*args, **(kwargs | {"device": "cpu"})))
        return func(*args, **kwargs)


@contextmanager
def fake_card() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """A card, with the counts of what the host waits for, and of calls that compute."""
    OnCard.waits, OnCard.launches = Counter(), Counter()
    # Without a card torch warns wherever autocast of one is mentioned.
    with mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False), _Placing():
        yield OnCard.waits, OnCard.launches
