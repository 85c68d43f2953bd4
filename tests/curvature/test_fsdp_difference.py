"""Differences of gradients on the shards of FSDP2: how exact they are, what they leave behind, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lightning_subspace.curvature.fsdp_difference import LARGEST_DIFFERENCE, ShardedDifferenceHessian, check_differences
from lightning_subspace.curvature.self_check import CheckOutcome
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.fsdp import fsdp_modules, is_sharded
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition, shards
from lightning_subspace.parallel.ranks import Ranks
from tests.modules import differences, fingerprint, random_bytes
from tests.oracles import dense_gradient, dense_hessian, top_eigenspace
from tests.parallel.test_fsdp import NETS, WITHOUT_TREES, images, loss_fn, made, mean_of, micro_batch, mlp, shard
from tests.processes import run
from tests.thorough import covering


def operator_of(loss, data, count=None, **options):
    """With one micro-batch a rank, or `count` of them in all."""
    ranks = Ranks(dist.group.WORLD)
    batches = [micro_batch(data, index) for index in range(ranks.count if count is None else count)]
    return ShardedDifferenceHessian(loss, batches, partition=Partition.of(loss.space, loss.module, ranks), **options)


def cut(whole, space, module):
    return torch.cat([whole[piece.start : piece.stop] for piece in shards(space, module)[dist.get_rank()]]).float()


def assembled(parts):
    """The whole of vectors, from (the ranges of all ranks, this rank's part), by rank."""
    held = parts[0][0]
    whole = torch.zeros(sum(len(piece) for ranges in held for piece in ranges), dtype=torch.float64)
    for ranges, (_, part) in zip(held, parts, strict=True):
        for piece, values in zip(ranges, part.split([len(piece) for piece in ranges]), strict=True):
            whole[piece.start : piece.stop] = values
    return whole


def products(name, vectors, options):
    module, data = made(name)
    module = shard(module, **options)
    space = ParameterSpace.of(module)
    held = shards(space, module)
    with ShardedLoss(module, space, loss_fn) as loss:
        operator = operator_of(loss, data)
        found = [operator.matvec(cut(v, space, module)) for v in vectors]
        found.append(operator.gradient())
    return [(held, part) for part in found]


@pytest.mark.parametrize(("name", "options"), covering(WITHOUT_TREES, [{}, {"reshard_after_forward": False}]))
def test_products_are_those_of_one_process(name, options):
    """With micro-batches of unequal weight; to 1e-3 along the top eigenvector, where the solver looks."""
    module, data = made(name, torch.float64)
    objective = mean_of(data, 2)
    matrix = dense_hessian(module, objective)
    _, (top,) = top_eigenspace(matrix, 1)
    random = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = run(products, 2, name, [top, 100.0 * random], options)
    along_top, along_random, gradient = (assembled(parts) for parts in zip(*results, strict=True))
    assert (along_top - matrix @ top).norm() < 1e-3 * (matrix @ top).norm()
    assert (along_random - matrix @ (100.0 * random)).norm() < 3e-3 * (matrix @ (100.0 * random)).norm()
    expected = dense_gradient(module, objective)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def rounds():
    """Three micro-batches on two ranks: one rank keeps the other company at weight zero."""
    module = shard(made("uneven")[0])
    space = ParameterSpace.of(module)
    with ShardedLoss(module, space, loss_fn) as loss:
        operator = operator_of(loss, images, 3)
        zero, nan = operator.matvec(torch.zeros(loss.n)), operator.matvec(torch.full((loss.n,), float("nan")))
        held, value = shards(space, module), operator.value(None)
        first = operator.part([0])
        return (held, operator.gradient()), value, bool(zero.any()), bool(nan.isnan().all()), len(first.batches)


def test_turns_of_unequal_weight():
    results = run(rounds, 2)
    module, data = made("uneven", torch.float64)
    objective = mean_of(data, 3)
    expected = dense_gradient(module, objective)
    assert (assembled([result[0] for result in results]) - expected).norm() < 1e-6 * expected.norm()
    for _, value, is_zero_wrong, is_nan, length in results:
        assert value == pytest.approx(objective(module).item(), rel=1e-6)
        assert not is_zero_wrong
        assert is_nan
        assert length == 1


SHIFT = 0.1


def values_alone():
    """Forward passes without a backward pass, one after the other, here and elsewhere; then FSDP's own."""
    module, data = made("uneven")
    module = shard(module)
    space, batches = ParameterSpace.of(module), [micro_batch(data, index) for index in range(2)]
    with ShardedLoss(module, space, loss_fn) as loss:
        halves = [(batch, 0.5) for batch in batches]
        values = [loss.value_at(offset, halves) for offset in (None, torch.full((loss.n,), SHIFT), None)]
    return [*values, sum(0.5 * loss_fn(module, batch.data, 0).item() for batch in batches)]


def test_values_alone_leave_fsdp_as_it_was():
    module, data = made("uneven")
    batches = [micro_batch(data, index).data for index in range(2)]

    def expected():
        return sum(0.5 * loss_fn(module, batch, 0).item() for batch in batches)

    here = expected()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(SHIFT)
    for values in run(values_alone, 2):
        assert values == pytest.approx([here, expected(), here, here], rel=1e-5)


def buffers_of_others():
    torch.manual_seed(dist.get_rank())
    module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    nn.init.normal_(module[1].running_mean)
    nn.init.ones_(module[0].weight)
    module = shard(module)
    replacements = {id(module[1].running_mean): torch.zeros(3)}
    with ShardedLoss(module, ParameterSpace.of(module), loss_fn, mode="eval", replacements=replacements) as loss:
        used = []
        operator_of(loss, images).mean_gradient([micro_batch(images, 0)])
        loss._shadow.reset()
        used.append(module[1].running_mean.clone())
    return used[0].tolist(), bool(module[1].running_mean.any())


def test_buffers_can_be_stood_in_for():
    assert run(buffers_of_others, 2) == [([0.0, 0.0, 0.0], True)] * 2


# -- nothing is left behind -------------------------------------------------------------------------------------------


class DeliberateError(Exception):
    pass


class Everything(nn.Module):
    """Counts, draws random numbers, moves a frozen teacher, and has a hook that would step."""

    def __init__(self):
        super().__init__()
        self.net, self.teacher, self.count = mlp(), mlp().requires_grad_(False), 0
        self.fails = False
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        self.count += 1
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                parameter.mul_(0.9)
        x = self.net(F.dropout(self.norm(x), 0.1)) + self.teacher(x)
        if self.fails:
            raise DeliberateError
        return x


def values(module):
    with torch.no_grad():
        found = {name: p.to_local().clone() for name, p in module.named_parameters()}
        found |= {f"grad {n}": p.grad.to_local().clone() for n, p in module.named_parameters() if p.grad is not None}
        found |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
    return fingerprint({**found, "count": module.count, "random": random_bytes()}, "values")


def objects(module):
    with torch.no_grad():
        found = {n: (id(p), p.to_local().data_ptr(), id(p.grad), p.requires_grad) for n, p in module.named_parameters()}
    return found | {name: id(buffer) for name, buffer in module.named_buffers()}


def untouched(fails_at):
    torch.manual_seed(0)
    module = Everything()
    mesh = init_device_mesh("cpu", (2,))
    for part in (module.net, module.teacher):
        fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    calls = []

    def evaluated(module, batch, batch_idx):
        calls.append(1)
        if len(calls) == fails_at:
            module.fails = True  # in the middle of the forward pass
        return loss_fn(module, batch, batch_idx)

    def step():
        optimizer.zero_grad()
        loss_fn(module, images(dist.get_rank()), 0).backward()
        optimizer.step()

    step()
    space, fired = ParameterSpace.of(module), []
    module.net[0].weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.mul_(0.5)))
    before = values(module) | objects(module)
    try:
        with ShardedLoss(module, space, evaluated) as loss:
            operator = operator_of(loss, images)
            is_same = torch.equal(operator.matvec(torch.ones(loss.n)), operator.matvec(torch.ones(loss.n)))
    except DeliberateError:
        is_same = None
    after = values(module) | objects(module)
    module.net[0].weight._post_accumulate_grad_hooks.clear()
    step()
    return differences(before, after), len(fired), is_same, values(module)


