"""Layers, their table and traces of blocks against dense Hessians, written out."""

import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_subspace import Layers, Measurement, SubspaceMonitor, Trace, measure_subspace
from lightning_subspace.measurements.grouping import Grouping, checked_groups
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.checkpoint import decode
from lightning_subspace.report import layers_figure
from lightning_subspace.report.tab_entry import tab_entry
from lightning_subspace.subspace.record import History, Record
from lightning_subspace.subspace.table import MOST_GROUPS, Table
from lightning_subspace.tensorboard_tab.schema import to_json
from tests.left_out import without_error_bar
from tests.measurements.test_measurements import Classifier, batched_hessian, blobs, digits, fit
from tests.processes import run
from tests.thorough import usual

from .probes import F64, data, derivatives, loss_fn, metrics, net, stepped, top_eigenspace

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
PLACES = [slice(a, b) for a, b in pairwise(accumulate((30, 6, 18, 3), initial=0))]
K = 4


def by_group(found, row):
    """The numbers of a row, by group."""
    start = f"{row}/"
    return {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}


def values(found, row):
    return torch.tensor(list(by_group(found, f"layers/{row}").values()), dtype=F64)


@pytest.fixture(scope="module")
def trained():
    """A net, its gradient, Hessian and top eigenpairs, and what is measured of it by tensor."""
    module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.5), 30)
    gradient, hessian = derivatives(module)
    found = metrics(module, Layers(exact=True), Trace(vectors=3, groups="tensors"), k=K)
    return module, gradient, hessian, *top_eigenspace(hessian, K), found


# Identities


def test_shares_sum_to_one_and_parts_to_the_whole(trained):
    *_, found = trained
    for row in ("participation", "participation_weighted", "gradient"):
        assert tuple(by_group(found, f"layers/{row}")) == NAMES
        assert float(values(found, row).sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(values(found, "gradient_curvature").sum()) == pytest.approx(found["gradient_curvature"], rel=1e-12)
    assert sum(by_group(found, "trace").values()) == pytest.approx(found["trace"], rel=1e-12)


def test_one_group_is_the_whole(trained):
    module, *_ = trained
    one = {"whole": "*"}
    found = metrics(module, Layers(one, exact="whole"), Trace(vectors=3, groups=one), k=K)
    assert found["layers/participation/whole"] == pytest.approx(1.0, abs=1e-12)
    assert found["layers/gradient_curvature/whole"] == pytest.approx(found["gradient_curvature"], rel=1e-12)
    assert found["layers/block_sharpness/whole"] == pytest.approx(found["sharpness"], rel=1e-10)
    assert found["layers/block_sharpness_exact/whole"] == pytest.approx(found["sharpness"], rel=1e-10)
    assert found["trace/whole"] == pytest.approx(found["trace"], rel=1e-12)


def test_every_number_is_that_of_the_dense_hessian(trained):
    _, gradient, hessian, eigenvalues, vectors, found = trained
    top = vectors.T @ (eigenvalues[:, None] * vectors)
    bend, square = hessian @ gradient, float(gradient @ gradient)
    following = float(torch.linalg.eigvalsh(hessian)[-K - 1])
    given = 0
    for name, place in zip(NAMES, PLACES, strict=True):
        own = vectors[:, place].square().sum(dim=1)
        block, full = (float(torch.linalg.eigvalsh(matrix[place, place])[-1]) for matrix in (top, hessian))
        weighted = float((own * eigenvalues).sum() / eigenvalues.sum())
        assert found[f"layers/participation/{name}"] == pytest.approx(float(own.mean()), abs=1e-8)
        assert found[f"layers/participation_weighted/{name}"] == pytest.approx(weighted, abs=1e-8)
        assert found[f"layers/gradient/{name}"] == pytest.approx(float(gradient[place].square().sum()) / square)
        along = float(gradient[place] @ bend[place]) / square
        assert found[f"layers/gradient_curvature/{name}"] == pytest.approx(along, rel=1e-8)
        assert found[f"layers/block_sharpness_exact/{name}"] == pytest.approx(max(full, 0.0), rel=1e-8)
        assert (f"layers/block_sharpness/{name}" in found) == (block >= 2.0 * following)
        if block >= 2.0 * following:
            assert found[f"layers/block_sharpness/{name}"] == pytest.approx(block, rel=1e-7)
            given += 1
    assert 0 < given < 4
    spread = 57 * float(vectors.pow(4).sum(dim=1).mean())
    assert found["layers/inverse_participation"] == pytest.approx(spread, rel=1e-7)


class OfVectors(Measurement):
    """What the layers say where these rows were the eigenvectors."""

    def __init__(self, rows):
        self.rows = rows

    def measure(self, probe):
        return Layers().measure(replace(probe, subspace=replace(probe.top, eigenvectors=self.rows)))


def test_the_inverse_participation_is_3_for_random_vectors_and_n_for_one_coordinate():
    module = nn.Linear(400, 50, bias=False).to(F64)
    random = torch.linalg.qr(torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)).Q.T
    for rows, expected in ((random, pytest.approx(3.0, rel=0.05)), (torch.eye(2, 20_000, dtype=F64), 20_000.0)):
        found = measure_subspace(
            module,
            [torch.ones(1, 400, dtype=F64)],
            k=2,
            loss_fn=lambda m, x, i: (m(x)[:, :3].square() * torch.tensor([3.0, 2.0, 1.0])).sum(),
            measurements=[OfVectors(rows)],
        ).metrics
        assert found["layers/inverse_participation"] == expected


