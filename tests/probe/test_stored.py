"""Checkpoints of others: stored ones of an earlier day, damaged ones, and ones of another format."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_subspace import CheckpointError, Control, Density, SubspaceMonitor, SubspaceProjection, read_history
from lightning_subspace.callbacks.projection_state import ProjectionState
from lightning_subspace.probe import checkpoint
from tests.left_out import leave_self_check_out
from tests.probe import stored_run as stored
from tests.thorough import IS_THOROUGH

# Of lightning: states of callbacks that a run does not have.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
MONITOR, PROJECTION = "SubspaceMonitor{'name': 'subspace'}", "SubspaceProjection{'name': 'projection'}"
# Numbers of the solver that depend on where it starts: a resumed run with sketches for a basis starts cold.
SOLVER = "solver/"
# The value behind the k-th is left out where it is not known to 5 %, which depends on that start, too; and the largest
# ratio of two values is one of those that are there.
BEHIND, OF_IT = "eigenvalues/03", ("eigenvalues/03", "gap_index")
ERRORS = {6: {"overlap": 1e-3, "fraction": 1e-3}, 400: {"overlap": 0.04, "fraction": 0.02}}


def saved(width=6):
    return torch.load(stored.checkpoint(width), weights_only=True)


@pytest.mark.parametrize("width", stored.WIDTHS, ids=["123 parameters", "8,003 parameters"])
def test_a_stored_checkpoint_is_resumed_as_on_the_day_it_was_written(width):
    expected = json.loads((stored.FOLDER / f"width={width}.json").read_text())
    monitor, projection = stored.callbacks()
    module = stored.train(stored.Net(width), monitor, projection, ckpt_path=stored.checkpoint(width))
    rows = [{key: value for key, value in row.items() if math.isfinite(value)} for row in monitor.to_rows()]
    assert [row["step"] for row in rows] == [row["step"] for row in expected["rows"]] == [0, 3, 6, 9, 10]
    for found, then in zip(rows, expected["rows"], strict=True):
        # Keys that came after that day.
        later = {"sample_loss", "training_loss", BEHIND, *(key for key in found if key.startswith(("step/", "noise/")))}
        assert {key for key in found if SOLVER not in key} - later == {key for key in then if SOLVER not in key} - later
        for key, value in then.items():
            if SOLVER not in key and (key not in OF_IT or (BEHIND in found) is (BEHIND in then)):
                # .0085 is the standard deviation of an estimate with k = 2, .02 the error that is claimed of a space
                kind = next((kind for kind in ERRORS[width] if kind in key), "")
                error = ERRORS[width].get(kind, 1e-4)
                # From there on training differs a little: the space of the projection was found from another start.
                relative = 3e-2 if then["step"] >= stored.AT else 0.0
                error = error if then["step"] >= stored.AT else 0.0
                assert found[key] == pytest.approx(value, rel=relative, abs=error), (then["step"], key)
    steps, matrix = monitor.overlap_matrix()
    assert steps == expected["steps"]
    np.testing.assert_allclose(matrix, expected["overlaps"], atol=ERRORS[width]["overlap"])
    assert projection.is_active
    assert projection.chi == pytest.approx(expected["chi"], abs=ERRORS[width]["fraction"])
    assert float(nn.utils.parameters_to_vector(module.parameters()).detach().norm()) == pytest.approx(
        expected["norm"], rel=1e-4
    )


@pytest.mark.parametrize("width", stored.WIDTHS)
def test_its_history_is_read_without_the_model(width):
    expected = json.loads((stored.FOLDER / f"width={width}.json").read_text())["rows"]
    history = read_history(stored.checkpoint(width))
    assert [record.step for record in history] == [0, 3, 6]
    for record, row in zip(history[:2], expected, strict=False):
        assert dict(record.metrics) == {key: value for key, value in row.items() if key != "step"}
        assert record.subspace.eigenvalues.tolist() == [row["eigenvalues/01"], row["eigenvalues/02"]]
        assert record.sketch is not None
    assert "update_fraction" not in history[2].metrics  # the step from there had not been taken
    assert [r.step for r in read_history(stored.checkpoint(width), "subspace")] == [0, 3, 6]
    with pytest.raises(CheckpointError, match="expected a monitor of the checkpoint, got 'other'; it has 'subspace'"):
        read_history(stored.checkpoint(width), "other")


def test_a_file_with_two_monitors_wants_a_name(tmp_path):
    state = saved()
    state["callbacks"]["SubspaceMonitor{'name': 'head'}"] = {"format": 7}
    torch.save(state, tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match="got None; it has 'subspace', 'head'"):
        read_history(tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match="format: expected 3, got 7; it was written by another version"):
        read_history(tmp_path / "two.ckpt", "head")
    assert len(read_history(tmp_path / "two.ckpt", "subspace")) == 3


def test_the_state_of_a_complex_model_is_that_of_its_space():
    class Net(stored.Net):
        def __init__(self):
            super().__init__(6)
            self.phase = nn.Parameter(torch.ones(1, dtype=torch.complex64))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (3.0 * self.phase.real**2 + self.phase.imag**2).sum()

    monitor, _ = stored.callbacks()
    stored.train(Net(), monitor)
    state = monitor.state_dict()
    assert checkpoint.decode(state).space == monitor._runner.run.space


def test_a_state_of_an_older_format_is_brought_up_to_date(monkeypatch):
    monitor, _ = stored.callbacks()
    monitor.load_state_dict(saved()["callbacks"][MONITOR])
    older = {"format": 0, "k": 2, "steps_then": 3}
    monkeypatch.setitem(checkpoint.MIGRATIONS, 0, lambda state: {"num_probes": state.pop("steps_then"), **state})
    entries = checkpoint.up_to_date(older)
    assert entries.integer("num_probes") == 3
    assert "steps_then" not in entries
    assert older["steps_then"] == 3  # what was given stays as it was


# Damage: every entry in turn of another type, of a wrong shape, full of nan, or absent.


def leaves(state, path=()):
    """The paths of all entries of a state, in mappings and in lists."""
    yield path
    if isinstance(state, dict):
        for key in state:
            yield from leaves(state[key], (*path, key))
    elif isinstance(state, list):
        for i in range(len(state)):
            yield from leaves(state[i], (*path, i))


def at(state, path):
    for key in path:
        state = state[key]
    return state


ABSENT = object()


def damages(value):
    """What may have become of a value, with a name for each."""
    yield from {"absent": ABSENT, "None": None, "text": "damaged", "nan": math.nan, "list": [None], "dict": {}}.items()
    yield from {"negative": -1, "huge": 10**12, "flag": not value if isinstance(value, bool) else True}.items()
    yield "tensor", torch.zeros(2, 2)
    if isinstance(value, Tensor):
        yield "transposed", value.unsqueeze(0)
        yield "half", value.half() if value.is_floating_point() else value.int()
        yield "full of nan", torch.full_like(value, math.nan) if value.is_floating_point() else value - 10**6
        yield "scaled", value * 3
    if isinstance(value, list) and value:
        yield "shorter", value[:-1]
        yield "longer", [*value, value[-1]]
        yield "backwards", value[::-1]
    if isinstance(value, dict):
        yield "other keys", {f"{key} ": item for key, item in value.items()}


def damaged(state):
    """Copies of a state with one entry changed."""
    for path in leaves(state):
        for name, value in damages(at(state, path)):
            if not path:
                if value is not ABSENT and not isinstance(value, Tensor):  # which fails in Lightning
                    yield (name,), value
                continue
            other = copy.deepcopy(state)
            parent = at(other, path[:-1])
            if value is not ABSENT:
                parent[path[-1]] = value
            else:
                del parent[path[-1]]
            yield (*path, name), other


STATES = {key: saved()["callbacks"][key] for key in (MONITOR, PROJECTION)}
FEW = {"k": 2, "sample": 16, "gradient_sample": 16, "batch_size": 16, "on_failure": "raise"}


def measurements():
    """Those that remember."""
    return [Control(), Density(steps=4, vectors=1)]


@pytest.fixture
def _unchecked(monkeypatch):
    leave_self_check_out(monkeypatch)


@pytest.fixture(scope="module")
def of_today(tmp_path_factory):
    """The state that the same run leaves today, with measurements that remember."""
    path = tmp_path_factory.mktemp("today") / "a.ckpt"
    monitor = SubspaceMonitor(
        every_n_steps=3,
        reference_step=3,
        max_overhead=None,
        measurements=measurements(),
        **{**FEW, "sample": [next(iter(stored.loader()))]},
    )
    stored.train(stored.Net(6), monitor, stored.Save(path))
    return torch.load(path, weights_only=True)["callbacks"][MONITOR]


def resume(key, state, folder, measurements=None):
    """Take one step from a checkpoint with this state: the callback, and what was warned of."""
    whole = saved()
    whole["callbacks"] = {key: state}
    torch.save(whole, folder / "damaged.ckpt")
    if key == MONITOR:
        settings = {**FEW, "measurements": measurements}
        callback = SubspaceMonitor(every_n_steps=7, reference_step=3, max_overhead=None, **settings)
    else:
        callback = SubspaceProjection("bulk", refresh_every_n_steps=2, start_when=stored.START, **FEW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored.train(stored.Net(6), callback, ckpt_path=folder / "damaged.ckpt", steps=stored.AT + 1)
    return callback, [str(w.message) for w in caught if type(callback).__name__ in str(w.message)]


# Changes to what another run could have written: they pass.
PLAUSIBLE = {
    ("which", "text"), ("num_probes", "huge"), ("open", "flag"), ("overlaps", "reference_step", "None"),
    ("overlaps", "sketches", 0, "absent"), ("history", "metrics", "full of nan"), ("history", "steps", 2, "huge"),
    *(("history", name, "scaled") for name in ("metrics", "eigenvalues", "residuals")),
    *((*path, "backwards") for path in (("names",), ("shapes",), *(("shapes", i) for i in range(4)))),
    *(("names", i, "text") for i in range(4)), *(("history", "keys", i, "text") for i in range(24)),
    *(("history", name, i, change) for i in range(3) for name, change in (
        ("next_eigenvalues", "nan"), ("errors", "nan"), ("verified", "flag"), ("num_matvecs", "huge"))),
    *(("history", name, "backwards") for name in (
        "keys", "sizes", "next_eigenvalues", "errors", "outcomes", "verified", "num_matvecs")),
}  # fmt: skip


def judged(state):
    """The numbers of single changes that are refused, and the paths of those that pass."""
    refused, passed = 0, set()
    for path, damaged_one in damaged(state):
        message = ""
        try:
            checkpoint.decode(damaged_one)
        except CheckpointError as error:
            message, refused = str(error), refused + 1
        else:
            passed.add(path)
        # Sizes are held against what is of that size, and the steps of sketches against those of the records.
        others = {"names": "shapes", "k": "overlaps.sketches", "shapes": "overlaps.sketches", "history": "overlaps"}
        start = (str(path[0]), "state", others.get(path[0], "format"))
        assert path in passed or message.startswith(start), (path, message)
    return refused, passed


AHEAD = {("schedule", "last_step", "huge"), ("schedule", "num_passed_over", "huge")}  # refused where they are resumed


def test_whatever_is_damaged_in_the_state_of_a_monitor_is_found_and_named():
    refused, passed = judged(STATES[MONITOR])
    assert refused > 900
    assert passed - PLAUSIBLE <= AHEAD


def test_whatever_is_damaged_in_a_state_of_today_is_found_and_named(of_today):
    assert of_today["format"] == checkpoint.FORMAT
    assert of_today["measurements"].keys() == {"Control", "Density"}
    assert of_today["failed"] == {"steps": [], "reasons": []}
    refused, passed = judged({**of_today, "failed": {"steps": [1, 4], "reasons": ["A: a.", "B: b."]}})
    assert refused > 900
    apart = {path for path in passed if path[0] != "measurements"}  # which judge for themselves
    # Keys of metrics, of which there are more than then.
    kinds = {path for path in apart if path[:2] == ("history", "keys") and path[-1] in ("text", "backwards")}
    absent = {("complex_names", "absent"), ("sample", "None")}  # it is None, as batches were given
    # Older states have none that failed; their texts are any, and of their steps the last one may be later.
    texts = {("failed", "reasons", *change) for change in ((0, "text"), (1, "text"), ("backwards",))}
    absent |= {("failed", "absent"), ("failed", "steps", 1, "huge")} | texts
    # Names of groups and rows, and numbers, could be others; and an older state has no tables.
    tables = {path for path in apart if path[:2] == ("history", "tables")}
    one = ("history", "tables", "layers", "absent")
    assert {path[-1] for path in tables - {one} if len(path) > 3} == {"text", "backwards", "scaled", "full of nan"}
    assert {path[-1] for path in tables if len(path) == 3} == {"absent", "dict", "other keys"}
    assert apart - PLAUSIBLE - AHEAD - kinds - absent - tables == set()


@pytest.mark.usefixtures("_unchecked")
def test_a_run_that_is_resumed_from_any_change_in_a_measurement_measures(of_today, tmp_path):
    """At each place of what they remember: one of the two goes on, the other one goes on or says that it does not."""
    whole = {**of_today, "measurements": of_today["measurements"]}
    changes = [(path, state) for path, state in damaged(whole["measurements"]) if path[-1] in ("None", "nan", "scaled")]
    assert len(changes) > 20
    for path, states in changes if IS_THOROUGH else in_turn(changes):
        callback, warned = resume(MONITOR, {**whole, "measurements": states}, tmp_path, measurements())
        is_decoded = isinstance(states, dict) and all(isinstance(state, dict) for state in states.values())
        assert [record.step for record in callback.history] == ([0, 3, 6, 7] if is_decoded else [6, 7]), path
        assert {"trace", "gradient_fraction"} <= callback.history[-1].metrics.keys(), path
        names = [text for text in warned if "is not used" in text]
        assert len(names) == (path != ("Density", "steps", "scaled")), (path, warned)  # as of another run
        assert not names or path[0] in names[0] or not is_decoded, (path, names)


def test_a_state_with_the_overlaps_of_all_probes_keeps_those_that_are_held():
    state = copy.deepcopy(STATES[MONITOR])
    del state["overlaps"]["sketches"][3]
    state["overlaps"]["reference_step"] = None
    overlaps = checkpoint.decode(state).overlaps
    assert (overlaps.steps, list(overlaps.pairs)) == ([0, 6], [(0, 6)])
    then = dict(zip(map(tuple, state["overlaps"]["pairs"].tolist()), state["overlaps"]["overlaps"], strict=True))
    assert overlaps.pairs[0, 6] == float(then[0, 6])


def in_turn(changes):
    """One change at each place, another than at the place before."""
    places = {}
    for path, state in changes:
        places.setdefault(path[:-1], []).append((path, state))
    return [at_place[i % len(at_place)] for i, at_place in enumerate(places.values())]


def kind(path):
    """What places of a list have in common."""
    return tuple("any" if isinstance(key, int) else key for key in path)


SAME = {("shapes", 1, "backwards"), ("shapes", 3, "backwards")}  # of vectors


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("part", range(4))
def test_a_run_that_is_resumed_from_a_plausible_state_measures(part, tmp_path):
    changes = {path: state for path, state in damaged(STATES[MONITOR]) if path in PLAUSIBLE}
    assert changes.keys() == PLAUSIBLE
    first_of_kind = {kind(path): path for path in sorted(changes, key=str, reverse=True)}
    paths = changes if IS_THOROUGH else {*first_of_kind.values(), *SAME}
    for path in sorted(paths, key=str)[part::4]:
        monitor, warned = resume(MONITOR, changes[path], tmp_path)
        is_refused = path in {("which", "text"), ("history", "steps", 2, "huge")}
        assert bool(warned) == (is_refused or path[0] in ("names", "shapes")) or path in SAME, (path, warned)
        assert [record.step for record in monitor.history] == ([6, 7] if is_refused else [0, 3, 6, 7]), path
        assert "gradient_fraction" in monitor.history[-1].metrics, path


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("entry", [(), *((key,) for key in STATES[MONITOR])], ids=str)
def test_a_run_that_is_resumed_from_a_damaged_state_says_so_and_starts_anew(entry, tmp_path):
    state = {"damaged": True} if not entry else {**STATES[MONITOR], entry[0]: [None]}
    monitor, warned = resume(MONITOR, state, tmp_path)
    [message] = [text for text in warned if "of the checkpoint is not used" in text]
    assert f"the state 'subspace' of the checkpoint is not used: {entry[0] if entry else 'format'}" in message
    assert "History and overlaps start anew" in message
    assert [record.step for record in monitor.history] == [6, 7]


# Of a projection, what another run could have written, and what is said of it.
PLAUSIBLE_OF_PROJECTION = {
    ("which", "text"): "written with which='damaged'",
    ("start_when", "text"): None,  # another condition, which is waited for anew
    ("start", "begun", "flag"): None,
    ("start", "average", "None"): None,
    ("num_probes", "huge"): None,
    ("schedule", "last_step", "huge"): None,
    ("schedule", "num_passed_over", "huge"): None,
    ("k", "huge"): "written with k=1000000000000",
}


def test_whatever_is_damaged_in_the_state_of_a_projection_is_found_and_named():
    refused = 0
    for path, state in damaged(STATES[PROJECTION]):
        words, message = PLAUSIBLE_OF_PROJECTION.get(path, path[0] if path[0] in STATES[PROJECTION] else ""), None
        try:
            ProjectionState.decoded(state, k=FEW["k"], which="LA")
        except CheckpointError as error:
            message, refused = str(error), refused + 1
        assert (message is None) == (words is None), (path, message)
        assert message is None or words in message, (path, message)
    assert refused > 110


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("entry", [None, *STATES[PROJECTION]], ids=str)
def test_a_damaged_state_of_a_projection_is_a_warning_that_names_the_entry(entry, tmp_path):
    changes = {
        path: state
        for path, state in damaged(STATES[PROJECTION])
        if (path[0] if path[0] in STATES[PROJECTION] else None) == entry
    }
    for path in (
        changes if IS_THOROUGH else {*dict(in_turn(changes.items())), *PLAUSIBLE_OF_PROJECTION} & changes.keys()
    ):
        state = changes[path]
        projection, warned = resume(PROJECTION, state, tmp_path)
        expected = PLAUSIBLE_OF_PROJECTION.get(path, f"is not used: {path[0] if entry else ''}")
        if expected is None or not state:  # Lightning takes an empty state for none
            assert not warned, (path, warned)
        else:
            assert any(expected in text for text in warned), (path, warned)
        assert projection._runner.run.num_probes > 0, path


@pytest.mark.parametrize("callback", stored.callbacks(), ids=lambda callback: type(callback).__name__)
def test_a_state_that_no_run_has_taken_up_is_handed_on_whatever_it_is(callback):
    callback.load_state_dict(STATES[MONITOR])
    assert callback.state_dict() == STATES[MONITOR]
    for damaged_one in ("damaged", None, [1], 3.0):
        callback.load_state_dict(damaged_one)
        assert callback.state_dict() == {}
