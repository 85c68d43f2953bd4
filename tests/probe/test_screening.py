"""Batches without a loss: what is measured is what the others give, to the bit, on one rank and on two."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_subspace import LossError, measure_subspace
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.loss_function import NoLossError, as_scalar
from lightning_subspace.measurements import Reliability
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from tests.left_out import leave_self_check_out, without_error_bar
from tests.processes import run
from tests.thorough import covering

COUNT = "solver/batches_without_loss"
SAYS = "micro-batches gave no loss"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_fn(module, batch, batch_idx):
    inputs, labels, has_target = batch
    if not has_target.any():
        return None
    return nn.functional.cross_entropy(module(inputs)[has_target], labels[has_target])


def batches(without, count=6, size=12):
    """Batches of different sizes; those of the given numbers have no target, the others one here and there."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(count):
        n = size + number
        target = torch.arange(n) % 2 == 0 if number not in without else torch.zeros(n, dtype=torch.bool)
        found.append((torch.randn(n, 4, generator=generator).double(), torch.arange(n) % 3, target))
    return found


def left(without):
    """The micro-batches of the others, with the seeds and weights that they have among all."""
    sample = sample_of_batches(batches(without))
    return [batch for batch in sample.hessian if batch.index not in without]


def same(one, other):
    """Equal to the bit, but for the count."""
    metrics = {key: value for key, value in one.metrics.items() if key != COUNT}
    assert metrics == other.metrics
    if one.subspace is not None:
        assert torch.equal(one.subspace.eigenvectors, other.subspace.eigenvectors)


@pytest.mark.filterwarnings("ignore:The empirical Fisher is taken over micro-batches")
@pytest.mark.parametrize(
    ("curvature", "k"), covering(["hessian", "ggn", "finite-difference", "empirical-fisher"], [0, 2])
)
def test_they_have_no_part_in_the_mean(curvature, k):
    without = {0, 3}
    options = {"k": k, "loss_fn": loss_fn, "curvature": curvature, "measurements": [Reliability()]}
    with pytest.warns(UserWarning, match=f"2 of 6 {SAYS}"):
        record = measure_subspace(network(), batches(without), **options)
    assert record.metrics[COUNT] == 2.0
    expected = measure_subspace(network(), left(without), **options)
    assert COUNT not in expected.metrics
    same(record, expected)


@pytest.mark.filterwarnings("ignore:The empirical Fisher is taken over micro-batches")
def test_the_first_examples_of_a_batch_may_have_none():
    late = [(x, y, torch.arange(len(x)) >= 10) for x, y, _ in batches(())]
    for curvature in ("hessian", "empirical-fisher"):
        record = measure_subspace(network(), late, k=2, loss_fn=loss_fn, curvature=curvature)
        assert COUNT not in record.metrics
        assert record.subspace.converged


def test_without_any_loss_the_error_says_so():
    with pytest.raises(LossError, match="got none for this batch or any other of the Hessian's 6"):
        measure_subspace(network(), batches(set(range(6))), k=2, loss_fn=loss_fn)


def test_what_lightning_refuses_is_no_batch_to_skip():
    with pytest.raises(NoLossError):
        as_scalar(None, "Net")
    for output in ({}, {"loss": None}):
        with pytest.raises(LossError, match="got none") as caught:
            as_scalar(output, "Net")
        assert type(caught.value) is LossError