@pytest.mark.parametrize("fails_at", [None, 3])
def test_parameters_gradients_hooks_and_state_are_as_before(fails_at):
    for changes, fired, is_same, _ in run(untouched, 2, fails_at):
        assert changes == []
        assert fired == 0
        assert is_same is (None if fails_at else True)


def trained_on():
    return differences(untouched(None)[-1], untouched(3)[-1])


def test_training_goes_on_after_an_exception_as_without():
    assert run(trained_on, 2) == [[], []]


# -- what is refused --------------------------------------------------------------------------------------------------


def checked(make, data, prepare=None):
    torch.manual_seed(0)
    module = shard(make())
    if prepare is not None:
        prepare(module)
    with ShardedLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        return check_differences(operator_of(loss, data))


def test_smooth_nets_pass_the_check():
    first, second = run(lambda: {name: checked(*NETS[name]) for name in NETS}, 2)
    assert first == second
    assert first.keys() == NETS.keys()
    for name, found in first.items():
        assert found.outcome is CheckOutcome.PASSED, name
        assert found.error < LARGEST_DIFFERENCE / 5, name


def relu():
    return mlp(nn.ReLU)


def pooled():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 6, 2), nn.GELU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def many(index):
    generator = torch.Generator().manual_seed(index)
    return torch.randn(100, 5, generator=generator), torch.randint(0, 3, (100,), generator=generator)


