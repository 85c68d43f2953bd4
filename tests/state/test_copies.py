"""A copied batch shares nothing with the original, and every tensor in it is copied by the function given."""

import copy
import datetime
import threading
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_subspace.loss.precision import widened, widened_array
from lightning_subspace.state.copies import CopyError, copied, tensors_of
from lightning_subspace.state.layouts import bytes_of
from tests.modules import differences, fingerprint


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
def test_a_nested_tensor_with_a_capsule_of_c_code_can_be_copied():
    """As torch 2.6 keeps one with the sizes; this one is of Python's own."""
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)
    nested._sym_sizes_capsule = datetime.datetime_CAPI
    (new,) = copied([nested], lambda tensor: tensor.detach().clone())
    assert "_sym_sizes_capsule" not in vars(new)
    assert torch.equal(new.values(), nested.values())
    assert new.values() is not nested.values()


def wide(tensor):
    return widened(tensor.detach(), torch.float64, copy=True)


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


class CopiesItself:
    """Never asks `copy` for its tensor."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, memo):
        return CopiesItself(self.x.clone())


class Tagged(torch.Tensor):
    pass


class Plain(torch.Tensor):
    """Its results are tensors of no class."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def tagged(x, kind=torch.Tensor):
    x = x.clone() if kind is torch.Tensor else x.clone().as_subclass(kind)
    x.tag = {"weights": torch.ones(3), "name": "a"}
    return x


