"""Kinds of state, each with a way to make one and a step that writes to it, and places to keep it in."""

from __future__ import annotations

import array
import collections
import configparser
import contextlib
import ctypes
import decimal
import enum
import functools
import hashlib
import io
import itertools
import queue
import random
import sqlite3
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

# -- a package of somebody else's -------------------------------------------------------------------------------------

FOREIGN = types.ModuleType("somebody_elses_package")
exec(  # its classes come from a package that the module's class does not come from
    compile(
        """
class Box:
    def __init__(self, held):
        self.held = held
        self.uses = 0

class Slots:
    __slots__ = ("held", "uses")
    def __init__(self, held):
        self.held, self.uses = held, 0

class Wrapper:
    def __init__(self, held):
        self.inside = {"box": [Box(held)]}
        self.uses = 0
    @property
    def held(self):
        return self.inside["box"][0].held
""",
        "somebody_elses_package",
        "exec",
    ),
    FOREIGN.__dict__,
)
sys.modules.setdefault(FOREIGN.__name__, FOREIGN)

# -- kinds ------------------------------------------------------------------------------------------------------------


@dataclass
class Plain:
    count: int = 0
    seen: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    count: int = 0
    tensor: torch.Tensor = field(default_factory=lambda: torch.zeros(2))


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Buffer(IterableDataset):
    def __init__(self):
        self.items = deque(maxlen=100)

    def __iter__(self):
        return iter(self.items)


class Table(Dataset):
    def __init__(self):
        self.weights = torch.ones(6, dtype=torch.double)

    def __len__(self):
        return 6


class Shared:
    """A tensor with a view of it, and an array with a view of it."""

    def __init__(self):
        self.tensor, self.array = torch.zeros(4), np.zeros(4)
        self.part, self.row = self.tensor[1:3], self.array[1:3]


class ReadsFrom(io.StringIO):
    """A file in memory with attributes."""

    lines = 0


class Endless:
    """Refuses to tell a length or a truth value, as sparse matrices do."""

    n = 0

    def __len__(self):
        raise TypeError("the length is ambiguous")

    __bool__ = __len__


class CountingRandom(random.Random):
    """A generator with attributes."""

    draws = 0

    def random(self):
        self.draws += 1
        return super().random()


def configuration():
    made = configparser.ConfigParser()
    made.read_dict({"a": {"n": "0"}})
    return made


class Node(ElementTree.Element):
    """Attributes, and children in fields of C."""


def node():
    made = Node("a", {"w": np.zeros(2)})
    made.append(ElementTree.Element("b"))
    made.held = []
    return made


def _exchange(node):
    node.held.append(1)
    node[0] = ElementTree.Element(node[0].tag + "b")
    return node[0].tag, len(node.held)


def data_base():
    made = sqlite3.connect(":memory:", check_same_thread=False)
    made.execute("create table t (n int)")
    return made


def local():
    made = threading.local()
    made.n, made.seen = 0, []
    return made


def closure():
    count, seen, tensor = 0, [], torch.zeros(2)

    def step():
        nonlocal count
        count += 1
        seen.append(count)
        tensor.add_(1)
        return count, len(seen), tensor.tolist()

    return step


def transitions():
    return deque([(np.full(2, i, np.float32), i, torch.full((2,), float(i))) for i in range(200)], maxlen=300)


def weak_values():
    kept = Plain()
    made = weakref.WeakValueDictionary(kept=kept)
    return types.SimpleNamespace(kept=kept, weak=made)


class WeakKey:
    pass


def weak_keys():
    key = WeakKey()
    return types.SimpleNamespace(key=key, weak=weakref.WeakKeyDictionary({key: 0}))


def _put(target, key, value):
    target[key] = value
    return value


def _write(tensor, change: Callable):
    change(tensor)
    return tensor.tolist()


def _c_bump(number):
    number.value += 1
    return number.value


def _view_bump(view):
    view[0] = (view[0] + 1) % 250
    return bytes(view)


def _file(file):
    file.write("x")
    return file.tell(), len(file.getvalue())


