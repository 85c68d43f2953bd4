"""Batches of every kind: training is bit for bit the same, and eigenvalues are those of the mean over examples.

Every kind holds the same examples, so that one oracle serves all: the dense Hessian, in float64, of the mean loss over
the examples themselves.
"""

import copy
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_subspace import Measurement, Needs, measure_subspace
from tests.left_out import leave_self_check_out
from tests.modules import BATCH, CLASSES, examples
from tests.oracles import dense_hessian, top_eigenspace
from tests.thorough import covering, usual
from tests.works_with.same_run import Classifier, compare

pytestmark = [
    pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step"),  # two eigenvalues may lie close together
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning"),
]
NAMES = ["ant", "bee", "cat"]


class Own:
    """Neither a collection nor able to move itself."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.names = x, y, ["a"] * len(x)


class Graphs:
    """Two nodes a graph, edges, and labels of graphs, as torch_geometric's Batch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.store = {"x": x.repeat_interleave(2, 0), "edge_index": torch.zeros(2, 9 + len(x)), "y": y}
        self.batch = torch.arange(len(x)).repeat_interleave(2)

    @property
    def num_graphs(self) -> int:
        return len(self.store["y"])

    def mean(self) -> Tensor:
        x = self.store["x"]
        return x.new_zeros(self.num_graphs, x.shape[1]).index_add(0, self.batch, x) / 2


class Tagged(Tensor):
    """A tensor that carries labels."""


@dataclass
class Labelled:
    x: Tensor
    y: Tensor
    split: str = "train"


def tagged(x: Tensor, y: Tensor) -> Tensor:
    x = x.as_subclass(Tagged)
    x.y = y
    return x


def detection(x: Tensor, y: Tensor) -> Any:
    images = [row[None, :, None].repeat(1, 1, 1 + i % 3) for i, row in enumerate(x)]
    targets = [{"boxes": torch.zeros(1 + i % 2, 4), "label": label} for i, label in enumerate(y)]
    return tuple(images), tuple(targets)


def parts(x: Tensor) -> list[Tensor]:
    """Each row in one to three parts whose sum it is."""
    return [row.repeat(1 + i % 3, 1) / (1 + i % 3) for i, row in enumerate(x)]


def rows(x: Any) -> Tensor:
    return torch.stack(list(x))


def sums(x: Any) -> Tensor:
    if isinstance(x, PackedSequence):
        return pad_packed_sequence(x, batch_first=True)[0].sum(1)
    return rows(part.sum(0) for part in x.unbind())


