"""Where a basis lies, and how large it is, from what is free on every rank."""

import re
from dataclasses import replace
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.curvature import graph_memory
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.linalg import tiles
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe import room as probe_room
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from lightning_subspace.subspace import room
from lightning_subspace.subspace.room import DEVICE_SHARE, HOST_SHARE, MORE_NEEDED, VECTORS, NoRoomError, Place, Room
from tests import processes
from tests.works_with.test_state import QUIET

K, N = 10, 1_000_000
VECTOR = 4 * N
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "WIDTH", N // 100)


def free_for(vectors: float, share: float) -> float:
    """What has to be free for so many vectors, to rounding."""
    return (vectors + 0.01) * VECTOR / share


def made(device: torch.device, on_device: float, on_host: float, reserved: int = 0, ranks: Ranks | None = None) -> Room:
    """Room for so many vectors beside those around the solve."""
    free = {
        device.type: free_for(on_device + K + VECTORS, DEVICE_SHARE),
        **({} if device.type == "cpu" else {"cpu": free_for(on_host, HOST_SHARE)}),
    }
    return Room(N, 4, reserved, device, Ranks() if ranks is None else ranks, lambda device: free[device.type])


@pytest.mark.parametrize(
    ("on_device", "on_host", "choice", "expected"),
    [
        (1_000, 0, "auto", Place(30, 30, "device")),
        (31, 1_000, "auto", Place(30, 30, "device")),  # the pending vector, too
        (30, 1_000, "auto", Place(29, 30, "device")),
        (16, 1_000, "auto", Place(15, 30, "device")),
        (15, 1_000, "auto", Place(30, 30, "cpu")),
        (2, 20, "auto", Place(19, 30, "cpu")),
        (1_000, 1_000, "cpu", Place(30, 30, "cpu")),
        (1_000, 16, "cpu", Place(15, 30, "cpu")),
        (16, 0, "device", Place(15, 30, "device")),
    ],
)
def test_as_much_as_fits_and_on_the_device_if_it_does(on_device, on_host, choice, expected):
    assert made(GPU, on_device, on_host).place(K, None, N, choice) == expected


def test_on_a_cpu_both_places_are_the_same():
    for choice in ("auto", "device", "cpu"):
        assert made(CPU, 20, 0).place(K, None, N, choice) == Place(19, 30, "device")


def test_what_was_asked_for_is_not_made_smaller():
    assert made(GPU, 18, 1_000).place(K, 17, N) == Place(17, 17, "device")
    assert made(GPU, 17, 1_000).place(K, 17, N) == Place(17, 17, "cpu")
    with pytest.raises(NoRoomError):
        made(GPU, 17, 1_000).place(K, 17, N, "device")


def test_small_spaces_need_no_more_than_they_have():
    tiny = Room(8, 4, 0, CPU, Ranks(), lambda device: 1e6)
    assert tiny.place(5, None, 8) == Place(8, 8, "device")


def test_what_else_is_held_is_left_free():
    reserved = 12 * VECTOR
    assert made(GPU, 31 + 12, 0, reserved).place(K, None, N) == Place(30, 30, "device")
    assert made(GPU, 30 + 12, 0, reserved).place(K, None, N) == Place(29, 30, "device")


