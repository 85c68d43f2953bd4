"""Every wrong argument of every public function is refused at once, by name, and changes nothing.

The table below has a row for every argument of everything that can be imported by a documented name: one that is added
without a row fails `test_every_argument_of_every_public_name_has_a_row`.
"""

import enum
import importlib
import inspect
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_subspace
from lightning_subspace import (
    CheckpointError,
    Chi,
    Density,
    Measurement,
    Needs,
    Probe,
    Prospect,
    Record,
    SampleError,
    SubspaceMonitor,
    SubspaceProjection,
    Trace,
    eigsh,
    measure_subspace,
    read_history,
)
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg import quadrature
from lightning_subspace.metrics import PrincipalAngles
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace import Subspace
from lightning_subspace.subspace.sketch import Sketch
from lightning_subspace.subspace.solver import Solver
from tests.thorough import usual
from tests.works_with.test_state import QUIET

ROOMS = ("", "linalg", "measurements", "metrics", "report", "subspace")
NAN, INF = math.nan, math.inf
NOW = 1_764_130_000_000_000_000  # as `time.time_ns` gives

# Names without a row, and why.
MADE_HERE = {
    "EigshResult",
    "Estimate",
    "LossSlices",
    "Probe",
    "Prospect",
    "Quadrature",
    "SpectralDensity",
    "Subspace",
}  # only read
DRIVEN = {"Publisher", "ProgressLine", "Reporter"}  # called by the callbacks alone, and never raise
# What the package calls, and users override or leave alone.
CALLED = {
    "after_step",
    "expected_products",
    "figures",
    "is_due",
    "measure",
    "prepare",
    "record_at",
    "refusal",
    "require_space",
    "see_update",
    "should_measure",
    "with_found",
}
UNCHECKED = {"kwargs", "ranks"}  # torchmetrics checks its own; a process group is made by the package
HOOKS = {name for base in (pl.Callback, torchmetrics.Metric) for name in dir(base)} - {"update"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x)


NET, FROZEN, LINE = Net(), Net().requires_grad_(False), nn.Linear(3, 1)
X, Y = torch.arange(80.0).reshape(16, 5).sin(), torch.arange(16) % 3
DIAGONAL = torch.arange(8.0)
ROWS = torch.eye(4)[:2]
RESULT = eigsh(lambda v: DIAGONAL * v, 8, 2)
SPACE = Subspace.of(RESULT)
SPECTRUM = quadrature(lambda v: DIAGONAL * v, 8, steps=3, vectors=1)
RECORD = Record(0, {"sharpness": 7.0}, SPACE)
PART = Partition.even(ParameterSpace.of(NET))


FOUR = Probe(
    **{**dict.fromkeys(f.name for f in fields(Probe) if f.init), "partition": Partition.even(ParameterSpace.of(LINE))}
)
PROSPECT = Prospect(0, Solver(), sample_of_batches([X]))


