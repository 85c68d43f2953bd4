"""FSDP2 as it is used: trees in part, meshes of two, policies and checkpointing, in few processes."""

import re
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from lightning_subspace.curvature import Hessian
from lightning_subspace.curvature.fsdp_difference import ShardedDifferenceHessian, check_gradient
from lightning_subspace.curvature.whole_copies import whole_copies
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.fsdp import fsdp_modules
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import PeerError, Ranks
from lightning_subspace.subspace.room import GIB
from tests.parallel.test_fsdp import Block, loss_fn, made, mean_of, micro_batch, words
from tests.processes import run
from tests.thorough import IS_THOROUGH

try:
    from torch.distributed._composable.replicate_with_fsdp import replicate
except ImportError:  # older versions of torch have it by DDP alone
    replicate = None

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
# Of blocks in a float32 root.
INSIDE = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)


def transformer():
    return made("transformer with tied embeddings")[0]


def blocks(module, mesh=None, **options):
    """The blocks alone: the root with its embeddings is whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for block in module.blocks:
        fully_shard(block, mesh=mesh, **options)
    return module


def everything(module, mesh=None, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    return fully_shard(blocks(module, mesh, **options), mesh=mesh, **options)


def embeddings_left_out(module):
    """With a hook of training's on what is whole, which is no part of the loss."""
    module.embed.weight.register_hook(torch.neg)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(blocks(module, mesh), mesh=mesh, ignored_params={module.embed.weight})


def replicated_block(module):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    replicate(module.blocks[0], mesh=mesh)
    fully_shard(module.blocks[1], mesh=mesh)
    return module


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def checkpointed_inside(module):
    for block in module.blocks:
        block.__class__ = Checkpointed
    return everything(module)


def checkpointed_around(module):
    for index, block in enumerate(module.blocks):
        module.blocks[index] = checkpoint_wrapper(block)
    return blocks(module)


def two():
    """Two replicas of two shards."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def transposed():
    """Shards over distant processes, replicas over neighbours."""
    return DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("replicate", "shard"))


def two_meshes(module, mesh=two):
    """Replicated shards in the blocks, plain ones in the root."""
    return fully_shard(blocks(module, mesh()), mesh=init_device_mesh("cpu", (4,)))


ON_TWO = {
    "embeddings left out": embeddings_left_out,
    **({} if replicate is None else {"a replicated block": replicated_block}),
    "host memory": partial(everything, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "bfloat16": partial(everything, mp_policy=BFLOAT16),
    "bfloat16, root not wrapped": partial(blocks, mp_policy=INSIDE, reshard_after_forward=False),
    "checkpointed inside": checkpointed_inside,
    "checkpointed around, root not wrapped": checkpointed_around,
}
ON_FOUR = {
    "HSDP, transposed, and FSDP": partial(two_meshes, mesh=transposed),
    "resharded over two": lambda module: everything(module, reshard_after_forward=2),
}
if IS_THOROUGH:  # one of two things each, or "bfloat16, root not wrapped" on more processes
    ON_FOUR |= {
        "HSDP, root not wrapped": lambda module: blocks(module, two(), mp_policy=INSIDE),
        "HSDP, transposed": lambda module: everything(module, transposed()),
        "HSDP and FSDP": two_meshes,
    }


def gradients(module):
    """Those of a training step with this rank's micro-batch."""
    loss_fn(module, words(dist.get_rank()), 0).backward()
    found = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in module.parameters()]
    module.zero_grad()
    return found


def measured(kinds, v):
    """Of each kind: products and gradient by both ways, what the partition holds, and what has changed."""
    found, ranks = {}, Ranks(dist.group.WORLD)
    batches = [micro_batch(words, index) for index in range(ranks.count)]
    for kind, wrap in kinds.items():
        module = wrap(transformer())
        space = ParameterSpace.of(module)
        partition = Partition.of(space, module, ranks)
        before, bytes_before = gradients(module), policies(module)
        with ranks.agree():
            with TrainingLoss(
                module, space, loss_fn, replacements=whole_copies(module, ranks, torch.float32), ranks=ranks
            ) as loss:
                exact = partition.gather(Hessian(loss, batches, partition=partition).matvec(partition.cut(v).float()))
            with ShardedLoss(module, space, loss_fn, ranks=ranks) as loss:
                operator = ShardedDifferenceHessian(loss, batches, partition=partition)
                gradient = operator.gradient()
                check_gradient(operator, gradient)
                difference = partition.gather(operator.matvec(partition.cut(v).float()))
            point = partition.gather(partition.point(module))
        is_as_before = all(map(torch.equal, before, gradients(module))) and policies(module) == bytes_before
        found[kind] = exact, difference, partition.gather(gradient), point, partition.local_n, is_as_before
    return found


