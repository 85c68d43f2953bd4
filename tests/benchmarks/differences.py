"""Errors of differences of gradients beside exact products in float64, and the gradients that a product takes.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.differences [--json differences.json]

MLP, CNN and ViT of `workloads.py` before training and after 300 steps, on 256 examples: smooth, with GELU in place of
ReLU and means in place of max-pooling, and as they are, with kinks. Along the top five eigenvectors, the gradient and a
random vector, for unit vectors v: |D v - H v| over lambda_1 along eigenvectors, and over |H v|. The differences on the
shards of FSDP2 are those of a group of one process, beside differences to one side with the same step. Ends in an error
where the self-check would use forward differences with kinks, or none for a smooth network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_subspace.curvature import (
    BatchMean,
    CheckOutcome,
    CurvatureConfig,
    FiniteDifferenceHessian,
    ForwardDifferenceHessian,
    Hessian,
)
from lightning_subspace.curvature.fsdp_difference import STEP, ShardedDifferenceHessian
from lightning_subspace.data.sample import Sample
from lightning_subspace.linalg import eigsh
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from tests.benchmarks.workloads import (
    TRAINED,
    WORKLOADS,
    Batch,
    Case,
    Workload,
    colour_images,
    cross_entropy,
    digits,
    trained,
)
from tests.processes import run

EXAMPLES, K = 256, 5
SMOOTH: dict[type[nn.Module], Callable[[], nn.Module]] = {nn.ReLU: nn.GELU, nn.MaxPool2d: lambda: nn.AvgPool2d(2)}
TIMEOUT = 600.0


class Counted:
    """The loss, with the number of its evaluations."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, batch: Batch, batch_idx: int) -> Tensor:
        self.calls += 1
        return cross_entropy(module, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the rows")
    asked = parser.parse_args()
    data = {"digits": digits(), "colour": colour_images()}
    rows = []
    for name, workload in WORKLOADS.items():
        for variant in [workload] if workload.is_smooth else [smooth(workload), workload]:
            for steps in (0, TRAINED):
                case = trained(replace(variant, examples=EXAMPLES), data[workload.data], steps)
                require_the_right_choice(variant, case)
                row = {"network": name, "is_smooth": variant.is_smooth, "steps": steps, "n": case.space.n}
                rows.append(row | compared(case.module, case.sample))
                print(", ".join(f"{what} {value}" for what, value in rows[-1].items()), flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


def smooth(workload: Workload) -> Workload:
    """The same without kinks."""

    def make() -> nn.Module:
        layers = workload.make()
        assert isinstance(layers, nn.Sequential)
        return nn.Sequential(*(SMOOTH.get(type(layer), lambda layer=layer: layer)() for layer in layers))

    return replace(workload, make=make, is_smooth=True)


def require_the_right_choice(variant: Workload, case: Case) -> None:
    """Forward differences are used without kinks, and only there."""
    check = CurvatureConfig(curvature="finite-difference", loss_fn=cross_entropy).check(case.module, case.sample)
    assert (check.outcome is CheckOutcome.PASSED) == variant.is_smooth, f"{variant.name}: {check.reason}"


def compared(module: nn.Module, sample: Sample) -> dict[str, Any]:
    """Errors of each kind of difference, and evaluations of the loss that its products took."""
    space, counted = ParameterSpace.of(module), Counted()
    with TrainingLoss(module, space, cross_entropy, dtype=torch.float64) as loss:
        exact = Hessian(loss, sample.hessian)
        top = eigsh(exact.matvec, space.n, K, dtype=torch.float64, subspace_tol=None, verify="never").eigenvectors
        random = torch.randn(space.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        others = (vector / vector.norm() for vector in (exact.gradient(), random))
        directions = [*top, *others]
        images = [exact.matvec(direction) for direction in directions]
    with TrainingLoss(module, space, counted, order=1) as loss:
        forward = ForwardDifferenceHessian(loss, sample.hessian)
        near = taken(forward, directions, counted)
        far = [forward.matvec(direction.float(), STEP) for direction in directions]
    with TrainingLoss(module, space, counted, order=1, dtype=torch.float64) as loss:
        central = taken(FiniteDifferenceHessian(loss, sample.hessian, dtype=torch.float64), directions, counted)
    [sharded] = run(on_shards, 1, module, sample, directions, timeout=TIMEOUT)
    found = {"forward": near, "central": central, "shards": sharded}
    errors = {way: apart(products, images) for way, (products, _) in found.items()}
    return {
        "errors": errors | {"one_side": apart(far, images)},
        "gradients": {way: most for way, (_, most) in found.items()},
    }


def on_shards(module: nn.Module, sample: Sample, directions: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Products on the shards of FSDP2, layer by layer, and the evaluations of one; runs in a group."""
    mesh, counted = init_device_mesh("cpu", (dist.get_world_size(),)), Counted()
    for child in module.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)
    space, ranks = ParameterSpace.of(module), Ranks(dist.group.WORLD)
    with ShardedLoss(module, space, counted, ranks=ranks) as loss:
        partition = Partition.of(space, module, ranks)
        return taken(ShardedDifferenceHessian(loss, sample.hessian, partition=partition), directions, counted)


def taken(operator: BatchMean, directions: Sequence[Tensor], counted: Counted) -> tuple[list[Tensor], int]:
    """Products along directions, and the most evaluations of one."""
    operator.gradient()  # which the first product would take
    products, evaluations = [], []
    for direction in directions:
        before = counted.calls
        products.append(operator.matvec(direction.to(operator.dtype)).double())
        evaluations.append(counted.calls - before)
    return products, max(evaluations)


def apart(products: Sequence[Tensor], images: Sequence[Tensor]) -> dict[str, float]:
    """The largest error over lambda_1 along the eigenvectors, and errors over |H v| along the others."""
    errors = [float((product - image).norm()) for product, image in zip(products, images, strict=True)]
    lengths = [float(image.norm()) for image in images]
    relative = [error / length for error, length in zip(errors, lengths, strict=True)]
    return {
        "eigenvectors": max(errors[:K]) / lengths[0],
        "top": relative[0],
        "gradient": relative[K],
        "random": relative[K + 1],
    }


if __name__ == "__main__":
    main()