def loss(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def two(a, b):
    return a


class Indexed(Dataset):
    def __getitem__(self, index):
        return X[index]


class Callable3:
    def __call__(self, module, batch, batch_idx):
        return loss(module, batch, batch_idx)


# Wrong values by the kind of an argument

OTHERS = [object(), 1j, b"3", {"a": 1}]


def integers(least, *, none=False):
    """What is no integer of at least `least`; None is one of them unless it has a meaning."""
    wrong = [
        least - 1,
        -5,
        1.5,
        np.float32(2.0),
        NAN,
        INF,
        "3",
        True,
        False,
        torch.tensor(3),
        [3],
        np.array(3),
        *OTHERS,
    ]
    return wrong if none else [None, *wrong]


def numbers(*outside, none=False):
    """What is no number, and numbers that are not in the range."""
    wrong = [NAN, 10**400, "0.1", True, torch.tensor(0.1), [0.1], *OTHERS, *outside]
    return wrong if none else [None, *wrong]


SEEDS = [None, -1, 2**63, 2**64, -(2**70), 0.5, NAN, "x", True, torch.tensor(0), [0], *OTHERS]
WORDS = ["no such word", "", "3", 3, True, None, ["LA"], *OTHERS]
FLAGS = [0, 1, None, "yes", 1.0, np.array(True), torch.tensor(True), [True], *OTHERS]
NAMES = ["", "a b", "a/b", "größe", 3, None, Path("subspace"), b"subspace", ["subspace"], True]
TEXTS = [None, 3, b"a", ["a"], Path("a"), True]


def functions(*others, none=True):
    """What is no function, or takes another number of arguments."""
    wrong = [3, "f", [two], nn.Linear, lambda: None, lambda a, b, c, d, e: None, *others]
    return wrong if none else [None, *wrong]


DATA = [
    X, X.numpy(), [X, Y], [{"x": X}, Y], ({"x": X}, Y), [X, torch.ones(16, 1)], (X, X), {"x": X}, [], (),
    [1, 2], [True], 0.5, DataLoader, NET, TensorDataset(X), Indexed(), object(), b"x", NAN,
]  # fmt: skip
PATTERNS = ["head.*", b"head", 3, [3], [], (), {"head.*": 1}, [None], [["head.*"]], NET.parameters, True, nn.Linear]
LISTS = [3, 0, "", "Trace", True, Trace, [Trace], [3], [None], [[Trace()]], {"a": Trace()}, Trace()]
SAME = Trace()
VECTORS = [None, 3, "v", torch.ones(3), torch.ones(4, 1), torch.ones(4, dtype=torch.complex64), np.ones(4), [1.0] * 4]
BASES = [None, 3, "V", ROWS[0], ROWS * 1j, ROWS.numpy(), ROWS.tolist()]
RECORDS = [None, 3, "r", RECORD, [3], [None], {"a": RECORD}, [RECORD.metrics], Record, [Record], torch.ones(2)]

PATTERNS_OF_GROUPS = [3, b"head", [3], [], (), "", [""], [None], [["head.*"]], NET.parameters, nn.Linear, {"head.*": 1}]
GROUPS = [
    3, True, "layers", "", ["*.weight"], {}, nn.Linear, {3: "*"}, {"": "*"}, {"a": 3}, {"a": []}, {"a": [3]},
]  # fmt: skip
MEASUREMENT = {"every": integers(1)}
SETTINGS = {
    "sample": [None, 0, -1, True, "everything", "", *DATA],
    "gradient_sample": ["current", "", 1023, np.float64(8192), *integers(1)],
    "resample": FLAGS,
    "read_timeout": numbers(0, -1.0, -INF, -0.0),
    "batch_size": integers(1, none=True),
    "weight": functions(),
    "which": ["SM", "la", *WORDS],
    "tol": numbers(0, -0.0, 0.2, -1e-3, 1, INF),
    "max_matvecs": [9, *integers(1)],
    "ncv": [12, *integers(1, none=True)],
    "verify": ["sometimes", *integers(1)],
    "params": PATTERNS,
    "loss_fn": functions(two, F.cross_entropy, F.mse_loss, nn.MSELoss(), nn.MSELoss, "cross_entropy"),
    "mode": WORDS,
    "dtype": ["bfloat16", torch.float64, *WORDS],
    "curvature": ["gauss-newton", *WORDS],
    "on_check_fail": ["ignore", *WORDS],
    "on_failure": ["ignore", *WORDS],
    "name": NAMES,
    "seed": SEEDS,
}


@dataclass
class Row:
    """How a function is called rightly, and which values each of its arguments must refuse."""

    valid: dict[str, Any]
    wrong: dict[str, list[Any]]
    call: Callable[..., Any] | None = None  # where the walk finds a method of a class
    speaker: str = ""  # before the name of the argument
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError)


def callback(made, **wrong):
    return Row(
        {"keep": "top"} if made is SubspaceProjection else {}, wrong, None, made.__name__, MisconfigurationException
    )


