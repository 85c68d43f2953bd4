"""Checkpoints: a resumed run is the straight run, and what cannot go on says so."""

import copy
import io

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.sketch import Sketch
from tests.left_out import leave_error_bar_out
from tests.thorough import usual

# Of ModelCheckpoint, which a resumed run does not have here.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
# Of a space that has a gap, and not one that some twenty products certify; told once, as it should be.
NOT_CERTIFIED = "ignore:SubspaceMonitor. at step 3, .* may occur more often than it was found:UserWarning"
# Metrics that count products or seconds: those of a resumed run with a cold start are its own.
SOLVER = "solver/"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}


class Net(LightningModule):
    """A smooth classifier; `width=400` has 8,003 parameters, more than a sketch has cells."""

    def __init__(self, width=6, freeze=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 3))
        self.net[0].requires_grad_(not freeze)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


def loader():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(64) % 3
    inputs = torch.randn(64, 16, generator=generator) + 2.0 * torch.eye(3, 16)[labels]
    return DataLoader(TensorDataset(inputs, labels), batch_size=64)  # one step an epoch: every step can be resumed from


@pytest.fixture
def _without_error_bar(monkeypatch):
    leave_error_bar_out(monkeypatch)


def monitor(**arguments):
    settings = {"k": 2, "every_n_steps": 3, "max_overhead": None, "reference_step": 3, "batch_size": 16, "log": "all"}
    return SubspaceMonitor(**{**settings, "sample": 48, "gradient_sample": 64, "on_failure": "raise", **arguments})