def _lines(file):
    file.lines += 1
    file.seek(0, 2)
    return file.write("yz"), file.lines, file.getvalue()


def _swap(target):
    target.insert(0, target.pop())
    return [type(item).__name__ for item in target[:3]], repr(target[0])


def _shared(shared):
    shared.part.add_(1)
    shared.row += 1
    return shared.tensor.tolist(), shared.array.tolist()


def _move(ordered):
    ordered.move_to_end(next(iter(ordered)))
    return list(ordered)


def _chain(chain):
    chain["a"] = chain["a"] + 1
    return dict(chain)


# name: how it is made, and a step that writes to it and returns what depends on it
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "tensor": (lambda: torch.zeros(2), lambda t: _write(t, lambda t: t.add_(1))),
    "tensor through .data": (lambda: torch.zeros(2), lambda t: _write(t, lambda t: t.data.add_(1))),
    "long tensor": (lambda: torch.zeros(3, dtype=torch.long), lambda t: _write(t, lambda t: t.add_(1))),
    "array": (lambda: np.zeros(2), lambda a: np.add(a, 1, out=a).tolist()),
    "array of objects": (lambda: np.array([[1], [2], None], dtype=object), lambda a: (a[0].append(3), len(a[0]))[1]),
    "array of a record": (
        lambda: np.zeros(2, dtype=[("a", "f4"), ("b", "i4")]),
        lambda a: _put(a["b"], 0, 1 + a["b"][0]),
    ),
    "tensor and array with views": (Shared, _shared),
    "list": (list, lambda v: (v.append(len(v)), len(v))[1]),
    "list in a list": (lambda: [[1], [2]], lambda v: (v[0].append(1), v)[1][0].__len__()),
    "large list of pairs": (
        lambda: [(str(i), i) for i in range(300)],
        lambda v: (v.append(("new", len(v))), len(v))[1],
    ),
    "large list of pairs, an entry": (
        lambda: [(str(i), i) for i in range(300)],
        lambda v: _put(v, 7, ("n", v[7][1] + 1)),
    ),
    "large list of numbers, an entry": (lambda: [0.0] * 300, lambda v: _put(v, 7, v[7] + 1.0)),
    "large list, its order": (lambda: list(range(300)), _swap),
    "large list of lists, an inner one": (lambda: [[i] for i in range(300)], lambda v: (v[5].append(1), len(v[5]))[1]),
    "large dict": (lambda: {str(i): i for i in range(300)}, lambda v: _put(v, "7", v["7"] + 1)),
    "large dict, its order": (
        lambda: {i: i for i in range(300)},
        lambda v: (v.update({(k := next(iter(v))): v.pop(k)}), k)[1],
    ),
    "large set": (lambda: set(range(300)), lambda v: (v.add(1000 + len(v)), len(v))[1]),
    "large list of tensors": (
        lambda: [torch.zeros(2) for _ in range(200)],
        lambda v: _write(v[3], lambda t: t.add_(1)),
    ),
    "large list of tensors, through .data": (
        lambda: [torch.zeros(2) for _ in range(200)],
        lambda v: _write(v[3], lambda t: t.data.add_(1)),
    ),
    "replay memory": (transitions, lambda v: (v.append((np.ones(2), len(v), torch.ones(2))), len(v), v[0][1])[1:]),
    "replay memory, a full one": (lambda: deque(transitions(), 200), lambda v: (v.append((1, 2, 3)), v[0][1])[1]),
    "replay memory, an array in it": (transitions, lambda v: np.add(v[4][0], 1, out=v[4][0]).tolist()),
    "replay memory, a tensor in it": (transitions, lambda v: _write(v[4][2], lambda t: t.add_(1))),
    "dict": (dict, lambda v: _put(v, len(v), len(v))),
    "ordered dict": (lambda: collections.OrderedDict(a=1, b=2, c=3), _move),
    "default dict": (lambda: collections.defaultdict(list), lambda v: (v["x"].append(1), len(v["x"]))[1]),
    "counter": (collections.Counter, lambda v: (v.update("ab"), v["a"])[1]),
    "chain map": (lambda: collections.ChainMap({"a": 0}, {"b": 1}), _chain),
    "user dict": (lambda: collections.UserDict(a=0), lambda v: _put(v, "a", v["a"] + 1)),
    "user list": (collections.UserList, lambda v: (v.append(1), len(v))[1]),
    "set": (lambda: {1, 2}, lambda v: (v.add(len(v) + 5), len(v))[1]),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda v: (v.append(v[-1] + 1), list(v))[1]),
    "array.array": (lambda: array.array("d"), lambda v: (v.append(len(v)), len(v))[1]),
    "array.array, an entry": (lambda: array.array("i", [0, 0]), lambda v: _put(v, 0, v[0] + 1)),
    "bytearray": (bytearray, lambda v: (v.append(len(v) % 250), len(v))[1]),
    "memoryview": (lambda: memoryview(bytearray(b"abc")), _view_bump),
    "memoryview of an array": (lambda: memoryview(np.zeros(3, np.uint8)), _view_bump),
    "number of C": (lambda: ctypes.c_long(0), _c_bump),
    "array of C": (lambda: (ctypes.c_int * 3)(), lambda v: _put(v, 0, v[0] + 1)),
    "text in memory": (io.StringIO, _file),
    "text in memory, in Windows": (
        lambda: io.StringIO("a\nb", newline="\r\n"),
        lambda v: (v.seek(0, 2), v.write("c\n"), v.getvalue())[1:],
    ),
    "text in memory, with attributes": (ReadsFrom, _lines),
    "bytes in memory": (lambda: io.BytesIO(b"abc"), lambda v: (v.read(1), v.tell())),
    "thread-local": (local, lambda v: (setattr(v, "n", v.n + 1), v.seen.append(v.n), v.n, len(v.seen))[2:]),
    "namespace": (lambda: types.SimpleNamespace(n=0), lambda v: (setattr(v, "n", v.n + 1), v.n)[1]),
    "object": (Plain, lambda v: (setattr(v, "count", v.count + 1), v.seen.append(v.count), v.count, len(v.seen))[2:]),
    "object with slots": (
        Slotted,
        lambda v: (setattr(v, "count", v.count + 1), v.count, _write(v.tensor, lambda t: t.mul_(0.5).add_(1)))[1:],
    ),
    "attribute that is rebound": (
        lambda: types.SimpleNamespace(t=torch.zeros(2)),
        lambda v: (setattr(v, "t", v.t + 1), v.t.tolist())[1],
    ),
    "constant": (lambda: Colour.RED, lambda v: v.value),
    "weak values": (weak_values, lambda v: (setattr(v.weak["kept"], "count", v.kept.count + 1), v.kept.count)[1]),
    "weak keys": (weak_keys, lambda v: _put(v.weak, v.key, v.weak[v.key] + 1)),
    "closure": (closure, lambda v: v()),
    "partial": (lambda: functools.partial(lambda *, held: (held.append(1), len(held))[1], held=[]), lambda v: v()),
    "bound method": (lambda: [].append, lambda v: (v(1), len(v.__self__))[1]),
    "cached function": (lambda: functools.lru_cache(lambda n: object()), lambda v: (v(v.cache_info().currsize), 0)[1]),
    "torch generator": (lambda: torch.Generator().manual_seed(1), lambda v: torch.rand(2, generator=v).tolist()),
    "numpy generator": (lambda: np.random.default_rng(1), lambda v: v.normal()),
    "python generator": (lambda: random.Random(1), lambda v: v.random()),
    "data set of what was seen": (Buffer, lambda v: (v.items.append(torch.zeros(2)), len(v.items))[1]),
    "data set of weights": (Table, lambda v: _write(v.weights, lambda t: t.mul_(0.9))),
    "module in a list": (
        lambda: [nn.BatchNorm1d(2)],
        lambda v: (v[0](torch.ones(3, 2).to(v[0].weight)), int(v[0].num_batches_tracked))[1],
    ),
    "python generator with attributes": (lambda: CountingRandom(1), lambda v: (v.random(), v.draws)),
    "configuration": (configuration, lambda v: (v.set("a", "n", str(v.getint("a", "n") + 1)), v.get("a", "n"))[1]),
    "exit stack": (contextlib.ExitStack, lambda v: (v.callback(print), len(v._exit_callbacks))[1]),
    "mock": (mock.Mock, lambda v: (v.called_with(1), v.called_with.call_count)[1]),
    "semaphore": (lambda: threading.Semaphore(10_000), lambda v: (v.acquire(), v._value)[1]),
    "array behind a field of C": (node, lambda v: np.add(v.get("w"), 1, out=v.get("w")).tolist()),
    "container without a length": (Endless, lambda v: (setattr(v, "n", v.n + 1), v.n)[1]),
    "event": (threading.Event, lambda v: ((v.clear if v.is_set() else v.set)(), v.is_set())[1]),
    # What is refused: it can be neither copied nor put back.
    "hash": (hashlib.sha256, lambda v: (v.update(b"a"), v.hexdigest())[1]),
    "tree": (lambda: ElementTree.Element("a"), lambda v: (ElementTree.SubElement(v, "b"), len(v))[1]),
    "tree with attributes": (node, _exchange),
    "arithmetic context": (decimal.Context, lambda v: (setattr(v, "prec", v.prec + 1), v.prec)[1]),
    "data base": (data_base, lambda v: v.execute("insert into t values (1)").lastrowid),
    "queue": (queue.Queue, lambda v: (v.put(1), v.qsize())[1]),
    "simple queue": (queue.SimpleQueue, lambda v: (v.put(1), v.qsize())[1]),
    "iterator": (lambda: iter(range(1000)), next),
    "generator function": (lambda: (i for i in range(1000)), next),
    "count": (itertools.count, next),
}
REFUSED = frozenset(
    {"queue", "simple queue", "iterator", "generator function", "count", "hash", "tree", "arithmetic context"}
    | {"data base", "tree with attributes"}
)

