"""Object graph: every kind of state is found and put back; objects of other packages are not followed."""

import collections
import copy
import functools
import itertools
import random
import types
import warnings
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.state.object_graph import walk
from tests.modules import Holder, differences, fingerprint


def look(module):
    return fingerprint(module, "module", identity=True)


@dataclass
class Plain:
    count: int = 0
    tensor: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    def see(self):
        self.count += 1
        return self.count


def counting():
    count, seen, tensor = 0, [], torch.zeros(2)

    def step(x, defaults=[torch.zeros(1)], *, keyword={"a": 0}):  # noqa: B006, B008 - mutable defaults are state
        nonlocal count
        count += 1
        seen.append(x)
        tensor.add_(1)
        defaults[0].add_(1)
        keyword["a"] += 1
        step.calls = getattr(step, "calls", 0) + 1
        return count, len(seen), float(tensor.sum()), float(defaults[0]), keyword["a"], step.calls

    return step


def slots():
    class Slotted:
        __slots__ = ("__private", "count", "late")

        def __init__(self):
            self.count, self.__private = 0, torch.zeros(1)

        def __call__(self):
            self.count += 1
            self.late = self.count
            return self.count, float(self.__private.add_(1))

    Slotted.__module__ = __name__
    return Slotted()


class Meter(dict):
    """A dict with attributes."""

    total = 0

    def __call__(self):
        self["count"] = self.get("count", 0) + 1
        self.total += 2
        return self["count"], self.total


class Counter:
    """An iterator whose state can be seen."""

    def __init__(self):
        self.i = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.i += 1
        return self.i


def bump(tensor):
    return float(tensor.add_(1).sum())


def appended(container):
    container.append(1)
    return len(container)


# name: the attribute, and what a training step does with it; every call of it must give the same
STATE = {
    "tensor": (lambda: torch.zeros(2), bump),
    "tensor that requires a gradient": (lambda: torch.zeros(2, requires_grad=True), lambda t: bump(t.data)),
    "tensor of a validation loop": (torch.inference_mode()(lambda: torch.zeros(2)), lambda t: (t + 1).tolist()),
    "array": (lambda: np.zeros(2), lambda a: float(np.add(a, 1, out=a).sum())),
    "list": (list, appended),
    "list of tensors": (lambda: [torch.zeros(2)], lambda held: bump(held[0])),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda d: (d.append(d[-1] + 1), list(d))[1]),
    "dict": (dict, lambda d: (d.setdefault(len(d), 0), len(d))[1]),
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda d: (d.update(a=d.pop("a")), list(d))[1]),
    "ordered dict": (lambda: collections.OrderedDict(a=1, b=2), lambda d: (d.move_to_end(next(iter(d))), list(d))[1]),
    "counter": (collections.Counter, lambda c: (c.update("ab"), dict(c))[1]),
    "default dict": (lambda: collections.defaultdict(list), lambda d: appended(d["x"])),
    "user dict": (lambda: UserDict(a=0), lambda d: (d.update(a=d["a"] + 1), d["a"])[1]),
    "set": (lambda: {1, 2}, lambda s: (s.add(len(s) + 1), sorted(s))[1]),
    "set that shrinks": (lambda: set(range(100)), lambda s: (s.pop(), s.clear(), len(s))[2]),
    "tuple": (lambda: (torch.zeros(2), []), lambda t: (bump(t[0]), appended(t[1]))),
    "named tuple": (lambda: collections.namedtuple("P", "x")(torch.zeros(2)), lambda p: bump(p.x)),
    "read-only dict": (lambda: types.MappingProxyType({"a": torch.zeros(2)}), lambda d: bump(d["a"])),
    "namespace": (lambda: types.SimpleNamespace(a=0), lambda n: (setattr(n, "a", n.a + 1), n.a)[1]),
    "plain object": (Plain, lambda p: (setattr(p, "count", p.count + 1), p.count, bump(p.tensor))[1:]),
    "objects in a list": (lambda: [Plain()], lambda ps: bump(ps[0].tensor)),
    "slots": (slots, lambda s: s()),
    "dict with attributes": (Meter, lambda m: m()),
    "closure": (counting, lambda f: f(1)),
    "partial": (lambda: functools.partial(bump, torch.zeros(2)), lambda p: p()),
    "keyword of a partial": (lambda: functools.partial(lambda *, held: appended(held), held=[]), lambda p: p()),
    "bound method": (lambda: Plain().see, lambda m: m()),
    "method of a list": (lambda: [].append, lambda m: (m(1), len(m.__self__))[1]),
    "iterator with attributes": (Counter, next),
    "module in a list": (
        lambda: [nn.BatchNorm1d(2)],
        lambda m: (m[0](torch.rand(4, 2)), int(m[0].num_batches_tracked))[1],
    ),
    "method of a hidden module": (
        lambda: nn.BatchNorm1d(2).forward,
        lambda m: (m(torch.rand(4, 2)), int(m.__self__.num_batches_tracked))[1],
    ),
    "torch generator": (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(2, generator=g).tolist()),
    "numpy generator": (lambda: np.random.default_rng(1), lambda g: g.normal()),
    "numpy bit generator": (lambda: np.random.PCG64(1), lambda g: int(g.random_raw())),
    "numpy legacy": (lambda: np.random.RandomState(1), lambda g: g.randn()),
    "python generator": (lambda: random.Random(1), lambda g: g.gauss(0, 1)),
    "sobol engine": (lambda: torch.quasirandom.SobolEngine(2), lambda e: e.draw(3).tolist()),
    "distribution": (lambda: torch.distributions.Normal(torch.zeros(1), 1.0), lambda d: bump(d.loc)),
}


