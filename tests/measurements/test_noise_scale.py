"""The gradient noise scale against the gradients of single examples, closed forms, and estimates without each group."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, Needs, NoiseScale, SubspaceMonitor
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.gradient_tally import KEPT, GradientTally, square_norm
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import Reliability
from lightning_subspace.measurements.noise_estimate import Deviations, NoiseEstimate, participation
from lightning_subspace.measurements.noise_scale import _of_groups
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver
from tests.oracles import dense_hessian
from tests.processes import run
from tests.thorough import usual

from .probes import F64, data, loss_fn, net
from .test_measurements import fit, small

CPU = torch.device("cpu")
KEYS = ("noise/scale", "noise/scale_low", "noise/scale_high", "noise/variance", "noise/gradient_square")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def micro_batches(*sizes):
    inputs, labels = (torch.cat(parts) for parts in zip(*data(), strict=True))
    pieces = zip(inputs[: sum(sizes)].split(sizes), labels[: sum(sizes)].split(sizes), strict=True)
    return [
        MicroBatch(piece, float(size), i, size=size) for i, (piece, size) in enumerate(zip(pieces, sizes, strict=True))
    ]


def gradients(batches):
    """One row a micro-batch."""
    module, rows = net(), []
    for batch in batches:
        found = torch.autograd.grad(loss_fn(module, batch.data, 0), tuple(module.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in found]))
    return torch.stack(rows)


def measured(batches, *measurements, k=0, first=None, population=math.inf, ranks=None, number=0, function=loss_fn):
    """Metrics of one probe; the Hessian has the `first` micro-batches."""
    module, first = net(), len(batches) if first is None else first
    sample, space = Sample(tuple(batches[:first]), tuple(batches[first:]), population), ParameterSpace.of(module)
    with TrainingLoss(module, space, function, dtype=F64, ranks=ranks) as loss:
        partition = Partition.even(space, ranks)
        solver = Solver(k=k, tol=1e-10, max_matvecs=500)
        return take_probe(loss, sample, solver, measurements, partition=partition, number=number, verify=False)[
            1
        ].metrics


def plain(rows, sizes, population):
    """S, G^2 and B_simple by their definitions."""
    sizes = torch.tensor(sizes, dtype=F64)
    total = float(sizes.sum())
    mean = sizes @ rows / total
    variance = float((sizes * (rows - mean).square().sum(dim=1)).sum()) / (len(rows) - 1)
    square = float(mean @ mean) - variance * (1.0 / total - 1.0 / population)
    return variance, square, variance / square


def interval(rows, sizes, population, groups):
    """B_simple with the delete-one jackknife, each estimate made anew from the rows that are left."""
    left = []
    for group in sorted(set(groups)):
        kept = [i for i, one in enumerate(groups) if one != group]
        left.append(plain(rows[kept], [sizes[i] for i in kept], population))
    factor = math.sqrt(1.0 - sum(sizes) / population)
    logs = torch.tensor([math.log(variance) - factor * math.log(square) for variance, square, _ in left], dtype=F64)
    scale = plain(rows, sizes, population)[2]
    error = math.sqrt((len(left) - 1) * float(logs.var(correction=0)))
    return scale * math.exp(-2.0 * error), scale * math.exp(2.0 * error)


def numbers(metrics, part=""):
    scale, low, high, variance, square = (key + part for key in KEYS)
    if part:
        low, high = f"noise/scale{part}_low", f"noise/scale{part}_high"
    return [metrics[key] for key in (variance, square, scale, low, high)]


# What is estimated


@pytest.mark.parametrize("population", [math.inf, 100.0])
def test_the_numbers_are_those_of_the_definitions_for_unequal_micro_batches(population):
    sizes = (8, 12, 4, 8, 16, 8, 8)
    batches = micro_batches(*sizes)
    rows = gradients(batches)
    found = measured(batches, NoiseScale(), first=3, population=population)
    low, high = interval(rows, sizes, population, range(7))
    assert numbers(found) == pytest.approx([*plain(rows, sizes, population), low, high], rel=1e-9)
    deviations = (rows - torch.tensor(sizes, dtype=F64) @ rows / 64) * torch.tensor(sizes, dtype=F64).sqrt()[:, None]
    values = torch.linalg.eigvalsh(deviations @ deviations.T)
    assert found["noise/participation"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()), rel=1e-9)


def test_for_equal_micro_batches_they_are_those_of_two_batch_sizes():
    # McCandlish et al., arXiv 1812.06162, appendix A.1, with all micro-batches for the large size.
    batches = micro_batches(*[4] * 16)
    rows = gradients(batches)
    large, few = float(rows.mean(dim=0).square().sum()), float(rows.square().sum(dim=1).mean())
    square, variance = (64 * large - 4 * few) / (64 - 4), (few - large) / (1 / 4 - 1 / 64)
    found = measured(batches, NoiseScale())
    assert numbers(found)[:3] == pytest.approx([variance, square, variance / square], rel=1e-9)


def test_many_micro_batches_are_left_out_in_groups_and_weights_are_examples():
    batches = micro_batches(*[1] * 64)
    rows, groups = gradients(batches), [position // 2 for position in range(64)]
    heavy = [MicroBatch(b.data, 3.0 * b.weight, b.index, size=b.size) for b in batches]
    for chosen in (batches, heavy):
        found = measured(chosen, NoiseScale(), first=10)
        assert numbers(found) == pytest.approx(
            [*plain(rows, [1] * 64, math.inf), *interval(rows, [1] * 64, math.inf, groups)], rel=1e-9
        )


def estimate(rows, sizes, population):
    """What the measurement makes of some gradients."""
    tally = GradientTally(range(len(rows)), sizes, rows.shape[1], CPU)
    for place, row in enumerate(rows):
        tally.see(place, row)
    sizes = torch.tensor(sizes, dtype=F64)
    mean = sizes @ rows / sizes.sum()
    return NoiseEstimate.of(_of_groups(tally.gathered(Ranks()), sizes, float(mean @ mean))[0], population)


@pytest.mark.parametrize("sizes", [[3] * 8, [1, 2, 3, 4, 5, 9]], ids=["equal", "unequal"])
def test_draws_without_replacement_are_unbiased_and_without_the_share_they_are_not(sizes):
    examples = drawn(40, 6) * torch.linspace(0.2, 2.0, 6, dtype=F64) + 0.3
    mean, count = examples.mean(dim=0), sum(sizes)
    variance, square = float((examples - mean).square().sum()) / 39, float(mean @ mean)
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(1500):
        order = torch.randperm(40, generator=generator)[:count]
        rows = torch.stack([part.mean(dim=0) for part in examples[order].split(sizes)])
        one = estimate(rows, [float(size) for size in sizes], 40.0)
        found.append((one.variance, one.square, one.square - one.variance / 40.0))
    values = torch.tensor(found, dtype=F64)
    means, errors = values.mean(dim=0), values.std(dim=0) / len(values) ** 0.5
    expected = torch.tensor([variance, square, square - variance / 40.0], dtype=F64)
    assert bool(((means - expected).abs() < 4.0 * errors).all())
    assert variance / 40.0 > 8.0 * errors[1]  # so that the two would be told apart


def test_the_whole_set_has_its_own_gradient_and_equal_micro_batches_no_noise():
    batches = micro_batches(*[8] * 8)
    mean = gradients(batches).mean(dim=0)
    found = measured(batches, NoiseScale(), population=64.0)
    assert found["noise/gradient_square"] == pytest.approx(float(mean @ mean), rel=1e-12)
    same = [MicroBatch(batches[0].data, 8.0, i, size=8) for i in range(5)]
    found = measured(same, NoiseScale(), k=2)
    assert found["noise/variance"] == pytest.approx(0.0, abs=1e-12)
    assert found["noise/scale"] == pytest.approx(0.0, abs=1e-9)
    assert "noise/scale_high" not in found


def test_where_the_sample_is_too_small_it_says_more_than_its_own_size():
    rows = drawn(12, 50)  # noise alone
    rows -= rows.mean(dim=0) * 0.9
    found = estimate(rows, [4.0] * 12, math.inf)
    assert found.square < 0.0
    assert math.isnan(found.scale)
    assert math.isnan(found.high)
    assert found.low == 48.0
    rows = torch.tensor([[0.5], [-0.5], [0.5], [-0.5], [0.5], [3.0]], dtype=F64)
    found = estimate(rows, [4.0] * 6, math.inf)
    assert found.square > 0.0  # but not without the last
    assert math.isnan(found.scale)
    assert found.low == 24.0


@pytest.mark.parametrize("count", [1, 2])
def test_few_micro_batches_have_no_interval(count):
    found = measured(micro_batches(*[16] * count), NoiseScale(), k=2)
    keys = {"noise/variance", "noise/gradient_square"} if count == 2 else set()
    assert {key for key in found if key in KEYS} == keys


def test_repeated_draws_are_not_independent():
    batches = [MicroBatch(batch.data, 16.0, 0, size=16, draw=i) for i, batch in enumerate(micro_batches(*[16] * 4))]
    assert not any(key.startswith("noise/") for key in measured(batches, NoiseScale(), k=2))


def test_the_interval_of_a_long_vector_needs_few_of_its_coordinates():
    # Entries of very different sizes, as the tensors of a network have them, and noise along the gradient.
    count = 6 * KEPT + 77
    scales = torch.logspace(0, -3, count, dtype=F64)[torch.randperm(count, generator=torch.Generator().manual_seed(5))]
    mean = drawn(count, seed=1) * scales
    rows = mean * (1.0 + 0.5 * drawn(40, 1, seed=2)) + 4.0 * drawn(40, count, seed=3) * scales
    sizes = [2.0] * 40
    groups = [position * 32 // 40 for position in range(40)]
    found, expected = estimate(rows, sizes, math.inf), plain(rows, sizes, math.inf)
    assert [found.variance, found.square, found.scale] == pytest.approx(expected, rel=1e-9)
    low, high = interval(rows, sizes, math.inf, groups)
    assert math.log(found.high / found.low) == pytest.approx(math.log(high / low), rel=0.15)
    assert square_norm(rows[0].float()).item() == pytest.approx(float(rows[0] @ rows[0]), rel=1e-6)


def test_the_participation_ratio_counts_directions():
    assert participation(torch.eye(5)) == pytest.approx(5.0)
    assert math.isnan(participation(torch.zeros(2, 2)))


# Inside and outside of the top space


class Space(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        self.basis, self.eigenvalues = probe.top.basis.clone(), probe.top.eigenvalues.clone()
        return {}


@pytest.mark.parametrize("halves", [True, False])
def test_both_parts_have_the_numbers_of_the_projected_gradients(halves):
    sizes, space = (8, 12, 4, 8, 16, 8, 8), Space()
    batches = micro_batches(*sizes)
    rows = gradients(batches)
    more = [Reliability()] if halves else []
    found = measured(batches, *more, NoiseScale(), space, k=4, first=3, population=100.0)
    inside = rows @ space.basis.T @ space.basis
    for part, values in (("_top", inside), ("_bulk", rows - inside)):
        variance, square, _ = plain(values, sizes, 100.0)
        assert found[f"noise/variance{part}"] == pytest.approx(variance, rel=1e-9)
        assert found[f"noise/gradient_square{part}"] == pytest.approx(square, rel=1e-9)
    assert numbers(found, "_top")[2:] == pytest.approx(
        [plain(inside, sizes, 100.0)[2], *interval(inside, sizes, 100.0, range(7))], rel=1e-9
    )
    for key in ("noise/variance", "noise/gradient_square"):
        assert found[f"{key}_top"] + found[f"{key}_bulk"] == pytest.approx(found[key], rel=1e-9)
    assert not any("bulk" in key for key in measured(batches, NoiseScale(), k=4, number=1))
    assert any("bulk" in key for key in measured(batches, NoiseScale(split_every=1), k=4, number=1))


def test_with_all_eigenvectors_nothing_is_outside_and_the_trace_is_that_of_products():
    batches = micro_batches(*[8] * 8)
    rows = gradients(batches)
    found = measured(batches, NoiseScale(), k=57)
    assert numbers(found, "_top") == pytest.approx(numbers(found), rel=1e-9)
    assert found["noise/variance_bulk"] == 0.0
    assert found["noise/gradient_square_bulk"] == 0.0
    assert "noise/scale_bulk" not in found
    assert "noise/scale_bulk_low" not in found
    hessian, deviations = dense_hessian(net(), objective_of(batches)), rows - rows.mean(dim=0)
    expected = 8.0 / 7.0 * float((deviations @ hessian * deviations).sum())
    assert found["noise/hessian_top"] == pytest.approx(expected, rel=1e-8)


def objective_of(batches):
    def mean(module):
        return sum(batch.weight * loss_fn(module, batch.data, 0) for batch in batches) / sum(b.weight for b in batches)

    return mean


# What it costs


def test_it_takes_no_evaluation_beyond_those_of_the_probe():
    batches = micro_batches(*[8] * 4)

    def evaluations(*measurements, **options):
        calls = []

        def counted(module, batch, batch_idx):
            calls.append(batch_idx)
            return loss_fn(module, batch, batch_idx)

        metrics = measured(batches, *measurements, function=counted, **options)
        return len(calls), metrics

    for options in (
        {"k": 0, "first": 2},
        {"k": 1, "first": 2, "number": 1},  # without the split
        {"k": 1, "population": 32.0},  # the split from the graphs that are there
    ):
        alone, _ = evaluations(**options)
        count, metrics = evaluations(NoiseScale(), **options)
        assert "noise/scale" in metrics
        assert count == alone
    both = {"k": 1, "first": 2, "population": 100.0}  # the split in the pass of the error bar
    alone, _ = evaluations(Reliability(), **both)
    for measurements in ([Reliability(), NoiseScale()], [NoiseScale(), Reliability()]):
        count, metrics = evaluations(*measurements, **both)
        assert "gradient_fraction_low" in metrics
        assert "noise/variance_bulk" in metrics
        assert count == alone


# In a run, and on several ranks


def test_joined_micro_batches_are_taken_one_by_one_and_training_is_the_same():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 3
    dataset = TensorDataset(torch.randn(96, 5, generator=generator) + 2 * torch.eye(3, 5)[labels], labels)
    runs = []
    for options in ({"curvature": "none"}, {}):
        module = small()
        monitor = SubspaceMonitor(
            k=0, every_n_steps=[0, 3], max_overhead=None, sample="all", batch_size=4, on_failure="raise", **options
        )
        fit(module, DataLoader(dataset, batch_size=8), monitor, max_steps=6)
        runs.append((module, [[record.metrics[key] for key in KEYS] for record in monitor.history], monitor))
    assert runs[1][1] == [pytest.approx(values, rel=1e-4) for values in runs[0][1]]
    module = small()
    fit(module, DataLoader(dataset, batch_size=8), max_steps=6)
    for other, _, _ in runs:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def on_ranks():
    """Numbers of probes with and without eigenvectors, and what was sent for those without."""
    ranks, batches = Ranks(dist.group.WORLD), micro_batches(*[6, 10] * 3, 16)
    batches = [
        b
        if b.index % ranks.count == ranks.index or b.index == 0
        else MicroBatch(None, b.weight, b.index, size=b.size, is_local=False)
        for b in batches
    ]
    found = {}
    calls = []
    for measurements in ([], [NoiseScale()]):
        before = sum(ranks.calls.values())
        found = measured(batches, *measurements, ranks=ranks, first=4)
        calls.append(sum(ranks.calls.values()) - before)
    split = measured(batches, NoiseScale(), ranks=ranks, first=4, k=3)
    return found, split, calls[1] - calls[0]


@pytest.mark.parametrize("world_size", usual([3], thorough=[2]))
def test_any_number_of_ranks_has_the_same_numbers(world_size):
    batches = micro_batches(*[6, 10] * 3, 16)
    alone = measured(batches, NoiseScale(), first=4), measured(batches, NoiseScale(), first=4, k=3)
    found = run(on_ranks, world_size)
    for cheap, split, sums in found:
        assert sums == 2  # of the tally and of |g|^2
        for one, other in zip((cheap, split), alone, strict=True):
            mine = {key: value for key, value in one.items() if key.startswith("noise/")}
            theirs = {key: value for key, value in other.items() if key.startswith("noise/")}
            assert mine == pytest.approx(theirs, rel=1e-7)
            assert len(mine) > 5
    assert all(one[:2] == found[0][:2] for one in found)


def test_a_split_every_that_is_no_positive_integer_is_refused():
    with pytest.raises(ValueError, match="split_every: expected a positive integer"):
        NoiseScale(split_every=0)


def test_the_deviations_outside_are_the_differences():
    one = torch.ones(3, dtype=F64)
    outside = Deviations(one, one, 5 * one, 3 * one, 2 * one, 4.0) - Deviations(one, one, 2 * one, one, one, 1.0)
    assert [outside.squares[0], outside.along[0], outside.own[0], outside.square] == [3.0, 2.0, 1.0, 3.0]
