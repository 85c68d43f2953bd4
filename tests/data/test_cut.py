"""Parts of batches: only where everything in a batch has one number of examples."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_subspace.data.cut import common_length, cut
from lightning_subspace.data.micro_batch import MicroBatch, few_examples, single_examples

X, Y = torch.arange(24).reshape(12, 2), torch.arange(12)
NAMES = [str(i) for i in range(12)]


@dataclass(frozen=True)
class Labelled:
    x: torch.Tensor
    y: torch.Tensor
    split: str = "train"


Named = namedtuple("Named", "x y")


class Own:
    def __init__(self):
        self.x, self.y = X, Y


# a batch, and how its third and fourth example are read of a part
CUT = {
    "tensor": (X, lambda b: b),
    "list": ([X, Y], lambda b: b[0]),
    "tuple": ((X, (Y, "name"), None, 3), lambda b: b[0]),
    "dict": ({"x": X, "names": NAMES}, lambda b: b["x"]),
    "ordered dict": (OrderedDict(x=X, y=Y), lambda b: b["x"]),
    "user dict": (UserDict(x=X, y=Y), lambda b: b["x"]),
    "dataclass": (Labelled(X, Y), lambda b: b.x),
    "named tuple": (Named(X, Y), lambda b: b.x),
    "arrays": ({"x": X, "a": X.numpy()}, lambda b: torch.from_numpy(b["a"])),
    "list of dicts": (
        {"items": [{"x": row} for row in X], "y": Y},
        lambda b: torch.stack([i["x"] for i in b["items"]]),
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_a_part_has_the_examples_of_a_slice_everywhere(name):
    batch, read = CUT[name]
    assert common_length(batch) == 12
    part = cut(batch, 12, slice(2, 4))
    assert type(part) is type(batch)
    assert read(part).tolist() == X[2:4].tolist()
    assert common_length(part) == 2


def test_strings_are_cut_along_and_the_original_stays():
    batch = {"x": X, "names": NAMES, "split": "train"}
    part = cut(batch, 12, slice(2, 4))
    assert (part["names"], part["split"]) == (["2", "3"], "train")
    assert batch["names"] is NAMES
    assert len(batch["names"]) == 12


WHOLE = {
    "COO": lambda: X.float().to_sparse(),
    "CSR": lambda: (X.float().to_sparse_csr(), Y),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3)] * 12, layout=torch.jagged),
    "packed": lambda: (pack_sequence([torch.ones(2, 3)] * 12), Y),
    "own class": lambda: Own(),
    "own class beside a tensor": lambda: {"x": X, "own": Own()},
    "names of something else": lambda: {"x": X, "y": Y, "columns": ["a", "b"]},
    "adjacency": lambda: (X, torch.zeros(10, 10), Y),
    "scalar": lambda: (X, torch.tensor(1.0)),
    "uneven": lambda: (X, Y[:-1]),
    "array of another length": lambda: {"x": X, "y": Y, "a": np.zeros(3)},
    "strings": lambda: "no tensor",
    "empty": lambda: torch.zeros(0, 2),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_what_may_belong_to_the_whole_keeps_a_batch_whole(name):
    batch = MicroBatch(WHOLE[name](), 12.0, 0)
    assert few_examples(batch, 8) is batch
    assert single_examples(batch) is None


def test_a_known_size_decides_between_two_readings():
    images = [torch.full((3, 2, 2), float(i)) for i in range(12)]
    assert few_examples(MicroBatch(images, 12.0, 0), 8).data is images
    few = few_examples(MicroBatch(images, 12.0, 0, size=12), 8)
    assert [image.mean().item() for image in few.data] == list(range(8))
    assert (few.size, few.weight) == (8, 8.0)
    assert [one.data[0].mean().item() for one in single_examples(MicroBatch(images, 12.0, 0, size=12))] == list(
        range(12)
    )


def test_a_part_knows_which_tensors_are_on_the_cpu():
    columns = MicroBatch((X, Y), 12.0, 0, transferred=True, size=12, off_cpu=(True, False))
    assert few_examples(columns, 8).off_cpu == single_examples(columns)[0].off_cpu == (True, False)
    rows = MicroBatch(list(X), 12.0, 0, transferred=True, size=12, off_cpu=(True,) * 12)
    assert few_examples(rows, 8).off_cpu == (True,) * 8
    mixed = MicroBatch(list(X), 12.0, 0, transferred=True, size=12, off_cpu=(True, False) * 6)
    assert few_examples(mixed, 8) is mixed
