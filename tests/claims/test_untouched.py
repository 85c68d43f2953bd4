"""Training is bit for bit what it is without the monitor: through the real Trainer, and whatever fails inside a probe.

The last part removes each piece of the containment in turn and asserts that the comparison then sees a difference: a
comparison that cannot fail proves nothing.
"""

import contextlib
import functools
import itertools
import math
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_subspace import SubspaceMonitor, _lightning, measure_subspace
from lightning_subspace.curvature import Hessian, diagnosis
from lightning_subspace.curvature.selection import CurvatureConfig
from lightning_subspace.curvature.self_check import Diagnosis
from lightning_subspace.data import micro_batch, reading
from lightning_subspace.data.sample import sample_of_current
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.loss import shadow as containment
from lightning_subspace.loss import training_loss
from lightning_subspace.measurements import Measurement
from lightning_subspace.measurements.base import Needs
from lightning_subspace.state import containers as contents
from lightning_subspace.state import object_graph as containers
from tests.left_out import leave_figures_out, leave_self_check_out
from tests.modules import (
    BATCH,
    NOT_A_GRADIENT,
    PROJECTS,
    Augmented,
    Everything,
    InPlaceBatch,
    Project,
    RandomDataset,
    bag,
    differences,
    examples,
    fingerprint,
    random_bytes,
    train,
)
from tests.thorough import covering, usual


def monitor(**options) -> SubspaceMonitor:
    defaults = {
        "k": 2,
        "every_n_steps": 4,
        "max_overhead": None,
        "sample": 16,
        "gradient_sample": 24,
        "on_failure": "raise",
    }
    return SubspaceMonitor(**{**defaults, **options})


@pytest.fixture(autouse=True)
def _left_out(request, monkeypatch):
    """Figures, the self-check, and its diagnosis of what is no gradient, which take long.

    Tests that name them have them, and so have the run of every project, and the interrupts, which wait for calls of
    the self-check. `Everything` has no diagnosis: the projects that it is made of have theirs.
    """
    name = request.node.name
    if "figures" not in name:
        leave_figures_out(monkeypatch)
    if "monitored_run" not in name or "Everything" in name:
        monkeypatch.setattr(diagnosis, "diagnose", lambda *args, **options: Diagnosis(math.nan, diagnosis.UNKNOWN))
    if not any(word in name for word in ("monitored_run", "self_check", "self-check", "interrupt")):
        leave_self_check_out(monkeypatch)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a project without a monitor, once for all tests."""
    return functools.cache(
        lambda name, accumulate=1: train(PROJECTS[name], tmp_path_factory.mktemp("alone"), accumulate=accumulate)
    )


def watched(name, folder, callback, accumulate=1):
    """The run of a project with a monitor, which may say that the gradient is none, where that is so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SubspaceMonitor: at step")  # two eigenvalues may lie close together
        if name in NOT_A_GRADIENT:
            warnings.filterwarnings(
                "ignore", "SubspaceMonitor: (What trains this model is not|The second derivatives of this model are)"
            )
            warnings.filterwarnings("ignore", "SubspaceMonitor: the set of measured parameters has changed")
        return train(PROJECTS[name], folder, callback, accumulate=accumulate)


# -- bit identity -----------------------------------------------------------------------------------------------------


WAYS = {  # arguments of the monitor, and how many batches make a step
    "fixed sample": ({"sample": 16}, 1),
    "current batch, accumulated": ({"sample": "current", "every_n_steps": 1}, 4),
}


# `Everything` is made of these.
PARTS = ["Statistics", "Metrics", "Randomness", "Attributes"]


@pytest.mark.parametrize(
    ("name", "way"), covering(usual([name for name in PROJECTS if name not in PARTS], thorough=PARTS), list(WAYS))
)
def test_a_monitored_run_is_the_same_run(name, way, alone, tmp_path):
    options, accumulate = WAYS[way]
    callback = monitor(**options)
    run = watched(name, tmp_path, callback, accumulate)
    assert differences(alone(name, accumulate), run) == []
    assert len(callback.history) >= 3


