"""Processes of a Trainer's strategy that measure together."""

from __future__ import annotations

from typing import Any

from lightning_subspace._lightning import Trainer, is_a
from lightning_subspace.callbacks.model_groups import ADVICE, SAID, why_by_sampler, why_shared
from lightning_subspace.parallel.ranks import Ranks, world

# Strategies that cannot be measured under, and what to do instead.
UNSUPPORTED = {
    "FSDPStrategy": "FSDP1 cannot be differentiated twice; use FSDP2, by ModelParallelStrategy(tensor_parallel_size=1) "
    "with fully_shard in configure_model, or strategy='ddp'.",
    "DeepSpeedStrategy": "DeepSpeed owns the backward pass, so that there is nothing to differentiate twice; use "
    "strategy='ddp', or FSDP2 by ModelParallelStrategy(tensor_parallel_size=1) with fully_shard in configure_model.",
}

# Names of a mesh's dimension over which layers are cut: Lightning's, and what strategies of other packages use.
TENSOR_PARALLEL = ("tensor_parallel", "tp")


def ranks_of(trainer: Trainer) -> Ranks:
    """The processes that share the data of training.

    Raises:
        ValueError: for strategies under which the Hessian of this module cannot be taken.
    """
    strategy = trainer.strategy
    if is_a(strategy, "ModelParallelStrategy"):
        return Ranks(_group_of_shards(strategy), strategy.root_device)
    for name, advice in UNSUPPORTED.items():
        if is_a(strategy, name):
            raise ValueError(f"strategy: {advice}")
    if trainer.world_size == 1 and not is_a(strategy, "DDPStrategy"):
        return Ranks()
    if not is_a(strategy, "DDPStrategy"):
        raise ValueError(
            f"strategy: expected DDP or FSDP2, got {type(strategy).__name__} with {trainer.world_size} processes; use "
            "strategy='ddp', ModelParallelStrategy(tensor_parallel_size=1), or devices=1."
        )
    if (why := why_shared(trainer)) is not None:
        raise ValueError(
            f"strategy: expected processes that each have a whole model, got {type(strategy).__name__}, of which "
            f"several may share one ({why}); {ADVICE}."
        )
    return Ranks(world(), strategy.root_device)


def _group_of_shards(strategy: Any) -> Any:
    """The process group of a strategy with a mesh.

    Raises:
        ValueError: where several processes compute one layer, or share a batch.
    """
    mesh = strategy.device_mesh
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=False))
    if any(sizes.get(name, 1) > 1 for name in TENSOR_PARALLEL):
        raise ValueError(
            "second derivatives through tensor parallel layers are wrong in torch; use "
            "ModelParallelStrategy(tensor_parallel_size=1), with fully_shard (FSDP2) in configure_model."
        )
    if getattr(strategy, SAID, None) is not True and (why := why_by_sampler(strategy)) is not None:
        raise ValueError(
            f"strategy: expected processes that each have batches of their own, got {type(strategy).__name__}, of "
            f"which several may share one ({why}); {ADVICE}."
        )
    # Where each process has its own batches, no other dimension of the mesh has more than one process a place.
    return mesh["data_parallel"].get_group() if sizes.get("data_parallel") == strategy.world_size else world()