TABLE = {
    "SubspaceMonitor": callback(
        SubspaceMonitor,
        k=integers(0),
        every_n_steps=[0, -5, True, 1.5, "100", [], [3, -1], [2.0], [True], None, {3: 1}, torch.tensor([3]), NAN, b"3"],
        max_overhead=numbers(0, 1, -0.0, -0.1, 20, INF, none=True),
        reference_step=integers(0, none=True),
        measurements=[*LISTS, [SAME, SAME]],
        log=WORDS,
        basis=["cuda", *WORDS],
        **SETTINGS,
    ),
    "SubspaceProjection": callback(
        SubspaceProjection,
        keep=WORDS,
        k=integers(1),
        basis=[*functions(none=True)[:2], *functions()[3:], *DATA],
        where=WORDS,
        refresh_every_n_steps=integers(1),
        start_when=[
            -1,
            True,
            0.95,
            "aligned",
            None,
            {"chi": 0.9},
            lightning_subspace.StartWhenAligned,
            torch.tensor(3),
        ],
        **SETTINGS,
    ),
    "StartWhenAligned": callback(
        lightning_subspace.StartWhenAligned, chi=numbers(1.0, -0.1, INF), decay=numbers(1.0, -0.1, INF)
    ),
    "measure_subspace": Row(
        {"module": NET, "batches": [(X, Y)], "k": 2, "loss_fn": loss},
        {
            "module": [FROZEN, None, 3, "net", Net, [NET], loss, NET.state_dict()],
            "batches": [None, 3, "all", True, *DATA],
            "k": [19, 2**70, *integers(0)],
            "tol": SETTINGS["tol"],
            "verify": [*WORDS, True],
            "which": SETTINGS["which"],
            "ncv": [4, *integers(1, none=True)],
            "basis": ["cuda", *WORDS],
            "max_matvecs": integers(1),
            "loss_fn": SETTINGS["loss_fn"],
            "weight": functions(),
            "params": ["none.*", ["none.*"], *PATTERNS],
            "mode": WORDS,
            "measurements": [None, *LISTS, [SAME, SAME]],
            "optimizer": [3, "sgd", torch.optim.SGD, [torch.optim.SGD(NET.parameters(), lr=0.1)], True],
            "previous": [3, "r", SPACE, Record, [RECORD], RECORD, RECORD.without_eigenvectors(), RECORD.metrics, True],
            "dtype": ["bfloat16", torch.float16, *WORDS],
            "curvature": SETTINGS["curvature"],
            "on_check_fail": SETTINGS["on_check_fail"],
            "seed": SEEDS,
            "group": [3, "world", -100, [0, 1], True],
        },
    ),
    "eigsh": Row(
        {"matvec": lambda v: DIAGONAL * v, "n": 8, "k": 2},
        {
            "matvec": [torch.eye(8), *functions(two, none=False)],
            "n": integers(0),
            "k": [9, *integers(1)],
            "which": SETTINGS["which"],
            "tol": numbers(0, -1.0, INF),
            "subspace_tol": numbers(0, -1.0, INF, none=True),
            "ncv": [4, *integers(1, none=True)],
            "basis": ["auto", *WORDS],
            "max_matvecs": integers(1),
            "v0": [3, "v", [1.0] * 8, torch.ones(7), torch.zeros(8), torch.full((8,), NAN), torch.ones(8) * 1j],
            "verify": [*WORDS, True],
            "delta": numbers(0, 1, -0.0, 2),
            "seed": SEEDS,
            "dtype": [torch.float16, torch.int64, "float32", None, float, []],
            "device": ["nowhere", "cuda:99", "meta", 1.5, [], None.__class__],
            "all_sum": functions(two),
            "random": functions(lambda seed: None),
            "on_matvec": functions(lambda number: None),
            "dimension": integers(1, none=True),
            "max_asymmetry": numbers(-1e-9, -INF),
        },
    ),
    "linalg.quadrature": Row(
        {"matvec": lambda v: DIAGONAL * v, "n": 8},
        {
            "matvec": [torch.eye(8), *functions(two, none=False)],
            "n": integers(0),
            "steps": integers(1),
            "vectors": integers(1),
            "known": [
                3,
                "k",
                torch.ones(3),
                (),
                (torch.ones(2),) * 3,
                (torch.ones(2), torch.ones(2), torch.eye(7)[:2]),
            ],
            "seed": SEEDS,
            "dtype": [torch.float16, torch.int64, "float32", None, float, []],
            "device": ["nowhere", "cuda:99", "meta", 1.5, []],
            "all_sum": functions(two),
            "random": functions(lambda seed: None),
            "dimension": integers(1, none=True),
        },
    ),
    "linalg.Quadrature.sum": Row({"function": torch.abs}, {"function": functions(two, none=False)}, SPECTRUM.sum),
    "linalg.Quadrature.below": Row({"threshold": 1.0}, {"threshold": numbers(INF, -INF)}, SPECTRUM.below),
    "linalg.Quadrature.density": Row(
        {"grid": torch.ones(3), "width": 1.0},
        {"grid": [None, 3, [1.0], torch.ones(2, 2), torch.tensor(1.0)], "width": numbers(0, -1.0, INF)},
        SPECTRUM.density,
    ),
    "read_history": Row(
        {"path": "nothing.ckpt"},
        {"path": [None, 3, b"a", ["a"], {}, True, NAN], "name": [3, b"a", Path("a"), ["a"], True]},
    ),
    "to_rows": Row({"records": [RECORD]}, {"records": RECORDS}),
    "Record": Row(
        {"step": 0, "metrics": {}},
        {
            "step": integers(0),
            "metrics": [None, 3, "m", [("a", 1.0)]],
            "subspace": [3, "s", ROWS, Subspace, RECORD],
            "sketch": [3, "s", ROWS, Sketch],
            "tables": [None, 3, "t", [], {"layers": {"gradient": [1.0]}}],
        },
    ),
    "Subspace.of": Row(
        {"result": RESULT},
        {"result": [None, 3, SPACE, ROWS], "partition": [3, "p", ParameterSpace.of(NET), Partition]},
    ),
    "Subspace.fraction": Row({"vector": torch.ones(8)}, {"vector": [*VECTORS, torch.ones(7)]}, SPACE.fraction),
    "Subspace.overlap": Row({"other": torch.eye(8)[:3]}, {"other": [*BASES, torch.ones(2, 7)]}, SPACE.overlap),
    "subspace.fraction": Row(
        {"basis": ROWS, "vector": torch.ones(4)}, {"basis": BASES, "vector": VECTORS, "ranks": []}
    ),
    "subspace.overlap": Row({"basis": ROWS, "other": ROWS}, {"basis": BASES, "other": BASES, "ranks": []}),
    "subspace.principal_angles": Row({"basis": ROWS, "other": ROWS}, {"basis": BASES, "other": BASES}),
    "Probe.dot": Row({"a": torch.ones(4), "b": torch.ones(4)}, {"a": VECTORS, "b": VECTORS}, FOUR.dot),
    "Probe.norm": Row({"vector": torch.ones(4)}, {"vector": VECTORS}, FOUR.norm),
    "Prospect.solve": Row(
        {},
        {"k": integers(1, none=True), "verify": FLAGS},
        PROSPECT.solve,
    ),
    "ActivationSpectrum": Row(
        {"modules": ["layer"]},
        {
            "modules": [None, *PATTERNS],
            "tail": [None, 3, "ab", (1,), (1, 2, 3), (0, 5), (-3, 5), (3, 4), (5, 1), (1.0, 9), (True, 9), {1: 9}, NAN],
            "dim": [1.5, NAN, "3", True, [3], torch.tensor(1), *OTHERS],
            **MEASUREMENT,
        },
    ),
    "BatchSharpness": Row({}, {"batches": integers(1), **MEASUREMENT}),
    "GradientNoise": Row({}, {"batches": integers(1), **MEASUREMENT}),
    "NoiseScale": Row({}, {"split_every": integers(1)}),
    "Control": Row({}, {"reference_step": integers(0, none=True), **MEASUREMENT}),
    "CriticalSharpness": Row({}, {"along": WORDS, "max_points": [1, *integers(2)]}),
    "Density": Row(
        {}, {"steps": integers(1), "vectors": integers(1), "keep": integers(1), "seed": SEEDS, **MEASUREMENT}
    ),
    "Trace": Row({}, {"vectors": integers(1), "seed": SEEDS, "groups": GROUPS, **MEASUREMENT}),
    "Layers": Row({}, {"groups": [None, *GROUPS], "exact": [None, *PATTERNS_OF_GROUPS], **MEASUREMENT}),
    "Matrices": Row(
        {},
        {
            "rank": integers(1),
            "modules": [pattern for pattern in PATTERNS if pattern is not None],
            "anchor_step": integers(0),
            **MEASUREMENT,
        },
    ),
    "SecondLoss": Row(
        {"batches": [(X, Y)]},
        {
            "batches": [None, 3, "all", True, *DATA],
            "loss_fn": functions(two, F.cross_entropy, F.mse_loss, nn.MSELoss(), nn.MSELoss, "cross_entropy"),
            "weight": functions(),
            "overlap": FLAGS,
            "critical": FLAGS,
            "reliability": FLAGS,
            **MEASUREMENT,
        },
    ),
    "Slices": Row(
        {},
        {
            "at": [[], [-1], 3, "all", [1.5], [True]],
            "directions": integers(1),
            "share": [0.0, -1.0, NAN, INF, "1"],
            "points": [2, 4, *integers(3)],
            "plane": FLAGS,
            "keep": integers(1),
            **MEASUREMENT,
        },
    ),
    "SpectralSharpness": Row(
        {},
        {
            "params": ["*.weight", [1], 3],
            "lr": [0.0, -1.0, NAN, INF, "1"],
            "adjust_lr_fn": [word for word in WORDS if word is not None],
            "max_products": [2, *integers(3)],
            **MEASUREMENT,
        },
    ),
    "Stability": Row({}, {"eigensolve": FLAGS, **MEASUREMENT}),
    "Step": Row({}, {"pool": integers(1)}),
    "StepCurvature": Row({}, {"hessian": FLAGS, **MEASUREMENT}),
    "UpdateSpectrum": Row({}, {"window": [1, *integers(2)], "stride": integers(1), **MEASUREMENT}),
    "measurements.Reliability": Row({}, MEASUREMENT),
    "measurements.default_measurements": Row({"k": 2}, {"k": integers(0)}),
    "metrics.gradient_fraction": Row(
        {"basis": ROWS, "vector": torch.ones(4)},
        {
            "basis": [2 * ROWS, ROWS.T, ROWS[:, :0], ROWS.int(), *BASES],
            "vector": [torch.ones(4).int(), *VECTORS],
            "validate_args": FLAGS,
        },
    ),
    **{
        f"metrics.{name}": Row(
            {"basis": ROWS, "other": ROWS},
            {
                "basis": [2 * ROWS, ROWS.T, ROWS[:, :0], ROWS.int(), *BASES],
                "other": [2 * ROWS, ROWS.T, torch.eye(3), *BASES],
                "validate_args": FLAGS,
            },
        )
        for name in ("subspace_overlap", "principal_angles")
    },
    "metrics.GradientFraction": Row({}, {"validate_args": FLAGS, "kwargs": []}),
    "metrics.SubspaceOverlap": Row({}, {"validate_args": FLAGS, "kwargs": []}),
    "metrics.PrincipalAngles": Row(
        {"num_angles": 2}, {"num_angles": integers(1), "validate_args": FLAGS, "kwargs": []}
    ),
    "metrics.GradientFraction.update": Row(
        {"basis": ROWS, "vector": torch.ones(4)},
        {"basis": [2 * ROWS, *BASES], "vector": VECTORS},
        lambda **given: lightning_subspace.metrics.GradientFraction().update(**given),
    ),
    **{
        f"metrics.{name}.update": Row(
            {"basis": ROWS, "other": ROWS}, {"basis": [2 * ROWS, *BASES], "other": [2 * ROWS, *BASES]}, call
        )
        for name, call in {
            "SubspaceOverlap": lambda **given: lightning_subspace.metrics.SubspaceOverlap().update(**given),
            "PrincipalAngles": lambda **given: PrincipalAngles(2).update(**given),
        }.items()
    },
    "report.logged_name": Row({"prefix": "a", "key": "b"}, {"prefix": TEXTS, "key": TEXTS}),
    "report.select": Row(
        {"metrics": {}, "log": "all", "extra": set()},
        {"metrics": [None, 3, "m", [("a", 1.0)]], "log": WORDS, "extra": [None, 3, "gap_index"]},
    ),
    "report.spectrum_figure": Row({"records": [RECORD]}, {"records": RECORDS}),
    "report.layers_figure": Row({"records": [RECORD]}, {"records": RECORDS}),
    "report.overlap_figure": Row(
        {"steps": [0, 10], "matrix": np.eye(2)},
        {
            "steps": [None, 3, "ab", [0.5, 1.0], ["a", "b"], {0: 1, 1: 2}],
            "matrix": [None, 3, np.eye(3), np.eye(2).tolist(), torch.eye(2), np.eye(2, dtype=object)],
            "error": numbers(-0.1, none=True),
        },
    ),
    "report.summary_figure": Row(
        {"records": [RECORD], "steps": [0, 10], "matrix": np.eye(2)},
        {
            "records": RECORDS,
            "steps": [None, 3, "ab", [0.5, 1.0], ["a", "b"], {0: 1, 1: 2}],
            "matrix": [None, 3, np.eye(3), np.eye(2).tolist(), torch.eye(2), np.eye(2, dtype=object)],
            "error": numbers(-0.1, none=True),
        },
    ),
}


