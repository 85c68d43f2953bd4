"""Kinds of objects that a walk meets, told by their classes.

By the class, not by the object: it is asked once for each, and no code of a user's object runs.
"""

from __future__ import annotations

import functools
import queue
import threading
import types
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict, UserList, UserString
from enum import Enum, auto
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_subspace.state.buffers import of_memory
from lightning_subspace.state.containers import of_built_in
from lightning_subspace.state.generators import GENERATORS
from lightning_subspace.state.packages import ITSELF, MACHINERY, TRAINING, WRITERS, package, package_names_of
from lightning_subspace.state.per_class import per_class
from lightning_subspace.state.thread_objects import RUNNING


class Kind(Enum):
    """What a walk does with an object: see `object_graph.walk`."""

    PROXY = auto()  # stands for another
    CONSTANT = auto()
    IMMUTABLE = auto()  # with contents
    TENSOR = auto()
    ARRAY = auto()
    GENERATOR = auto()  # of random numbers
    CACHE = auto()
    QUEUE = auto()  # between threads, processes or tasks
    OBJECT = auto()  # any other


KINDS: tuple[tuple[Any, Kind], ...] = (
    (weakref.ProxyTypes, Kind.PROXY),
    ((type(None), str, int, float, complex, bytes, range, type, types.ModuleType), Kind.CONSTANT),
    ((torch.dtype, torch.device, torch.Size), Kind.CONSTANT),
    ((tuple, types.MappingProxyType, frozenset), Kind.IMMUTABLE),
    (Tensor, Kind.TENSOR),
    (np.ndarray, Kind.ARRAY),
    (GENERATORS, Kind.GENERATOR),
    (functools._lru_cache_wrapper, Kind.CACHE),
    ((queue.Queue, queue.SimpleQueue), Kind.QUEUE),
)
QUEUES = ("multiprocessing.queues", "torch.multiprocessing.queue", "asyncio.queues")  # where others are defined
# Classes of foreign packages that are nothing but state.
PLAIN = (
    types.SimpleNamespace, Namespace, UserDict, UserList, UserString, ChainMap, Distribution, SobolEngine,
    weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet, threading.local,
)  # fmt: skip
# Classes of torch whose objects are followed around a module, and those of a user's own that are not.
AROUND = (Dataset, Sampler, DataLoader, Optimizer, LRScheduler)
NOT_AROUND = frozenset({"Logger", "Trainer", "Strategy", "SummaryWriter"})
LEFT_ALONE = TRAINING | WRITERS | MACHINERY | {ITSELF, "numpy"}


@per_class
def kind_of(cls: type) -> Kind:
    """What objects of a class are.

    Example:
        >>> kind_of(bool).name, kind_of(nn.Parameter).name, kind_of(nn.Linear).name
        ('CONSTANT', 'TENSOR', 'OBJECT')
    """
    found = next((kind for classes, kind in KINDS if issubclass(cls, classes)), Kind.OBJECT)
    return Kind.QUEUE if found is Kind.OBJECT and cls.__module__ in QUEUES else found


@per_class
def is_state(cls: type) -> bool:
    """Whether objects of a class are followed, whichever package it is of."""
    return issubclass(cls, (nn.Module, *PLAIN))


@per_class
def is_all_known(cls: type) -> bool:
    """Whether objects of a class have nothing but attributes and items."""
    is_plain = is_state(cls) or issubclass(cls, (types.CellType, types.MethodType, types.BuiltinMethodType))
    return is_plain or bool(of_built_in(cls)) or bool(of_memory(cls))


@per_class
def is_watched(cls: type) -> bool:
    """Whether objects of a class that are not followed are watched."""
    if issubclass(cls, (Tensor, nn.Module, types.FunctionType, types.BuiltinFunctionType, *RUNNING, BaseProcess)):
        return False
    return package(cls) not in LEFT_ALONE and ITSELF not in package_names_of(cls)


@per_class
def is_followed_around(cls: type) -> bool:
    """Whether objects of a class are followed around a module."""
    is_ruled_out = any(base.__name__ in NOT_AROUND for base in cls.__mro__)
    return issubclass(cls, AROUND) or (not is_ruled_out and is_watched(cls))
