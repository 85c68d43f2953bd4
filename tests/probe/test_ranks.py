"""Two and three ranks measure what one process measures, each with its share of the vectors and of the batches.

Without a Trainer: the processes share a group, a module and a sample. Everything that is measured in a sequence of
probes, with a step of the parameters between them, is compared with the same sequence in this process alone.
"""

import functools
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_subspace.curvature import Hessian
from lightning_subspace.data.assignment import group_by_round
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.sample import Sample
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import Reliability, default_measurements
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.measure import measure_subspace, take_probe
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace.sketch import CELLS
from lightning_subspace.subspace.solver import Solver
from lightning_subspace.subspace.subspace import inner_products
from tests.left_out import leave_self_check_out, without_error_bar
from tests.oracles import dense_gradient, dense_hessian, projected_share, top_eigenspace
from tests.processes import run
from tests.thorough import IS_THOROUGH, covering, usual

CLASSES = 3


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def examples(sizes, *shape, seed=1):
    """Batches of these sizes, whose inputs tell their classes."""
    generator, batches = drawn(seed), []
    for size in sizes:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        inputs = torch.randn(size, *shape, generator=generator)
        inputs += 2.0 * labels.view(-1, *[1] * len(shape))
        batches.append((inputs, labels))
    return batches


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def squared_error(module, batch, batch_idx):
    return F.mse_loss(module(batch[0])[:, 0], batch[1].to(batch[0].dtype))


def network(*widths):
    torch.manual_seed(0)
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES))
    )