# What there is


def own_names(module):
    """What a room lists: what it imports by name, and its own functions."""
    if hasattr(module, "__all__"):
        return module.__all__
    source = inspect.getsource(module)
    return [*re.findall(r"import (\w+) as \1\n", source), *re.findall(r"^def ([a-z]\w*)", source, flags=re.MULTILINE)]


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "args")]


def public():
    """Functions, classes and methods that a user can call with arguments, by their first public name."""
    seen, found = set(), {}
    for room in ROOMS:
        module = importlib.import_module(".".join(filter(None, ["lightning_subspace", room])))
        for name in own_names(module):
            item, path = getattr(module, name), ".".join(filter(None, [room, name]))
            is_error = isinstance(item, type) and issubclass(item, BaseException | enum.Enum)
            if is_error or name in DRIVEN or not (isinstance(item, type) or inspect.isfunction(item)) or item in seen:
                continue
            seen.add(item)
            if name not in MADE_HERE and arguments(item):
                found[path] = item
            for inner in dir(item) if isinstance(item, type) else []:
                method = getattr(item, inner)
                bare = getattr(method, "__func__", method)
                is_own = str(getattr(bare, "__module__", None)).startswith("lightning_subspace")
                if (
                    inner.startswith("_")
                    or inner in CALLED | HOOKS
                    or not callable(method)
                    or not is_own
                    or bare in seen
                ):
                    continue
                seen.add(bare)
                if arguments(method):
                    found[f"{path}.{inner}"] = method
    return found


