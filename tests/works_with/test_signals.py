"""A signal that arrives in a probe: its handler meets the state of training, at once but for one evaluation."""

import copy
import functools
import logging
import signal
import types
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, SignalError, SubspaceMonitor, SubspaceProjection, measure_subspace
from tests.left_out import leave_error_bar_out
from tests.thorough import covering, usual
from tests.works_with.faults import Case, Fault, run_cases

SIGNUM = signal.SIGUSR2


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    leave_error_bar_out(monkeypatch)
    kept = {signum: signal.getsignal(signum) for signum in (SIGNUM, signal.SIGUSR1, signal.SIGTERM)}
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


@dataclass
class Counts(types.ModuleType):
    """Of evaluations in probes, and where a signal is sent; a module, since a probe puts other state back."""

    at: int = 0
    backward: int = 0
    signum: int = SIGNUM
    num_forward: int = 0
    num_backward: int = 0
    num_behind: int = 0
    was_sent: bool = False

    def __post_init__(self):
        super().__init__("counts")

    def see(self, *, is_backward):
        self.num_behind += self.was_sent
        if is_backward:
            self.num_backward += 1
        else:
            self.num_forward += 1
        is_here = self.num_backward == self.backward if is_backward else self.num_forward == self.at
        if is_here and not self.was_sent:
            self.was_sent = True
            signal.raise_signal(self.signum)


counts = Counts()


class Net(LightningModule):
    """Counts evaluations on copies, and sends a signal at one of them, forward or backward."""

    def __init__(self, **place):
        super().__init__()
        global counts
        counts = Counts(**place)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.own = id(self.net[0].weight)

    def training_step(self, batch, batch_idx):
        self.count += 1
        hidden = self.net[0](batch[0])
        if id(self.net[0].weight) != self.own:
            counts.see(is_backward=False)
            hidden.register_hook(lambda gradient: counts.see(is_backward=True))
        return F.cross_entropy(self.net[1:](hidden), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Looking(Callback):
    """Keeps the state at the beginning of a hook that comes before the monitor's."""

    def on_train_start(self, trainer, pl_module):
        self.state = state_of(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.state = state_of(trainer, pl_module)


def data(count=48):
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)


def fit(module, *callbacks, steps=2, **options):
    looking = Looking()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[looking, *callbacks],
        **options,
    )
    return trainer, looking, functools.partial(trainer.fit, module, data())


def monitor(**options):
    return SubspaceMonitor(**{"k": 2, "every_n_steps": [0, 1], "max_overhead": None, "sample": "all", **options})


def state_of(trainer, module):
    return copy.deepcopy((dict(module.state_dict()), trainer.optimizers[0].state_dict(), torch.get_rng_state()))


def are_equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other


# Evaluations of the self-check, of the first probe, and of the second one; and the step of the probe.
PLACES = usual(
    [({"at": 4}, 0), ({"backward": 20}, 0), ({"backward": 180}, 1)],
    thorough=[({"at": 1}, 0), ({"backward": 2}, 0), ({"backward": 60}, 0)],
)


@pytest.mark.parametrize(("place", "step"), PLACES, ids=str)
def test_a_handler_meets_the_state_of_training(place, step, caplog):
    module, one = Net(**place), monitor(on_failure="raise")  # it is no failure
    trainer, looking, run = fit(module, one)
    heard = []
    signal.signal(SIGNUM, lambda *_: heard.append((state_of(trainer, module), looking.state)))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        run()
    ((state, before),) = heard
    assert are_equal(state, before)
    assert [record.step for record in one.history] == [1 - step]
    assert [text for text in caplog.messages if "given up" in text] == [
        f"SubspaceMonitor: the probe at step {step} was given up, since SIGUSR2 arrived; training goes on."
    ]


@pytest.mark.parametrize(
    ("curvature", "place"),
    [
        ("hessian", {"backward": 30}),
        ("ggn", {"backward": 30}),
        ("finite-difference", {"at": 3}),
        ("finite-difference", {"backward": 60}),
        ("empirical-fisher", {"backward": 2}),
    ],
)
def test_at_most_one_evaluation_is_made_before_it_runs(curvature, place):
    module, one = Net(**place), monitor(curvature=curvature, every_n_steps=[0])
    trainer, looking, run = fit(module, one)
    heard = []
    signal.signal(
        SIGNUM, lambda *_: heard.append((counts.num_behind, are_equal(state_of(trainer, module), looking.state)))
    )
    run()
    ((count, is_equal),) = heard
    assert count <= 1
    assert is_equal
    assert one.history == []