class Two(nn.Module):
    """Two nets that have nothing to do with each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = (nn.Linear(3, 1, bias=False).to(F64) for _ in range(2))
        self.inputs = torch.randn(2, 20, 3, dtype=F64)

    def forward(self, x):
        outputs = self.one(self.inputs[0]), 2.0 * self.other(self.inputs[1])
        return sum((output - x.mean()).square().mean() for output in outputs)


def test_of_two_independent_nets_the_blocks_have_the_eigenvalues_of_the_whole():
    module = Two()
    factors = (module.inputs * torch.tensor([1.0, 2.0])[:, None, None]).mT @ module.inputs
    factors = factors * torch.tensor([1.0, 2.0])[:, None, None] * 2.0 / 20.0
    each = [torch.linalg.eigvalsh(factor) for factor in factors]
    record = measure_subspace(
        module,
        [torch.ones(1, dtype=F64)],
        k=6,
        tol=1e-10,
        dtype="float64",
        loss_fn=lambda m, x, i: m(x),
        measurements=[Layers("modules", exact=True)],
    )
    assert record.subspace.eigenvalues == pytest.approx(torch.cat(each).sort(descending=True).values, rel=1e-9)
    for name, eigenvalues in zip(("one", "other"), each, strict=True):
        for row in ("block_sharpness", "block_sharpness_exact"):  # all pairs are there: nothing is behind them
            assert record.metrics[f"layers/{row}/{name}"] == pytest.approx(float(eigenvalues[-1]), rel=1e-9)
        assert record.metrics[f"layers/participation/{name}"] == pytest.approx(0.5, abs=1e-9)


# Traces of a small net, and of one on the digits where training is under way

VECTORS, EXAMPLES = 200, 600


@pytest.fixture(scope="module")
def of_a_small_net(trained):
    """The same of a net whose products take little."""
    module, _, hessian, *_ = trained
    batch = tuple(torch.cat(parts) for parts in zip(*data(), strict=True))
    options = {"loss_fn": loss_fn, "dtype": "float64", "tol": 1e-10}
    trace = Trace(vectors=VECTORS, groups="tensors")
    deflated, plain = (measure_subspace(module, [batch], k=k, measurements=[trace], **options).metrics for k in (10, 0))
    return hessian, top_eigenspace(hessian, 10), dict(zip(NAMES, PLACES, strict=True)), deflated, plain


@pytest.fixture(scope="module")
def of_digits():
    """The dense Hessian at step 500 with its pairs, and what is measured with them taken out and without."""
    torch.manual_seed(0)
    module = Classifier(64, 10, 10, 10, activation=nn.ReLU)
    fit(module, DataLoader(digits(), batch_size=64, shuffle=True), max_steps=500)
    module = module.double()
    images, labels = digits().tensors
    batch = images[:EXAMPLES].double(), labels[:EXAMPLES]  # of all of them the dense Hessian takes long
    hessian = batched_hessian(module, batch)
    options = {"loss_fn": lambda m, b, i: m.training_step(b, i), "dtype": "float64"}
    trace = Trace(vectors=VECTORS, groups="tensors")
    deflated = measure_subspace(module, [batch], k=10, measurements=[Layers(), trace], **options).metrics
    plain = measure_subspace(module, [batch], k=0, measurements=[trace], **options).metrics
    space = ParameterSpace.of(module)
    ends = accumulate(space.numels, initial=0)
    places = dict(zip(space.names, (slice(a, b) for a, b in pairwise(ends)), strict=True))
    return hessian, top_eigenspace(hessian, 10), places, deflated, plain


@pytest.mark.thorough  # of the tests: where a block is given, it is that of the dense Hessian above
def test_blocks_of_weights_are_known_from_ten_pairs(of_digits):
    hessian, _, places, found, _ = of_digits
    for name, place in places.items():
        if name.endswith("weight"):
            exact = float(torch.linalg.eigvalsh(hessian[place, place])[-1])
            assert found[f"layers/block_sharpness/{name}"] == pytest.approx(exact, rel=0.02)
    assert max(by_group(found, "layers/block_sharpness").values()) < 0.75 * found["sharpness"]  # layers are coupled


@pytest.mark.parametrize("where", usual(["of_a_small_net"], thorough=["of_digits"]))
def test_traces_of_blocks_are_unbiased_and_have_the_errors_of_the_formula(where, request):
    hessian, (eigenvalues, vectors), places, deflated, plain = request.getfixturevalue(where)
    rest = hessian - vectors.T @ (eigenvalues[:, None] * vectors)
    for matrix, found in ((hessian, plain), (rest, deflated)):
        for name, place in places.items():
            error = found[f"trace_error/{name}"]
            assert abs(found[f"trace/{name}"] - float(hessian[place, place].diagonal().sum())) < 4.0 * error
            inside, row = matrix[place, place].square().sum(), matrix[place].square().sum()
            expected = math.sqrt(float(inside + row))  # 2 inside and 1 across
            assert error * math.sqrt(VECTORS) == pytest.approx(expected, rel=0.2)
    for name in places:
        if name.endswith("weight"):
            assert deflated[f"trace_error/{name}"] < 0.3 * plain[f"trace_error/{name}"]


# Groups


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.tokens.weight


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("tensors", {"tokens.weight": 20, "norm.weight": 4, "norm.bias": 4, "head.bias": 5}),
        ("modules", {"tokens": 20, "norm": 8, "head": 5}),
        ("types", {"Embedding": 20, "LayerNorm": 8, "Linear": 5}),
        ({"head": "head.*", "weights": ["*.weight"]}, {"head": 25, "weights": 4, "other": 4}),  # the first one wins
        ({"biases": "*.bias", "other": "norm.*"}, {"biases": 9, "other": 24}),
    ],
)
def test_a_parameter_is_in_one_group(groups, expected):
    grouping = Grouping.by(ParameterSpace.of(Tied()), checked_groups(groups))
    assert dict(zip(grouping.names, grouping.sizes, strict=True)) == expected


@pytest.mark.parametrize("measurement", [Layers, lambda groups: Trace(groups=groups)], ids=["Layers", "Trace"])
def test_patterns_without_a_match_are_refused_before_training_with_the_names_that_there_are(measurement):
    with pytest.raises(ValueError, match=r"groups: .*'\*\.attn\.\*', which matches none of them; .*0\.weight, 0\.bias"):
        metrics(net(), measurement({"attention": "*.attn.*"}))
    with pytest.raises(ValueError, match="groups: expected a parameter in each group, got none in 'b'"):
        metrics(net(), measurement({"a": "*", "b": "*.bias"}))
    monitor = SubspaceMonitor(k=2, measurements=[measurement({"attention": "*.attn.*"})])
    with pytest.raises(Exception, match="groups: expected patterns of parameter names") as caught:
        fit(Classifier(5, 6, 3), DataLoader(blobs(), batch_size=16), monitor, max_steps=1)
    assert type(caught.value).__name__ == "MisconfigurationException"


def test_exact_groups_without_a_match_are_refused():
    with pytest.raises(ValueError, match=r"exact: expected patterns of the groups 0\.weight, .*, got 'attention'"):
        metrics(net(), Layers(exact=["attention"]))


def tree(widths):
    return nn.ModuleDict({name: nn.Sequential(*[nn.Linear(1, 1) for _ in range(n)]) for name, n in widths.items()})


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 2), ("weight", "bias")),
        (tree({"a": 2, "b": 2}), ("a.0", "a.1", "b.0", "b.1")),
        (tree({"a": 24}), tuple(f"a.{i}-{i + 1}" for i in range(0, 24, 2))),
        (tree({"a": 3, "b": 29}), ("a.0-2", *(f"b.{i}-{i + 2}" for i in range(0, 27, 3)), "b.27-28")),
        (tree({f"m{i}": 1 for i in range(16)}), tuple(f"m{i}.0" for i in range(16))),
        (tree({f"m{i}": 1 + (i > 4) for i in range(20)}), (*(f"m{i}" for i in range(5, 20)), "other")),
    ],
)
def test_a_table_has_the_deepest_modules_that_are_few_enough(module, expected):
    found = Grouping.coarse(ParameterSpace.of(module), MOST_GROUPS)
    assert len(found.names) <= MOST_GROUPS
    assert sum(found.shares) == pytest.approx(1.0)
    assert found.names == expected


# The record, what is made of it, and ranks


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A monitor with its defaults after a fit, and where it wrote."""
    folder = tmp_path_factory.mktemp("layers")
    monitor = SubspaceMonitor(k=3, every_n_steps=2, max_overhead=None, dtype="float64")
    with without_error_bar():
        fit(Classifier(5, 6, 3), DataLoader(blobs(), batch_size=16), monitor, max_steps=6, logger=CSVLogger(folder))
    return monitor