def test_a_run_looks_for_them_at_each_probe():
    module, state = network(), {"without": ()}

    def by_state(net, batch, batch_idx):
        return None if batch_idx in state["without"] else nn.functional.cross_entropy(net(batch[0]), batch[1])

    def part(without):
        hessian, extra = (tuple(b for b in every if b.index not in without) for every in (given[:4], given[4:]))
        return Sample(hessian, extra, population=sum(batch.size for batch in (*hessian, *extra)))

    given = sample_of_batches(batches(())).hessian
    tracker = ProbeRun(ProbeSettings(k=2, tol=1e-6, loss_fn=by_state, measurements=[Reliability()]), module)
    tracker.check(module, part(()))
    for without in ((), (1, 5), (2,), (), (0, 1, 2)):
        state["without"] = without
        record = tracker.measure(module, part(()), 0).record
        assert record.metrics.get(COUNT, 0.0) == len(without)
        if without:
            assert tracker.examples.remarks["no loss"].startswith(f"{len(without)} of 6 {SAYS}")
        state["without"] = ()
        alone = ProbeRun(ProbeSettings(k=2, tol=1e-6, loss_fn=by_state, measurements=[Reliability()]), module)
        expected = alone.measure(module, part(without), 0).record
        for key in ("gradient_norm", "gradient_curvature", "gradient_fraction", "eigenvalues/02"):
            assert record.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-4)
        # what has a loss is the whole of the training set that has one
        assert "gradient_fraction_low" not in {**record.metrics, **expected.metrics} or part(without).hessian_share < 1


def test_whether_a_draw_has_a_loss_may_be_random():
    def sometimes(module, batch, batch_idx):
        return (
            None
            if torch.rand((), dtype=torch.float32) < 0.5
            else nn.functional.cross_entropy(module(batch[0]), batch[1])
        )

    given = batches(())
    with pytest.warns(UserWarning, match=f"of 6 {SAYS}"):
        record = measure_subspace(network(), given, k=2, loss_fn=sometimes)
    kept = []
    for batch in sample_of_batches(given).hessian:
        torch.manual_seed(batch.index)  # seed 0: that of the micro-batch is its index
        if not torch.rand((), dtype=torch.float32) < 0.5:
            kept.append(batch)
    assert len(kept) == 6 - record.metrics[COUNT]

    def always(module, batch, batch_idx):
        torch.rand((), dtype=torch.float32)  # one that draws is taken batch by batch, as `sometimes` is
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    same(record, measure_subspace(network(), kept, k=2, loss_fn=always))


@pytest.mark.filterwarnings("ignore:.*micro-batches gave no loss")
def test_one_rank_may_have_none_at_all():
    cases = ({1, 3, 5}, {0, 2, 4}, {0}, {5})

    def measured(group=None):
        options, found = {"k": 2, "loss_fn": loss_fn, "group": group}, []
        for without in cases:
            with without_error_bar(), pytest.MonkeyPatch.context() as patch:
                if without != cases[0]:  # it takes longer than what is measured
                    leave_self_check_out(patch)
                found.append(dict(measure_subspace(network(), batches(without), **options).metrics))
        return found

    expected = measured()
    for found in run(lambda: measured(torch.distributed.group.WORLD), 2):
        for without, metrics, alone in zip(cases, found, expected, strict=True):
            assert metrics[COUNT] == len(without)
            for key in ("sharpness", "gradient_norm", "gradient_fraction", "eigenvalues/01"):
                assert (key in metrics) == (key in alone)
                if key in alone:
                    assert metrics[key] == pytest.approx(alone[key], rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*micro-batches gave no loss")
def test_each_rank_may_give_a_current_batch_of_its_own():
    def measured():
        index = torch.distributed.get_rank()
        own = MicroBatch(batches({1})[index], 1.0, index, transferred=True)
        sample = Sample(tuple(own if i == index else replace(own, data=None, index=i, is_local=False) for i in (0, 1)))
        from lightning_subspace.parallel.ranks import Ranks

        ranks, module = Ranks(torch.distributed.group.WORLD), network()
        tracker = ProbeRun(ProbeSettings(k=2, loss_fn=loss_fn, sample="current"), module, ranks)
        tracker.check(module, sample)
        return dict(tracker.measure(module, sample, 0).record.metrics)

    first = measure_subspace(network(), [(batches({1})[0], 1.0)], k=2, loss_fn=loss_fn).metrics
    for metrics in run(measured, 2):
        assert metrics[COUNT] == 1.0
        assert metrics["eigenvalues/01"] == pytest.approx(first["eigenvalues/01"], rel=1e-6)