PUBLIC = public()


def test_every_argument_of_every_public_name_has_a_row():
    assert sorted(TABLE) == sorted(PUBLIC)
    for path, item in PUBLIC.items():
        assert sorted(TABLE[path].wrong) == sorted(arguments(item)), path
        assert all(values or name in UNCHECKED for name, values in TABLE[path].wrong.items()), path


def test_an_argument_without_a_row_is_found(monkeypatch):
    monkeypatch.delitem(TABLE["Trace"].wrong, "seed")
    with pytest.raises(AssertionError, match="Trace"):
        test_every_argument_of_every_public_name_has_a_row()


# What is wrong


def state():
    """All that a refusal could have changed."""
    random_numbers = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    return [p.tolist() for p in NET.parameters()], [p.grad for p in NET.parameters()], X.tolist(), random_numbers


def refusal(path, name, value):
    """The error for a value, or None where it is taken."""
    row = TABLE[path]
    try:
        (row.call or PUBLIC[path])(**{**row.valid, name: value})
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, row in TABLE.items() for name in row.wrong])
def test_what_is_wrong_is_refused_by_name_and_changes_nothing(path, name):
    row, before, seen = TABLE[path], state(), []
    for value in row.wrong[name]:
        error = refusal(path, name, value)
        head = f"{row.speaker}: {name}: " if row.speaker else f"{name}: "
        text = str(error)
        is_right = isinstance(error, row.error) and re.match(rf"(?s){re.escape(head)}.*expected .+, got .+\.$", text)
        if not is_right:
            seen.append(f"{value!r}: {type(error).__name__}: {text}")
    assert seen == []
    assert state() == before


