"""Thousands of probes, by a stub of the solver: memory is that of the scalars, and the work of each is constant."""

import gc
import io
import sys
import tracemalloc
from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_subspace import Density, SubspaceMonitor, to_rows
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg import Outcome, Quadrature
from lightning_subspace.measurements import Probe, density
from lightning_subspace.probe import run as probe_run
from lightning_subspace.probe.checkpoint import decode, encode
from lightning_subspace.probe.schedule import Position, Schedule
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.sketch import Sketch
from lightning_subspace.subspace.subspace import Subspace
from tests.thorough import how_many

PROBES, K = how_many(4_000, thorough=100_000), 2
METRICS = 12  # beside those that the recorder adds
SKETCHED = 25  # every so many probes has a sketch, which is compared with 64 others
BASES = torch.eye(4)


def found(step):
    """What a solver and the measurements might find: new objects at each probe, as they would be."""
    values = torch.tensor([2.0 + step, 1.0], dtype=torch.float64)
    vectors = BASES[[step % 3, step % 3 + 1]].clone()
    space = Subspace(values, vectors, values * 1e-4, 0.5, 0.01, Outcome.CONVERGED, step % 10 == 0, 12)
    metrics = {f"metric/{i:02d}": step + 0.5 * i for i in range(METRICS)}
    sketch = Sketch(vectors.clone(), exact=True) if step % SKETCHED == 0 else None
    return Record(step, metrics, space, sketch)


@pytest.fixture
def many(monkeypatch):
    """A monitor whose probes cost nothing, a function that takes the next ones, and what its logger got."""
    module = nn.Linear(2, 2, bias=False)
    monitor = SubspaceMonitor(k=K, every_n_steps=1, max_overhead=None, loss_fn=lambda m, b, i: m(b).sum(), log="all")
    logged = SimpleNamespace(scalars=0, histograms=0, figures=[])

    class CometLogger:
        experiment = SimpleNamespace(
            log_histogram_3d=lambda values, name, step: setattr(logged, "histograms", logged.histograms + 1),
            log_figure=lambda figure_name, figure, step: logged.figures.append((figure_name, step)),
        )

        def log_metrics(self, metrics, step):
            logged.scalars += len(metrics)

    trainer = SimpleNamespace(
        is_global_zero=True, loggers=[CometLogger()], callback_metrics={}, optimizers=[], lightning_module=module,
        progress_bar_callback=None, accumulate_grad_batches=1,
    )  # fmt: skip
    sample = sample_of_batches([torch.ones(2, 2)])

    def take_probe(loss, sample, solver, measurements, *, partition, step, number, history, **others):
        for measurement in measurements:
            if isinstance(measurement, Density):
                measurement.measure(SimpleNamespace(step=step, number=number))
        return probe_stub(step, number, sample, partition, history), found(step)

    def probe_stub(step, number, sample, partition, history):
        given = {"step": step, "number": number, "sample": sample, "partition": partition, "history": history}
        given |= {"losses": (1.0,), "operator": SimpleNamespace(dtype=torch.float32)}
        return Probe(**{**dict.fromkeys(field.name for field in fields(Probe) if field.init), **given})

    monkeypatch.setattr(probe_run, "take_probe", take_probe)
    monkeypatch.setattr(CurvatureConfig, "loss", lambda *args: nullcontext())
    runner = monitor._runner
    runner.run = probe_run.ProbeRun(monitor._settings, module)
    monkeypatch.setattr(type(runner), "_prepare", lambda *args: None)
    monkeypatch.setattr(type(runner), "_sample", lambda *args: sample)
    monkeypatch.setattr(probe_run.ProbeRun, "_after_step", lambda *args: {"after": 1.0})

    def take(first, last):
        for step in range(first, last):
            monitor._recorder.take(trainer, module, step)
            monitor._recorder.close(trainer, module)

    return monitor, take, logged


def fill(monitor, first, last):
    """Records as probes leave them, which all would take minutes."""
    run = monitor._runner.run
    for step in range(first, last):
        record = found(step)
        run.num_probes += 1
        run.history.keep(record if step % (40 * SKETCHED) == 0 else replace(record, sketch=None))
        if (sketch := run.history[-1].sketch) is not None:
            run.history.drop_sketch(run.overlaps.add(step, sketch))