def test_tiles_on_the_device_have_to_fit_where_the_basis_is_on_the_host(monkeypatch):
    monkeypatch.setattr(tiles, "WIDTH", N // 10)
    # Two buffers of a tenth of a row: five rows are room for 25.
    assert made(GPU, 5.05, 1_000).place(K, None, N, "cpu") == Place(24, 30, "cpu")


@pytest.mark.parametrize("choice", ["auto", "device", "cpu"])
def test_what_does_not_fit_is_refused_with_the_numbers(choice):
    with pytest.raises(NoRoomError) as caught:
        made(GPU, 15, 15).place(K, None, N, choice)
    gib = VECTOR / 2**30
    assert str(caught.value) == (
        f"basis: expected room for 16 vectors of {gib:.3g} GiB, {16 * gib:.3g} GiB, beside {18 * gib:.3g} GiB on the "
        f"device for all else, got {33.01 * gib:.3g} GiB free on the device and {15.01 * gib:.3g} GiB in host memory; "
        "take fewer parameters by params= (adapters, the head), a smaller k, more ranks, or curvature='none', which "
        "needs no basis."
    )


class Others(Ranks):
    """A group whose other ranks have less, or are on other hosts."""

    def __init__(self, rows):
        super().__init__()
        self.index, self.count, self._rows = 0, 1 + len(rows), rows

    def all_reduce(self, local):
        total = local.clone()
        for number, row in enumerate(self._rows, start=1):
            total[number] = local[0] * torch.tensor(row, dtype=local.dtype)
        return total


SAME = [1.0] * 7


def test_the_rank_with_the_least_decides_for_all():
    half = [1, 1, 1, 0.5, 1, 1, 1]
    one = made(GPU, 50, 1_000)
    assert replace(one, ranks=Others([SAME])).place(K, None, N) == Place(30, 30, "device")
    # Of room for 50 + 18 vectors half is room for 34, of which 18 are taken.
    assert replace(one, ranks=Others([half])).place(K, None, N) == Place(15, 30, "device")


def test_ranks_of_one_host_share_its_memory():
    elsewhere = [1, 1, 1, 1, 1, 2, 1]
    one = made(GPU, 1, 42)
    assert replace(one, ranks=Others([SAME])).place(K, None, N) == Place(20, 30, "cpu")
    assert replace(one, ranks=Others([elsewhere])).place(K, None, N) == Place(30, 30, "cpu")
    # Ranks on CPUs share what a device would have alone.
    cpu = made(CPU, 31 + 2 * 18, 0)
    assert replace(cpu, ranks=Others([elsewhere])).place(K, None, N).size == 30
    with pytest.raises(NoRoomError, match=r"on each rank"):
        replace(cpu, ranks=Others([SAME, SAME])).place(K, None, N)


# In a probe

WIDTH = 300


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def sample():
    generator = torch.Generator().manual_seed(1)
    return sample_of_batches([(torch.randn(16, WIDTH, generator=generator), torch.arange(16) % 3) for _ in range(2)])


def a_run(ranks=None, **settings):
    module = network()
    chosen = ProbeSettings(k=3, loss_fn=cross_entropy, defaults=False, measurements=(), **settings)
    return ProbeRun(chosen, module, ranks), module


def test_a_probe_takes_the_basis_that_fits_and_finds_the_same(monkeypatch):
    run, module = a_run()
    whole = run.measure(module, sample(), 0).record.subspace
    assert run.examples.footprint.basis == Place(16, 16, "device")
    vector = 4 * run.partition.n
    # Of what is free: ten vectors of the basis, eleven around the solve, and two graphs of some MB.
    product = run.examples.footprint.of_product
    free = ((11.5 + 3 + VECTORS) * vector + product) / DEVICE_SHARE
    monkeypatch.setattr(graph_memory, "free_memory", lambda device: free)
    other, module = a_run()
    bounded = other.measure(module, sample(), 0).record.subspace
    assert other.examples.footprint.basis == Place(10, 16, "device")
    torch.testing.assert_close(bounded.eigenvalues, whole.eigenvalues, rtol=1e-3, atol=0)


def test_a_probe_that_cannot_fit_is_refused_before_its_loss_is_opened(monkeypatch):
    run, module = a_run()
    monkeypatch.setattr(probe_room, "free_memory", lambda device: 20.0 * 4 * run.partition.n)
    monkeypatch.setattr(type(run._choice), "loss", lambda *args: pytest.fail("opened"))
    with pytest.raises(NoRoomError, match=re.escape("basis: expected room for 9 vectors")):
        run.measure(module, sample(), 0)
    assert run.num_probes == 0


def test_without_a_basis_no_room_is_asked_for(monkeypatch):
    monkeypatch.setattr(probe_room, "free_memory", lambda device: 0.0)
    monkeypatch.setattr(room.Room, "place", lambda *args: pytest.fail("asked"))
    module = network()
    run = ProbeRun(ProbeSettings(k=0, loss_fn=cross_entropy, defaults=False, measurements=()), module)
    run.measure(module, sample(), 0)


def in_processes(before, in_solve):
    """A probe on two ranks, with room for so many vectors on each: what became of it, and its collectives."""

    def in_a_process():
        ranks = Ranks(dist.group.WORLD)
        run, module = a_run(ranks=ranks)
        vector = 4.0 * run.partition.local_n
        with (
            mock.patch.object(probe_room, "free_memory", return_value=before[ranks.index] * vector),
            mock.patch.object(graph_memory, "free_memory", return_value=in_solve[ranks.index] * vector),
        ):
            try:
                run.measure(module, sample(), 0)
            except NoRoomError as error:
                return str(error), dict(ranks.calls)
        return run.examples.footprint.basis, dict(ranks.calls)

    return processes.run(in_a_process, 2)


def test_all_ranks_refuse_alike_and_before_any_vector_has_moved():
    (one, calls), (other, others) = in_processes([1e3, 20.0], [1e3, 1e3])
    assert one == other
    assert one.startswith("basis: expected room for 9 vectors")
    assert calls == others
    assert not {"all_gather", "reduce_scatter"} & calls.keys()


def test_all_ranks_take_the_basis_that_fits_on_each():
    # Two ranks share a host: each may take 24 vectors, of which 11 and a graph are for what else is there.
    (one, _), (other, _) = in_processes([1e3, 1e3], [1e3, 54.0])
    assert one == other
    assert 3 + MORE_NEEDED <= one.size < one.wanted == 16


def test_a_run_whose_probes_do_not_fit_goes_on_and_says_why(monkeypatch):
    monkeypatch.setattr(probe_room, "free_memory", lambda device: 0.0)
    monitor = SubspaceMonitor(2, sample=8, gradient_sample=8, max_overhead=None)
    module = Trained()
    trainer = pl.Trainer(max_steps=2, enable_checkpointing=False, callbacks=[monitor], **QUIET)
    with pytest.warns(UserWarning, match="NoRoomError: basis: expected room for 8 vectors of .* curvature='none'"):
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, WIDTH), torch.arange(16) % 3), batch_size=8))
    assert trainer.global_step == 2
    assert list(monitor.history) == []


class Trained(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net, batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
