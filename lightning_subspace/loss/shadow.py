"""Shadow of a module: its state replaced by copies during a probe.

`training_step` changes more than gradients: batch-norm statistics, metric states, counters, a momentum teacher, clamped
weights, random generators. A `Shadow` finds all mutable objects of a module and fills them with copies. The objects
stay the same, so that closures and hooks see the copies, too. Closing puts the very same contents back.

Copied: attributes of all modules; dicts, lists, sets, deques and tuples at any depth; arrays; random generators; hooks
with their closures and partials; objects whose class is of the module's own package. Views stay views. Put back, but
not copied: large containers of plain data, and what is around the module (see `surroundings.py`). Using an iterator, an
open file or a queue raises. `.grad` is None on the copies. A set that grew may iterate in another order afterwards.
README.md in this folder has a table of all kinds of state.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_subspace.loss.findings import findings_of
from lightning_subspace.loss.leaves import ParameterCopy, unmodified
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.loss.places import refusal
from lightning_subspace.loss.precision import widened
from lightning_subspace.loss.sealed import Sealed
from lightning_subspace.loss.surroundings import Surroundings, is_left_open
from lightning_subspace.loss.views import array_owners, owners
from lightning_subspace.parallel.fsdp import is_sharded
from lightning_subspace.state.bulk import Bulk
from lightning_subspace.state.containers import MutableObject, immutable_items, with_items
from lightning_subspace.state.object_graph import own_caches, own_generators, restore, walk
from lightning_subspace.state.packages import packages_of
from lightning_subspace.state.thread_objects import in_other_threads


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
        loss_key: tells the loss from others of this module; one that could not be undone is refused from then on.

    Raises:
        LossError: for a loss that has changed training before.
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
        loss_key: Any = None,
    ) -> None:
        self._module, self._dtype, self._roots = module, dtype, list(extra_roots)
        self._replacements = {} if replacements is None else replacements
        self._copies_parameters = parameters
        self._displacement = displacement if displacement is not None else lambda parameter: None
        self._loss_key = loss_key
        self._leaves: dict[int, ParameterCopy] = {}  # by the id of the original
        self._written: set[int] = set()  # ids of the originals
        self._round = 0
        self._is_first = True  # whether no evaluation has ended yet
        self._is_running = False  # whether an evaluation has begun and not ended, or has raised
        self._findings = findings_of(module)
        if loss_key in self._findings.refusals:
            raise LossError(self._findings.refusals[loss_key])
        self._open()

    def _open(self) -> None:
        """Find all state, as it is now."""
        module, findings = self._module, self._findings
        packages, threads = packages_of(module.modules()), in_other_threads()
        inside = walk([module], packages, threads, bulk=self._bulk)
        around = Surroundings(module, self._roots, inside, packages, findings, threads)
        generators = walk(own_generators(module), packages, threads).generators
        self._around, self._generators = around, [*inside.generators, *around.generators, *generators]
        caches = {id(cache): cache for cache in (*own_caches(module), *inside.caches, *around.caches)}.values()
        self._caches = [(cache, cache.cache_info().misses) for cache in caches]
        copied = [tensor for tensor in around.tensors if id(tensor) in around.copied]
        self._owners = owners([*(t for t in inside.tensors if id(t) not in around.kept), *copied])
        self._array_owners = array_owners(inside.arrays)
        for tensor in inside.tensors if self._copies_parameters else []:
            if is_sharded(tensor) and id(tensor) not in self._replacements:
                raise ValueError(
                    "replacements: expected the whole of every sharded tensor, got none for one of shape "
                    f"{tuple(tensor.shape)}; `full_tensors(module)` makes those of the parameters."
                )
        unsealed = (value for value in inside.iterators if not is_left_open(value))
        self._sealed = {id(value): Sealed(value) for value in (*unsealed, *around.iterators)}
        self._copied: list[MutableObject] = []  # with something in it that is copied
        self._partly: list[MutableObject] = []  # around the module, the same
        self._others: list[MutableObject] = []
        for container in inside.containers:
            (self._copied if any(map(self._is_copied, container.items)) else self._others).append(container)
        for container in around.each:
            is_copied = (around.copied or self._sealed) and any(map(self._is_exchanged, container.items))
            (self._partly if is_copied else self._others).append(container)

    def _bulk(self, value: Any) -> Bulk | None:
        """A large container of plain data that needs no wider types."""
        found = self._findings.bulk(value)
        types = () if found is None else found.dtypes
        is_kept = all(widened(torch.empty(0, dtype=t), self._dtype, copy=False).dtype == t for t in types)
        return found if is_kept else None

    def _is_copied(self, value: Any) -> bool:
        """Whether a copy takes the place of a value."""
        if isinstance(value, Tensor | np.ndarray):
            return id(value) not in self._around.kept
        items = immutable_items(value)
        return id(value) in self._sealed if items is None else any(map(self._is_copied, items))

    def _is_exchanged(self, value: Any) -> bool:
        """The same around the module, for what was written to."""
        items = immutable_items(value)
        if items is None:
            return id(value) in self._around.copied or id(value) in self._sealed
        return any(map(self._is_exchanged, items))

    def reset(self) -> None:
        """Start from the original state; unwritten copies of parameters stay."""
        self.drop_written()
        if self._is_running and (lost := self._around.end_interrupted()):
            self._refuse(lost, [])
        self._round += 1
        offset = self._displacement
        self._leaves = {key: leaf for key, leaf in self._leaves.items() if offset(leaf.original) is leaf.offset}
        memo: dict[int, Any] = dict(self._sealed)
        for container in self._copied:
            container.replace_contents([self._copy(item, memo) for item in container.items])
        for container in self._partly:
            container.replace_contents([self._exchange(item, memo) for item in container.items])
        for leaf in list(self._leaves.values()):
            leaf.copy.grad = None
            leaf.copy.__dict__.clear()
            leaf.copy.__dict__.update({key: self._copy(item, memo) for key, item in vars(leaf.original).items()})
        restore(self._others, self._generators)
        self._around.begin()
        self._is_running = True

    def settle(self) -> bool:
        """Undo what an evaluation has written to; whether to take it again.

        It is called behind each evaluation. What was written to is a copy from then on.

        Raises:
            LossError: when something cannot be put back; then this loss is not evaluated any more.
        """
        is_first, self._is_first, self._is_running = self._is_first, False, False
        again, lost, bare = self._around.settle_first() if is_first else self._around.settle()
        if lost or bare:
            self._refuse(lost, bare)
        if not again:
            return False
        self._put_back()
        self._around.put_back()
        self._open()
        self._is_first = is_first
        return True

    def _refuse(self, lost: list[Any], bare: list[Any]) -> None:
        text = self._findings.refusals[self._loss_key] = refusal(lost, bare, self._module, self._roots)
        raise LossError(text)

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
        """Put the original contents back, also after an exception.

        Raises:
            LossError: when something cannot be put back.
        """
        self._put_back()
        lost = [*(self._around.end_interrupted() if self._is_running else []), *self._around.close()]
        if lost:
            self._refuse(lost, [])

    def _put_back(self) -> None:
        self._leaves.clear()
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:  # the tables of a probe may be of a wider type
                cache.cache_clear()
        restore([*self._copied, *self._partly, *self._others], self._generators)

    def _copy(self, value: Any, memo: dict[int, Any]) -> Any:
        """The copy of a value, or the value if none is needed."""
        if isinstance(value, tuple | types.MappingProxyType):
            return self._copy_immutable(value, memo)
        if id(value) not in memo:
            if id(value) in self._around.kept:
                return value
            if isinstance(value, nn.Parameter):
                memo[id(value)] = self._copy_parameter(value) if self._copies_parameters else value
            elif isinstance(value, Tensor):
                memo[id(value)] = self._copy_tensor(value, memo)
            elif isinstance(value, np.ndarray):
                memo[id(value)] = self._copy_array(value, memo)
            else:
                return value
        return memo[id(value)]

    def _exchange(self, value: Any, memo: dict[int, Any]) -> Any:
        """The same around the module, for what an evaluation has written to."""
        if not self._is_exchanged(value):
            return value
        items = immutable_items(value)
        if items is None:
            return self._copy(value, memo)
        return with_items(value, [self._exchange(item, memo) for item in items])

    def _copy_immutable(self, value: Any, memo: dict[int, Any]) -> Any:
        """A tuple or a read-only dict, with copies of its items."""
        items = immutable_items(value) or []
        new = [self._copy(item, memo) for item in items]
        return value if all(map(is_, new, items)) else with_items(value, new)

    def _copy_array(self, original: np.ndarray[Any, Any], memo: dict[int, Any]) -> np.ndarray[Any, Any]:
        if (owner := self._array_owners.get(id(original))) is None:
            return original.copy()
        start = original.ctypes.data - owner.ctypes.data
        return np.ndarray(original.shape, original.dtype, self._copy(owner, memo), start, original.strides)

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
            # Around the module, what a copy is computed with is not widened either.
            dtype = None if id(original) in self._around.copied else self._dtype
            alone = widened(self._source(original), dtype, copy=True)
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
