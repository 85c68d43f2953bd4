"""Shadow of a module: its state replaced by copies during a probe.

`training_step` changes more than gradients: batch-norm statistics, metric states, counters, a momentum teacher, clamped
weights, random generators. A `Shadow` finds all mutable objects of a module and fills them with copies. The objects
stay the same, so that closures and hooks see the copies, too. Closing puts the very same contents back.

Copied: attributes of all modules; dicts, lists, sets, deques and tuples at any depth; arrays; random generators; hooks
with their closures and partials; objects whose class is of the module's own package. Views stay views. Using an
iterator or an open file raises. Not copied: globals and class attributes (but for generators in the files of the
module's classes), objects of other packages, state outside of Python, and `.grad`, which is None on the copies. A set
that grew may iterate in another order afterwards. A training set kept in a list of the module is copied whole.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from lightning_subspace.loss.leaves import ParameterCopy, unmodified
from lightning_subspace.loss.precision import widened
from lightning_subspace.parallel.fsdp import is_sharded
from lightning_subspace.state.object_graph import MutableObject, own_caches, own_generators, packages_of, restore, walk

# Types of what is copied; a tuple or a read-only dict only if it holds any of them.
COPIED = (Tensor, np.ndarray, tuple, types.MappingProxyType)


class Shadow:
    """Replace a module's state by copies, from `reset` until `close`.

    Args:
        module: any module; its tree is walked once.
        dtype: floating-point copies are at least this wide (a bfloat16 weight becomes a float32 leaf); None keeps all.
        displacement: a function from a parameter to an offset of its copy, or to None.
        extra_roots: more objects whose attributes are put back, without copies of their tensors: what a training step
            can assign to, such as the learning rate of an optimizer.
        replacements: tensors to copy in place of an original, by the id of the original. That of a sharded parameter (a
            DTensor) is the whole one; it becomes the copy itself if it is wide enough.
        parameters: whether parameters are copied.

    Raises:
        TypeError: for a TorchScript module.
        ValueError: when a sharded parameter is to be copied and has no replacement.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> shadow = Shadow(norm)
        >>> shadow.reset()
        >>> _ = norm(torch.ones(3, 2)); norm.num_batches_tracked
        tensor(1)
        >>> shadow.close(); norm.num_batches_tracked
        tensor(0)
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype | None = None,
        displacement: Callable[[nn.Parameter], Tensor | None] | None = None,
        extra_roots: Iterable[Any] = (),
        *,
        replacements: Mapping[int, Tensor] | None = None,
        parameters: bool = True,
    ) -> None:
        self._dtype = dtype
        self._replacements = {} if replacements is None else replacements
        self._copies_parameters = parameters
        self._displacement = displacement if displacement is not None else lambda parameter: None
        self._leaves: dict[int, ParameterCopy] = {}  # by the id of the original
        self._written: set[int] = set()  # ids of the originals
        self._round = 0
        self._caches = [(cache, cache.cache_info().misses) for cache in own_caches(module)]
        packages = packages_of(module.modules())
        inside = walk([module], packages)
        around = walk([*map(vars, extra_roots), *own_generators(module)], packages, inside.seen)
        self._generators = inside.generators + around.generators
        self._owners = _owners(inside.tensors)
        for tensor in inside.tensors if parameters else []:
            if is_sharded(tensor) and id(tensor) not in self._replacements:
                raise ValueError(
                    "replacements: expected the whole of every sharded tensor, got none for one of shape "
                    f"{tuple(tensor.shape)}; `full_tensors(module)` makes those of the parameters."
                )
        self._sealed = {id(iterator): _Sealed(iterator) for iterator in inside.iterators}
        self._copied: list[MutableObject] = []  # with something in it that is copied
        self._others: list[MutableObject] = around.containers
        for container in inside.containers:
            needs_copy = any(isinstance(i, COPIED) or id(i) in self._sealed for i in container.items)
            (self._copied if needs_copy else self._others).append(container)

    def reset(self) -> None:
        """Start from the original state; unwritten copies of parameters stay."""
        self.drop_written()
        self._round += 1
        offset = self._displacement
        self._leaves = {key: leaf for key, leaf in self._leaves.items() if offset(leaf.original) is leaf.offset}
        memo: dict[int, Any] = dict(self._sealed)
        for container in self._copied:
            container.replace_contents([self._copy(item, memo) for item in container.items])
        for leaf in list(self._leaves.values()):
            leaf.copy.grad = None
            leaf.copy.__dict__.clear()
            leaf.copy.__dict__.update({key: self._copy(item, memo) for key, item in vars(leaf.original).items()})
        restore(self._others, self._generators)

    def drop_written(self) -> None:
        """Drop the parameter copies that an evaluation has written to.

        Raises:
            RuntimeError: when an earlier graph uses the copy, unwritten, or it is the whole of a sharded parameter.
        """
        leaves = list(self._leaves.items())
        intact = unmodified(None if key in self._written else leaf.comparison(self._value) for key, leaf in leaves)
        for (key, leaf), is_intact in zip(leaves, intact, strict=True):
            if is_intact:
                continue
            if leaf.is_gathered:
                raise RuntimeError(
                    "the training step writes to a parameter that FSDP2 has sharded, whose copy is made once a probe; "
                    "pass loss_fn=, a loss without that."
                )
            del self._leaves[key]
            self._written.add(key)
            if leaf.round < self._round:
                raise RuntimeError(
                    "the training step writes to a parameter at some batches and not at others, so that there is no "
                    "one function to differentiate; pass loss_fn=, a loss without that."
                )

    def close(self) -> None:
        """Put the original contents back, also after an exception."""
        self._leaves.clear()
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:  # the tables of a probe may be of a wider type
                cache.cache_clear()
        restore([*self._copied, *self._others], self._generators)

    def _copy(self, value: Any, memo: dict[int, Any]) -> Any:
        """The copy of a value, or the value if none is needed."""
        if isinstance(value, tuple | types.MappingProxyType):
            return self._copy_immutable(value, memo)
        if id(value) not in memo:
            if isinstance(value, nn.Parameter):
                memo[id(value)] = self._copy_parameter(value) if self._copies_parameters else value
            elif isinstance(value, Tensor):
                memo[id(value)] = self._copy_tensor(value, memo)
            elif isinstance(value, np.ndarray):
                memo[id(value)] = value.copy()
            else:
                return value
        return memo[id(value)]

    def _copy_immutable(self, value: Any, memo: dict[int, Any]) -> Any:
        """A tuple or a read-only dict, with copies of its items."""
        items = list(value if isinstance(value, tuple) else value.values())
        new = [self._copy(item, memo) for item in items]
        if all(a is b for a, b in zip(new, items, strict=True)):
            return value
        if not isinstance(value, tuple):
            return types.MappingProxyType(dict(zip(value, new, strict=True)))
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)

    def _copy_parameter(self, original: nn.Parameter) -> nn.Parameter:
        if id(original) not in self._leaves:
            offset = self._displacement(original)
            value = self._value(original, offset, clone=not is_sharded(original))
            cls = type(original) if issubclass(type(original), nn.Parameter) else nn.Parameter
            leaf = nn.Parameter.__new__(cls, value, requires_grad=original.requires_grad)
            self._leaves[id(original)] = ParameterCopy(original, leaf, offset, self._round)
        return self._leaves[id(original)].copy

    def _copy_tensor(self, original: Tensor, memo: dict[int, Any]) -> Tensor:
        owner = self._owners.get(id(original))
        if owner is not None and isinstance(owner, nn.Parameter) and not self._copies_parameters:
            return original
        if owner is None:
            alone = widened(self._source(original), self._dtype, copy=True)
            return alone.requires_grad_(original.requires_grad and original.is_leaf)
        start = original.storage_offset() - owner.storage_offset()
        view: Tensor = self._copy(owner, memo).as_strided(original.size(), original.stride(), start)
        return view if original.requires_grad else view.detach()

    def _value(self, original: nn.Parameter, offset: Tensor | None, *, clone: bool = False) -> Tensor:
        """The value of an unwritten copy."""
        value = widened(self._source(original), self._dtype, copy=clone and offset is None)
        return value if offset is None else value + offset.to(value)

    def _source(self, original: Tensor) -> Tensor:
        return self._replacements.get(id(original), original).detach()


class _Sealed:
    """Replacement for an iterator or a file; raises when used."""

    def __init__(self, original: Iterator[Any]) -> None:
        self._kind = type(original).__name__

    def _refuse(self, *args: object) -> NoReturn:
        raise TypeError(
            f"the training step uses an object of type {self._kind} that the module keeps, which cannot be put back "
            "afterwards; pass loss_fn=, a loss without it."
        )

    __iter__ = __next__ = __getattr__ = _refuse


def _owners(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """The owners of views in the list, by the view's id."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    owners: dict[int, Tensor] = {}
    for group in by_storage.values():
        owner = max(group, key=lambda tensor: (tensor.numel(), isinstance(tensor, nn.Parameter)))
        owners.update({id(tensor): owner for tensor in group if tensor is not owner and _is_part(tensor, owner)})
    return owners


def _is_part(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor lies within another one of the same storage."""
    if isinstance(tensor, nn.Parameter) or tensor.dtype != whole.dtype or not whole.is_contiguous():
        return False
    start = tensor.storage_offset() - whole.storage_offset()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return bool(start >= 0 and start + extent <= whole.numel())
