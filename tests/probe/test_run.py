"""A sequence of probes without a trainer: what each hands to the next, what is kept, and what is let go."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.measurements import Measurement, UpdateFraction
from lightning_subspace.measurements.base import Needs
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.probe.verification import is_verified, unverified
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.subspace import fraction, overlap

K = 3


def cross_entropy(module, batch, batch_idx):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def nan_loss(module, batch, batch_idx):
    return cross_entropy(module, batch, batch_idx) * float("nan")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return sample_of_batches([(torch.randn(16, 5, generator=generator), torch.arange(16) % 3) for _ in range(2)])


def settings(*measurements, k=K, loss_fn=cross_entropy, **kwargs):
    return ProbeSettings(k=k, measurements=measurements, loss_fn=loss_fn, **kwargs)


def move(module, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def take(tracker, module, steps, seed=0):
    """Probe at each step, with a random move between them; the bases that were found."""
    bases = []
    for step in steps:
        opened = tracker.measure(module, data(), step)
        bases.append(opened.record.subspace.basis.clone())
        move(module, seed=seed + step)
        tracker.close(opened, module)
    return bases


def test_the_step_from_a_point_completes_its_record():
    module = network()
    tracker = ProbeRun(settings(), module)
    opened = tracker.measure(module, data(), step=7)
    assert tracker.history == []
    before, basis = flat(module.parameters()), opened.record.subspace.basis
    batch_gradient = torch.randn(tracker.space.n, generator=torch.Generator().manual_seed(3))
    for parameter, piece in zip(module.parameters(), tracker.space.unflatten(batch_gradient), strict=True):
        parameter.grad = piece.clone()
    opened.see_gradient(module)
    for parameter in module.parameters():
        parameter.grad.zero_()
    opened.see_gradient(module)  # a later step: the first counts
    move(module, seed=5)
    record = tracker.close(opened, module)
    assert tracker.history == [record]
    assert record.step == 7
    update = flat(module.parameters()) - before
    assert record.metrics["update_fraction"] == pytest.approx(fraction(basis, update), abs=1e-7)
    assert record.metrics["batch_gradient_fraction"] == pytest.approx(fraction(basis, batch_gradient), abs=1e-7)


def test_without_a_step_or_without_a_change_its_numbers_are_absent():
    module = network()
    tracker = ProbeRun(settings(), module)
    for after in (None, module):
        record = tracker.close(tracker.measure(module, data(), 0), after)
        assert not {"update_fraction", "batch_gradient_fraction"} & record.metrics.keys()


def test_the_update_is_taken_in_the_widest_type():
    module = network()
    module[0].half()  # the first parameter's type would round the change of the others away

    def loss(net, batch, batch_idx):
        hidden = torch.tanh(net[0](batch[0].to(net[0].weight.dtype)))
        return nn.functional.cross_entropy(net[2](hidden.to(net[2].weight.dtype)), batch[1])

    tracker = ProbeRun(settings(loss_fn=loss), module)
    opened = tracker.measure(module, data(), 0)
    before = flat([p.float() for p in module.parameters()])
    with torch.no_grad():
        module[2].weight.mul_(1.0 + 1e-5)
    record = tracker.close(opened, module)
    update = flat([p.float() for p in module.parameters()]) - before
    assert record.metrics["update_fraction"] == pytest.approx(fraction(opened.record.subspace.basis, update), abs=1e-6)


def test_overlaps_are_those_of_the_bases():
    module = network()
    tracker = ProbeRun(settings(reference_step=15), module)
    bases = take(tracker, module, [0, 10, 20, 30, 40])
    metrics = [record.metrics for record in tracker.history]
    assert "overlap_previous" not in metrics[0]
    for i in range(1, 5):
        assert metrics[i]["overlap_previous"] == pytest.approx(overlap(bases[i - 1], bases[i]), abs=1e-6)
    assert [i for i in range(5) if "overlap_reference" in metrics[i]] == [3, 4]  # the first at or after 15 is step 20
    for i in (3, 4):
        assert metrics[i]["overlap_reference"] == pytest.approx(overlap(bases[2], bases[i]), abs=1e-6)


def test_records_drop_the_eigenvectors_and_keep_the_sketch():
    module = network()
    tracker = ProbeRun(settings(), module)
    take(tracker, module, [0, 1])
    assert all(record.subspace.eigenvectors is None for record in tracker.history)
    assert all(record.sketch is not None for record in tracker.history)


def test_a_sketch_that_is_thinned_out_leaves_its_record_too():
    module = network()
    tracker = ProbeRun(settings(), module)
    tracker.overlaps = OverlapHistory(keep=3)
    history = tracker.history
    take(tracker, module, range(6))
    assert tracker.history is history  # a probe holds it
    assert [record.sketch is not None for record in history].count(True) == 3
    assert history[0].sketch is not None
    assert history[-1].sketch is not None
    assert [record.step for record in history] == list(range(6))


def test_a_changed_set_of_parameters_starts_the_overlaps_anew():
    module = network()
    tracker = ProbeRun(settings(reference_step=0), module)
    take(tracker, module, [0, 1])
    assert not tracker.refresh_parameters(module)
    module[0].requires_grad_(False)
    assert tracker.refresh_parameters(module)
    assert tracker.space.names == ("2.weight", "2.bias")
    take(tracker, module, [2, 3])
    before, after = tracker.history[2].metrics, tracker.history[3].metrics
    assert not {"overlap_previous", "overlap_reference"} & before.keys()
    assert {"overlap_previous", "overlap_reference"} <= after.keys()
    assert tracker.overlaps.matrix()[0] == [2, 3]
    module[2].requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        tracker.refresh_parameters(module)


@pytest.mark.parametrize(
    ("verify", "expected"), [("always", [0, 1, 2, 3, 4]), (3, [0, 3]), (1, [0, 1, 2, 3, 4]), ("never", [])]
)
def test_probes_exclude_missed_copies_as_verify_says(verify, expected):  # where there are none
    module = network()
    tracker = ProbeRun(settings(verify=verify), module)
    take(tracker, module, range(5))
    verified = [record.step for record in tracker.history if record.metrics["solver/verified"]]
    assert verified == expected
    told = [record.step for record in tracker.history if unverified(record.subspace, verify) is not None]
    assert told == sorted(set(range(5)) - set(expected))


@pytest.mark.parametrize("verify", [0, -1, 2.0, True, None, "sometimes"])
def test_verify_that_is_no_choice_is_refused(verify):
    with pytest.raises(ValueError, match=r"^verify: expected 'always', 'never', or an integer of at least 1, got"):
        settings(verify=verify)


def test_where_eigenvalues_are_equal_every_probe_excludes_missed_copies():
    # Softmax regression on orthonormal points: K equal eigenvalues at any step (Gur-Ari et al. 2018, section 3).
    module = nn.Linear(4, 4, bias=False).double()
    nn.init.zeros_(module.weight)
    points = (torch.eye(4, dtype=torch.float64), torch.arange(4))
    tracker = ProbeRun(settings(k=4, verify=100), module)
    for step in range(3):
        opened = tracker.measure(module, sample_of_batches([points]), step)
        loss = cross_entropy(module, points, 0)
        with torch.no_grad():
            module.weight.sub_(torch.autograd.grad(loss, module.weight)[0])
        record = tracker.close(opened)
        margin = float(opened.theta[0] - opened.theta[1])
        q = 1.0 / (math.exp(margin) + 3.0)
        expected = torch.full((4,), math.exp(margin) * q * q, dtype=torch.float64)
        torch.testing.assert_close(record.subspace.eigenvalues, expected, rtol=1e-6, atol=0.0)
        assert record.metrics["solver/verified"]
    assert not is_verified(1, "never", tracker.history)


def test_a_probe_that_fails_leaves_no_trace():
    module = network()
    tracker = ProbeRun(settings(loss_fn=nan_loss), module)
    before = flat(module.parameters())
    with pytest.raises(LossError, match="nan"):
        tracker.measure(module, data(), 0)
    assert torch.equal(flat(module.parameters()), before)
    assert tracker.num_probes == 0
    assert tracker.history == []
    assert tracker.overlaps.matrix()[0] == []


class Keeper(Measurement):
    """Breaks the rule: holds on to the operator."""

    needs = Needs.NOTHING

    def measure(self, probe):
        self.operator = weakref.ref(probe.operator)
        return {}

    def after_step(self, probe, gradient, update):
        return {"after": float(probe.operator.matvec(update).norm())}


def test_the_graphs_are_free_before_the_next_step():
    module, keeper = network(), Keeper()
    tracker = ProbeRun(settings(keeper), module)
    opened = tracker.measure(module, data(), 0)
    gc.collect()
    assert keeper.operator() is None
    with pytest.raises(AttributeError, match="`matvec` was asked for after the probe"):
        tracker.close(opened, module)
    with pytest.raises(RuntimeError, match="the probe is over"):
        opened.probe.solve(lambda v: v)


class Growing(Measurement):
    """Sees what its probe gives it."""

    def __init__(self):
        self.seen = []

    def measure(self, probe):
        self.seen.append((probe.step, probe.number, len(probe.history), probe.previous is None))
        return {"number": probe.number, "undefined": float("nan")}


def test_measurements_see_the_number_and_the_history():
    module, growing = network(), Growing()
    tracker = ProbeRun(settings(growing), module)
    take(tracker, module, [0, 5, 9])
    assert growing.seen == [(0, 0, 0, True), (5, 1, 1, False), (9, 2, 2, False)]
    assert [record.metrics["number"] for record in tracker.history] == [0.0, 1.0, 2.0]
    assert all("undefined" not in record.metrics for record in tracker.history)


class Third(Growing):
    """Taken at each third probe."""

    every = 3

    def after_step(self, probe, gradient, update):
        return {"after": probe.number}


def test_a_measurement_is_taken_at_every_so_many_probes():
    module, third = network(), Third()
    tracker = ProbeRun(settings(third), module)
    take(tracker, module, range(5))
    assert [number for _, number, _, _ in third.seen] == [0, 3]
    taken = [{"number", "after"} & record.metrics.keys() for record in tracker.history]
    assert taken == [{"number", "after"}, set(), set(), {"number", "after"}, set()]


def test_the_cheap_tier_has_no_subspace():
    module = network()
    tracker = ProbeRun(settings(UpdateFraction(), k=0), module)
    opened = tracker.measure(module, data(), 0)
    move(module, seed=1)
    record = tracker.close(opened, module)
    assert record.subspace is None
    assert record.sketch is None
    assert set(record.metrics) >= {"gradient_norm", "gradient_curvature", "gradient_hessian_cosine"}
    assert "update_fraction" not in record.metrics  # it needs a space
    assert tracker.overlaps.matrix()[0] == []


@pytest.mark.parametrize("k", [34, 58])
def test_more_pairs_than_parameters_are_refused(k):
    module = nn.Linear(10, 3)
    with pytest.raises(ValueError, match=r"k: expected 0\.\.33"):
        ProbeRun(settings(k=k), module)
