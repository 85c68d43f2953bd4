"""Very many probes in one run: what is held stays flat; and the monitor crosses process boundaries."""

import gc
import io
import pickle
import resource
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.callbacks import loss_comparison
from lightning_subspace.probe import run
from lightning_subspace.subspace.overlap_history import OverlapHistory
from tests.thorough import how_many
from tests.works_with.test_state import QUIET, Net

SKETCHES, LOSSES = how_many(16, thorough=64), how_many(20, thorough=80)  # that are kept; by default those of thorough
PROBES, K = how_many(50, thorough=200), 2


class Watch(Callback):
    """The size of the monitor's state at every tenth step; at some, tensors alive and the largest resident set."""

    def __init__(self, monitor, counted=()):
        self.monitor, self.counted = monitor, counted
        self.tensors, self.resident, self.state = {}, {}, {}

    def on_train_batch_end(self, trainer, *args):
        step = trainer.global_step
        if step in self.counted:
            gc.collect()
            self.tensors[step] = sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())
            self.resident[step] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if step % 10 == 0:
            buffer = io.BytesIO()
            torch.save(self.monitor.state_dict(), buffer)
            self.state[step] = buffer.tell()


def test_many_probes_in_flat_memory(monkeypatch):
    """Usually fewer sketches and losses of training are kept than by default, so that fewer probes fill them."""
    torch.manual_seed(0)
    monkeypatch.setattr(run, "OverlapHistory", partial(OverlapHistory, keep=SKETCHES))
    monkeypatch.setattr(loss_comparison, "KEPT", LOSSES)
    monitor = SubspaceMonitor(
        k=K, every_n_steps=1, max_overhead=None, sample=16, gradient_sample=32, tol=1e-2, verify="never"
    )
    first, last = max(SKETCHES, LOSSES) + 10, PROBES - 10  # from where on they are as many as are kept
    watch = Watch(monitor, (first, last))
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(64) % 3
    inputs = torch.randn(64, 16, generator=generator) + 2.0 * torch.eye(3, 16)[labels]
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=32)
    trainer = Trainer(max_steps=PROBES - 1, callbacks=[monitor, watch], enable_checkpointing=False, **QUIET)
    trainer.fit(Net(width=250), loader)  # n = 5,003
    assert len(monitor.history) == PROBES
    # A record has two small tensors, eigenvalues and residuals; sketches and losses do not become more.
    assert len(monitor._runner.run.overlaps.sketches) == SKETCHES
    assert watch.tensors[last] - watch.tensors[first] <= 2 * (last - first) + 10
    assert watch.resident[last] - watch.resident[first] <= 8e6
    for step, size in watch.state.items():
        assert size <= 4 * SKETCHES * K * 4096 + 2_000 * (step + 1) + 20_000
    assert watch.state[last] - watch.state[first] <= 2_000 * (last - first)


@pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step .* are left out:UserWarning")
def test_it_crosses_process_boundaries_before_during_and_after_a_run():
    monitor = SubspaceMonitor(k=1, every_n_steps=1, max_overhead=None, sample=8, gradient_sample=8)
    assert pickle.loads(pickle.dumps(monitor)).history == []
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, *args):
            copies.append(pickle.loads(pickle.dumps(monitor)))

    inputs = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, torch.arange(16) % 3), batch_size=8)
    trainer = Trainer(max_steps=3, callbacks=[monitor, Copy()], enable_checkpointing=False, **QUIET)
    torch.manual_seed(0)
    trainer.fit(Net(), loader)
    assert [len(copy.history) for copy in copies] == [1, 2, 3]
    assert str(pickle.loads(pickle.dumps(monitor)).to_rows()) == str(monitor.to_rows())  # with its nan
