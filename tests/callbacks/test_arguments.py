"""What is refused, when, and in which words; a refusal changes nothing of the run."""

import inspect
import re
import threading

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import (
    Density,
    Layers,
    Measurement,
    SpectralSharpness,
    StepCurvature,
    SubspaceMonitor,
    Trace,
    measure_subspace,
)
from lightning_subspace.callbacks.project import check_project, warn_of_missing_keys

# The first is raised by torch's own pytree, in Lightning's CombinedLoader; the second depends on the machine.
NAN = float("nan")

# argument -> what is expected of it -> values that are not
WRONG = {
    "k": [("an integer of at least 0", [-1, 2.0, "10", True, None])],
    "every_n_steps": [
        ("an integer of at least 1", [0, -5, True]),
        ("a positive integer or a list of steps, each 0 or more", [1.5, "100", [], [3, -1], [2.0], [True], None]),
    ],
    "max_overhead": [("a number between 0 and 1 or None", [0, 1, 0.0, 1.0, -0.1, 20, NAN, "0.2", True])],
    "sample": [
        ("an integer of at least 1", [0, -1, True]),
        ("one of 'all', 'current'", ["everything", ""]),
        ("a number of examples, 'all', 'current', a loader or a list of batches", [0.5, None]),
    ],
    "gradient_sample": [
        ("one of 'all'", ["current"]),
        ("an integer of at least 1", [0, -1, 0.5, None, True]),
        ("at least the 1024 of `sample`, which it contains", [1023]),
    ],
    "resample": [("True or False", ["no", 0, None])],
    "read_timeout": [("a positive number of seconds", [0, -1.0, NAN, "600", None, True])],
    "batch_size": [("an integer of at least 1 or None", [0, 1.5, "64", True])],
    "weight": [("a function or None", [3, "tokens"])],
    "reference_step": [("an integer of at least 0 or None", [-1, 0.5, True])],
    "which": [("one of 'LA', 'SA', 'LM', 'BE'", ["SM", "la", None, 3])],
    "tol": [("a number in (0, 0.1]", [0, 0.2, -1e-3, NAN, "1e-3", None, True])],
    "max_matvecs": [
        ("at least as many products as k=10 eigenpairs", [9, 1]),
        ("an integer of at least 1", [0, 50.0, None, True]),
    ],
    "ncv": [("an integer of at least 13 or None", [12, 1]), ("an integer of at least 1 or None", [0, 20.0, True])],
    "basis": [("one of 'auto', 'device', 'cpu'", ["cuda", None, True])],
    "verify": [("'always', 'never', or an integer of at least 1", ["sometimes", 0, 2.0, None, True])],
    "params": [("a list of patterns such as ['head.*'], or None", ["head.*", 3, [3], [], {"head.*": 1}])],
    "loss_fn": [("a function or None", [3, "cross_entropy"])],
    "mode": [("one of 'train', 'eval'", ["test", None, True])],
    "dtype": [("one of 'float32', 'float64', 'native'", ["bfloat16", torch.float64, None])],
    "curvature": [("one of 'hessian', 'ggn', 'finite-difference', 'empirical-fisher', 'none'", ["gauss-newton", None])],
    "on_check_fail": [("one of 'warn', 'raise', 'finite-difference', 'omit'", ["ignore", None, True])],
    "measurements": [("a list of instances of lightning_subspace.Measurement", [[3], 3, 0, ""])],
    "log": [("one of 'default', 'all'", ["everything", None, True])],
    "on_failure": [("one of 'warn', 'raise'", ["ignore", None])],
    "name": [("an ASCII word of letters, digits, '_', '-' and '.'", ["", "a b", "a/b", "größe", 3, None])],
    "seed": [("an integer from 0 to 2**63 - 1", [-1, 0.5, None, True, 2**63])],
}
# What is added behind the value, by the argument or by what was expected.
WAY_OUT = {
    "at least as many products as k=10 eigenpairs": "; raise it, or lower k",
    "tol": "; it is relative to the largest eigenvalue",
    "verify": "; 10 verifies every tenth probe, and those after one that found copies",
}
CASES = [(name, expected, value) for name, rows in WRONG.items() for expected, values in rows for value in values]


def test_the_table_has_every_argument():
    assert list(WRONG) == list(inspect.signature(SubspaceMonitor).parameters)


@pytest.mark.parametrize(("name", "expected", "value"), CASES)
def test_a_wrong_argument_is_named_with_what_was_expected_and_what_came(name, expected, value):
    with pytest.raises(MisconfigurationException) as caught:
        SubspaceMonitor(**{name: value})
    way_out = WAY_OUT.get(expected, WAY_OUT.get(name, ""))
    assert str(caught.value) == f"SubspaceMonitor: {name}: expected {expected}, got {value!r}{way_out}."


