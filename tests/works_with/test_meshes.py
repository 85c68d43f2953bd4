"""Runs over a mesh of two, under a strategy of another package, and with a rank that leaves and comes back."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_subspace.callbacks.strategy import ranks_of
from tests.left_out import without_error_bar
from tests.processes import environment, run
from tests.works_with import test_ddp as ddp
from tests.works_with import test_fsdp as fsdp

STEPS, PROBED = 7, [0, 2, 6]
MEASURED = ("eigenvalues/01", "eigenvalues/02", "gradient_fraction", "overlap_previous", "overlap_reference")
KEYS = (*MEASURED, "gradient_norm", "step/gain", "step/curvature", "step/norm", "step/edge_ratio")


class HybridStrategy(ModelParallelStrategy):
    """As other packages have them: a mesh with dimensions of its own, and a sampler that goes by it."""

    def setup_environment(self):
        super().setup_environment()
        names = ("dp_replicate", "dp_shard", "cp", "tp")
        self._device_mesh = init_device_mesh("cpu", (2, 2, 1, 1), mesh_dim_names=names)
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": self.world_size, "rank": self.global_rank}


class Hybrid(ddp.Net):
    """One layer sharded and replicated, one whole on every rank, whose gradients a hook averages in training."""

    def configure_model(self):
        fully_shard(self.net[0], mesh=self.device_mesh["dp_replicate", "dp_shard"])
        for parameter in self.net[2].parameters():
            parameter.register_hook(averaged)


def averaged(gradient):
    torch.distributed.all_reduce(gradient)
    return gradient / torch.distributed.get_world_size()


def hybrid(ranks, resume):
    """As `fsdp.resumed`."""
    one = ddp.monitor(every_n_steps=PROBED, reference_step=2, curvature="finite-difference")
    data, options = ddp.in_turn(ranks, ddp.COUNT), {"steps": STEPS, "max_epochs": -1, "ckpt_path": resume}
    with without_error_bar():
        ddp.fit(Hybrid(), data, one, ranks=ranks, strategy=HybridStrategy(), **options)
    return ddp.rows(one), *one.overlap_matrix()


def assert_goes_on(found, expected, tolerance=1e-6):
    """History and overlaps of a run that went on from a checkpoint, as those of the straight run."""
    rows, steps, overlaps = found
    history, steps_of_straight, matrix = expected
    assert steps == steps_of_straight == PROBED
    torch.testing.assert_close(torch.as_tensor(overlaps), torch.as_tensor(matrix), rtol=0, atol=tolerance)
    for one, other in zip(rows, history, strict=True):
        for key in KEYS:
            near = pytest.approx(other[key], rel=tolerance, abs=tolerance, nan_ok=True)
            assert one[key] == near, (other["step"], key)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Of one process."""
    with ddp.probes_alone():
        return ddp.on(1, fsdp.resumed, tmp_path_factory.mktemp("straight"), None, PROBED)[0]


# -- a rank that leaves -----------------------------------------------------------------------------------------------


class Leaving(Callback):
    """Ends the process of one rank without a word, the first time."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            trainer.strategy.barrier()  # until the checkpoint of this step is written on both
            if trainer.global_rank == 1:
                os._exit(1)


def worker(folder):
    """What a script does that `torchrun` starts: it goes on from the last checkpoint, if there is one."""
    torch.set_num_threads(1)
    rank_zero_only.rank = int(os.environ["RANK"])
    checkpoints = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem))
    one, data = ddp.monitor(every_n_steps=PROBED, reference_step=2), ddp.in_turn(2, ddp.COUNT)
    options = {"steps": STEPS, "max_epochs": -1, "ckpt_path": checkpoints[-1] if checkpoints else None}
    fsdp.fit_in_shards(2, data, one, ddp.Saving(folder), Leaving(), **options)
    return ddp.rows(one), *one.overlap_matrix(), [path.stem for path in checkpoints]


def launched(folder):
    """`torchrun --nproc-per-node 2 --max-restarts 1`, without its start of two interpreters."""
    for name in environment(0, 1):
        os.environ.pop(name, None)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # By default all attempts share one store, where gloo of torch 2.14 finds addresses of processes that have ended.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="tests",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="fork",
    )
    return elastic_launch(config, worker)(folder)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    """What each rank has returned, and the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("restarted")
    with ddp.probes_alone():
        (found,) = run(launched, 1, folder, group=False, timeout=120)
    return found, folder


def test_a_rank_that_leaves_and_comes_back_goes_on(straight, restarted):
    """The launcher ends the others, too, and starts all of them again."""
    assert sorted(restarted[0]) == [0, 1]
    for *history, checkpoints in restarted[0].values():
        assert checkpoints[-1] == "5"
        assert_goes_on(history, straight)


# -- a mesh of two ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_shards_goes_on_in_replicated_shards_of_another_package(straight, restarted):
    """From two ranks of FSDP2 to four of HSDP, by differences of gradients on what they hold, behind a self-check."""
    found = ddp.on(4, hybrid, restarted[1] / "5.ckpt")
    ddp.assert_equal_on_all([rows for rows, *_ in found])
    assert_goes_on(found[0], straight, tolerance=2e-3)


class SharingStrategy(ModelParallelStrategy):
    """Pairs of processes work on one batch, each on its part of the sequences or of the layers."""

    world_size = 4

    def __init__(self, name):
        super().__init__()
        self.name = name

    @property
    def device_mesh(self):
        return SimpleNamespace(mesh_dim_names=("dp", self.name), mesh=torch.arange(4).view(2, 2))

    @property
    def global_rank(self):
        return 3

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": 2, "rank": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cp", r"SharingStrategy, of which several may share one .*'num_replicas': 2.*in process 3 of 4"),
        ("tp", "through tensor parallel layers are wrong"),
    ],
)
def test_processes_that_share_a_batch_are_refused(name, message, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # that of this process, which the Trainer takes from the strategy
    with pytest.raises(ValueError, match=message):
        ranks_of(ddp.trainer_of(SharingStrategy(name), 4))
