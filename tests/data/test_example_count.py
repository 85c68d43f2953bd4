"""The number of examples in batches of every structure: by the loader's batch size, from a list of them, and alone."""

import pickle
from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_subspace.data.example_count import ExampleCounter, readings

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning"),
]


def floats(*shape):
    return torch.zeros(shape)


def labels(count):
    return torch.zeros(count, dtype=torch.long)


class Graphs:
    """As torch_geometric's Batch: the number of graphs is a property, tensors lie in a store."""

    def __init__(self, count):
        self._store = {"x": floats(40 + count, 3), "edge_index": floats(2, 90 - count), "y": floats(count)}
        self._count = count

    @property
    def num_graphs(self):
        return self._count


class Dict(dict):
    """As a TensorDict: the batch size is a shape."""

    @property
    def batch_size(self):
        return self["x"].shape[:1]


class Own:
    def __init__(self, count):
        self.nodes, self.edges, self.y = floats(50 + count % 3, 2), floats(2, 70 - count % 5), labels(count)


class Failing(Own):
    @property
    def batch_size(self):
        raise RuntimeError("not set")


@dataclass
class Labelled:
    x: torch.Tensor
    y: torch.Tensor


Named = namedtuple("Named", "x y")

# Told from the structure alone; and those for which a batch size or a list of batches is needed.
CLEAR = {
    "tensor": lambda n: floats(n, 2),
    "x, y": lambda n: [floats(n, 2), labels(n)],
    "x, y alike": lambda n: [floats(n, 2), floats(n, 2)],
    "one in a list": lambda n: [floats(n, 2)],
    "views": lambda n: [floats(n, 3, 8, 8), floats(n, 3, 8, 8)],
    "views, y": lambda n: [[floats(n, 3, 8, 8), floats(n, 3, 8, 8)], labels(n)],
    "detection": lambda n: (
        tuple(floats(3, 5 + i, 6) for i in range(n)),
        tuple({"boxes": floats(1 + i % 3, 4), "labels": labels(1 + i % 3)} for i in range(n)),
    ),
    "strings": lambda n: {"text": ["a"] * n, "x": floats(n, 3)},
    "strings alone": lambda n: ["a"] * n,
    "adjacency, y": lambda n: (floats(n, 5), floats(10, 10), labels(n)),
    "adjacency": lambda n: (floats(n, 5), floats(10, 10)),
    "graphs": Graphs,
    "positions": lambda n: {"positions": torch.arange(7)[None], "ids": labels(n)[:, None].repeat(1, 7)},
    "scalars and None": lambda n: {"scale": torch.tensor(1.0), "x": floats(n, 2), "none": None, "k": 3},
    "sizes": lambda n: {"x": floats(n, 3, 4, 4), "size": (224, 224)},
    "COO": lambda n: floats(n, 4).to_sparse(),
    "CSR": lambda n: (torch.ones(n, 4).to_sparse_csr(), floats(n)),
    "jagged": lambda n: torch.nested.nested_tensor([floats(2 + i, 3) for i in range(n)], layout=torch.jagged),
    "nested": lambda n: torch.nested.nested_tensor([floats(2 + i, 3) for i in range(n)]),
    "packed": lambda n: pack_sequence([floats(9 - i % 3, 2) for i in range(n)], enforce_sorted=False),
    "user dict": lambda n: UserDict(x=floats(n, 2), y=floats(n)),
    "shape of a dict": lambda n: Dict(x=floats(n, 2), edges=floats(70, 2), more=floats(70)),
    "dataclass": lambda n: Labelled(floats(n, 2), floats(n)),
    "named tuple": lambda n: Named(floats(n, 2), labels(n)),
    "arrays": lambda n: {"x": np.zeros((n, 3)), "y": np.zeros(n)},
    "several loaders": lambda n: {"a": [floats(n, 2), labels(n)], "b": [floats(n, 2), labels(n)]},
    "list of dicts": lambda n: [{"x": floats(5, 2), "y": floats(5)} for _ in range(n)],
    "list of pairs": lambda n: [(floats(5, 2), i) for i in range(n)],
    "list of different lengths": lambda n: [floats(4 + i, 2) for i in range(n)],
    "list of objects": lambda n: [Own(i) for i in range(n)],
}
AMBIGUOUS = {
    "list of images": lambda n: [floats(3, 6, 6) for _ in range(n)],
    "four alike": lambda n: [floats(n, 1) for _ in range(4)],
}
OF_A_LOADER = {"own class": Own, "failing property": Failing, "edges": lambda n: {"x": floats(n, 3), "e": floats(9, 2)}}


@pytest.mark.parametrize("kind", [*CLEAR, *AMBIGUOUS, *OF_A_LOADER])
@pytest.mark.parametrize("sizes", [(32, 32, 8), (5, 5, 1), (2, 2, 1)])
def test_the_batch_size_of_the_loader_decides(kind, sizes):
    counter = ExampleCounter(sizes[0])
    assert [counter.count({**CLEAR, **AMBIGUOUS, **OF_A_LOADER}[kind](n)) for n in sizes] == list(sizes)


@pytest.mark.parametrize("kind", [*CLEAR, *AMBIGUOUS])
@pytest.mark.parametrize("sizes", [(32, 32, 8), (4, 1), (1, 4), (5, 2, 7)])
def test_of_a_list_of_batches_what_varies_is_right(kind, sizes):
    found = [readings({**CLEAR, **AMBIGUOUS}[kind](n)) for n in sizes]
    counter = ExampleCounter()
    assert counter.learn(found)
    assert [counter.count_of(reading) for reading in found] == list(sizes)


@pytest.mark.parametrize("kind", CLEAR)
def test_most_batches_say_it_themselves(kind):
    counter = ExampleCounter()
    assert [counter.count(CLEAR[kind](n)) for n in (32, 32, 8)] == [32, 32, 8]


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_tie_is_not_known(kind):
    assert ExampleCounter().count(AMBIGUOUS[kind](32)) is None


@pytest.mark.parametrize("batch", [None, "text", torch.tensor(1.0), [], {}, {"x": 1}, [None, torch.tensor(1.0)]])
def test_without_anything_to_count_nothing_is_known(batch):
    assert ExampleCounter(4).count(batch) is None


def test_nothing_is_known_where_two_things_vary():
    found = [readings({"tokens": floats(t), "bounds": floats(b)}) for t, b in ((70, 5), (52, 7), (93, 6))]
    assert not ExampleCounter().learn(found)


def test_a_loader_that_gives_twice_its_batch_size_is_believed():
    counter = ExampleCounter(4)
    assert [counter.count((floats(2 * n, 3), labels(2 * n))) for n in (4, 4, 1)] == [8, 8, 2]


def test_a_place_that_matched_by_chance_is_dropped():
    counter = ExampleCounter(8)
    sizes = [(8, 8), (8, 9), (8, 5), (3, 6)]
    assert [counter.count({"x": floats(n, 2), "y": labels(n), "boxes": floats(m, 4)}) for n, m in sizes] == [8, 8, 8, 3]


def test_what_was_learned_can_be_given_to_another_rank():
    counter, other = ExampleCounter(3), ExampleCounter(3)
    counter.count({"x": floats(3, 5), "edges": floats(7, 2)})
    other.learned = pickle.loads(pickle.dumps(counter.learned))
    assert other.count({"x": floats(2, 5), "edges": floats(3, 2)}) == 2


def test_a_batch_that_holds_itself_is_counted():
    batch = {"x": floats(4, 2)}
    batch["self"] = batch
    assert ExampleCounter().count(batch) == 4