@pytest.mark.parametrize(("make", "kink"), [(relu, "relu"), (pooled, "max_pool")])
def test_kinks_are_refused_by_name(make, kink):
    first, second = run(checked, 2, make, many)
    assert first == second
    assert first.outcome is CheckOutcome.FAILED
    assert first.error > 2 * LARGEST_DIFFERENCE
    assert "disagree by" in first.reason
    assert f"kinks ({kink}" in first.reason
    assert "use curvature='hessian'" in first.reason


def undivided(module):
    for part in fsdp_modules(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other


def partly_undivided(module):
    undivided(module[0])


@pytest.mark.parametrize("prepare", [undivided, partly_undivided])
def test_gradients_that_are_no_mean_over_ranks_are_refused(prepare):
    with pytest.raises(LossError, match="gradients are not those of the mean"):
        run(checked, 2, mlp, images, prepare)


def bfloat16_parameters():
    module = shard(mlp().bfloat16())
    ShardedLoss(module, ParameterSpace.of(module), loss_fn)


def unsharded_parameters():
    module = mlp()
    fully_shard(module[0], mesh=init_device_mesh("cpu", (2,)))
    ShardedLoss(module, ParameterSpace.of(module), loss_fn)


def called():
    module = shard(mlp())
    with ShardedLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        loss(micro_batch(images, 0))


def empty():
    module = shard(mlp())
    with ShardedLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        operator_of(loss, images, 0)


def unsynchronised():
    module = shard(mlp())
    module.set_requires_gradient_sync(False)
    with ShardedLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        operator_of(loss, images).gradient()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (bfloat16_parameters, ValueError, "got torch.bfloat16 for '0.weight'"),
        (unsharded_parameters, ValueError, "'2.weight' is not sharded"),
        (called, TypeError, "expected a call of gradient"),
        (empty, ValueError, "got an empty sample"),
        (unsynchronised, LossError, "no gradient to any shard"),
    ],
)
def test_what_cannot_be_is_told(function, error, message):
    with pytest.raises(error, match=message):
        run(function, 2)


def one_infinite():
    module = shard(mlp())

    def infinite(module, batch, batch_idx):
        return loss_fn(module, batch, batch_idx) * (float("inf") if dist.get_rank() == 1 else 1.0)

    with ShardedLoss(module, ParameterSpace.of(module), infinite) as loss:
        product = operator_of(loss, images).matvec(torch.ones(loss.n))
        return bool(product.isfinite().all()), all(is_sharded(p) for p in module.parameters())


def test_a_loss_that_is_not_finite_on_one_rank_comes_to_all():
    assert run(one_infinite, 2) == [(False, True)] * 2


def test_a_plain_module_is_not_sharded():
    module = mlp()
    with pytest.raises(ValueError, match=r"'0\.weight' is not sharded"):
        ShardedLoss(module, ParameterSpace.of(module), loss_fn)
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        loss(MicroBatch(images(0), 1.0, 0))