@pytest.mark.parametrize(
    ("name", "size", "accumulate", "mode"),
    [
        *usual(
            [("Augmented", "all", 4, "train")],
            thorough=[
                ("Everything", "all", 4, "train"),
                *itertools.product(["Everything"], [16, "current"], [1, 4], ["train"]),
            ],
        ),
        *covering(["InPlaceBatch", "Augmented"], ["all", "current"], [1], ["train"]),
        *usual(
            [("Statistics", "all", 1, "eval")], thorough=[("Everything", "all", 1, mode) for mode in ("train", "eval")]
        ),
        ("Toggled", "current", 4, "eval"),
    ],
)
def test_whatever_the_sample_the_mode_and_the_accumulation(name, size, accumulate, mode, alone, tmp_path):
    callback = monitor(sample=size, every_n_steps=4 // accumulate, mode=mode)
    run = watched(name, tmp_path, callback, accumulate)
    assert differences(alone(name, accumulate), run) == []
    assert len(callback.history) >= 3


def test_figures_and_all_measurements_change_nothing(alone, tmp_path):
    callback = monitor(log="all", reference_step=4, every_n_steps=[4, 8])
    assert differences(alone("Metrics"), watched("Metrics", tmp_path, callback)) == []


def test_the_cheap_tier_changes_nothing(alone, tmp_path):
    assert differences(alone("Everything"), watched("Everything", tmp_path, monitor(k=0, every_n_steps=8))) == []


def test_two_monitors_change_nothing(alone, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SubspaceMonitor")
        other = monitor(name="subspace_eval", mode="eval", sample="current", every_n_steps=8)
        run = train(Everything, tmp_path, monitor(every_n_steps=8), other)
    assert differences(alone("Everything"), run) == []


def test_the_comparison_sees_a_single_bit(alone):
    run = dict(alone("Everything"))
    path = next(path for path, value in run.items() if "randomness" in path and path.endswith(".weight"))
    [(data, shape)], *rest = run[path]
    run[path] = ([(bytes([data[0] ^ 1]) + data[1:], shape)], *rest)
    assert differences(alone("Everything"), run) == [path]
    assert len(run) > 5_000


# -- a probe that fails -----------------------------------------------------------------------------------------------


class DeliberateError(Exception):
    """What is raised inside probes here."""


def failing_at(function: Callable, count: int, error: type[BaseException] = DeliberateError) -> Callable:
    """The function, which does its work and then raises at one of its calls."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == count:
            raise error("on purpose")
        return result

    return wrapper


def failing_after_the_check(owner, name, count, **arguments):
    """A patch by which a function fails at one of its calls behind the self-check, and arguments that it needs."""

    def install(patch):
        check = CurvatureConfig.check

        def checked(*args, **options):
            result = check(*args, **options)
            patch.setattr(owner, name, failing_at(getattr(owner, name), count))
            return result

        patch.setattr(CurvatureConfig, "check", checked)
        return arguments

    return install


def failing_evaluation(call):
    return lambda patch: patch.setattr(training_loss, "as_scalar", failing_at(training_loss.as_scalar, call))


class FailingMeasurement(Measurement):
    needs = Needs.NOTHING

    def __init__(self, where):
        self.where = where

    def measure(self, probe):
        if self.where == "measure":
            probe.operator.matvec(torch.ones(probe.space.n))
            raise DeliberateError("on purpose")
        return {}

    def after_step(self, probe, gradient, update):
        raise DeliberateError("on purpose")


FAILURES = {
    "self-check": lambda patch: patch.setattr(CurvatureConfig, "check", failing_at(CurvatureConfig.check, 1)),
    "first evaluation": failing_after_the_check(training_loss, "as_scalar", 1),
    "transfer": failing_after_the_check(training_loss, "transfer", 2, sample="all"),  # what is gathered has been
    "restart": lambda patch: (
        patch.setattr(Lanczos, "contract", failing_at(Lanczos.contract, 1)) or {"every_n_steps": 4}
    ),
    "after_step": lambda patch: {"measurements": [FailingMeasurement("after_step")]},
}
MORE_FAILURES = {  # amid a solve as a restart is, or before one; works_with/test_faults.py has measurements
    "tenth product": failing_after_the_check(Hessian, "matvec", 10),
    "measurement": lambda patch: {"measurements": [FailingMeasurement("measure")]},
    "fifth evaluation": failing_after_the_check(training_loss, "as_scalar", 5),
    "first product": failing_after_the_check(Hessian, "matvec", 1),
}


@pytest.mark.parametrize("failure", usual(FAILURES, thorough=MORE_FAILURES))
def test_a_failing_probe_is_told_and_changes_nothing(failure, alone, tmp_path, monkeypatch):
    options = {**FAILURES, **MORE_FAILURES}[failure](monkeypatch) or {}
    callback = monitor(**{"on_failure": "warn", "ncv": 5, "every_n_steps": 8, **options})
    with pytest.warns(UserWarning, match="DeliberateError: on purpose"):
        run = watched("Everything", tmp_path, callback)
    assert differences(alone("Everything"), run) == []


@pytest.mark.thorough  # works_with/test_faults.py has this of one rank
def test_a_self_check_that_fails_inside_is_inconclusive_and_changes_nothing(alone, tmp_path, monkeypatch):
    failing_evaluation(3)(monkeypatch)
    assert differences(alone("Everything"), watched("Everything", tmp_path, monitor(every_n_steps=8))) == []


class Opened(RandomDataset):
    """Can be read from the start of training on, behind that of its callbacks."""

    is_open = False

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if not self.is_open and index > 4:
            raise DeliberateError("on purpose")
        return item


class OpenedLate(Augmented):
    def __init__(self):
        super().__init__()
        self.data = Opened()

    def on_train_start(self):
        self.data.is_open = True


def test_a_sample_that_cannot_be_read_is_told_and_changes_nothing(tmp_path):
    callback = monitor(on_failure="warn", sample="all")
    with pytest.warns(UserWarning, match="the sample could not be drawn, so nothing is measured"):
        run = train(OpenedLate, tmp_path / "watched", callback)
    assert differences(train(OpenedLate, tmp_path / "alone"), run) == []
    assert len(callback.history) == 0


class Uncopyable(Project):
    def train_dataloader(self):
        def collate(items):
            x, y = (torch.stack(column) for column in zip(*items, strict=True))
            return x, y, (item for item in ())  # a generator: no copy of it is possible

        return DataLoader(examples(), batch_size=BATCH, shuffle=True, collate_fn=collate)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


@pytest.mark.parametrize("sample", ["current", 16])
def test_a_batch_that_cannot_be_copied_is_told_and_changes_nothing(sample, tmp_path):
    told = "could not be copied, so nothing is measured" if sample == "current" else "is left out of the sample"
    with pytest.warns(UserWarning, match=told):
        run = train(Uncopyable, tmp_path / "watched", monitor(sample=sample, on_failure="warn"))
    assert differences(train(Uncopyable, tmp_path / "alone"), run) == []


class BrokenLogger(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if any(name.startswith("subspace") for name in metrics):
            raise DeliberateError("on purpose")
        super().log_metrics(metrics, step)


def test_a_failing_logger_is_told_and_changes_nothing(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.modules.CSVLogger", BrokenLogger)
    with pytest.warns(UserWarning, match="BrokenLogger raised DeliberateError: on purpose"):
        run = watched("Metrics", tmp_path, monitor(every_n_steps=8))
    assert differences(alone("Metrics"), run) == []


@pytest.mark.filterwarnings("ignore:(What trains this model is not|The second derivatives of this model are)")
@pytest.mark.parametrize(
    ("name", "place"),
    covering(
        ["Everything", "Teacher", "Hooks"],
        [(Hessian, "matvec"), (training_loss, "as_scalar"), (containment.Shadow, "reset")],
    ),
)
def test_an_interrupted_probe_leaves_every_object_in_place(name, place, monkeypatch):
    owner, function = place
    module = PROJECTS[name]()
    for cover in ("log", "log_dict"):  # without a Trainer there is nowhere to log to
        monkeypatch.setattr(type(module), cover, lambda *args, **kwargs: None)
    batches = [tuple(column[i : i + BATCH] for column in examples().tensors) for i in (0, BATCH)]
    module.training_step(batches[0], 0)
    before = {**fingerprint(module, "module", identity=True), **fingerprint(random_bytes(), "random")}
    monkeypatch.setattr(owner, function, failing_at(getattr(owner, function), 4, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure_subspace(module, batches, k=2)
    after = {**fingerprint(module, "module", identity=True), **fingerprint(random_bytes(), "random")}
    assert differences(before, after) == []


@pytest.mark.thorough  # the one above goes without a Trainer; callbacks/test_monitor.py interrupts a run in a probe
@pytest.mark.filterwarnings(
    "ignore:SubspaceMonitor. (What trains this model is not|The second derivatives of this model are)"
)
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_an_interrupt_during_a_probe_of_a_trainer(alone, tmp_path, monkeypatch):
    made = []

    def make():
        made.append(Everything())
        return made[0]

    monkeypatch.setattr(SubspaceMonitor, "should_measure", lambda self, step: step == 4)
    callback = monitor(every_n_steps=[4])
    monkeypatch.setattr(Hessian, "matvec", failing_at(Hessian.matvec, 5, KeyboardInterrupt))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(make, tmp_path, callback)
    fourth = "epoch 0 batch 3 module"
    expected = {path: value for path, value in alone("Everything").items() if path.startswith(fourth)}
    assert differences(expected, fingerprint(made[0], fourth)) == []


# -- nothing of the containment is there for nothing ------------------------------------------------------------------


@contextlib.contextmanager
def nothing(*args):
    yield


@contextlib.contextmanager
def mode_for_good(module, mode):
    module.train(mode == "train")
    yield


def unchanged(self, value, *args):
    return value


def without(factory: str, empty):
    return lambda patch: patch.setattr(containers, factory, lambda *args: empty)


def without_kind(kind: type) -> Callable:
    """Objects of one built-in kind hold nothing that is exchanged."""

    def remove(patch):
        found = containers._containers
        empty = containers.MutableObject([], lambda items: None)
        patch.setattr(
            containers,
            "_containers",
            lambda v, p, **options: [empty] if isinstance(v, kind) else found(v, p, **options),
        )
        if kind is dict:  # that of an object's attributes, too
            patch.setattr(contents, "fill_dict", nothing)
            patch.setattr(contents, "read_dict", lambda target: [])

    return remove


def not_copied(kind: Callable) -> Callable:
    """Parameters of one kind are used as they are."""

    def remove(patch):
        copy = containment.Shadow._copy_parameter
        patch.setattr(containment.Shadow, "_copy_parameter", lambda self, p: p if kind(p) else copy(self, p))

    return remove


def followed_by_nobody(patch):
    """Objects are followed neither as a module's own nor as something around it."""
    for name in ("_is_own", "_is_around"):
        patch.setattr(containers, name, lambda *args: False)


def both_batch_copies(patch):
    for place in (micro_batch, training_loss):
        patch.setattr(place, "copied", lambda data, *args: data)


def caches_as_they_are(patch):
    opened = containment.Shadow._open

    def without(self):
        opened(self)
        self._caches = []

    patch.setattr(containment.Shadow, "_open", without)


LATER = {"every_n_steps": [4]}  # at step 0 training does the same itself

# piece: how to take it away, the project that needs it, and how it is monitored
PIECES = {
    "random state": (lambda p: p.setattr(training_loss, "preserved_random_state", nothing), "Randomness", {}),
    "generators": (without("rewind", None), "Randomness", {}),
    "tensors": (lambda p: p.setattr(containment.Shadow, "_copy_tensor", unchanged), "Statistics", {}),
    "arrays": (lambda p: p.setattr(containment.np, "ndarray", ()), "Attributes", {}),
    "frozen parameters": (not_copied(lambda p: not p.requires_grad), "Teacher", {}),
    "trainable parameters": (not_copied(lambda p: p.requires_grad), "Clamped", LATER),
    "dicts and attributes": (without_kind(dict), "Attributes", {}),
    "lists": (without_kind(list), "Metrics", {}),
    "sets": (without_kind(set), "Attributes", {}),
    "tuples": (lambda p: p.setattr(containment.Shadow, "_copy_immutable", unchanged), "Attributes", {}),
    "partials": (without_kind(functools.partial), "Attributes", {}),
    "slots": (lambda p: p.setattr(contents, "in_slots", lambda target: []), "Attributes", {}),
    "functions": (without_kind(types.FunctionType), "Hooks", {}),
    "closures": (without_kind(types.CellType), "Hooks", {}),
    "plain objects": (followed_by_nobody, "Attributes", {}),
    "caches": (caches_as_they_are, "Cached", {"sample": "all", "dtype": "float64"}),
    "extra_roots": (
        lambda p: p.setattr(training_loss, "extra_roots", lambda module: []),
        "Conductor",
        {"every_n_steps": 4},
    ),
    "self.log": (lambda p: p.setattr(_lightning, "_cover", nothing), "Metrics", {}),
    "loggers": (lambda p: p.setattr(_lightning, "Silent", lambda logger: logger), "Writers", {}),
    "kept writers": (lambda p: p.setattr(_lightning, "_writes", lambda *args: False), "Writers", {}),
    "modes": (lambda p: p.setattr(training_loss, "in_mode", mode_for_good), "Statistics", {"mode": "eval"}),
    "reading": (lambda p: p.setattr(reading, "unmoved", nothing), "Augmented", {"sample": "all"}),
    "batch": (both_batch_copies, "InPlaceBatch", {"sample": "current"}),
}


# Of a project with several pieces, one or two that are kept in different ways.
FEW_PIECES = [
    *("random state", "tensors", "trainable parameters", "dicts and attributes", "plain objects", "closures", "caches"),
    *("extra_roots", "self.log", "kept writers", "reading", "batch"),
]


@pytest.mark.parametrize("piece", usual(FEW_PIECES, thorough=[piece for piece in PIECES if piece not in FEW_PIECES]))
def test_without_a_piece_of_the_containment_the_run_is_another(piece, alone, tmp_path, monkeypatch):
    remove, name, options = PIECES[piece]
    one_probe = {"every_n_steps": [0], "verify": "never", "on_failure": "warn"}  # and all steps behind it
    expected = alone(name)
    remove(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is broken may well complain
        try:
            run = train(PROJECTS[name], tmp_path, monitor(**{**one_probe, **options}))
        except Exception as error:
            run = {"raised": error}
    assert differences(expected, run) != []


def test_what_training_does_to_its_batch_does_not_reach_the_sample():
    batch = bag([examples()[i] for i in range(BATCH)])
    kept = sample_of_current(batch).hessian[0].data
    before = fingerprint(kept, "sample")
    InPlaceBatch().training_step(batch, 0)
    assert differences(before, fingerprint(kept, "sample")) == []