def test_every_record_has_a_table_and_no_number(fitted):
    for record in fitted.history:
        assert not [key for key in record.metrics if key.startswith("layers")]
        table = record.tables["layers"]
        assert table.groups == ("net.0", "net.2")
        trusted = {"participation"} if record.subspace.trusted else set()
        stepped = {"update"} if record.step < 6 else set()  # the last one has no step behind it
        assert set(table.names) - {"block_sharpness"} == {"gradient", "null"} | trusted | stepped
        for row in set(table.names) - {"block_sharpness"}:
            assert float(table.rows[row].sum()) == pytest.approx(1.0, abs=1e-6)
        assert table.rows["null"].tolist() == pytest.approx([36 / 57, 21 / 57])
    assert any("participation" in record.tables["layers"].names for record in fitted.history)
    assert len({id(record.tables["layers"].groups) for record in fitted.history}) == 1  # held once


class Steps(Measurement):
    """The share of the update of one group, by hand."""

    def after_step(self, probe, gradient, update):
        return {"by_hand": float(update[:36].square().sum() / update.square().sum())}


def test_the_update_is_that_of_the_step_and_numbers_come_on_request():
    monitor = SubspaceMonitor(
        k=3, every_n_steps=2, max_overhead=None, dtype="float64", measurements=[Layers("modules"), Steps()]
    )
    fit(Classifier(5, 6, 3), DataLoader(blobs(), batch_size=16), monitor, max_steps=3)
    for record in monitor.history[:2]:
        assert record.metrics["layers/update/net.0"] == pytest.approx(record.metrics["by_hand"], rel=1e-6)
        assert record.metrics["layers/update/net.0"] + record.metrics["layers/update/net.2"] == pytest.approx(1.0)
        assert float(record.tables["layers"].rows["update"][0]) == pytest.approx(record.metrics["by_hand"], rel=1e-6)