HOLDERS = {
    "own class": lambda x: (b := Bag(x), b.x)[0],
    "object in a list in a dict": lambda x: {"a": [Bag(x)]},
    "slots": Slots,
    "copies itself": CopiesItself,
    "frozen dataclass": lambda x: FrozenBatch(x, x + 1),
    "user dict": lambda x: UserDict(x=x),
    "object array": lambda x: np.array([Bag(x), None], dtype=object),
    "module": lambda x: nn.ParameterList([x]),
    "packed": lambda x: pack_sequence([x, x[:1]]),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_tensors_are_found_in_objects_of_every_class(name):
    x = torch.randn(2)
    batch = HOLDERS[name](x)
    new = copied(batch, wide)
    floats = [tensor for tensor in tensors_of(new) if tensor.is_floating_point()]
    before = [tensor for tensor in tensors_of(batch) if tensor.is_floating_point()]
    assert type(new) is type(batch)
    assert len(floats) == len(before) >= 1
    assert all(f.dtype == torch.float64 and torch.equal(f, b.double()) for f, b in zip(floats, before, strict=True))
    assert not {f.data_ptr() for f in floats} & {b.data_ptr() for b in before}


@pytest.mark.parametrize("kind", [torch.Tensor, Tagged, Plain])
def test_tensors_keep_their_class_and_their_attributes(kind):
    x = tagged(torch.ones(2), kind)
    new = copied([x], wide)[0]
    assert type(new) is kind
    assert new.dtype == new.tag["weights"].dtype == torch.float64
    assert new.tag["name"] == "a"
    new.tag["weights"].zero_()
    assert x.tag["weights"].sum() == 3
    assert len(tensors_of([x])) == 2


def test_a_parameter_is_a_parameter_of_the_other_type():
    parameter = nn.Parameter(torch.ones(2))
    parameter.tag = "a"
    new = copied(Bag(parameter), wide).x
    assert isinstance(new, nn.Parameter)
    assert (new.dtype, new.tag) == (torch.float64, "a")


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


EYE = torch.eye(4)
# how it is made, and the bytes of its data in float32 with indices in int64
LAYOUTS = {
    "dense": (lambda: EYE, 64),
    "COO": (lambda: EYE.to_sparse(), 4 * 4 + 8 * 8),
    "CSR": (lambda: EYE.to_sparse_csr(), 4 * 4 + 9 * 8),
    "CSC": (lambda: EYE.to_sparse_csc(), 4 * 4 + 9 * 8),
    "BSR": (lambda: EYE.to_sparse_bsr((2, 2)), 8 * 4 + 5 * 8),
    "jagged": (lambda: nested(torch.jagged), 18 * 4),
    "nested": (lambda: nested(torch.strided), 18 * 4),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), 3),
    "complex": (lambda: (torch.ones(2) + 1j).conj(), 16),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), 2),
    "empty": (lambda: torch.zeros(0, 3), 0),
    "scalar": (lambda: torch.tensor(2.0), 4),
    "8 bits": (lambda: torch.ones(2).to(torch.float8_e4m3fn), 2),
    "bfloat16": (lambda: torch.ones(2, dtype=torch.bfloat16), 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quant.*", "ignore:TypedStorage")
def test_every_layout_is_copied_widened_and_counted(name):
    make, nbytes = LAYOUTS[name]
    x = make()
    new, same = copied(Bag(x), wide).x, copied(Bag(x), lambda t: t.detach().to("cpu", copy=True)).x
    assert new.layout == same.layout == x.layout
    assert same.dtype == x.dtype
    is_float = (x.is_floating_point() or x.is_complex()) and name != "8 bits"
    assert new.dtype == (torch.promote_types(x.dtype, torch.float64) if is_float else x.dtype)
    assert bytes_of(x) == bytes_of(same) == nbytes
    for old, copy_ in zip(values(x), values(same), strict=True):
        assert torch.equal(old, copy_)
    for old, copy_ in zip(values(x), values(new), strict=True):
        assert torch.equal(old.to(torch.complex128), copy_.to(torch.complex128))


def values(tensor):
    if tensor.is_nested:
        return tensor.unbind()
    return [tensor.dequantize() if tensor.is_quantized else tensor.to_dense()]


def test_inference_tensors_are_copied_as_ordinary_ones():
    with torch.inference_mode():
        x = torch.ones(2)
    new = copied(Bag(x), wide).x
    assert not new.is_inference()
    assert (new * torch.ones(2, dtype=torch.float64, requires_grad=True)).sum().requires_grad


def test_tensors_come_in_the_order_of_the_structure():
    batch = {"b": [Bag(torch.tensor([1.0])), torch.tensor([2.0])], "a": (torch.tensor([3.0]), torch.tensor([1.0]))}
    order = [tensor.item() for tensor in tensors_of(batch)]
    assert order == [tensor.item() for tensor in tensors_of(copied(batch, wide))] == [1.0, 2.0, 3.0, 1.0]


def test_a_packed_sequence_keeps_its_class():
    packed = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    new = copied({"p": packed}, wide)["p"]
    assert isinstance(new, PackedSequence)
    assert new.data.dtype == torch.float64
    assert torch.equal(new.batch_sizes, packed.batch_sizes)


def test_arrays_are_widened_wherever_they_are():
    bag = Bag(None)
    bag.array = np.ones(2, dtype=np.float32)
    batch = {"bag": bag, "same": bag.array, "ids": np.arange(2), "c": np.ones(2, dtype=np.complex64)}
    new = copied(batch, wide, lambda array: widened_array(array, torch.float64))
    assert new["bag"].array is new["same"]
    assert [new[key].dtype for key in ("same", "ids", "c")] == [np.float64, batch["ids"].dtype, np.complex128]
    new["same"][:] = 0
    assert bag.array.sum() == 2


@pytest.mark.parametrize("what", [threading.Lock(), (x for x in "ab")], ids=["lock", "generator"])
def test_what_cannot_be_copied_is_named_with_the_way_out(what):
    with pytest.raises(CopyError, match=f"Bag.*{type(what).__name__}.*sample=.*loss_fn="):
        copied(Bag(what), torch.clone)


def test_a_failure_of_the_function_is_not_one_of_the_batch():
    def fail(tensor):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        copied(Bag(torch.ones(2)), fail)


def test_copying_leaves_the_copy_module_as_it_was():
    copied(Bag(torch.ones(2)), wide)
    assert copy.deepcopy(torch.ones(2)).dtype == torch.float32
