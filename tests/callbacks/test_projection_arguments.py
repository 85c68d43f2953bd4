"""What a projection refuses, and the same class under both names of Lightning, from YAML and in help texts."""

import importlib
import inspect
import math
import re
import sys

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import StartWhenAligned, SubspaceProjection
from lightning_subspace.callbacks.projection import SubspaceProjection as Direct
from tests.processes import run

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}


# What is refused


WRONG = {
    "keep": [("one of 'top', 'bulk'", ["inside", "", None, True])],
    "k": [("an integer of at least 1", [0, -1, 2.0, "10", True, None])],
    "basis": [("a function of the module, a loader or a list of batches", ["all", 3])],
    "where": [("one of 'update', 'gradient'", ["step", None, True])],
    "refresh_every_n_steps": [("an integer of at least 1", [0, -5, True, 1.5, "1", None, [1, 2]])],
    "start_when": [
        ("an integer of at least 0", [-1, True]),
        ("a step or a StartWhenAligned(chi=..., decay=...)", [0.95, "aligned", None, {"chi": 0.9}]),
    ],
    "sample": [("an integer of at least 1", [0, True]), ("one of 'all', 'current'", ["everything"])],
    "gradient_sample": [("one of 'all'", ["current"]), ("at least the 1024 of `sample`", [1023])],
    "resample": [("True or False", [1])],
    "read_timeout": [("a positive number of seconds", [0, None])],
    "batch_size": [("an integer of at least 1 or None", [0, "64"])],
    "weight": [("a function or None", [3])],
    "which": [("one of 'LA', 'SA', 'LM', 'BE'", ["SM", None])],
    "tol": [("a number in (0, 0.1]", [0, 0.2, None, math.nan])],
    "max_matvecs": [("at least as many products as k=10 eigenpairs", [9]), ("an integer of at least 1", [0, None])],
    "ncv": [("an integer of at least 13 or None", [12]), ("an integer of at least 1 or None", [True])],
    "verify": [("'always', 'never', or an integer of at least 1", ["sometimes", 0])],
    "params": [("a list of patterns such as ['head.*'], or None", ["head.*", [3]])],
    "loss_fn": [("a function or None", ["cross_entropy"])],
    "mode": [("one of 'train', 'eval'", ["test"])],
    "dtype": [("one of 'float32', 'float64', 'native'", ["bfloat16"])],
    "curvature": [("one of 'hessian', 'ggn', 'finite-difference'", ["gauss-newton"])],
    "on_check_fail": [("one of 'warn', 'raise', 'finite-difference', 'omit'", ["ignore"])],
    "on_failure": [("one of 'warn', 'raise'", ["ignore"])],
    "name": [("an ASCII word", ["", "a b", None])],
    "seed": [("an integer from 0 to 2**63 - 1", [-1, None])],
}
CASES = [(name, expected, value) for name, rows in WRONG.items() for expected, values in rows for value in values]


def test_every_argument_has_its_refusals():
    assert list(WRONG) == list(inspect.signature(SubspaceProjection).parameters)
    assert SubspaceProjection is Direct


@pytest.mark.parametrize(("name", "expected", "value"), CASES)
def test_a_wrong_value_is_refused_by_name(name, expected, value):
    with pytest.raises(MisconfigurationException) as caught:
        SubspaceProjection(**{"keep": "top", name: value})
    text = str(caught.value)
    assert text.startswith(f"SubspaceProjection: {name}: expected ")
    assert expected in text
    assert f", got {value!r}" in text


@pytest.mark.parametrize("name", ["chi", "decay"])
@pytest.mark.parametrize("value", [1.0, -0.1, math.nan, "0.9", True, None])
def test_an_alignment_is_made_of_shares(name, value):
    with pytest.raises(
        MisconfigurationException,
        match=re.escape(f"StartWhenAligned: {name}: expected a number of at least 0 and below 1, got {value!r}"),
    ):
        StartWhenAligned(**{name: value})


def test_finite_differences_of_a_native_loss_are_refused():
    with pytest.raises(MisconfigurationException, match="SubspaceProjection: dtype: "):
        SubspaceProjection("top", dtype="native", curvature="finite-difference")


def module_of(namespace=pl, **attributes):
    class Net(namespace.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            for name, value in attributes.items():
                setattr(self, name, value)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.3)

    return Net()


def loader():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(32) % 3
    return DataLoader(TensorDataset(torch.randn(32, 4, generator=generator) + torch.eye(3, 4)[labels], labels), 8)


def fit(*callbacks, namespace=pl, module=None, **options):
    trainer = namespace.Trainer(
        **{"max_steps": 2, "enable_checkpointing": False, **QUIET, **options}, callbacks=list(callbacks)
    )
    trainer.fit(module_of(namespace) if module is None else module, loader())
    return trainer