def test_the_groups_of_a_user_take_the_place_of_modules_in_the_table():
    record = measure_subspace(
        net(), data(), k=2, dtype="float64", loss_fn=loss_fn, measurements=[Layers({"biases": "*.bias"})]
    )
    assert record.tables["layers"].groups == ("biases", "other")


def test_gradient_curvature_and_layers_share_a_product():
    products = []

    class Counting(Measurement):
        def measure(self, probe):
            own = probe.operator.matvec
            probe.operator.matvec = lambda v: products.append(1) or own(v)
            return {}

    metrics(net(), Counting(), Layers(), k=0)
    assert sum(products) == 0  # that of the default measurement came before
    found = metrics(net(), Layers(), k=0)  # no eigenpairs
    assert {key.split("/")[1] for key in found if key.startswith("layers")} == {"gradient", "gradient_curvature"}


def test_tables_come_back_from_a_checkpoint(fitted):
    again = decode(fitted.state_dict()).records
    for one, other in zip(fitted.history, again, strict=True):
        assert other.tables["layers"].plain() == one.tables["layers"].plain()


def test_sixteen_groups_add_little_to_an_entry_of_the_tab():
    grouping = Grouping.coarse(ParameterSpace.of(tree({"transformer": 15, "head": 1})), MOST_GROUPS)
    generator = torch.Generator().manual_seed(0)
    rows = {row: torch.rand(16, generator=generator) / 30 for row in ("participation", "gradient", "null", "update")}
    table = Table.of(grouping.names, {**rows, "block_sharpness": 20 * torch.rand(16, generator=generator)})
    record = Record(3, {}, tables={"layers": table})
    entry = tab_entry(record)
    assert entry["layers"].keys() == {"groups", *table.names}
    assert entry["layers"]["participation"] == pytest.approx(rows["participation"].tolist(), rel=5e-3)
    assert len(grouping.names) == 16
    assert len(to_json(entry)) - len(to_json(tab_entry(replace(record, tables={})))) <= 950