RIGHT = {
    "k": [0, 1, 50],
    "every_n_steps": [1, [0], (5, 3), range(3)],
    "max_overhead": [None, 0.001, 0.999],
    "sample": [1, "all", "current", [torch.zeros(2, 2)], (b for b in [])],
    "gradient_sample": [1024, "all"],
    "resample": [True, False],
    "read_timeout": [1, 0.5, float("inf")],
    "batch_size": [None, 1],
    "weight": [None, len],
    "reference_step": [None, 0],
    "which": ["LA", "SA", "LM", "BE"],
    "tol": [0.1, 1e-9],
    "max_matvecs": [10],
    "ncv": [None, 13],
    "basis": ["auto", "device", "cpu"],
    "verify": ["always", "never", 1, 10],
    "params": [None, ["head.*"], ("head.*",)],
    "loss_fn": [None, lambda module, batch, batch_idx: None],
    "mode": ["train", "eval"],
    "dtype": ["float32", "float64", "native"],
    "curvature": ["hessian", "finite-difference"],
    "on_check_fail": ["warn", "raise", "finite-difference", "omit"],
    "measurements": [None, [], [Measurement()], (Measurement(),)],
    "log": ["default", "all"],
    "on_failure": ["warn", "raise"],
    "name": ["subspace", "2nd-run_v1.0"],
    "seed": [0, 7],
}


@pytest.mark.parametrize("every", [0, 2.0, None])
def test_how_often_a_measurement_is_taken_is_a_positive_integer(every):
    class Seldom(Measurement):
        pass

    Seldom.every = every
    with pytest.raises(
        MisconfigurationException,
        match=f"SubspaceMonitor: Seldom.every: expected an integer of at least 1, got {every}",
    ):
        SubspaceMonitor(measurements=[Seldom()])
    with pytest.raises(ValueError, match=f"Seldom.every: expected an integer of at least 1, got {every}"):
        measure_subspace(nn.Linear(2, 1), [torch.ones(1, 2)], loss_fn=Net.training_step, measurements=[Seldom()])


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_what_is_right_is_taken(name, value):
    assert SubspaceMonitor(**{name: value}).history == []


# What a trainer and a module must have


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ManualNet(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class IteratorNet(Net):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


def of_layer(module, batch, batch_idx):
    return module.layer(batch).square().mean()


class FrozenNet(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class RandomState(pl.Callback):
    """What the monitor behind it finds; Lightning itself moves the generator when it starts the loader."""

    def setup(self, trainer, pl_module, stage):
        self.state = torch.get_rng_state()

    def on_train_start(self, trainer, pl_module):
        self.state = torch.get_rng_state()


def batches(count=4):
    return DataLoader(torch.randn(4 * count, 4, generator=torch.Generator().manual_seed(0)), batch_size=4)


def listed():
    """The same in a list, whose examples are gathered."""
    return DataLoader(list(batches().dataset), batch_size=4)


def trainer(*callbacks, **kwargs):
    settings = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**settings, **quiet, **kwargs}, callbacks=list(callbacks))


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")  # Lightning: of it as such
@pytest.mark.parametrize(
    ("module", "loader", "arguments", "words"),
    [
        (FrozenNet, batches, {}, "FrozenNet has no parameter with requires_grad=True"),
        (Net, batches, {"k": 11}, r"k: expected 0\.\.10, the number of parameters, got 11"),
        (Net, batches, {"params": ["head.*"]}, "the pattern 'head.*' matches no trainable parameter of Net"),
        (ManualNet, batches, {}, "ManualNet optimizes manually.*pass loss_fn="),
        (IteratorNet, batches, {}, "training_step takes a dataloader_iter.*pass loss_fn="),
        (IteratorNet, listed, {"sample": 4, "loss_fn": of_layer}, "sample: expected 'all', a loader or a list"),
        (
            IteratorNet,
            batches,
            {"sample": "current", "loss_fn": of_layer},
            "sample: expected 'all', a loader or a list",
        ),
        (Net, lambda: batches(), {"sample": (b for b in [])}, "sample: expected at least one batch, got none"),
        (Net, batches, {"sample": [torch.ones(2, 4)], "weight": lambda batch: 0.0}, "weight: expected a positive"),
        (Net, batches, {"sample": [threading.Lock()]}, "batch: .*lock"),
    ],
)
def test_what_cannot_work_is_refused_before_training_and_changes_nothing(module, loader, arguments, words):
    torch.manual_seed(0)
    net, monitor = module(), SubspaceMonitor(**{"k": 2, **arguments})
    weights = [parameter.clone() for parameter in net.parameters()]
    before = RandomState()
    run = trainer(before, monitor)
    data = loader()
    with pytest.raises(MisconfigurationException, match=f"(?s)SubspaceMonitor: .*{words}"):
        run.fit(net, data)
    assert run.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), before.state)
    assert monitor.history == []
    assert monitor.to_rows() == []
    monitor.plot()


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`:UserWarning")  # Lightning: of it as such
@pytest.mark.parametrize("module", [ManualNet, IteratorNet])
def test_a_loss_function_is_the_way_out(module):
    monitor = SubspaceMonitor(k=2, max_overhead=None, sample="all", loss_fn=of_layer)
    check_project(trainer(monitor), module(), monitor._settings.loss_fn)
    weights = []
    for callbacks in ([monitor], []):
        torch.manual_seed(0)
        net = module()
        trainer(*callbacks).fit(net, batches())
        weights.append(net.layer.weight)
    assert [record.step for record in monitor.history] == [0, 2]
    assert torch.equal(*weights)


def test_differences_of_what_is_computed_in_a_narrow_type_are_refused():
    with pytest.raises(MisconfigurationException, match=r"SubspaceMonitor: dtype: .*expected 'float32' or 'float64'"):
        SubspaceMonitor(dtype="native", curvature="finite-difference")


def test_two_monitors_of_one_name_are_refused():
    class Other(SubspaceMonitor):
        pass

    with pytest.raises(MisconfigurationException, match="name: expected another one for every callback"):
        trainer(SubspaceMonitor(k=1), Other(k=2)).fit(Net(), batches())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SubspaceMonitor`"):
        trainer(SubspaceMonitor(k=1), SubspaceMonitor(k=2))  # Lightning's own: they would share a place in checkpoints


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero:UserWarning")
def test_an_empty_dataset_is_left_to_lightning_which_skips_training():
    monitor = SubspaceMonitor(k=2)
    trainer(monitor).fit(Net(), DataLoader(TensorDataset(torch.zeros(0, 4)), batch_size=4))
    assert monitor.history == []
    monitor.plot()