class Transformer(nn.Module):
    """Attention and dropout, whose masks belong to the micro-batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        return self.head(self.layer(inputs).mean(dim=1))


def transformer():
    torch.manual_seed(0)
    return Transformer()


class Case:
    """A module, a sample and how it is measured.

    Args:
        make: gives the module.
        batches: for the Hessian.
        extra: more of them, for the gradient.
        k: number of eigenpairs.
        probes: their number.
        halves: whether to take `Reliability` too.
        settings: more settings.
    """

    def __init__(self, make, batches, *, extra=(), k=2, probes=1, halves=False, tol=1e-3, **settings):
        self.make, self.batches, self.extra, self.probes = make, batches, extra, probes
        measurements = [m for m in default_measurements(k) if halves or not isinstance(m, Reliability)]
        given = {"measurements": measurements, "loss_fn": cross_entropy, **settings}
        self.settings = ProbeSettings(k=k, tol=tol, defaults=False, **given)

    def sample(self, ranks):
        both = sample_of_batches([*self.batches, *self.extra], ranks=ranks).hessian
        return Sample(both[: len(self.batches)], both[len(self.batches) :])

    def measure(self, ranks):
        """What a sequence of probes gives, with a step of the parameters behind each."""
        module, sample = self.make(), self.sample(ranks)
        tracker = ProbeRun(self.settings, module, ranks)
        outcome = tracker.check(module, sample).outcome.name
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        bases = []
        for step in range(self.probes):
            opened = tracker.measure(module, sample, step, optimizer=optimizer)
            move(module, step)
            opened.see_gradient(module)
            tracker.close(opened, module)
            if opened.record.subspace is not None:
                bases.append(opened.record.subspace.gather().double())
        sketches = [record.sketch.basis for record in tracker.history if record.sketch is not None]
        return {
            "n": tracker.space.n,
            "check": outcome,
            "metrics": [dict(record.metrics) for record in tracker.history],
            "bases": bases,
            "sketches": sketches,
            "overlaps": tracker.overlaps.matrix()[1].tolist(),
        }


def move(module, seed):
    """A step of the parameters, and a gradient that it might have been made from."""
    generator = drawn(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.sub_(parameter.grad, alpha=0.02)


PLAIN = {"make": lambda: network(5, 7, CLASSES), "batches": examples([8] * 6, 5)}  # n = 66
UNEVEN = {"make": lambda: network(6, 8, CLASSES), "batches": examples([9, 4, 7, 1, 8], 6)}  # n = 83
LARGE = {"make": lambda: network(40, 100, CLASSES), "batches": examples([16] * 4, 40)}  # n = 4403
PAIR = {"make": lambda: nn.Linear(2, 1, bias=False), "batches": examples([5, 4], 2), "loss_fn": squared_error, "k": 1}
NORMS = {"make": convolutions, "batches": examples([8, 8, 6], 1, 8, 8)}
# Dropout makes the loss random: two draws for the Hessian, and four for the gradient.
DRAWS = {"sample": 256, "gradient_sample": 512}
ATTENTION = {"make": transformer, "batches": examples([6, 6, 5], 4, 8), **DRAWS}
MORE = examples([5, 3, 9], 6, seed=2)
CASES = {
    "float64": {
        "even": Case(**PLAIN, probes=2, reference_step=0, halves=True),
        "uneven": Case(**UNEVEN, probes=2, halves=IS_THOROUGH, extra=MORE),
        "one batch": Case(PLAIN["make"], PLAIN["batches"][:1]),
        "two batches and one": Case(UNEVEN["make"], UNEVEN["batches"][:2], extra=MORE[:1], halves=True),
        "fewer parameters than ranks": Case(**PAIR, probes=2),
        "sketched": Case(**LARGE, probes=2),
        "batch-norm": Case(**NORMS),
        "attention": Case(**ATTENTION, k=2 if IS_THOROUGH else 1, halves=IS_THOROUGH),
        "gauss-newton": Case(**UNEVEN, extra=MORE, curvature="ggn"),
        "differences": Case(**UNEVEN, halves=IS_THOROUGH, extra=MORE[:2], curvature="finite-difference"),
        "k = 0": Case(**UNEVEN, extra=MORE, k=0),
        "k = 0, differences": Case(**UNEVEN, k=0, curvature="finite-difference"),
    },
    # A product less changes fractions by up to the tolerance: it must not be seen where rounding is the question.
    "float32": {
        "even": Case(**PLAIN, probes=2, reference_step=0, halves=True, tol=1e-4),
        "uneven": Case(**UNEVEN, extra=MORE, tol=1e-4),
        "sketched": Case(**LARGE, probes=2, tol=1e-4),
        "batch-norm": Case(**NORMS, probes=2, tol=1e-4),
        "attention": Case(**ATTENTION, probes=2, tol=1e-4),
        "k = 0": Case(**UNEVEN, k=0),
    },
}
# Three ranks differ from two in what is dealt to them, and float32 from float64 in rounding: these cases are measured
# on three ranks (the first one on two, too), or in float32, too, and the others under `thorough` alone.
DEALT = ("uneven", "two batches and one", "fewer parameters than ranks", "k = 0")
ROUNDED = ("uneven", "sketched")
# The self-check takes as long as a probe, and its outcome is compared for one of each operator that it tells apart.
CHECKED = list(CASES["float64"]) if IS_THOROUGH else ("even", "batch-norm", "k = 0, differences")
for case in CASES["float64"].values():
    case.settings = replace(case.settings, dtype="float64")


def on(count, dtype):
    """Names of the cases that are measured on a number of ranks."""
    if IS_THOROUGH or (count < 2 and dtype == "float64"):
        return list(CASES[dtype])
    if count < 3 and dtype == "float64":
        return [name for name in CASES[dtype] if name not in DEALT[1:]]
    if count < 3:
        return list(ROUNDED)
    return list(DEALT) if dtype == "float64" else []


def world():
    return Ranks(dist.group.WORLD)


@functools.cache
def measured(dtype, count):
    """What every rank of a world gives in all cases."""

    def in_a_process():
        ranks = world() if count > 1 else Ranks()
        found = {}
        for name in on(count, dtype):
            with pytest.MonkeyPatch.context() as patch:
                if name not in CHECKED:
                    leave_self_check_out(patch)
                found[name] = outcome(CASES[dtype][name].measure, ranks)
        return found

    return run(in_a_process, count, timeout=120) if count > 1 else [in_a_process()]


def outcome(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return error


def in_all_cases(test):
    given = [(dtype, name, count) for count in (2, 3) for dtype in CASES for name in on(count, dtype)]
    ids = [f"{dtype}, {name}, {count} ranks" for dtype, name, count in given]
    return pytest.mark.parametrize(("dtype", "name", "count"), given, ids=ids)(test)


# -- as in one process ------------------------------------------------------------------------------------------------


def cosines(basis, other):
    """Mean square cosine of the angles between two spaces."""
    return float((basis @ other.T).square().sum()) / len(basis)


@in_all_cases
def test_ranks_measure_what_one_process_measures(dtype, name, count):
    (alone,) = measured(dtype, 1)
    found = measured(dtype, count)[0]
    found, alone = found[name], alone[name]
    for result in (alone, found):
        if isinstance(result, Exception):
            raise result
    assert found["check"] == alone["check"]
    is_exact = dtype == "float64" and "differences" not in name
    # Differences of gradients blow rounding up, by the inverse of their step.
    share = 1e-10 if is_exact else 1e-8 if dtype == "float64" else 1e-4
    for one, other in zip(found["metrics"], alone["metrics"], strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if key.startswith(("eigenvalues", "sharpness", "gradient_norm", "gradient_curvature")):
                scale = abs(other.get("eigenvalues/01", value))
                allowed = min(share, 1e-5) * max(scale, abs(value))
            elif key.startswith("noise/"):  # in examples or squared gradients, and differences of nearly equal ones
                allowed = 10 * share * max(1.0, abs(value))
            elif key == "solver/matvecs":
                allowed = 0 if dtype == "float64" else 2
            else:
                allowed = share
            assert abs(one[key] - value) <= allowed, key
    for one, other in zip(found["bases"], alone["bases"], strict=True):
        assert one.shape == other.shape
        assert cosines(one, other) >= 1 - share
    assert len(found["sketches"]) == len(alone["sketches"])
    for one, other in zip(found["sketches"], alone["sketches"], strict=True):
        assert one.shape == other.shape == (len(other), min(found["n"], CELLS))
        assert cosines(one.double(), other.double()) >= 1 - max(share, 1e-6)
    torch.testing.assert_close(
        torch.tensor(found["overlaps"]), torch.tensor(alone["overlaps"]), rtol=0, atol=share + 1e-6
    )


@in_all_cases
def test_all_ranks_have_the_same_to_the_bit(dtype, name, count):
    first, *others = (results[name] for results in measured(dtype, count))
    for other in others:
        for key in ("n", "check", "metrics", "overlaps"):
            assert other[key] == first[key]
        for key in ("bases", "sketches"):
            assert all(map(torch.equal, other[key], first[key]))


def test_the_cases_are_what_their_names_say():
    """And everything that a record can have is compared."""
    (alone,) = measured("float64", 1)
    of = {name: result["n"] for name, result in alone.items()}
    assert of["even"] % 6 == 0
    assert of["uneven"] % 2
    assert of["uneven"] % 3
    assert of["fewer parameters than ranks"] < 3
    assert of["batch-norm"] < CELLS < of["sketched"]
    everything = {key for record in alone["even"]["metrics"] for key in record}
    assert everything >= {
        *(f"eigenvalues/{i:02d}" for i in (1, 2, 3)),
        *("sharpness", "sharpness_over_threshold", "gap_index"),
        *("gradient_fraction", "gradient_norm", "gradient_curvature", "gradient_hessian_cosine"),
        *("reliability", "gradient_fraction_low", "gradient_fraction_high"),
        *("overlap_previous", "overlap_reference", "update_fraction", "batch_gradient_fraction"),
        *(f"solver/{key}" for key in ("subspace_error", "residual", "matvecs", "converged", "verified")),
    }
    for name, result in alone.items():
        has = [set(record) for record in result["metrics"]]
        assert all("gradient_norm" in keys for keys in has)
        if not name.startswith("k = 0"):
            assert all({"gradient_fraction", "update_fraction", "batch_gradient_fraction"} <= keys for keys in has)


# -- against a dense Hessian ------------------------------------------------------------------------------------------


def whole_loss(batches, loss_fn):
    """The mean over all examples, from a float64 module to a scalar."""
    total = sum(len(labels) for _, labels in batches)

    def objective(module):
        return sum(len(y) / total * loss_fn(module, (x.double(), y), 0) for x, y in batches)

    return objective


def upside_down(module, batch, batch_idx):
    return -squared_error(module, batch, batch_idx) - sum(p.square().sum() for p in module.parameters())


@pytest.mark.parametrize("count", usual([2], thorough=[3]))
def test_ranks_agree_with_a_dense_hessian(count):
    """Eigenvalues that are all negative, and all of them: a coordinate that does not exist would show as a zero."""
    linear, steep = nn.Linear(6, 1).double(), examples([7, 3, 4], 6)
    net, batches = UNEVEN["make"]().double(), UNEVEN["batches"]

    def in_a_process():
        given = {"group": dist.group.WORLD, "dtype": "float64", "tol": 1e-9}
        with without_error_bar(), pytest.MonkeyPatch.context() as patch:
            leave_self_check_out(patch)
            records = [
                measure_subspace(linear, steep, k=3, loss_fn=upside_down, **given),
                measure_subspace(linear, steep, k=7, loss_fn=upside_down, **given),
                measure_subspace(net, batches, k=4, loss_fn=cross_entropy, max_matvecs=300, **given),
            ]
        return [(record.metrics, record.subspace.gather()) for record in records]

    concave = top_eigenspace(dense_hessian(linear, whole_loss(steep, upside_down)), 7)[0]
    assert concave.max() < -1
    (few, _), (every, _), (metrics, basis) = run(in_a_process, count)[0]
    for values, k in ((few, 3), (every, 7)):
        found = torch.tensor([values[f"eigenvalues/{i + 1:02d}"] for i in range(k)], dtype=torch.float64)
        torch.testing.assert_close(found, concave[:k], rtol=0, atol=1e-9 * float(concave.abs().max()))
    objective = whole_loss(batches, cross_entropy)
    eigenvalues, eigenvectors = top_eigenspace(dense_hessian(net, objective), 4)
    found = torch.tensor([metrics[f"eigenvalues/{i + 1:02d}"] for i in range(4)], dtype=torch.float64)
    torch.testing.assert_close(found, eigenvalues, rtol=0, atol=1e-9 * float(eigenvalues[0]))
    assert cosines(basis, eigenvectors) == pytest.approx(1, abs=1e-9)
    gradient = dense_gradient(net, objective)
    assert metrics["gradient_fraction"] == pytest.approx(projected_share(eigenvectors, gradient), abs=1e-9)
    assert metrics["gradient_norm"] == pytest.approx(float(gradient.norm()), abs=1e-12)


# -- what it costs ----------------------------------------------------------------------------------------------------


# What torch calls them inside.
NAMES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Wire(TorchDispatchMode):
    """Sees what reaches the backends of torch.distributed: how often, and the bytes of the whole vector."""

    def __init__(self):
        super().__init__()
        self.calls, self.nbytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list) else [arg]) if hasattr(t, "nbytes")]
            name = NAMES.get(func._opname, func._opname)
            self.calls[name] += 1
            self.nbytes[name] += max(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def counted(ranks, function):
    """The collectives that a function makes and their bytes, by the count of `Ranks`; on the wire there are as many."""
    before = ranks.calls.copy(), ranks.nbytes.copy()
    with Wire() as wire:
        function()
    found = ranks.calls - before[0], ranks.nbytes - before[1]
    for own, seen in zip(found, (wire.calls, wire.nbytes), strict=True):
        assert own + Counter(all_reduce=own["check"]) == seen + Counter(check=own["check"])
    return found


@pytest.mark.parametrize("count", usual([3], thorough=[2]))
def test_a_product_is_one_all_gather_and_one_reduce_scatter(count):
    """Of n floats, padded to a multiple of W, whatever the number of batches; a block of inner products is one sum."""
    module = UNEVEN["make"]()
    space = ParameterSpace.of(module)
    padded = -(-space.n // count) * count

    def in_a_process():
        ranks = world()
        partition = Partition.even(space, ranks)
        assert partition.local_n <= padded // count
        for sizes in ([5], [5, 6], [3, 4, 5, 6, 7, 8, 9]):
            for dtype, width in ((torch.float32, 4), (torch.float64, 8)):
                for memory in (None, 0.0):  # with graphs kept, and without
                    sample = sample_of_batches(examples(sizes, 6), ranks=ranks)
                    with TrainingLoss(module, space, cross_entropy, dtype=dtype) as loss:
                        hessian = Hessian(loss, sample.hessian, memory=memory, partition=partition)
                        vector = partition.random(0, 0, dtype)
                        calls, nbytes = counted(ranks, lambda: hessian.matvec(vector))  # noqa: B023
                    assert calls == {"all_gather": 1, "reduce_scatter": 1}
                    assert nbytes == {"all_gather": width * padded, "reduce_scatter": width * padded}
        rows, others = torch.randn(9, partition.local_n), torch.randn(4, partition.local_n)
        calls, nbytes = counted(ranks, lambda: inner_products(rows, others, ranks))
        assert calls == {"all_reduce": 1}
        assert nbytes == {"all_reduce": 9 * 4 * 8}

    run(in_a_process, count)


def test_a_solve_moves_two_vectors_a_product_and_a_few_numbers():
    module = UNEVEN["make"]()
    space = ParameterSpace.of(module)

    def in_a_process():
        ranks = world()
        partition = Partition.even(space, ranks)
        sample = sample_of_batches(UNEVEN["batches"], ranks=ranks)
        found = []
        with TrainingLoss(module, space, cross_entropy) as loss, ranks.agree():
            hessian = Hessian(loss, sample.hessian, partition=partition)
            calls, nbytes = counted(ranks, lambda: found.append(Solver(3).solve(hessian)))
        matvecs, vector = found[0].num_matvecs, 4 * (space.n + space.n % 2)
        assert calls["all_gather"] == calls["reduce_scatter"] == matvecs
        assert nbytes["all_gather"] == nbytes["reduce_scatter"] == matvecs * vector
        # Two to four passes of orthogonalisation, each one sum over all vectors of the basis.
        assert 2 * matvecs <= calls["all_reduce"] <= 4 * matvecs + 20
        assert nbytes["all_reduce"] <= calls["all_reduce"] * 8 * (2 * 3 + 10 + 2) ** 2
        assert set(calls) == {"all_gather", "reduce_scatter", "all_reduce", "check"}
        assert calls["check"] <= 5  # none in the inner loop

    run(in_a_process, 2)


def test_a_measurement_that_solves_for_an_operator_compares_no_notes_in_its_products():
    """As for the halves of the sample; a function v -> A v may fail anywhere, and is a block of its own."""
    module = UNEVEN["make"]()

    def in_a_process():
        ranks = world()
        sample = sample_of_batches(UNEVEN["batches"], ranks=ranks)
        space = ParameterSpace.of(module)
        with TrainingLoss(module, space, cross_entropy) as loss, ranks.agree():
            probe, _ = take_probe(loss, sample, Solver(3), [], partition=Partition.even(space, ranks))
            half = probe.operator.part(range(0, 5, 2))
            for other, notes in ((half, 0), (half.matvec, 3)):  # at the all-gather, the reduce-scatter and the end
                found = []
                calls, _ = counted(ranks, lambda: found.append(probe.solve(other)))  # noqa: B023
                matvecs = found[0].num_matvecs
                assert matvecs > 3
                assert calls["all_gather"] == calls["reduce_scatter"] == matvecs
                assert calls["check"] - notes * matvecs <= 5

    run(in_a_process, 2)


@pytest.mark.parametrize("count", usual([3], thorough=[2]))
def test_a_rank_holds_its_share_of_the_basis(count):
    """At most (ncv + 1) ceil(n / W) floats while it solves; k ceil(n / W) for each space that is kept, and no more."""
    case = Case(**LARGE, k=3, probes=2)
    n = ParameterSpace.of(case.make()).n
    share = -(-n // count)
    made = []

    def spied(self, *args, original=Lanczos.__init__, **kwargs):
        original(self, *args, **kwargs)
        made.append(self.basis.whole(args[2] + 1))

    def in_a_process():
        ranks, module = world(), case.make()
        sample = case.sample(ranks)
        tracker = ProbeRun(replace(case.settings, reference_step=1), module, ranks)
        with mock.patch.object(Lanczos, "__init__", spied):
            for step in range(2):
                tracker.close(tracker.measure(module, sample, step), module)
                move(module, step)
        kept = [tracker._previous, tracker._reference]
        return [[(len(t), t.shape[1], t.untyped_storage().nbytes()) for t in tensors] for tensors in (made, kept)]

    shares = []
    for during, between in run(in_a_process, count):
        assert len(during) == 2
        for rows, columns, nbytes in during:
            assert rows <= 2 * 3 + 10 + 1
            assert columns <= share
            assert nbytes <= 4 * rows * share
        for rows, columns, nbytes in between:
            assert rows == 3
            assert columns <= share
            assert nbytes <= 4 * 3 * share
        shares.append(between[0][1])
    assert sum(shares) == n


# -- losses with collectives of their own -----------------------------------------------------------------------------


def with_a_collective(module, batch, batch_idx):
    """Sums something over ranks at each evaluation: those that are evaluated less often would be left behind."""
    loss = cross_entropy(module, batch, batch_idx)
    if dist.is_initialized():
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert math.isfinite(mean)
    return loss


OF_CHANGE = ("step/curvature", "step/edge_ratio", "step/edge_ratio_pooled", "step/uphill")


def of_gathered_losses(module, batch, batch_idx):
    """The mean over ranks by a collective with a gradient, so that there is one in each backward pass as well."""
    from torch.distributed.nn.functional import all_gather

    loss = cross_entropy(module, batch, batch_idx)
    return torch.stack(all_gather(loss)).mean() if dist.is_initialized() else loss


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated:FutureWarning")
@pytest.mark.parametrize(("loss_fn", "count"), covering([with_a_collective, of_gathered_losses], [2, 3]))
def test_a_loss_may_have_collectives_of_its_own(loss_fn, count):
    """With unequal numbers of batches a rank, for the Hessian and its halves and for the gradient."""
    case = Case(**UNEVEN, extra=MORE, k=2, halves=True, dtype="float64")
    assert len(group_by_round(case.sample(Ranks()).hessian, Ranks())) % count
    alone = case.measure(Ranks())
    case.settings = replace(case.settings, loss_fn=loss_fn)
    found = run(lambda: case.measure(world()), count)
    for result in found:
        assert result["metrics"] == found[0]["metrics"]
        for key, value in alone["metrics"][0].items():
            if key in ("sample_loss", "step/change", *OF_CHANGE) and loss_fn is of_gathered_losses:
                continue  # the value of a batch is the mean with whatever other ranks evaluate; its gradient is not
            assert result["metrics"][0][key] == pytest.approx(value, rel=1e-9, abs=1e-10), key