@pytest.mark.parametrize("path", sorted(TABLE.keys() - {"read_history"}))  # which has tests with checkpoints
def test_the_other_arguments_of_a_row_are_right(path):
    row = TABLE[path]
    (row.call or PUBLIC[path])(**row.valid)


# What is unusual, and right

TAKEN = [
    (
        "SubspaceMonitor",
        {"k": np.int64(3), "max_matvecs": np.uint16(50), "ncv": np.int8(20), "verify": np.int64(10)},
    ),
    ("SubspaceMonitor", {"sample": np.int64(64), "gradient_sample": np.int64(64), "reference_step": np.int64(0)}),
    ("SubspaceMonitor", {"every_n_steps": np.int64(5), "tol": np.float32(0.01), "max_overhead": np.float32(0.5)}),
    ("SubspaceMonitor", {"every_n_steps": np.array([0, 5]), "read_timeout": np.float64(3)}),
    ("SubspaceMonitor", {"every_n_steps": (step for step in (1, 2)), "params": (name for name in ["layer.*"])}),
    ("SubspaceMonitor", {"every_n_steps": {100, 200}, "params": {"layer.*", "head.*"}, "read_timeout": INF}),
    ("SubspaceMonitor", {"measurements": (made() for made in (Trace, Chi))}),
    ("SubspaceMonitor", {"measurements": {"a": Trace()}.values()}),
    ("SubspaceMonitor", {"measurements": [Trace(), Trace()]}),
    ("SubspaceMonitor", {"seed": NOW}),
    ("SubspaceMonitor", {"seed": 2**63 - 1}),
    ("SubspaceMonitor", {"seed": np.uint64(2**63 - 1)}),
    ("SubspaceMonitor", {"loss_fn": Callable3(), "weight": len}),
    ("SubspaceMonitor", {"loss_fn": partial(lambda scale, m, b, i: loss(m, b, i), 2.0), "weight": partial(two, b=1)}),
    ("SubspaceMonitor", {"loss_fn": lambda *args: loss(*args), "weight": lambda batch, scale=1.0: scale}),
    ("SubspaceMonitor", {"sample": DataLoader(TensorDataset(X, Y))}),
    ("SubspaceMonitor", {"sample": [(X, Y)]}),
    ("SubspaceMonitor", {"sample": [((X, Y), np.float32(2.0)), ((X, Y), 3)]}),
    ("SubspaceMonitor", {"sample": [X[:, :4], X[:8, :3], X[:, :2]]}),  # batches of sequences of several lengths
    ("SubspaceMonitor", {"sample": [X]}),
    ("SubspaceMonitor", {"sample": ([X, Y] for _ in range(2))}),
    ("SubspaceMonitor", {"curvature": "finite_difference"}),
    ("SubspaceProjection", {"keep": "top", "k": np.int64(2), "start_when": np.int64(3)}),
    ("SubspaceProjection", {"keep": "bulk", "basis": (X for _ in range(2)), "where": "gradient"}),
    ("SubspaceProjection", {"keep": "bulk", "basis": partial(two, b=1)}),
    ("ActivationSpectrum", {"modules": (name for name in ["layer"]), "tail": [np.int64(1), 9], "dim": np.int8(-1)}),
    ("StartWhenAligned", {"chi": np.float32(0.5), "decay": 0}),
    ("Density", {"steps": np.int64(3), "seed": NOW}),
    ("Trace", {"every": np.uint8(2), "seed": 2**63 - 1}),
    ("Layers", {"groups": {"head": (name for name in ["*.weight"])}, "exact": "head", "every": np.uint8(2)}),
    ("CriticalSharpness", {"max_points": np.int64(2)}),
    ("Matrices", {"rank": np.int64(2), "modules": (name for name in ["layer"])}),
    ("SecondLoss", {"batches": DataLoader(TensorDataset(X, Y)), "loss_fn": Callable3(), "weight": len}),
    ("Control", {"reference_step": np.int64(0)}),
    ("metrics.PrincipalAngles", {"num_angles": np.int64(2)}),
    ("eigsh", {"n": np.int64(8), "k": np.int64(2), "tol": np.float32(1e-3), "seed": 2**63 - 1, "ncv": np.int64(8)}),
    ("eigsh", {"n": 8, "k": 2, "tol": 1, "subspace_tol": 1, "max_asymmetry": 0, "device": torch.device("cpu")}),
    ("linalg.quadrature", {"n": 8, "steps": np.int64(2), "vectors": np.int64(1), "seed": NOW}),
    ("Record", {"step": np.int64(3), "metrics": {}}),
    ("to_rows", {"records": (RECORD for _ in range(2))}),
    ("report.spectrum_figure", {"records": (RECORD, RECORD)}),
    ("report.overlap_figure", {"steps": (step for step in (0, 5)), "matrix": np.eye(2)}),
    ("report.overlap_figure", {"steps": (np.int64(0), 5), "matrix": np.eye(2, dtype=np.float32), "error": 0}),
]