# Callbacks that wait for a value


@pytest.mark.parametrize("key", ["subspace/sharpness", "subspace_eigenvalues/01"])
def test_early_stopping_that_insists_on_a_value_is_told_what_will_happen(key):
    run = trainer(EarlyStopping(key, strict=True))
    with pytest.warns(UserWarning, match=re.escape(f"EarlyStopping(monitor={key!r}, strict=True) will end the run")):
        warn_of_missing_keys(run, "subspace")


def test_a_checkpoint_that_waits_for_a_value_is_told_too(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="subspace/sharpness")
    with pytest.warns(UserWarning, match="saves nothing before a probe has logged that value"):
        warn_of_missing_keys(trainer(checkpoint, enable_checkpointing=True), "subspace")


@pytest.mark.parametrize(
    "callback",
    [
        EarlyStopping("subspace/sharpness", strict=False),
        EarlyStopping("val_loss", strict=True),
        EarlyStopping("subspaces/sharpness", strict=True),
        ModelCheckpoint(),
    ],
)
def test_nothing_is_said_where_nothing_can_happen(callback):
    warn_of_missing_keys(trainer(callback, enable_checkpointing=True), "subspace")


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        (["Trace"], "pass [Trace()] after `from {} import Trace`"),
        ("trace", "pass [Trace()] after `from {} import Trace`"),
        ([Density(), "lightning_subspace.SecondLoss"], "pass [SecondLoss(...)] after `from {} import SecondLoss`"),
        *(
            ([word], "pass objects, such as [Trace()] after `from {} import Trace`, not their names")
            for word in ("Hessian", "SpectralDensity", "Measurement", "Probe")  # none of a measurement
        ),
    ],
)
def test_a_name_in_place_of_a_measurement_is_refused_with_what_to_pass(given, way_out):
    for measurements in (given, iter(given)) if isinstance(given, list) else (given,):
        with pytest.raises(MisconfigurationException) as raised:
            SubspaceMonitor(measurements=measurements)
        message, _, told = str(raised.value).rpartition("; ")
        assert "measurements: expected a list of instances of lightning_subspace.Measurement, got " in message
        assert told == f"{way_out.format('lightning_subspace.measurements')}."


@pytest.mark.parametrize("item", [Trace(), Density(), SpectralSharpness()])
def test_without_products_measurements_that_need_them_are_refused(item):
    with pytest.raises(MisconfigurationException, match=f"measurements: expected ones .* got '{type(item).__name__}'"):
        SubspaceMonitor(curvature="none", measurements=[item])
    SubspaceMonitor(curvature="none", measurements=[Layers(), StepCurvature()])
    SubspaceMonitor(k=0, measurements=[item])


@pytest.mark.parametrize("k", [1, 9, 11])
def test_without_products_eigenpairs_that_are_asked_for_are_refused(k):
    told = f"k: expected 0 or the default beside curvature='none', without eigenpairs, got {k}; leave it out, or pass "
    with pytest.raises(MisconfigurationException, match=told):
        SubspaceMonitor(k, curvature="none")
    with pytest.raises(ValueError, match=told):
        measure_subspace(nn.Linear(2, 1), [torch.ones(1, 2)], loss_fn=Net.training_step, k=k, curvature="none")
    for given in ({}, {"k": 0}):
        assert SubspaceMonitor(curvature="none", **given).history == []