def lines_of(function):
    """Number of lines of Python that a call executes."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def grown(take, first, last):
    """Bytes that are held for each probe of a range."""
    gc.collect()
    tracemalloc.start()
    try:
        take(first, last)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / (last - first)
    finally:
        tracemalloc.stop()


def test_very_many_probes_take_the_memory_of_their_scalars_and_no_more_work_each(many, monkeypatch):
    monitor, take, logged = many
    compared = []
    compare = OverlapHistory.compare
    monkeypatch.setattr(
        OverlapHistory, "compare", lambda self, new: compared.append(len(self.sketches)) or compare(self, new)
    )
    take(0, 1_400)
    early = grown(take, 1_400, 1_600), lines_of(lambda: take(1_601, 1_626)) / 25
    fill(monitor, 1_626, PROBES - 300)
    late = grown(take, PROBES - 300, PROBES - 100), lines_of(lambda: take(PROBES - 99, PROBES - 74)) / 25
    # Each step of 25 has one probe with a sketch; at powers of two there are figures, and none is in these ranges.
    assert late[1] <= 1.02 * early[1]
    # The floats of a record and its dict; two small tensors, of which the storages are not traced.
    assert late[0] <= 1.1 * early[0]
    assert late[0] <= 200 + 100 * (METRICS + 10)
    assert max(compared) == 64
    run = monitor._runner.run
    assert len(run.history) == PROBES - 76
    assert sum(record.sketch is not None for record in run.history) == len(run.overlaps.sketches) == 64
    assert all(record.subspace.eigenvectors is None for record in run.history)
    assert len(run.overlaps.pairs) == 64 * 63 // 2
    assert monitor.overlap_matrix()[1].shape == (64, 64)
    assert sorted({step for _, step in logged.figures})[:6] == [0, 1, 3, 7, 15, 31]
    assert len(logged.figures) <= 2 * 17

    state = run.state(Position(PROBES))
    count = lines_of(lambda: encode(state))
    per_record = lines_of(lambda: encode(run_state_of(state, 1_000))) / 1_000
    assert count <= 1.1 * per_record * len(run.history)
    buffer = io.BytesIO()
    torch.save(encode(state), buffer)
    keys = len(to_rows(run.history[:10])[0]) - 1
    assert buffer.tell() <= (8 * keys + 16 * K + 60) * len(run.history) + 200_000
    buffer.seek(0)
    back = decode(torch.load(buffer, weights_only=True))
    assert (back.num_probes, len(back.records)) == (run.num_probes, len(run.history))
    assert dict(back.records[77].metrics) == dict(run.history[77].metrics)


def run_state_of(state, count):
    return type(state)(**{**vars(state), "records": state.records[:count]})


def test_densities_are_as_many_as_are_kept(monkeypatch):
    nodes = torch.linspace(0.0, 1.0, 4).double()[None]
    spectrum = Quadrature(torch.ones(1).double(), nodes, torch.full((1, 4), 0.25).double(), 9, ((nodes[0], nodes[0]),))
    monkeypatch.setattr(density, "spectrum_of", lambda *args: spectrum)
    count = how_many(100, thorough=600)
    for keep in (1, 2, 3, how_many(20, thorough=200)):
        measurement = Density(keep=keep)
        for step in range(count):
            measurement.measure(SimpleNamespace(step=step, number=step))
            assert len(measurement.history) <= keep
        steps = [one.step for one in measurement.history]
        assert steps[-1] == count - 1
        assert steps == sorted(set(steps))
        assert (steps[0] == 0) == (keep > 2)
        assert measurement.state_dict()["values"].numel() == len(steps) * 17


def test_a_long_list_of_steps_is_searched_by_halves():
    class Counted(int):
        compared = 0

        def __gt__(self, other):  # as `bisect` asks: step < listed
            Counted.compared += 1
            return int(self) > int(other)

    listed = list(range(0, 3 * PROBES, 3))
    schedule = Schedule(listed, None)
    schedule.begin(0)
    schedule._listed = [Counted(step) for step in listed]
    assert [step for step in range(1, 20) if schedule.is_due(step)] == [3, 6, 9, 12, 15, 18]
    assert Counted.compared <= 19 * 2 * 18


def test_sketches_of_parameters_that_have_changed_leave_the_history(many):
    monitor, take, _ = many
    run = monitor._runner.run
    for start in range(0, 300, 100):
        take(start, start + 100)
        run._start_overlaps()
        assert not any(record.sketch is not None for record in run.history)
    assert len(run.history) == 300