def test_a_table_of_other_groups_adds_no_rows_and_too_many_are_refused():
    table = Table.of(["a", "b"], {"gradient": [0.5, 0.5]})
    assert table.with_rows_of(Table.of(["a", "c"], {"update": [0.1, 0.9]})).names == ("gradient",)
    with pytest.raises(ValueError, match="groups: expected 1 to 16 names, got 17"):
        Table.of([str(i) for i in range(17)], {"gradient": [0.0] * 17})
    with pytest.raises(ValueError, match="values: expected float32 of shape"):
        Table.of(["a", "b"], {"gradient": [0.5]})


@pytest.mark.parametrize("count", [0, 1, 3, 900])
def test_the_figure_draws(fitted, count):
    records = History()
    for number in range(count):
        records.keep(replace(fitted.history[number % 4], step=number))
    layers_figure(records).canvas.draw()


def of_types(module, group=None):
    """What is measured of a net's only type of module, and of its tensors."""
    with without_error_bar():
        record = measure_subspace(
            module,
            data(),
            k=K,
            tol=1e-10,
            dtype="float64",
            loss_fn=loss_fn,
            max_matvecs=500,
            measurements=[Layers("types", exact=True), Trace(vectors=2, groups="tensors")],
            group=group,
        )
    kept = {key: value for key, value in record.metrics.items() if key.startswith(("layers/", "trace"))}
    return kept, record.tables["layers"].plain()


def of_ranks():
    """On shards, whose classes FSDP2 renames, and on a module that each rank has whole, as test_ranks.py does, too."""
    found = []
    for is_sharded in usual([True], thorough=[False]):
        module, _ = stepped(lambda m: SGD(m.parameters(), lr=0.5), 5)
        if is_sharded:
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        found.append(of_types(module, dist.group.WORLD))
    return found


def test_three_ranks_and_shards_measure_what_one_process_does():
    numbers, table = of_types(stepped(lambda m: SGD(m.parameters(), lr=0.5), 5)[0])
    assert {"layers/participation/Linear", "layers/block_sharpness_exact/Linear", "trace/0.bias"} <= numbers.keys()
    for world in run(of_ranks, 3):
        for found, drawn in world:
            assert found == pytest.approx(numbers, rel=1e-6)
            assert drawn == table