def policies(module):
    """The types that FSDP works in, and its policies by identity."""
    states = [m._get_fsdp_state() for m in fsdp_modules(module)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    types = [(p.param_dtype, p.reduce_dtype, id(p.mp_policy)) for group in groups for p in group.fsdp_params]
    return (
        types,
        [(g._orig_dtype, g._reduce_dtype, id(g.mp_policy)) for g in groups],
        [id(s._mp_policy) for s in states],
    )


def gradient_and_product(module, objective):
    """The gradient, and H v by double backward: a dense Hessian takes as long as all that is compared with it."""
    parameters = list(module.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        pieces = torch.autograd.grad(objective(module), parameters, create_graph=True)
    slope = torch.cat([piece.flatten() for piece in pieces])

    def product(v):
        return torch.cat([p.flatten() for p in torch.autograd.grad(slope @ v, parameters, retain_graph=True)])

    return slope.detach(), product


@pytest.mark.parametrize(("kinds", "count"), [(ON_TWO, 2), (ON_FOUR, 4)])
def test_products_are_those_of_one_process_however_the_module_is_sharded(kinds, count):
    """With micro-batches of unequal weight; a rank holds n / W numbers of a vector, and training is as before."""
    module = transformer().double()
    slope, product = gradient_and_product(module, mean_of(words, count))
    top = torch.randn(len(slope), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(30):  # to where the largest eigenvalues are, where the solver looks
        top = product(top)
        top = top / top.norm()
    expected = product(top)
    whole = torch.cat([p.detach().flatten() for p in module.parameters()]).float()
    for results in run(measured, count, kinds, top):
        for kind, (exact, difference, gradient, point, local_n, is_as_before) in results.items():
            assert (exact - expected).norm() < 1e-5 * expected.norm(), kind
            assert (difference - expected).norm() < 1e-3 * expected.norm(), kind
            assert (gradient - slope).norm() < 1e-5 * slope.norm(), kind
            assert torch.equal(point, whole), kind
            # Each parameter is cut by itself, so that a rank may hold a row more of each.
            assert local_n < 1.4 * len(whole) / count, kind
            assert is_as_before, kind


# -- what is refused --------------------------------------------------------------------------------------------------


def tensor_parallel(module):
    return parallelize_module(module, init_device_mesh("cpu", (2,)), {"blocks.0.mlp.0": ColwiseParallel()})


def columns(module):
    return blocks(module, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))


def some_ranks(module):
    """Experts, say: every rank has a mesh of its own."""
    meshes = [DeviceMesh("cpu", [rank]) for rank in range(2)]
    fully_shard(module.blocks[1], mesh=meshes[dist.get_rank()])
    return module


REFUSED = {
    tensor_parallel: "'blocks.0.mlp.0.weight': expected a parameter that fully_shard has sharded, got a DTensor",
    columns: "'blocks.0.qkv.weight': expected shards by rows, .* tensor parallelism and shards along other dimensions",
    some_ranks: r"expected a mesh over the ranks that measure together, \[0, 1\], got one over \[.\]",
}


def refused():
    told = []
    for wrap in REFUSED:
        module = wrap(transformer())
        with pytest.raises(ValueError, match=": expected") as caught:
            Partition.of(ParameterSpace.of(module), module, Ranks(dist.group.WORLD))
        told.append(str(caught.value))
    module = everything(transformer())
    with pytest.raises(ValueError, match="group: expected the 2 processes that the module is sharded over, got 1"):
        Partition.of(ParameterSpace.of(module), module, Ranks())
    return told, without_room(module)


def without_room(module):
    """What each rank is told where one has memory for the parameters alone, and what was sent before that."""
    ranks, n = Ranks(dist.group.WORLD), sum(p.numel() for p in module.parameters())
    there = 4 * n if dist.get_rank() == 1 else 1 << 40
    with (
        mock.patch("lightning_subspace.curvature.whole_copies.free_memory", return_value=there),
        pytest.raises((ValueError, PeerError)) as caught,
        ranks.agree(),
    ):
        whole_copies(module, ranks, torch.float32)
    largest = max(p.numel() for p in module.parameters())
    numbers = f"n = {n:,} sharded parameters, {4 * (n + largest) / GIB:.3g} GiB, got {4 * n / GIB:.3g} GiB free on cpu;"
    return type(caught.value), numbers in str(caught.value), set(ranks.calls)


def test_what_cannot_be_measured_is_refused_with_a_sentence():
    found = run(refused, 2)
    for told, _ in found:
        for text, pattern in zip(told, REFUSED.values(), strict=True):
            assert re.search(pattern, text), text
    kinds = PeerError, ValueError
    assert [there for _, there in found] == [(kind, True, {"check"}) for kind in kinds]  # nothing was gathered