REFUSED = {
    "k": ({"k": 100}, {}, "SubspaceProjection: k: expected 0..43, the number of parameters, got 100."),
    "params": ({"params": ["tail.*"]}, {}, "SubspaceProjection: params: expected patterns of parameter names, got one"),
    "manual": ({}, {"automatic_optimization": False}, "SubspaceProjection: Net optimizes manually"),
    "sample": ({"sample": [(torch.zeros(3), "x")], "weight": lambda batch: 0.0}, {}, "SubspaceProjection: weight: "),
}


@pytest.mark.parametrize(("arguments", "attributes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_at_the_start(arguments, attributes, words):
    module = module_of(**attributes)
    with pytest.raises(MisconfigurationException, match=re.escape(words)):
        fit(SubspaceProjection("top", **arguments), module=module)


def test_equal_names_are_refused():
    # Lightning itself, when the Trainer is made, since their states would be one
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SubspaceProjection`"):
        fit(SubspaceProjection("top"), SubspaceProjection("bulk"))


class Stepping:
    """What Lightning takes for an optimizer, and torch does not."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_an_optimizer_without_hooks_is_refused():
    module = module_of()
    module.configure_optimizers = lambda: Stepping(torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"derived from torch.optim.Optimizer.*got Stepping"):
        fit(SubspaceProjection("top", k=2), module=module)


def test_shards_are_refused():
    def refused():
        with pytest.raises(MisconfigurationException, match="has shards of them; use strategy='ddp', or devices=1"):
            fit(
                SubspaceProjection("top"),
                strategy=ModelParallelStrategy(
                    data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
                ),
                devices=2,
            )
        return True

    assert run(refused, 2, group=False) == [True, True]


# Both namespaces


@pytest.fixture(params=NAMESPACES)
def namespace(request):
    pytest.importorskip(request.param.split(".")[0])
    return importlib.import_module(request.param)


def test_trainers_of_both_namespaces_are_projected_alike(namespace):
    found = {}
    for each in (namespace, pl):
        one = SubspaceProjection("bulk", k=2, sample="all", on_failure="raise")
        trainer = fit(one, namespace=each, max_steps=4)
        assert one.is_active
        found[each] = nn.utils.parameters_to_vector(trainer.lightning_module.parameters()).detach()
    assert torch.equal(found[namespace], found[pl])
    plain = fit(namespace=namespace, max_steps=4).lightning_module
    assert not torch.equal(found[pl], nn.utils.parameters_to_vector(plain.parameters()))
    error = importlib.import_module(f"{namespace.__name__}.utilities.exceptions").MisconfigurationException
    with pytest.raises(error, match="keep: expected one of 'top', 'bulk'"):
        SubspaceProjection("both")


def boring_loss(module, batch, batch_idx):
    return module(batch).square().mean()


YAML = {
    "step": ({"start_when": 1}, False),
    # the batches of the boring model have one example, and a gathered sample is there when it is full
    "alignment": ({"start_when": {"chi": 0.1, "decay": 0.5}, "sample": 2, "gradient_sample": 2}, True),
    "alignment by default": ({"start_when": {}, "sample": 2, "gradient_sample": 2}, True),
    "the rest": (
        {
            "refresh_every_n_steps": 2,
            "sample": 16,
            "gradient_sample": 16,
            "params": ["layer.*"],
            "loss_fn": "tests.callbacks.test_projection_arguments.boring_loss",
            "dtype": "float64",
            "curvature": "finite-difference",
            "name": "dom",
        },
        False,
    ),
}


def command_line(namespace, **arguments):
    cli = importlib.import_module(f"{namespace.__name__}.cli").LightningCLI
    boring = importlib.import_module(f"{namespace.__name__}.demos.boring_classes").BoringModel
    return cli(boring, save_config_callback=None, **arguments)


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about Lightning's use of it
@pytest.mark.parametrize(("arguments", "is_alignment"), YAML.values(), ids=YAML)
def test_the_command_line_reads_it_from_yaml(namespace, arguments, is_alignment, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(".")
    given = {"keep": "top", "k": 2, "on_failure": "raise", **arguments}
    callback = {"class_path": "lightning_subspace.SubspaceProjection", "init_args": given}
    trainer = {"max_steps": 3, "limit_val_batches": 0, "enable_checkpointing": False, **QUIET, "callbacks": [callback]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer}))
    cli = command_line(namespace, run=False, seed_everything_default=0, args=["--config", str(path)])
    [one] = [c for c in cli.trainer.callbacks if isinstance(c, SubspaceProjection)]
    cli.trainer.fit(cli.model)
    assert cli.trainer.global_step == 3
    assert (one.chi is not None) == is_alignment


def test_the_command_line_explains_the_arguments(namespace, monkeypatch, capsys):
    arguments = ["main.py", "fit", "--trainer.callbacks.help", "lightning_subspace.SubspaceProjection"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        command_line(namespace)
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name in WRONG:
        assert f"--trainer.callbacks.{name} " in text, name
    assert "optimizer steps between two computations of the space" in text
