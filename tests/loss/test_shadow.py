"""Shadow: copies inside, the very same objects afterwards, for every kind of container that Python has."""

import collections
import copy
import functools
import itertools
import random
import types
from collections import UserDict, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.state.copies import copied
from lightning_subspace.state.object_graph import walk
from tests.modules import PROJECTS, counting_tensors, differences, fingerprint


def look(module):
    return fingerprint(module, "module", identity=True)


@dataclass
class Plain:
    count: int = 0
    tensor: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    def see(self):
        self.count += 1
        return self.count


class Holder(nn.Module):
    """A module with whatever it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


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


@pytest.mark.parametrize("name", PROJECTS)
def test_every_object_is_itself_and_every_address_the_same_after_a_shadow(name):
    module = PROJECTS[name]()
    before = look(module)
    shadow = Shadow(module, torch.float64)
    for _ in range(2):
        shadow.reset()
        assert all(a is not b for a, b in zip(module.parameters(), PROJECTS[name]().parameters(), strict=True))
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(1)
    shadow.close()
    assert differences(before, look(module)) == []


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


def test_shared_tensors_are_shared_among_the_copies():
    module = Holder()
    module.again, module.inside = module.linear.weight, [module.linear.weight, module.linear]
    module.state = torch.zeros(4)
    module.same_state, module.part = [module.state], module.state[1:3]
    shadow = Shadow(module, torch.float64)
    shadow.reset()
    assert module.again is module.linear.weight is module.inside[0]
    assert module.same_state[0] is module.state
    module.part.add_(1)
    assert module.state.tolist() == [0, 1, 1, 0]
    assert module.state.dtype == torch.float64
    shadow.close()
    assert module.state.tolist() == [0, 0, 0, 0]


def test_a_view_of_a_parameter_is_a_view_of_its_copy():
    module = Holder()
    module.row, module.raw, module.transposed = (
        module.linear.weight[1],
        module.linear.weight.data,
        module.linear.weight.t(),
    )
    shadow = Shadow(module)
    shadow.reset()
    (gradient,) = torch.autograd.grad(module.row.sum() + module.transposed[0, 0], module.linear.weight)
    assert gradient.tolist() == [[1, 0], [1, 1]]
    assert not module.raw.requires_grad
    assert module.raw.data_ptr() == module.linear.weight.data_ptr()
    shadow.close()


def test_a_view_of_something_larger_that_is_not_in_the_module_copies_the_view_alone():
    module = Holder(part=torch.zeros(1_000_000)[3:5])
    shadow = Shadow(module)
    shadow.reset()
    assert module.part.untyped_storage().nbytes() == 8
    shadow.close()


def test_copies_of_parameters_keep_class_and_attributes():
    class Special(nn.Parameter):
        pass

    module = Holder()
    module.linear.weight = Special(torch.zeros(2, 2))
    module.linear.weight.tag, module.linear.weight.history, module.linear.weight.ema = 1, [], torch.zeros(2)
    before = look(module)
    shadow = Shadow(module)
    for _ in range(2):
        shadow.reset()
        weight = module.linear.weight
        assert type(weight) is Special
        assert (weight.tag, weight.history, weight.ema.tolist(), weight.grad) == (1, [], [0, 0], None)
        weight.tag = 2
        weight.history.append(1)
        weight.ema.add_(1)
        weight.sum().backward()
    shadow.close()
    assert differences(before, look(module)) == []


def test_copies_of_parameters_stay_until_they_are_written_to():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    shadow.reset()
    weight, bias = module.weight, module.bias
    weight.data.clamp_(-0.1, 0.1)
    shadow.drop_written()
    shadow.reset()
    assert module.weight is not weight
    assert module.bias is bias
    shadow.close()


def test_a_write_that_would_spoil_an_earlier_graph_is_refused():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    shadow.reset()
    shadow.drop_written()
    shadow.reset()
    module.weight.data.mul_(0.5)
    with pytest.raises(RuntimeError, match="writes to a parameter at some batches and not at others"):
        shadow.drop_written()
    shadow.close()


def test_displaced_copies_are_made_anew_and_are_no_writes():
    module = nn.Linear(2, 2)
    offsets = {}
    shadow = Shadow(module, displacement=lambda p: offsets.get(id(p)))
    weight = module.weight
    for size in (0.0, 1.0, 2.0, 0.0):
        offsets = {id(weight): torch.full((2, 2), size)} if size else {}
        shadow.reset()
        assert torch.equal(module.weight.detach(), weight.detach() + size)
        shadow.drop_written()
    shadow.close()
    assert module.weight is weight


def test_floating_point_state_is_widened_and_nothing_else():
    module = Holder(state=torch.zeros(1), count=torch.zeros(1, dtype=torch.long)).bfloat16()
    shadow = Shadow(module, torch.float32)
    shadow.reset()
    assert module.linear.weight.dtype == torch.float32
    assert (module.state.dtype, module.count.dtype) == (torch.float32, torch.long)
    shadow.close()
    assert module.linear.weight.dtype == torch.bfloat16


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
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
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


def test_extra_roots_are_put_back_without_copies_of_their_tensors():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    before = look(optimizer)
    shadow = Shadow(nn.Linear(2, 2), extra_roots=[optimizer])
    for _ in range(2):
        shadow.reset()
        assert optimizer.param_groups[0]["lr"] == 0.1
        optimizer.param_groups[0]["lr"] *= 2
        optimizer.note = "new"
    shadow.close()
    assert differences(before, look(optimizer)) == []


def test_everything_is_put_back_even_if_one_thing_cannot_be():
    class Stubborn(dict):
        def clear(self):
            raise RuntimeError("on purpose")

    module = Holder(first=[1], stubborn=Stubborn(a=1), last=[1])
    weight = module.linear.weight
    shadow = Shadow(module)
    shadow.reset()
    module.first.append(2)
    module.stubborn["b"] = 2
    module.last.append(2)
    with pytest.raises(RuntimeError, match="on purpose"):
        shadow.close()
    assert (module.first, module.last) == ([1], [1])
    assert module.linear.weight is weight


@functools.cache
def cached_table():
    return torch.ones(()) / 3


class UsesTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self):
        return self.weight * cached_table()


def test_a_cache_filled_by_a_probe_is_emptied_and_one_left_alone_is_not():
    cached_table.cache_clear()
    module = UsesTable()
    shadow = Shadow(module)
    shadow.reset()
    module()
    shadow.close()
    assert cached_table.cache_info().currsize == 0
    table = cached_table()
    shadow = Shadow(module)
    shadow.reset()
    module()
    shadow.close()
    assert cached_table() is table


def test_parametrizations_and_flattened_weights_follow_the_copies():
    lstm = nn.LSTM(2, 3, num_layers=2)
    ortho = parametrizations.orthogonal(nn.Linear(3, 3))
    module = nn.ModuleList([lstm, ortho])
    before = look(module)
    shadow = Shadow(module, torch.float64)
    shadow.reset()
    out = ortho(lstm(torch.ones(1, 1, 2, dtype=torch.float64))[0]).sum()
    gradients = torch.autograd.grad(out, list(module.parameters()))
    assert all(g.dtype == torch.float64 and g.isfinite().all() for g in gradients)
    shadow.close()
    assert differences(before, look(module)) == []


def test_a_shadow_leaves_nothing_behind():
    module = PROJECTS["Everything"]()
    counts = []
    with counting_tensors() as count:
        for _ in range(4):
            shadow = Shadow(module)
            shadow.reset()
            shadow.reset()
            shadow.close()
            del shadow
            counts.append(count())
    assert counts == [0] * 4


# -- batches ----------------------------------------------------------------------------------------------------------


class Bag:
    def __init__(self, x):
        self.x, self.array, self.list = x, np.zeros(2), [1]


def test_a_copied_batch_shares_nothing_with_the_original():
    x = torch.zeros(2)
    batch = {"x": x, "again": [x, "text"], "bag": Bag(x), "array": np.zeros(2), "meta": ({"id": {1, 2}}, None)}
    before = fingerprint(batch, "batch")
    new = copied(batch, torch.clone)
    assert differences(before, fingerprint(new, "batch")) == []
    new["x"].add_(1)
    new["bag"].array += 1
    new["bag"].list.append(1)
    new["array"] += 1
    new["meta"][0]["id"].clear()
    assert differences(before, fingerprint(batch, "batch")) == []
    assert new["again"][0] is new["x"] is new["bag"].x


@dataclass(frozen=True)
class FrozenBatch:
    x: torch.Tensor
    y: torch.Tensor


def test_a_frozen_dataclass_can_be_copied():
    batch = FrozenBatch(torch.zeros(2), torch.zeros(2))
    new = copied(batch, torch.clone)
    new.x.add_(1)
    new.y.add_(1)
    assert (batch.x.tolist(), batch.y.tolist()) == ([0, 0], [0, 0])


def test_a_batch_with_a_graph_can_be_copied():
    x = torch.ones(2, requires_grad=True) * 2
    assert not copied([x], lambda t: t.detach().clone())[0].requires_grad