@pytest.mark.parametrize(("path", "given"), TAKEN)
def test_what_is_unusual_and_right_is_taken(path, given):
    PUBLIC[path](**{**TABLE[path].valid, **given})


def test_unusual_arguments_measure_what_the_usual_ones_do():
    batches = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    usual = measure_subspace(NET, batches, k=2, loss_fn=loss, params=["layer.*"], measurements=[Trace(2)], tol=1e-3)
    for given in (batches, tuple(batches), (batch for batch in batches), DataLoader(TensorDataset(X, Y), 8)):
        found = measure_subspace(
            NET,
            given,
            k=np.int64(2),
            loss_fn=Callable3(),
            params=(name for name in ["layer.*"]),
            measurements=(Trace(np.int64(2)) for _ in range(1)),
            tol=np.float64(1e-3),
            seed=np.int32(0),
            dtype=torch.float32,
        )
        assert found.metrics == usual.metrics
        assert type(found.subspace.num_matvecs) is int


def test_an_optimizer_in_lightnings_wrapper_is_the_one_inside():
    sgd = torch.optim.SGD(NET.parameters(), lr=0.5)
    found = measure_subspace(NET, [(X, Y)], k=1, loss_fn=loss, optimizer=LightningOptimizer(sgd))
    assert found.metrics["sharpness_over_threshold"] == pytest.approx(found.metrics["sharpness"] * 0.5 / 2)


def test_a_record_of_another_k_gives_an_overlap():
    wide, narrow = (measure_subspace(NET, [(X, Y)], k=k, loss_fn=loss) for k in (4, 2))
    again = measure_subspace(NET, [(X, Y)], k=2, loss_fn=loss, previous=wide)
    assert wide.subspace.trusted
    assert again.metrics["overlap_previous"] == pytest.approx(1.0, abs=1e-3)  # the smaller one lies in the larger one
    assert again.metrics["sharpness"] == pytest.approx(narrow.metrics["sharpness"], rel=1e-3)


class Dropping(Net):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("seed", usual([2**63 - 1], thorough=[2**44, 2**45, NOW, 2**63 - 2]))
def test_every_seed_of_the_range_measures_and_is_another_one(seed):
    def measured(seed):
        more = [Density(steps=2, vectors=1, seed=seed), Trace(vectors=1, seed=seed)]
        return measure_subspace(Dropping(), [(X, Y)], k=1, loss_fn=loss, seed=seed, measurements=more).metrics

    torch.manual_seed(0)
    found = measured(seed)
    torch.manual_seed(0)
    assert measured(seed) == found
    torch.manual_seed(0)
    assert measured(seed - 1)["sample_loss"] != found["sample_loss"]  # other dropout masks


