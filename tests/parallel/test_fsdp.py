"""Products of a Hessian with whole tensors in the place of FSDP2's shards, and what is known about those modules."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard
from torch.nn import functional as F

from lightning_subspace.curvature import Hessian
from lightning_subspace.curvature.self_check import CheckOutcome, self_check
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.fsdp import (
    full_tensors,
    is_sharded,
    local_slice,
    rank_zero_buffers,
    reshard,
    sharded_parameters,
    without_fsdp,
)
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import shards
from tests.oracles import dense_hessian
from tests.processes import run
from tests.thorough import IS_THOROUGH, covering

SIZE = 8


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """With embeddings that are also the last layer."""

    def __init__(self, d=4, words=7, length=5):
        super().__init__()
        self.embed, self.place = nn.Embedding(words, d), nn.Parameter(0.1 * torch.randn(length, d))
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.head = nn.Linear(d, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(activation=nn.Tanh):
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 3), activation(), nn.Linear(3, 3))


def frozen():
    net = mlp()
    net[2].requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Flatten(), nn.Linear(9, 3)
    )


def images(index):
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(SIZE + index, 5, generator=generator, dtype=torch.float64)
    return x.float(), torch.randint(0, 3, (len(x),), generator=generator)


def words(index):
    x = torch.randint(0, 7, (2 + index, 5), generator=torch.Generator().manual_seed(index))
    return x, (3 * x + 1) % 7


NETS = {
    "uneven": (mlp, images),
    "frozen": (frozen, images),
    "convolution and batch-norm": (convolution, images),
    "transformer with tied embeddings": (Transformer, words),
}
# The transformer is what tests/curvature/test_fsdp_trees.py has products of, by both ways.
WITHOUT_TREES = list(NETS) if IS_THOROUGH else list(NETS)[:-1]


def loss_fn(module, batch, batch_idx):
    output = module(batch[0])
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def micro_batch(data, index):
    """Of its own size and weight."""
    batch = data(index)
    return MicroBatch(batch, float(len(batch[0])), index)


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    net, data = NETS[name]
    return net().to(dtype), data


def shard(module, **options):
    """As one does: layer by layer, and the rest with the outermost module."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in module.blocks if isinstance(module, Transformer) else module:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def mean_of(data, count):
    """The weighted mean loss over the micro-batches of all ranks, in one process and float64."""
    batches = [micro_batch(data, index) for index in range(count)]
    total = sum(batch.weight for batch in batches)

    def objective(module):
        dtype = next(module.parameters()).dtype
        losses = []
        for batch in batches:
            x, y = batch.data
            losses.append(batch.weight / total * loss_fn(module, (x.to(dtype) if x.is_floating_point() else x, y), 0))
        return torch.stack(losses).sum()

    return objective


def exact_product(name, count):
    module, data = made(name, torch.float64)
    matrix = dense_hessian(module, mean_of(data, count))
    return matrix @ torch.linspace(-1.0, 1.0, len(matrix), dtype=torch.float64)


# -- exact products ---------------------------------------------------------------------------------------------------


def summed_product(loss, data):
    """This rank's micro-batch, weighted, and the others'."""
    rank, count = dist.get_rank(), dist.get_world_size()
    total = sum(micro_batch(data, index).weight for index in range(count))
    batch = micro_batch(data, rank)
    v = torch.linspace(-1.0, 1.0, loss.space.n, dtype=torch.float64).to(loss.dtype)
    product = Hessian(loss, [batch]).matvec(v) * (batch.weight / total)
    dist.all_reduce(product)
    return product


def product_on_whole_tensors(name, dtype, options):
    module, data = made(name, dtype)
    module = shard(module, **options)
    space = ParameterSpace.of(module)
    with TrainingLoss(module, space, loss_fn, dtype=dtype, replacements=full_tensors(module)) as loss:
        return summed_product(loss, data)


@pytest.mark.parametrize(
    ("name", "precision"), covering(WITHOUT_TREES, [(torch.float64, 1e-10), (torch.float32, 1e-5)])
)
def test_products_are_those_of_one_process(name, precision):
    dtype, tolerance = precision
    expected = exact_product(name, 2)
    for product in run(product_on_whole_tensors, 2, name, dtype, {}):
        assert (product - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)},
        {"reshard_after_forward": False},
    ],
)
def test_policies_of_fsdp_make_no_difference(options):
    expected = exact_product("uneven", 3)
    for product in run(product_on_whole_tensors, 3, "uneven", torch.float32, options):
        assert (product - expected).norm() < 1e-5 * expected.norm()


