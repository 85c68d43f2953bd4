"""On one card: DDP over nccl, FSDP2, and two processes that measure together over gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_subspace import measure_subspace
from tests.benchmarks.workloads import ViT
from tests.gpu import fresh, training
from tests.gpu.device import BACKEND, DEVICE, IS_CARD, shows_warnings
from tests.gpu.models import SMALL, on, trained

pytestmark = shows_warnings
K = 3


def in_order(strategy):
    """Training twice, with data in their order: under DDP Lightning shuffles them by a sampler of its own."""
    differing, _, watching = training.twice(
        training.vision_transformer,
        options=lambda: {
            "data": training.loader(shuffle=False),
            "use_distributed_sampler": False,
            "strategy": strategy(),
        },
    )
    return differing, watching.to_rows()


def under_ddp():
    return in_order(lambda: DDPStrategy(process_group_backend=BACKEND))


def test_ddp_with_one_rank():
    """Training is untouched, and the numbers are those of no strategy."""
    ((differing, rows),) = fresh.run(under_ddp, ranks=1)
    assert differing == []
    assert_close(rows, in_order(lambda: "auto")[1])


def assert_close(rows, expected):
    """To rounding, which the order of sums decides."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert len(rows) >= 2
    for row, other in zip(rows, expected, strict=True):
        assert row["sharpness"] == pytest.approx(other["sharpness"], rel=1e-3)


class Sharded(training.Classifier):
    """Sharded block by block."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(ViT(32, depth=2))

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def under_fsdp():
    found = {}
    for curvature in ("hessian", "finite-difference"):
        differing, _, watching = training.twice(
            Sharded,
            options=lambda: {
                "strategy": ModelParallelStrategy(
                    data_parallel_size=1, tensor_parallel_size=1, process_group_backend=BACKEND
                )
            },
            curvature=curvature,
        )
        found[curvature] = differing, watching.to_rows()
    return found


def test_fsdp2_with_one_rank():
    """Training is untouched; exact products and differences on the shards agree as far as differences can."""
    (found,) = fresh.run(under_fsdp, ranks=1)
    for curvature, (differing, rows) in found.items():
        assert differing == [], curvature
        assert len(rows) >= 2
    exact, differences = (rows for _, rows in found.values())
    for row, other in zip(exact, differences, strict=True):
        assert row["sharpness"] == pytest.approx(other["sharpness"], rel=1e-2)


def together(weights):
    """Two processes on one card, with equal arguments."""
    if IS_CARD:
        torch.cuda.set_device(0)
    dist.init_process_group("gloo")
    try:
        return measured(weights, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def measured(weights, group=None):
    problem = SMALL["vit"]
    module, batches = problem.make().to(DEVICE), on(DEVICE, problem.parted())
    module.load_state_dict(weights)
    record = measure_subspace(module, batches, k=K, tol=1e-5, loss_fn=problem.loss, group=group)
    return record.subspace.eigenvalues.tolist(), record.metrics["gradient_fraction"]


def test_two_processes_on_one_card_measure_what_one_does():
    # Trained once: not all kernels give the same bits in every process.
    weights = {name: value.cpu() for name, value in trained(SMALL["vit"], DEVICE).state_dict().items()}
    found, (values, fraction) = fresh.run(together, weights, ranks=2), measured(weights)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(values, rel=1e-5)
    assert found[0][1] == pytest.approx(fraction, rel=1e-3)