# kind: how a batch is made of columns, and how training reads them again
KINDS = {
    "strings": (
        lambda x, y: {"x": x, "label": [NAMES[i] for i in y]},
        lambda b: (b["x"], torch.tensor([NAMES.index(name) for name in b["label"]])),
    ),
    "None and scalars": (lambda x, y: {"s": torch.tensor(1.0), "n": None, "x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "positions": (lambda x, y: {"p": torch.arange(5)[None], "x": x, "y": y}, lambda b: (b["x"] + 0 * b["p"], b["y"])),
    "adjacency": (lambda x, y: (x, torch.eye(5), y), lambda b: (b[0] @ b[1], b[2])),
    "list of examples": (lambda x, y: list(zip(x, y, strict=True)), lambda b: tuple(map(rows, zip(*b, strict=True)))),
    "detection": (
        detection,
        lambda b: (rows(image.mean(2)[0] for image in b[0]), rows(target["label"] for target in b[1])),
    ),
    "COO": (lambda x, y: (x.to_sparse(), y), lambda b: (torch.sparse.mm(b[0], torch.eye(5).to(b[0].dtype)), b[1])),
    "CSR": (lambda x, y: (x.to_sparse_csr(), y), lambda b: (b[0].to_dense(), b[1])),
    "jagged": (
        lambda x, y: (torch.nested.nested_tensor(parts(x), layout=torch.jagged), y),
        lambda b: (sums(b[0]), b[1]),
    ),
    "nested": (lambda x, y: (torch.nested.nested_tensor(parts(x)), y), lambda b: (sums(b[0]), b[1])),
    "packed": (lambda x, y: (pack_sequence(parts(x), enforce_sorted=False), y), lambda b: (sums(b[0]), b[1])),
    "own class": (Own, lambda b: (b.x, b.y)),
    "graphs": (Graphs, lambda b: (b.mean(), b.store["y"])),
    "objects in a list": (
        lambda x, y: [Own(*pair) for pair in zip(x.split(1), y.split(1), strict=True)],
        lambda b: (torch.cat([o.x for o in b]), torch.cat([o.y for o in b])),
    ),
    "dataclass with text": (Labelled, lambda b: (b.x, b.y)),
    "user dict": (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "tensor with attributes": (tagged, lambda b: (b.as_subclass(Tensor), b.y)),
    "arrays": (lambda x, y: {"x": x.numpy(), "y": y}, lambda b: (torch.from_numpy(b["x"]), b["y"])),
    "views of a batch": (lambda x, y: [[x, x], y], lambda b: ((b[0][0] + b[0][1]) / 2, b[1])),
}


class Keep(Measurement):
    """The parameters and the eigenvalues of every probe."""

    needs = Needs.SUBSPACE

    def __init__(self) -> None:
        self.seen: list[tuple[list[Tensor], Tensor]] = []

    def measure(self, probe: Any) -> dict[str, float]:
        parameters = [parameter.detach().clone() for parameter in probe.parameters]
        self.seen.append((parameters, probe.subspace.eigenvalues))
        return {}


class Collate:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> Any:
        return KINDS[self.kind][0](*map(rows, zip(*items, strict=True)))


def expected(net: nn.Module, parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    net = copy.deepcopy(net).double()
    for parameter, value in zip(net.parameters(), parameters, strict=True):
        parameter.data.copy_(value)
    return top_eigenspace(dense_hessian(net, lambda m: F.cross_entropy(m(x.double()), y)), 2)[0]


@pytest.mark.parametrize(("kind", "sample"), covering(list(KINDS), ["all", "list"]))
def test_batches_of_every_kind_are_measured_as_they_are(kind, sample, tmp_path, monkeypatch):
    leave_self_check_out(monkeypatch)  # which is below
    keep, dataset = Keep(), examples()
    x, y = dataset.tensors
    if sample == "list":  # 8, 8 and 5 of them
        x, y = x[:21], y[:21]
        sample = [KINDS[kind][0](*columns) for columns in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    run = compare(
        tmp_path,
        lambda: Classifier(KINDS[kind][1]),
        lambda: DataLoader(dataset, batch_size=BATCH, shuffle=True, collate_fn=Collate(kind)),
        monitor={"sample": sample, "every_n_steps": 4, "dtype": "float64", "k": 2, "tol": 1e-8, "measurements": [keep]},
        max_epochs=1,
    )
    assert run.differing == []
    assert len(keep.seen) == len(run.steps) == 2
    for parameters, eigenvalues in (keep.seen[0], keep.seen[-1]):
        right = expected(run.trainer.lightning_module.net, parameters, x, y)
        assert torch.allclose(eigenvalues.double(), right, rtol=1e-6, atol=0)


# -- what the self-check sees -----------------------------------------------------------------------------------------


class OnCtx(torch.autograd.Function):
    """Softplus whose gradient is right and whose second derivative is not: what `ctx` holds has no graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = torch.sigmoid(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope


# Those that are to the check what one of the others is.
ALIKE = ("None and scalars", "adjacency", "CSR", "nested", "dataclass with text", "user dict", "views of a batch")


@pytest.mark.parametrize("kind", usual([kind for kind in KINDS if kind not in ALIKE], thorough=ALIKE))
def test_a_wrong_second_derivative_is_found_whatever_the_batch_is(kind):
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, CLASSES))
    make, read = KINDS[kind]

    def loss_fn(module, batch, batch_idx):
        x, y = read(batch)
        return F.cross_entropy(module[1](OnCtx.apply(module[0](x))), y)

    with pytest.warns(
        UserWarning, match="second derivatives of this model are wrong. .* a backward pass is wrong about its own"
    ):
        measure_subspace(net, [make(*examples().tensors)], k=1, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("refuse", "curvature"),
    covering(
        [
            lambda x: 1.0 / (len(x) // 32),
            lambda x: float("nan") if len(x) < 32 else 1.0,
            lambda x: None if len(x) < 32 else 1.0,
        ],
        ["hessian", "ggn", "finite-difference", "empirical-fisher"],
    ),
)
def test_a_batch_whose_part_has_no_loss_is_checked_whole(curvature, refuse):
    x, y = examples().tensors
    net = nn.Linear(5, CLASSES)

    def plain(module, batch, batch_idx):
        return F.cross_entropy(module(batch[0]), batch[1])

    def strict(module, batch, batch_idx):
        factor = refuse(batch[0])
        return None if factor is None else plain(module, batch, batch_idx) * factor

    options = {"k": 2, "curvature": curvature, "on_check_fail": "raise"}
    if curvature == "empirical-fisher":
        with pytest.warns(UserWarning, match="over micro-batches here"):
            found = measure_subspace(net, [(x, y)] * 2, loss_fn=strict, **options)
        assert np.isfinite(found.metrics["sharpness"])
        return
    found = measure_subspace(net, [(x, y)], loss_fn=strict, **options)
    right = measure_subspace(net, [(x, y)], loss_fn=plain, **options)
    assert torch.allclose(found.subspace.eigenvalues, right.subspace.eigenvalues, rtol=1e-5)


# -- parts of a batch -------------------------------------------------------------------------------------------------


class Sizes(Measurement):
    """The numbers of examples in the micro-batches of each probe."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []

    def measure(self, probe: Any) -> dict[str, float]:
        self.seen.append(([b.size for b in probe.sample.hessian], [b.size for b in probe.sample.extra]))
        return {}


@pytest.mark.parametrize(("sample", "parts"), [(BATCH - 2, [[BATCH - 2], [2]]), (BATCH - 1, [[BATCH], []])])
def test_a_batch_is_cut_where_each_part_has_a_loss(sample, parts, tmp_path):
    """Batch-norm refuses one example, which the rest of a batch may be, behind the part that was asked for."""
    sizes = Sizes()

    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__(lambda batch: tuple(batch))
            self.net = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, CLASSES))

    run = compare(
        tmp_path,
        Normed,
        lambda: DataLoader(list(zip(*examples().tensors, strict=True)), batch_size=BATCH, drop_last=True),
        monitor={"sample": sample, "gradient_sample": BATCH, "measurements": [sizes]},
    )
    assert run.differing == []
    assert [list(map(list, seen)) for seen in sizes.seen] == [parts] * len(run.steps)