class Encoder(nn.Module):
    """Is used by another method than forward, and shares one FSDP group among layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)

    def encode(self, x):
        return self.second(torch.tanh(self.first(x)))


def other_forward_methods():
    torch.manual_seed(0)
    module = Encoder()
    matrix = dense_hessian(module.double(), lambda m: m.encode(images(0)[0].double()).square().mean())
    module = module.float()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard([module.first, module.second], mesh=mesh, reshard_after_forward=False)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "encode")
    space, batch = ParameterSpace.of(module), MicroBatch(images(0)[0], 1.0, 0)
    before = vars(module)["encode"]

    def loss_fn(module, batch, batch_idx):
        return module.encode(batch).square().mean()

    with TrainingLoss(module, space, loss_fn, replacements=full_tensors(module)) as loss:
        product = Hessian(loss, [batch]).matvec(torch.ones(space.n))
    module.encode(batch.data)  # without a backward pass: parameters stay gathered
    replacements = full_tensors(module)
    module.encode(batch.data)
    with TrainingLoss(module, space, loss_fn, replacements=replacements) as loss:
        again = Hessian(loss, [batch]).matvec(torch.ones(space.n))
    expected = matrix.sum(dim=1)
    return float((product - expected).norm() / expected.norm()), torch.equal(product, again), before is module.encode


def test_other_forward_methods_and_what_a_forward_pass_has_gathered():
    for error, is_equal, is_same_method in run(other_forward_methods, 2):
        assert error < 1e-5
        assert is_equal
        assert is_same_method


class Trained(Encoder):
    """A whole module that is sharded, with a training step of its own: with the number of the batch and without."""

    def training_step(self, batch, batch_idx):
        return (1.0 + batch_idx) * self.encode(batch).square().mean()


class TrainedByBatch(Encoder):
    def training_step(self, batch):
        return self.encode(batch).square().mean()


def step_of_a_sharded_module(kind, factor, times):
    torch.manual_seed(0)
    module = kind()
    matrix = dense_hessian(module.double(), lambda m: factor * m.encode(images(0)[0].double()).square().mean())
    module = module.float()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    for _ in range(times):
        register_fsdp_forward_method(module, "training_step")
    before = vars(module)["training_step"]
    space, batch = ParameterSpace.of(module), MicroBatch(images(0)[0], 1.0, 2)
    with TrainingLoss(module, space, replacements=full_tensors(module)) as loss:
        product = Hessian(loss, [batch]).matvec(torch.ones(space.n))
    expected = matrix.sum(dim=1)
    return float((product - expected).norm() / expected.norm()), before is module.training_step


@pytest.mark.parametrize(("kind", "factor", "times"), [(Trained, 3.0, 1), (TrainedByBatch, 1.0, 1), (Trained, 3.0, 2)])
def test_a_training_step_that_fsdp_takes_for_a_forward_method(kind, factor, times):
    for error, is_same_method in run(step_of_a_sharded_module, 2, kind, factor, times):
        assert error < 1e-5
        assert is_same_method


def checked(name):
    module, data = made(name)
    module = shard(module)
    space = ParameterSpace.of(module)
    loss = TrainingLoss(module, space, loss_fn, dtype=torch.float64, replacements=full_tensors(module))
    return self_check(loss, micro_batch(data, 0)).outcome


def test_the_float64_self_check_runs_on_whole_tensors():
    assert run(checked, 2, "transformer with tied embeddings") == [CheckOutcome.PASSED] * 2


# -- what is made, and what is not ------------------------------------------------------------------------------------


def copies():
    module, data = made("frozen")
    module = shard(module)
    replacements = full_tensors(module)
    addresses = {tensor.data_ptr() for tensor in replacements.values()}
    before = [p.to_local().clone() for p in sharded_parameters(module).values()]
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn, replacements=replacements) as loss:
        loss(micro_batch(data, 0))
        leaves = list(module.parameters())
        is_plain = not any(is_sharded(p) for p in leaves)
        are_replacements = {p.data_ptr() for p in leaves} == addresses
    after = [p.to_local() for p in sharded_parameters(module).values()]
    return is_plain, are_replacements, all(map(torch.equal, before, after)), len(replacements)


def test_replacements_are_the_leaves_themselves():
    assert run(copies, 2) == [(True, True, True, 6)] * 2


def narrow():
    module = shard(made("uneven")[0].bfloat16())
    whole = full_tensors(module)
    parts = [torch.equal(local_slice(whole[id(p)], p), p.to_local().float()) for p in module.parameters()]
    return {t.dtype for t in whole.values()}, {t.dtype for t in full_tensors(module, None).values()}, all(parts)


def test_full_tensors_are_widened_and_contain_the_shards():
    assert run(narrow, 3) == [({torch.float32}, {torch.bfloat16}, True)] * 3


def one_process():
    module = shard(made("uneven")[0])
    before = [p.to_local().clone() for p in module.parameters()]
    for tensor in full_tensors(module).values():
        tensor.zero_()
    return all(map(torch.equal, before, [p.to_local() for p in module.parameters()]))


def test_on_one_rank_they_are_copies_too():
    assert run(one_process, 1) == [True]


def writing(write):
    module, data = made("uneven")
    module = shard(module)

    def clamping(module, batch, batch_idx):
        write(module[2].weight)
        return loss_fn(module, batch, batch_idx)

    try:
        with TrainingLoss(module, ParameterSpace.of(module), clamping, replacements=full_tensors(module)) as loss:
            loss(micro_batch(data, 0))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def clamp_data(weight):
    weight.data.clamp_(-0.01, 0.01)


def replace_data(weight):
    weight.data = weight.data.clone()


def last_row(weight):
    with torch.no_grad():
        weight[-1] += 1.0  # of the last rank: the others notice by the version counter


@pytest.mark.parametrize("write", [clamp_data, replace_data, last_row])
def test_a_training_step_that_writes_to_its_weights_is_refused_on_every_rank(write):
    for message in run(writing, 2, write):
        assert "writes to a parameter that FSDP2 has sharded" in message


def without_replacements():
    module = shard(made("uneven")[0])
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn):
        pass


def test_without_replacements_it_is_refused():
    with pytest.raises(ValueError, match="expected the whole of every sharded tensor"):
        run(without_replacements, 2)


def hooks():
    module = shard(made("uneven")[0])
    seen = []
    module[2].register_forward_hook(lambda *args: seen.append(1))
    dicts = [getattr(m, name) for m in module.modules() for name in ("_forward_pre_hooks", "_forward_hooks")]
    before = [list(d.items()) for d in dicts]
    with without_fsdp(module):
        counts = [len(d) for d in dicts]
    return sum(counts), [list(d.items()) for d in dicts] == before


def test_only_hooks_of_fsdp_are_taken_off_and_come_back_in_order():
    assert run(hooks, 2) == [(1, True)] * 2


def buffers():
    torch.manual_seed(dist.get_rank())
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    for name, values in [("flags", torch.rand(4) > 0.5), ("wave", torch.randn(3, dtype=torch.complex64)), ("no", [])]:
        module.register_buffer(name, torch.as_tensor(values))
    module.register_buffer("turned", torch.randn(2, 3).t())
    nn.init.normal_(module[0].running_mean)
    own = {name: buffer.clone() for name, buffer in module.named_buffers()}
    copies = rank_zero_buffers(module, lambda tensor: dist.broadcast(tensor, 0))
    kept = all(torch.equal(own[name], buffer) for name, buffer in module.named_buffers())
    strides = all(copies[id(b)].stride() == b.stride() for b in module.buffers())
    with TrainingLoss(
        module, ParameterSpace.of(module), lambda m, x, i: m(x).mean(), mode="eval", replacements=copies
    ) as t:
        t(MicroBatch(torch.ones(2, 3), 1.0, 0))
        used = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return kept, strides, own, used


def test_buffers_of_rank_zero_are_used_and_nobody_s_change():
    first, second = run(buffers, 2)
    for kept, strides, _, used in (first, second):
        assert kept
        assert strides
        assert all(torch.equal(first[2][name], used[name]) for name in used)
    assert not torch.equal(first[2]["0.running_mean"], second[2]["0.running_mean"])


# -- how coordinates are dealt ----------------------------------------------------------------------------------------


def dealt(name):
    module = shard(made(name)[0])
    space = ParameterSpace.of(module)
    whole = space.flatten([p.full_tensor() for p in space.tensors(module)])
    held = shards(space, module)
    mine = torch.cat([whole[piece.start : piece.stop] for piece in held[dist.get_rank()]])
    local = torch.cat([p.to_local().flatten() for p in space.tensors(module)])
    return (
        torch.equal(mine, local),
        sorted(i for ranges in held for piece in ranges for i in piece),
    )


@pytest.mark.parametrize(("name", "count"), [("uneven", 2), ("frozen", 3), ("transformer with tied embeddings", 3)])
def test_ranges_are_the_shards(name, count):
    for are_equal, coordinates in run(dealt, count, name):
        assert are_equal
        assert coordinates == list(range(len(coordinates)))


def test_nothing_is_dealt_without_fsdp():
    module = mlp()
    space = ParameterSpace.of(module)
    assert shards(space, module) is None
    assert full_tensors(module) == {}
    reshard(module)


def partly():
    module = mlp()
    fully_shard(module[0], mesh=init_device_mesh("cpu", (2,)))
    return shards(ParameterSpace.of(module), module)


def test_what_is_not_sharded_is_cut_evenly():
    first, second = run(partly, 2)[0]
    assert first == (range(20), range(35, 39), range(42, 53), range(63, 65), range(66, 71), range(75, 77))
    assert second == (range(20, 35), range(39, 42), range(53, 63), range(65, 66), range(71, 75), range(77, 78))


def other_dimension():
    module = nn.Linear(4, 4, bias=False)
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(1))
    return shards(ParameterSpace.of(module), module)


def test_shards_of_columns_are_refused():
    with pytest.raises(ValueError, match="expected shards by rows"):
        run(other_dimension, 2)


def replicated():
    module = nn.Linear(4, 3)
    fully_shard(module, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return shards(ParameterSpace.of(module), module)


def test_what_replicas_hold_is_cut_among_them():
    """Two rows of four numbers on one shard and one on the other, each held by two ranks."""
    expected = (range(0, 4), range(12, 13)), (range(8, 10), range(14, 15)), (range(4, 8), range(13, 14))
    assert run(replicated, 4)[0] == (*expected, (range(10, 12), range(15, 15)))