def run(*callbacks, steps, width=6, ckpt_path=None, freeze=False, **settings):
    seed_everything(0, verbose=False)
    module = Net(width, freeze)
    trainer = Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **{**QUIET, **settings},
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def saver(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module", params=[6, 400], ids=["sketch is basis", "sketch estimates"])
def straight(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    one = monitor()
    trainer = run(one, saver(folder), steps=14, width=request.param)
    return one, trainer, folder, request.param


def numbers(record):
    # The running mean of training's losses begins anew in a resumed run.
    apart = (SOLVER, "training_loss")
    return {key: value for key, value in record.metrics.items() if not key.startswith(apart)}


# 6 and 9: a probe is open when the checkpoint is written; 7 and 8: between two; 1: only the start has been probed
AT = {6: usual([1, 8], thorough=[6, 7, 9]), 400: usual([6], thorough=[1, 7, 8, 9])}


@pytest.mark.filterwarnings(NOT_CERTIFIED)
def test_a_resumed_run_is_the_straight_run(straight):
    for at in AT[straight[-1]]:
        assert_goes_on(straight, at)


def assert_goes_on(straight, at):
    one, trainer, folder, width = straight
    other = monitor()
    resumed = run(other, steps=14, width=width, ckpt_path=folder / f"step={at}.ckpt")
    for a, b in zip(trainer.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [r.step for r in other.history] == [r.step for r in one.history] == [0, 3, 6, 9, 12, 14]
    error = 5.0 * Sketch(torch.eye(2, 4096), exact=False).error if width == 400 else 1e-5
    for expected, found in zip(one.history, other.history, strict=True):
        values = numbers(expected)
        if expected.step == at:  # the step before it was not taken in this run
            values.pop("step/cosine_previous")
        assert numbers(found).keys() == values.keys()
        for key, value in numbers(found).items():
            tolerance = error if "overlap" in key else 1e-3
            relative = 1e-2 if key == "eigenvalues/03" else 1e-3  # the one behind the k-th is not waited for
            assert value == pytest.approx(values[key], rel=relative, abs=tolerance), (expected.step, key)
        torch.testing.assert_close(found.subspace.eigenvalues, expected.subspace.eigenvalues, rtol=1e-3, atol=1e-4)
        assert (found.subspace.outcome, found.subspace.k) == (expected.subspace.outcome, 2)
        if expected.step < at:  # all that was closed is there, number for number
            assert dict(found.metrics) == dict(expected.metrics)
    assert other.overlap_matrix()[0] == one.overlap_matrix()[0]
    np.testing.assert_allclose(other.overlap_matrix()[1], one.overlap_matrix()[1], atol=5e-3)
    assert "overlap_reference" in other.history[-1].metrics
    assert "overlap_previous" in other.history[-1].metrics


def test_the_state_is_tensors_and_plain_values_without_the_basis(straight):
    _, _, folder, width = straight
    checkpoint = torch.load(folder / "step=12.ckpt", weights_only=True)
    [state] = [value for key, value in checkpoint["callbacks"].items() if "SubspaceMonitor" in key]
    cells = min(4096, sum(t.numel() for t in checkpoint["state_dict"].values()))
    assert state["history"]["steps"] == [0, 3, 6, 9, 12]
    assert {basis.shape for basis in state["overlaps"]["sketches"].values()} == {(2, cells)}
    assert (cells == 4096) == (width == 400)


@pytest.mark.filterwarnings("ignore:.*eigenvalue 10 is so close to the next one:UserWarning")
@pytest.mark.usefixtures("_without_error_bar")
def test_a_checkpoint_is_no_larger_than_stated():
    k, cells, probes = 10, 4096, 100
    one = monitor(k=k, every_n_steps=100)
    run(one, steps=1, width=400)
    generator = torch.Generator().manual_seed(0)
    overlaps, base = OverlapHistory(), one._runner.run.history[-1]
    one._runner.run.history[:] = [base.__class__(step, base.metrics, base.subspace) for step in range(probes)]
    for step in range(probes):
        basis = torch.linalg.qr(torch.randn(cells, k, generator=generator))[0].T.contiguous()
        overlaps.add(step, Sketch(basis, exact=False))
    one._runner.run.overlaps = overlaps
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    assert 64 * 4 * k * cells < buffer.tell() <= 256 * k * cells + 2_000 * probes + 20_000


class EveryThird(SubspaceMonitor):
    """A schedule of the user's own, which asks nothing of the monitor's."""

    def should_measure(self, step):
        return step % 3 == 0


@pytest.mark.usefixtures("_without_error_bar")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_schedule_of_the_users_is_resumed_at_a_probe_without_a_second_record(tmp_path):
    # Unverified, so that every probe has a trusted space: a gap of this net is not certified within twenty products.
    settings = {"k": 2, "sample": 48, "gradient_sample": 64, "batch_size": 16, "on_failure": "raise", "verify": "never"}
    one, other, last = (EveryThird(max_overhead=None, **settings) for _ in range(3))
    run(one, saver(tmp_path / "one"), steps=10)
    run(other, saver(tmp_path / "other"), steps=10, ckpt_path=tmp_path / "one" / "step=6.ckpt")
    run(last, steps=10, ckpt_path=tmp_path / "other" / "step=9.ckpt")
    for monitor_ in (one, other, last):
        assert [record.step for record in monitor_.history] == monitor_.overlap_matrix()[0] == [0, 3, 6, 9, 10]
        assert "update_fraction" in monitor_.history[2].metrics


def test_resuming_without_the_monitor_goes_on(straight):
    _, trainer, folder, width = straight
    with pytest.warns(UserWarning, match="need to be provided.*SubspaceMonitor"):
        resumed = run(steps=14, width=width, ckpt_path=folder / "step=7.ckpt")
    for a, b in zip(trainer.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


K = ({"k": 3}, "k=2, and this monitor has k=3")
END = ({"which": "LM"}, "which='LA', and this monitor has which='LM'")


@pytest.mark.usefixtures("_without_error_bar")
def test_another_k_or_end_of_the_spectrum_starts_anew_and_says_so(straight):
    _, _, folder, width = straight
    cases = {6: usual([K], thorough=[END]), 400: usual([END], thorough=[K])}
    for arguments, words in cases[width]:
        other = monitor(**arguments)
        with pytest.warns(UserWarning, match=f"state 'subspace' of the checkpoint is not used: .*{words}.*start anew"):
            run(other, steps=9, width=width, ckpt_path=folder / "step=7.ckpt")
        assert [r.step for r in other.history] == [7, 9]


@pytest.mark.usefixtures("_without_error_bar")
def test_another_trainable_set_restarts_the_overlaps_and_says_so(straight):
    _, _, folder, width = straight
    other = monitor(params=["net.2.*"])
    with pytest.warns(UserWarning, match="the set of measured parameters has changed by step 9; overlaps start anew"):
        run(other, steps=12, width=width, ckpt_path=folder / "step=8.ckpt")
    assert [r.step for r in other.history] == [0, 3, 6, 9, 12]
    assert other.overlap_matrix()[0] == [9, 12]
    assert "overlap_previous" not in other.history[3].metrics
    assert "overlap_previous" in other.history[4].metrics


@pytest.mark.usefixtures("_without_error_bar")
@pytest.mark.parametrize("width", usual([6], thorough=[400]))
def test_a_checkpoint_of_another_version_is_not_used(width):
    other = monitor()
    other.load_state_dict({"format": 0, "schedule": {"last_step": 0, "passed_over": [], "num_passed_over": 0}})
    with pytest.warns(UserWarning, match="written by another version of lightning_subspace"):
        run(other, steps=2, width=width)


def test_a_state_that_no_run_has_taken_up_is_kept_for_the_next_checkpoint(straight):
    one, _, _, _ = straight
    other = monitor()
    assert other.state_dict() == {}
    other.load_state_dict(one.state_dict())
    assert other.state_dict().keys() == one.state_dict().keys()


@pytest.mark.usefixtures("_without_error_bar")
@pytest.mark.filterwarnings(NOT_CERTIFIED)
def test_two_monitors_keep_two_states(tmp_path):
    def pair():
        return monitor(name="all"), monitor(name="head", k=1, params=["net.2.*"], every_n_steps=[2, 5])

    first, second = pair(), pair()
    run(*first, saver(tmp_path), steps=8)
    run(*second, steps=8, ckpt_path=tmp_path / "step=5.ckpt")
    keys = torch.load(tmp_path / "step=8.ckpt", weights_only=True)["callbacks"].keys()
    assert {"SubspaceMonitor{'name': 'all'}", "SubspaceMonitor{'name': 'head'}"} <= keys
    for a, b in zip(first, second, strict=True):
        assert [r.step for r in a.history] == [r.step for r in b.history]
        assert a.history[-1].metrics["sharpness"] == pytest.approx(b.history[-1].metrics["sharpness"], rel=1e-3)


def test_one_name_for_two_is_refused_when_the_trainer_is_made():
    with pytest.raises(RuntimeError, match="SubspaceMonitor"):
        Trainer(callbacks=[SubspaceMonitor(), SubspaceMonitor(k=3)], **QUIET)


def test_the_sketch_of_the_reference_is_never_given_up():
    history = OverlapHistory(3)
    one = Sketch(torch.eye(4)[:2], exact=True)
    for step in range(20):
        history.add(step, one)
        if step == 1:
            history.reference_step = 1
    assert list(history.sketches) == [0, 1, 19]
    back = copy.copy(history)
    np.testing.assert_array_equal(back.matrix()[1], history.matrix()[1])
    assert list(back.sketches) == [0, 1, 19]
    back.forget(19)
    assert (list(back.sketches), back.matrix()[0]) == ([0, 1], [0, 1])
    assert list(history.sketches) == [0, 1, 19]


@pytest.mark.filterwarnings("ignore:.*is affected by:UserWarning")
def test_the_batch_just_trained_on_is_gone_after_a_resume_but_its_numbers_stay(tmp_path):
    # Unverified, so that every probe has a trusted space: a gap of this batch is not certified within few products.
    one, other = (monitor(sample="current", verify="never") for _ in range(2))
    run(one, saver(tmp_path), steps=10)
    run(other, steps=10, ckpt_path=tmp_path / "step=6.ckpt")
    assert [r.step for r in other.history] == [r.step for r in one.history]
    there, lost = numbers(other.history[2]), ("update_fraction", "batch_gradient_fraction", "step/")
    assert there == {key: value for key, value in numbers(one.history[2]).items() if not key.startswith(lost)}