# Files


class Foreign:
    pass


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").touch()
    torch.save({"callbacks": {}, "hyper_parameters": Foreign()}, tmp_path / "foreign")
    for path in tmp_path.iterdir():
        with pytest.raises(
            CheckpointError, match=rf"^path: expected a checkpoint .*, got {str(path)!r} \(\w+: "
        ) as told:
            read_history(path)
        assert "trust" not in str(told.value)
        assert "False" not in str(told.value)
        assert ("Unsupported global: GLOBAL" in str(told.value)) == (path.name == "foreign")
    torch.save({"callbacks": 3}, tmp_path / "number")
    with pytest.raises(CheckpointError, match=r"^checkpoint\.callbacks: expected a dict, got 3"):
        read_history(tmp_path / "number")
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / "none")


# Measurements of a user's own


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        *[("every", value) for value in integers(1)],
        *[("needs", value) for value in ("nothing", None, Needs, 0)],
        *[("extra", value) for value in ("a key", None, 3, {"a key": 1})],
        *[("measure", value) for value in (lambda self: {}, lambda self, probe, more: {}, None, 3)],
        *[("expected_products", value) for value in (lambda self: 1.0, 1.0)],
        *[("after_step", value) for value in (lambda self, probe: {}, {})],
    ],
)
def test_a_measurement_that_no_probe_could_take_is_refused(attribute, value):
    made = type("Own", (Measurement,), {attribute: value})()
    words = rf"Own\.{attribute}: expected .+, got .+\.$"
    with pytest.raises(MisconfigurationException, match=f"^SubspaceMonitor: {words}"):
        SubspaceMonitor(measurements=[made])
    with pytest.raises(ValueError, match=f"^{words}"):
        measure_subspace(NET, [(X, Y)], k=2, loss_fn=loss, measurements=[made])


OTHER_K = [value for value in integers(1) if value is not None]


# All of these are given to the arguments themselves above.
@pytest.mark.parametrize("k", usual(OTHER_K[::4], thorough=[k for i, k in enumerate(OTHER_K) if i % 4]))
def test_the_solver_of_a_probe_refuses_another_k(k):
    class Own(Measurement):
        needs = Needs.NOTHING

        def measure(self, probe):
            return {"top": float(probe.solve(probe.operator, k=k).eigenvalues[0])}

    with pytest.raises(ValueError, match=r"^k: expected a positive integer, got "):
        measure_subspace(NET, [(X, Y)], k=0, loss_fn=loss, measurements=[Own()])


@pytest.mark.parametrize("weight", [lambda batch: "a lot", lambda batch: None, lambda batch: -1, lambda batch: NAN])
def test_a_weight_that_is_no_number_is_named(weight):
    with pytest.raises(SampleError, match=r"^weight: expected a positive finite number for every batch, got "):
        measure_subspace(NET, [(X, Y)], k=1, loss_fn=loss, weight=weight)


# In a Trainer


class Lit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return loss(self.net, batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks):
    module = Lit()
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, callbacks=list(callbacks), **QUIET)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=8))
    return [p.tolist() for p in module.parameters()]


def test_the_time_is_a_seed_that_probes():
    more = [Density(steps=3, seed=NOW), Trace(seed=2**63 - 1)]
    monitor = SubspaceMonitor(2, sample=8, gradient_sample=8, seed=NOW, max_overhead=None, measurements=more)
    assert fit(monitor) == fit()
    assert [record.step for record in monitor.history] == [0, 1]
    assert all("trace" in record.metrics for record in monitor.history)


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", 19), ("params", ["head.*"]), ("sample", iter([])), ("weight", lambda batch: -1.0), ("every_n_steps", [0])],
)
def test_what_only_the_trainer_shows_is_refused_before_the_first_step(name, value):
    given = {"k": 2, "sample": [(X, Y)], **({"sample": 12, "gradient_sample": 12} if name == "every_n_steps" else {})}
    module = Lit()
    before = [p.tolist() for p in module.parameters()]
    monitor = SubspaceMonitor(**{**given, name: value})
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, callbacks=[monitor], **QUIET)
    data = DataLoader(list(zip(X, Y, strict=True)), batch_size=8)  # gathered, where a number of examples is asked for
    with pytest.raises(MisconfigurationException, match=rf"^SubspaceMonitor: {name}: expected .+, got "):
        trainer.fit(module, data)
    assert trainer.global_step == 0
    assert [p.tolist() for p in module.parameters()] == before
