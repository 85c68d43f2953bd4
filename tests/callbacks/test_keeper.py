"""What measurements remember: one run's, in checkpoints and back, and no other run's."""

import copy
import functools
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Control, CriticalSharpness, Density, Measurement, SubspaceMonitor, measure_subspace
from lightning_subspace._lightning import MisconfigurationException
from lightning_subspace.measurements import Chi
from lightning_subspace.measurements.base import Needs
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.thorough import covering, usual

# Of lightning: the saver is not in the run that is resumed.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(48, 6, generator=GENERATOR)
BATCH = (INPUTS, INPUTS[:, :3].argmax(dim=1))
KEY = "SubspaceMonitor{'name': 'subspace'}"


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """Nor an error bar, which keeps nothing."""
    leave_self_check_out(monkeypatch)
    leave_error_bar_out(monkeypatch)


class Net(LightningModule):
    def __init__(self, width=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Save(Callback):
    """Write a checkpoint after each step."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


class Counting(Measurement):
    """Keeps what a user's measurement might: numbers and a tensor."""

    needs = Needs.NOTHING

    def __init__(self):
        self.seen, self.total = [], torch.zeros(2)

    def measure(self, probe):
        if not self.seen or self.seen[-1] != probe.step:
            self.seen.append(probe.step)
            self.total += torch.tensor([1.0, probe.step])
        return {"seen": len(self.seen), "total": float(self.total[1])}

    def state_dict(self):
        return {"seen": self.seen, "total": self.total}

    def load_state_dict(self, state):
        self.seen, self.total = list(state.get("seen", [])), state.get("total", torch.zeros(2))


def loader():
    return DataLoader(TensorDataset(*BATCH), batch_size=48)  # one step an epoch


def monitor(*measurements, **settings):
    common = {"k": 2, "every_n_steps": 2, "max_overhead": None, "sample": [BATCH], "on_failure": "raise"}
    return SubspaceMonitor(**{**common, "measurements": measurements, **settings})


def trainer(*callbacks, steps=4):
    return Trainer(max_steps=steps, enable_checkpointing=False, callbacks=list(callbacks), **QUIET)


def go_on(same, module, steps=4):
    same.fit_loop.epoch_loop.max_steps += steps
    same.fit(module, loader())


def rows(one, *starts):
    """The numbers of some keys by step, without nan."""
    return {
        record.step: {key: value for key, value in record.metrics.items() if key.startswith(starts)}
        for record in one.history
    }


ALL = (Control, Density, CriticalSharpness, Counting)
STARTS = ("overlap_next", "overlap_top", "trace", "negative", "lowest", "critical", "seen", "total")


def each():
    return Control(reference_step=2), Density(steps=6, keep=3), CriticalSharpness(), Counting()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One run of each type: its measurements, its monitor and its checkpoints."""

    @functools.cache
    def run(dtype):
        own, folder = each(), tmp_path_factory.mktemp(dtype)
        one = monitor(*own, dtype=dtype)
        trainer(one, Save(folder), steps=8).fit(Net(), loader())
        return own, one, folder

    return run


# A record is open at 2, whose space is the reference, and at 4.
@pytest.mark.parametrize(("at", "dtype"), covering(usual([2, 4], thorough=[1, 5]), ["float32", "float64"]))
def test_a_resumed_run_remembers_to_the_bit(straight, at, dtype):
    own, one, folder = straight(dtype)
    other = each()
    two = monitor(*other, dtype=dtype)
    trainer(two, steps=8).fit(Net(), loader(), ckpt_path=folder / f"{at}.ckpt")
    expected, found = rows(one, *STARTS), rows(two, *STARTS)
    assert {"overlap_next_reference", "overlap_next_error", "trace", "critical_step", "seen"} <= expected[8].keys()
    if dtype == "float32":
        assert found == expected
    else:  # eigenvectors start from sketches in float32: another path of the solver, to the same answer
        assert found.keys() == expected.keys()
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-3, abs=1e-5), step
    assert [density.step for density in other[1].history] == [density.step for density in own[1].history]
    for a, b in zip(own[1].history, other[1].history, strict=True):
        assert len(a.spectrum.chains) == len(b.spectrum.chains) == 2
        if dtype == "float32" or a.step <= at:
            assert torch.equal(a.spectrum.nodes, b.spectrum.nodes)
            assert a.spectrum.below(0.1) == b.spectrum.below(0.1)
            assert a.metrics() == b.metrics()
    assert other[3].seen == [0, 2, 4, 6, 8]


def test_spaces_of_many_parameters_go_on_as_sketches(tmp_path):
    one, two = monitor(Control(reference_step=2)), monitor(Control(reference_step=2))
    trainer(one, Save(tmp_path), steps=8).fit(Net(width=420), loader())
    saved = torch.load(tmp_path / "5.ckpt", weights_only=True)["callbacks"][KEY]["measurements"]["Control"]
    assert {name: saved[name]["next"].shape for name in saved} == dict.fromkeys(("previous", "reference"), (2, 4096))
    trainer(two, steps=8).fit(Net(width=420), loader(), ckpt_path=tmp_path / "5.ckpt")
    expected, found = rows(one, "overlap_"), rows(two, "overlap_")
    for step in (6, 8):
        assert found[step].keys() == expected[step].keys() >= {"overlap_next_previous", "overlap_next_reference"}
        # A sketch of 4,096 numbers has a standard deviation of at most .0085 for k = 2.
        assert found[step] == pytest.approx(expected[step], abs=0.035)


def test_a_new_run_remembers_nothing_of_the_last_one():
    used, fresh = each(), each()
    one, two = monitor(*used), monitor(*fresh)
    trainer(one, steps=2).fit(Net(seed=1), loader())
    trainer(one).fit(Net(), loader())
    trainer(two).fit(Net(), loader())
    assert rows(one, *STARTS) == rows(two, *STARTS)
    assert used[3].seen == [0, 2, 4]


def test_a_space_of_the_last_run_does_not_survive_a_first_probe_that_is_not_trusted(monkeypatch):
    """`measure` is not called there, so that it could clear nothing."""
    control = Control()
    one = monitor(control)
    trainer(one).fit(Net(seed=1), loader())
    assert control._previous is not None
    monkeypatch.setattr(Control, "is_due", lambda self, number: number > 0)
    trainer(one, steps=2).fit(Net(), loader())
    assert "overlap_next_previous" not in one.history[-1].metrics


# Two monitors, and one after another


@pytest.mark.parametrize("make", [Control, Chi, Counting])
def test_one_measurement_in_two_monitors_of_a_trainer_is_refused(make):
    shared = make()
    both = trainer(monitor(shared, name="a"), monitor(shared, name="b", which="SA"))
    name = make.__name__
    words = f"measurements: expected objects of their own .*, got one {name} for 'a' and 'b'; .* make a {name} for each"
    with pytest.raises(MisconfigurationException, match=words):
        both.fit(Net(), loader())
    with pytest.raises(MisconfigurationException, match=f"measurements: .* once, got .*{name}.* is there twice"):
        trainer(monitor(shared, shared)).fit(Net(), loader())


@pytest.mark.parametrize("make", usual([Control], thorough=[Counting]))
def test_a_run_does_not_go_on_with_a_measurement_that_another_has_used(make):
    shared = make()
    one, two, first = monitor(shared), monitor(shared), Net()
    same = trainer(one)
    same.fit(first, loader())
    go_on(same, first)
    trainer(two).fit(Net(seed=1), loader())  # a new run: what is remembered begins anew
    assert rows(two, "overlap_next")[0] == {}
    with pytest.raises(MisconfigurationException, match=f"expected a {make.__name__} of its own for each monitor"):
        go_on(same, first)


def test_a_measurement_that_keeps_nothing_may_be_used_elsewhere_in_between():
    chi = Chi()
    one, module = monitor(chi), Net()
    same = trainer(one)
    same.fit(module, loader())
    trainer(monitor(chi)).fit(Net(seed=1), loader())
    measure_subspace(module, [BATCH], k=2, measurements=[chi])
    go_on(same, module)
    assert [record.step for record in one.history] == [0, 2, 4, 6, 8]


def test_a_probe_is_left_out_where_its_measurement_is_used_elsewhere_in_the_middle_of_a_fit():
    control = Control()
    one = monitor(control, on_failure="warn")

    class Elsewhere(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                measure_subspace(Net(seed=1), [BATCH], k=2, measurements=[control])

    with pytest.warns(UserWarning, match=r"probe at step 4 failed and is left out.*Control of its own") as told:
        trainer(one, Elsewhere(), steps=8).fit(Net(), loader())
    assert sum("Control of its own" in str(w.message) for w in told) == 1
    assert [record.step for record in one.history] == [0, 2]


def test_copies_of_a_monitor_have_measurements_of_their_own():
    counting = Counting()
    one, module = monitor(counting), Net()
    same = trainer(one)
    same.fit(module, loader())
    other, twin = copy.deepcopy(one), copy.deepcopy(module)
    again = trainer(other)
    again.fit(twin, loader())
    go_on(again, twin)
    go_on(same, module)
    assert counting.seen == [0, 2, 4, 6, 8]
    assert [row["seen"] for row in one.to_rows()] == [row["seen"] for row in other.to_rows()] == [1, 2, 3, 4, 5]


# States that cannot be used


def resumed(tmp_path, folder, change, *measurements):
    """Resume from a checkpoint of step 4 with one change in the states of the measurements."""
    saved = torch.load(folder / "4.ckpt", weights_only=True)
    change(saved["callbacks"][KEY]["measurements"])
    torch.save(saved, tmp_path / "changed.ckpt")
    one = monitor(*measurements)
    trainer(one, steps=8).fit(Net(), loader(), ckpt_path=tmp_path / "changed.ckpt")
    return one


def test_a_damaged_state_is_told_once_and_its_measurement_begins_anew(straight, tmp_path):
    folder = straight("float32")[-1]
    with pytest.warns(UserWarning, match="the state of .* in the checkpoint is not used") as told:
        one = resumed(
            tmp_path, folder, lambda states: states.update(Control={"previous": 3}, Density={"steps": None}), *each()
        )
    ours = [str(w.message) for w in told if "in the checkpoint is not used" in str(w.message)]
    assert [text.split(" in the")[0] for text in ours] == [
        "SubspaceMonitor: the state of Control",
        "SubspaceMonitor: the state of Density",
    ]
    found = rows(one, *STARTS)
    assert "overlap_next_previous" not in found[0]
    assert "overlap_next_previous" in found[8]
    assert found[8]["seen"] == 5  # the others go on


def test_a_state_that_nothing_takes_up_and_one_that_is_not_there_are_no_failure(straight, tmp_path, caplog):
    folder = straight("float32")[-1]
    caplog.set_level("INFO")
    one = resumed(tmp_path, folder, lambda states: states.pop("Density"), Density(steps=6), CriticalSharpness())
    assert [density.step for density in one._settings.measurements[0].history] == [4, 6, 8]
    assert any("no measurement takes up: Control, Counting" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "state",
    [{"net": nn.Linear(1, 1)}, [1, 2], {"x": torch.ones(1).to_sparse()}, {1.5: 2}, RuntimeError("broken")],
    ids=lambda state: type(state).__name__,
)
def test_a_state_that_cannot_be_written_is_told_and_the_rest_of_the_checkpoint_is_there(tmp_path, state):
    class Odd(Counting):
        def state_dict(self):
            if isinstance(state, Exception):
                raise state
            return state

    with pytest.warns(UserWarning, match="state_dict of Odd failed: .*; the checkpoint is written without it") as told:
        trainer(monitor(Odd(), Density(steps=4)), Save(tmp_path), steps=2).fit(Net(), loader())
    assert sum("state_dict of Odd" in str(w.message) for w in told) == 1
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["callbacks"][KEY]
    assert saved["measurements"].keys() == {"Density"}
    assert saved["history"]["steps"] == [0, 2]


def test_what_is_written_does_not_change_with_the_measurement(tmp_path):
    counting = Counting()
    one = monitor(counting)
    trainer(one).fit(Net(), loader())
    state = one.state_dict()["measurements"]["Counting"]
    counting.total.zero_()
    counting.seen.clear()
    assert state["seen"] == [0, 2, 4]
    assert state["total"].tolist() == [3.0, 6.0]


def test_two_of_a_class_keep_two_states(tmp_path):
    first, second = Density(steps=4), Density(steps=4, every=2)
    one = monitor(first, second)
    trainer(one).fit(Net(), loader())
    states = one.state_dict()["measurements"]
    assert states.keys() == {"Density", "Density/2"}
    assert (states["Density"]["steps"].tolist(), states["Density/2"]["steps"].tolist()) == ([0, 2, 4], [0, 4])


def damages(state):
    """Copies of a state with one entry of it changed, or a part of a tensor."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from ({**state, name: changed} for changed in damages(value))
        others = [None, "damaged", -1, math.nan, [], {"a": 1}, torch.zeros(2, 2), True, 10**12]
        if isinstance(value, torch.Tensor):
            others += [value[:-1], value * 3 + 1, value.to(torch.float16), torch.cat([value, value]), value - 10**6]
            others += [torch.full_like(value, math.nan)] if value.is_floating_point() else []
        yield from ({**state, name: other} for other in others)
        yield {key: kept for key, kept in state.items() if key != name}


@pytest.mark.parametrize("index", range(3), ids=["Control", "Density", "CriticalSharpness"])
def test_whatever_is_damaged_in_a_state_is_refused_or_can_be_measured_with(index):
    measurement = each()[index]
    one, module = monitor(measurement), Net()
    same = trainer(one)
    same.fit(module, loader())
    state, refused, passed = measurement.state_dict(), 0, []
    for damaged in damages(state):
        other = each()[index]
        before = dict(vars(other))
        try:
            other.load_state_dict(damaged)
        except ValueError:
            refused += 1
            assert vars(other) == before
        else:
            passed.append(damaged)
            measurement.load_state_dict(damaged)
            go_on(same, module, 2)
            if index < 2:
                assert measurement.state_dict().keys() == state.keys()
    assert refused >= {0: 90, 1: 50, 2: 20}[index]
    # Without an entry is without that memory; a digest that is another text fits no parameters.
    assert len(passed) <= {0: 10, 1: 8, 2: 3}[index], passed