@pytest.mark.parametrize("at", [2, 9])
def test_slurm_requeues_with_the_state_of_training(at, monkeypatch, tmp_path):
    """Lightning's own handler saves a checkpoint wherever Python is."""
    for name, value in {"NTASKS": 1, "JOB_NAME": "train", "JOB_ID": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: 0)
    module = Net(at=at, signum=signal.SIGUSR1)
    start = copy.deepcopy(dict(module.state_dict()))
    options = {"plugins": [SLURMEnvironment(auto_requeue=True)], "default_root_dir": tmp_path}
    fit(module, monitor(every_n_steps=[0]), **options)[-1]()
    (path,) = tmp_path.glob("hpc_ckpt_*.ckpt")
    assert counts.was_sent
    assert are_equal(dict(torch.load(path, weights_only=True)["state_dict"]), start)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("error", [StoppedError, SystemExit])
def test_what_a_handler_raises_ends_training_and_everything_is_back(error):
    module = Net(at=6)
    trainer, looking, run = fit(module, monitor())

    def stop(signum, frame):
        raise error

    signal.signal(SIGNUM, stop)
    with pytest.raises(error):
        run()
    assert are_equal(state_of(trainer, module), looking.state)
    assert signal.getsignal(SIGNUM) is stop


class Swallowing(Measurement):
    """Of the user's: takes every exception for a number that is not there."""

    def measure(self, probe):
        signal.raise_signal(SIGNUM)
        try:
            return {"swallowed": float(probe.operator.matvec(probe.gradient).norm())}
        except Exception:
            return {"swallowed": 0.0}


def test_a_number_behind_a_swallowed_signal_is_none():
    module, one = Net(), monitor(every_n_steps=[0], measurements=[Swallowing()])
    trainer, looking, run = fit(module, one)
    heard = []
    signal.signal(SIGNUM, lambda *_: heard.append(are_equal(state_of(trainer, module), looking.state)))
    run()
    assert (heard, one.history) == ([True], [])


class Averaging(Callback):
    """Puts other weights into the module before the last probe, which is of those that were trained."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.5)
        self.state = state_of(trainer, pl_module)
        counts.at = counts.num_forward + 2


def test_weights_that_are_lent_for_the_last_probe_are_not_met():
    module, averaging, one = Net(), Averaging(), monitor(every_n_steps=100)
    trainer, _, run = fit(module, averaging, one)
    heard = []
    signal.signal(SIGNUM, lambda *_: heard.append(are_equal(state_of(trainer, module), averaging.state)))
    run()
    assert heard == [True]
    assert [record.step for record in one.history] == [0]


def test_a_projection_gives_up_and_computes_its_space_at_the_next_step():
    module = Net(at=4)
    projection = SubspaceProjection("bulk", k=2, sample="all", on_failure="raise")
    trainer, looking, run = fit(module, projection, steps=3)
    heard = []
    signal.signal(SIGNUM, lambda *_: heard.append(are_equal(state_of(trainer, module), looking.state)))
    run()
    assert heard == [True]
    assert projection.is_active


def test_measure_subspace_raises_behind_the_handler():
    module, heard = nn.Linear(5, 3), []
    before = copy.deepcopy(dict(module.state_dict()))
    signal.signal(SIGNUM, lambda *_: heard.append(are_equal(dict(module.state_dict()), before)))

    def loss_fn(module, batch, batch_idx):
        signal.raise_signal(SIGNUM)
        return F.cross_entropy(module(batch[0]), batch[1])

    with pytest.raises(SignalError, match="gave up since signal SIGUSR2 arrived"):
        measure_subspace(module, data(), k=2, loss_fn=loss_fn)
    assert heard == [True]


# -- two ranks --------------------------------------------------------------------------------------------------------

PLACES_OF_A_RANK = {
    "usual": usual(["self-check forward", "build forward", "matvec 10 backward"], thorough=["matvec 1 backward"]),
    "sharded": ["self-check forward", "matvec 3 backward"],
}


@pytest.mark.parametrize("project", PLACES_OF_A_RANK)
def test_all_ranks_give_up_where_one_gets_a_signal(project):
    """They leave the probe together, training goes on to the bit, and the handler runs when they have."""
    check_on_two_ranks(project, {}, PLACES_OF_A_RANK[project])


def test_all_ranks_give_up_within_differences_on_shards():
    """Before FSDP's own collectives, in which they would wait for each other."""
    options = {"curvature": "finite-difference", "k": 1, "ncv": 4}
    check_on_two_ranks("sharded", options, ["matvec 1", "matvec 5"])


def check_on_two_ranks(project, options, places):
    faults = [Fault(place, rank, "signal") for place, rank in covering(places, [0, 1])]
    found = [Case([fault], {"on_failure": "raise", **options}, project=project) for fault in faults]
    for (name, fits), fault in zip(run_cases(found, 2).items(), faults, strict=True):
        for rank, fit in enumerate(fits):
            assert (fit.changed, fit.error, fit.told) == ([], None, []), name
            assert fit.steps == [2], name
            assert (fit.rows, fit.num_probes) == (fits[0].rows, 1), name
            # No phase of a probe was left, and no check between ranks was awaited.
            assert fit.heard == ([("SIGUSR2", [])] if rank == fault.rank else []), name