@pytest.mark.parametrize("name", STATE)
def test_every_kind_of_state_is_copied_rewound_and_put_back(name):
    make, use = STATE[name]
    module = Holder(held=make())
    before = look(module)
    shadow = Shadow(module)
    seen = []
    for _ in range(3):
        shadow.reset()
        seen.append(use(module.held))
    assert seen[0] == seen[1] == seen[2]
    shadow.close()
    assert differences(before, look(module)) == []
    first = use(module.held)
    assert first == seen[0]
    if name not in ("order of a dict", "ordered dict", "set that shrinks", "tensor of a validation loop"):
        assert use(module.held) != first  # so that there was something to rewind


def test_attributes_that_come_and_go():
    module = Holder(gone=1, stays=2)
    before, order = look(module), list(vars(module))
    shadow = Shadow(module)
    shadow.reset()
    del module.gone
    module.new = torch.zeros(1)
    module.register_buffer("buffer", torch.zeros(1))
    module.register_parameter("parameter", nn.Parameter(torch.zeros(1)))
    module.child = nn.Linear(1, 1)
    module.linear = nn.Linear(3, 3)
    module.linear.register_forward_hook(print)
    shadow.reset()
    assert not hasattr(module, "new")
    assert module.gone == 1
    shadow.close()
    assert differences(before, look(module)) == []
    assert list(vars(module)) == order


def test_the_dicts_of_a_module_stay_the_same_objects_inside():
    """Guards of compiled code, hooks and closures hold on to them."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    parts = [(m, vars(m), m._parameters, m._buffers, m._modules, m._forward_hooks) for m in module.modules()]
    shadow = Shadow(module)
    shadow.reset()
    for m, *dicts in parts:
        assert all(
            a is b
            for a, b in zip(dicts, [vars(m), m._parameters, m._buffers, m._modules, m._forward_hooks], strict=True)
        )
    shadow.close()


@pytest.mark.parametrize("make", [lambda: itertools.count(), lambda: iter([1, 2]), lambda: (i for i in range(3))])
def test_an_iterator_is_refused_when_it_is_used_and_not_before(make):
    module = Holder(batches=make(), inside=[make()])
    original = module.batches
    shadow = Shadow(module)
    shadow.reset()
    for iterator in (module.batches, module.inside[0]):
        with pytest.raises(TypeError, match="cannot be put back afterwards; pass loss_fn="):
            next(iterator)
    shadow.close()
    assert module.batches is original
    next(original)


def test_a_file_is_not_written_to(tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        module = Holder(file=file)
        shadow = Shadow(module)
        shadow.reset()
        with pytest.raises(TypeError, match="pass loss_fn="):
            module.file.write("twice")
        shadow.close()
        module.file.write("once")
    assert (tmp_path / "log.txt").read_text() == "once"


def test_a_torchscript_module_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch say that it is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    module = Holder(scripted=scripted)
    before = module.linear.weight
    with pytest.raises(TypeError, match="TorchScript"):
        Shadow(module)
    assert module.linear.weight is before


def test_other_people_s_objects_are_not_followed():
    """Trainers, loggers, optimizers, datasets, and libraries that have nothing to do with the module."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    dataset = torch.utils.data.TensorDataset(torch.zeros(3))
    found = walk([Holder(optimizer=optimizer, dataset=dataset, parser=copy)], frozenset({"tests"}))
    assert id(vars(optimizer)) not in found.seen
    assert not any(tensor is dataset.tensors[0] for tensor in found.tensors)


def test_everything_is_put_back_even_if_one_thing_cannot_be():
    module = Holder(first=[1], stubborn=bytearray(b"a"), last=[1])
    weight = module.linear.weight
    shadow = Shadow(module)
    shadow.reset()
    module.first.append(2)
    module.stubborn.extend(b"b")
    held = memoryview(module.stubborn)  # as long as there is one, the length stays
    module.last.append(2)
    with pytest.raises(BufferError):
        shadow.close()
    held.release()
    assert (module.first, module.last) == ([1], [1])
    assert module.linear.weight is weight


def test_what_a_class_does_in_methods_of_its_own_is_not_asked_for():
    class Endless(dict):
        def __iter__(self):
            yield Endless(a=1)  # as that of scipy's dok_matrix does

        def values(self):
            raise RuntimeError("not to be called")

    class Frozen(dict):
        def __setitem__(self, key, value):
            raise KeyError("frozen")

    class AppendOnly(list):
        def clear(self):
            raise RuntimeError("append only")

    module = Holder(endless=Endless(a=1), frozen=Frozen(a=1), grown=AppendOnly([1]), ordered=OrderedDict(a=1, b=2))
    shadow = Shadow(module)
    shadow.reset()
    dict.__setitem__(module.endless, "b", 2)
    dict.__setitem__(module.frozen, "a", 2)
    module.grown.append(2)
    module.ordered.move_to_end("a")
    shadow.close()
    assert dict.__eq__(module.endless, {"a": 1})
    assert (module.frozen, module.grown) == ({"a": 1}, [1])
    assert list(module.ordered) == ["a", "b"]