# -- places -----------------------------------------------------------------------------------------------------------


class Own:
    def __init__(self, held):
        self.held = held


class OwnSlots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


class OwnData(Dataset):
    def __init__(self, held):
        self.held = held


def in_closure(held):
    def get():
        return held

    return get


def in_local(held):
    made = threading.local()
    made.held = held
    return made


# name: what is kept, and how the state is reached from that
PLACES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "itself": (lambda held: held, lambda kept: kept),
    "list": (lambda held: [held, 1], lambda kept: kept[0]),
    "dict": (lambda held: {"a": held}, lambda kept: kept["a"]),
    "tuple": (lambda held: (1, (held,)), lambda kept: kept[1][0]),
    "deque": (lambda held: deque([held]), lambda kept: kept[0]),
    "read-only dict": (lambda held: types.MappingProxyType({"a": held}), lambda kept: kept["a"]),
    "object": (Own, lambda kept: kept.held),
    "object with slots": (OwnSlots, lambda kept: kept.held),
    "object of another package": (FOREIGN.Box, lambda kept: (setattr(kept, "uses", kept.uses + 1), kept.held)[1]),
    "slots of another package": (FOREIGN.Slots, lambda kept: (setattr(kept, "uses", kept.uses + 1), kept.held)[1]),
    "wrapped by another package": (FOREIGN.Wrapper, lambda kept: kept.held),
    "data set": (OwnData, lambda kept: kept.held),
    "closure": (in_closure, lambda kept: kept()),
    "partial": (lambda held: functools.partial(dict, held=held), lambda kept: kept.keywords["held"]),
    "thread-local": (in_local, lambda kept: kept.held),
    "object in a large list": (lambda held: [0] * 200 + [Own(held)], lambda kept: kept[200].held),
    "large list": (lambda held: [*range(200), held], lambda kept: kept[200]),
    "large dict of lists": (lambda held: {**{i: [i] for i in range(200)}, "a": [held]}, lambda kept: kept["a"][0]),
}
