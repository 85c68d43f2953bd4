"""The empirical Fisher against a dense one, from the gradients of single examples, one `backward()` each."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, SubspaceProjection, measure_subspace
from lightning_subspace.curvature import CheckOutcome, CurvatureConfig, EmpiricalFisher
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from tests.oracles import EPS, dense_gradient, top_eigenspace
from tests.processes import run
from tests.thorough import covering

ROUNDING = 1e4 * EPS
CLASSES = 3
SIZES = (6, 4, 1, 5)


def built(make, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(dtype)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def normed():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))


def dropping():
    return nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Tanh(), nn.Linear(20, CLASSES))


def batches(sizes=SIZES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    return [(x, torch.randint(CLASSES, (len(x),), generator=generator)) for x in inputs]


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def dense(module, data, weights, loss_fn=classify, *, examples=True):
    """sum_b w_b (mean over the examples of b of g g^T) / sum_b w_b; over micro-batches as they are without examples."""
    total = 0.0
    for (inputs, labels), weight in zip(data, weights, strict=True):
        pieces = (
            [(inputs[i : i + 1], labels[i : i + 1]) for i in range(len(labels))] if examples else [(inputs, labels)]
        )
        for piece in pieces:
            gradient = dense_gradient(module, lambda m, piece=piece: loss_fn(m, piece, 0))
            total = total + weight / sum(weights) / len(pieces) * torch.outer(gradient, gradient)
    return total


def opened(module, loss_fn=classify, **options):
    return TrainingLoss(module, ParameterSpace.of(module), loss_fn, **{"dtype": torch.float64, "order": 1} | options)


def as_matrix(operator):
    return torch.stack([operator.matvec(column) for column in torch.eye(operator.n, dtype=torch.float64)], dim=1)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=ROUNDING * float(expected.abs().max()))


# The matrix


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "micro-batches"])
@pytest.mark.parametrize("weights", [SIZES, (1.0, 7.0, 0.5, 2.0)], ids=["sizes", "weights"])
def test_products_are_those_of_the_dense_matrix(weights, examples):
    module = built(net)
    sample = sample_of_batches(list(zip(batches(), map(float, weights), strict=True))).hessian
    with opened(module) as loss:
        operator = EmpiricalFisher(loss, sample, examples=examples)
        matrix, gradient = as_matrix(operator), operator.gradient()
    assert_close(matrix, dense(module, batches(), weights, examples=examples))
    objective = lambda m: sum(w * classify(m, b, 0) for w, b in zip(weights, batches(), strict=True)) / sum(weights)  # noqa: E731
    assert_close(gradient, dense_gradient(module, objective))


def test_the_rank_is_at_most_the_number_of_examples():
    with opened(built(net)) as loss:
        values = torch.linalg.eigvalsh(as_matrix(EmpiricalFisher(loss, sample_of_batches(batches((3, 2))).hessian)))
    assert int((values > 1e-12 * values[-1]).sum()) == 5
    assert float(values[0]) > -1e-12 * float(values[-1])


def test_batch_norm_in_eval_mode_leaves_single_examples():
    module = built(normed)
    module[1].running_mean.normal_(generator=torch.Generator().manual_seed(0))
    with opened(module, mode="eval") as loss:
        matrix = as_matrix(EmpiricalFisher(loss, sample_of_batches(batches()).hessian))
    assert_close(matrix, dense(module.eval(), batches(), SIZES))


def test_sparse_gradients_of_an_embedding():
    module = nn.Embedding(6, CLASSES, sparse=True).double()
    data = [(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 2, 0]))]
    with opened(module) as loss:
        matrix = as_matrix(EmpiricalFisher(loss, sample_of_batches(data).hessian))
    same = nn.Embedding(6, CLASSES, _weight=module.weight.detach().clone())
    assert_close(matrix, dense(same, data, [4]))


def test_the_examples_of_a_batch_have_masks_of_their_own():
    module, data = built(dropping), [(torch.ones(8, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.long))]
    with opened(module) as loss:
        operator = EmpiricalFisher(loss, sample_of_batches(data).hessian)
        ((_, gradients),) = operator._retained
        assert len({tuple(g.tolist()) for g in gradients}) == 8  # of eight equal examples
        again = EmpiricalFisher(loss, sample_of_batches(data).hessian, memory=0.0)
        v = torch.randn(operator.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.equal(operator.matvec(v), again.matvec(v))


# How it is computed


def test_kept_and_recomputed_gradients_give_the_same_bits():
    module = built(dropping, torch.float32)
    sample = sample_of_batches(batches(dtype=torch.float32)).hessian
    results = {}
    with opened(module, dtype=torch.float32) as loss:
        size = 4 * loss.space.n
        v = torch.randn(loss.space.n, generator=torch.Generator().manual_seed(0))
        for count in (None, *range(0, 18)):
            operator = EmpiricalFisher(loss, sample, memory=None if count is None else count * size)
            results.setdefault(operator.num_retained, []).append((operator.matvec(v), operator.part([1, 3]).matvec(v)))
    assert results.keys() == {0, 6, 10, 11, 16}
    (image, of_part), *others = [pair for pairs in results.values() for pair in pairs]
    assert all(torch.equal(image, other) and torch.equal(of_part, other_part) for other, other_part in others)


class Counting(TrainingLoss):
    evaluations = 0

    def __call__(self, batch):
        self.evaluations += 1
        return super().__call__(batch)


@pytest.mark.parametrize(
    ("options", "setup", "each"),
    [({}, 16, 0), ({"memory": 0.0}, 0, 16), ({"examples": False}, 4, 0), ({"examples": False, "memory": 0.0}, 0, 4)],
)
def test_evaluations_of_the_loss(options, setup, each):
    module = built(net)
    with Counting(module, ParameterSpace.of(module), classify, dtype=torch.float64, order=1) as loss:
        operator = EmpiricalFisher(loss, sample_of_batches(batches()).hessian, **options)
        assert loss.evaluations == setup
        for _ in range(3):
            operator.matvec(torch.ones(operator.n, dtype=torch.float64))
        assert loss.evaluations == setup + 3 * each
        operator.gradient()
        assert loss.evaluations == setup + 3 * each + len(SIZES)


def test_parts_and_gradients_of_batches():
    module, sample = built(net), sample_of_batches(batches()).hessian
    with opened(module) as loss:
        operator = EmpiricalFisher(loss, sample)
        part = operator.part([0, 3])
        chosen = [batches()[0], batches()[3]]
        assert_close(as_matrix(part), dense(module, chosen, [6, 5]))
        for (_, gradient), data in zip(operator.batch_gradients(), batches(), strict=True):
            assert_close(gradient, dense_gradient(module, lambda m, data=data: classify(m, data, 0)))


# On ranks


def product_on_ranks(memory, examples):
    module, ranks = built(net), Ranks(dist.group.WORLD)
    partition = Partition.even(ParameterSpace.of(module), ranks)
    sample = sample_of_batches(batches(), ranks=ranks)
    with Counting(module, partition.space, classify, dtype=torch.float64, order=1) as loss:
        operator = EmpiricalFisher(loss, sample.hessian, memory=memory, examples=examples, partition=partition)
        v = partition.random(0, 1, torch.float64)
        found = [operator.matvec(v), operator.part([0, 3]).matvec(v), operator.gradient()]
    return [partition.gather(image) for image in found], loss.evaluations


@pytest.mark.parametrize(("examples", "memory", "size"), covering([True, False], [None, 0.0], [2, 3]))
def test_ranks_give_what_one_process_gives(size, memory, examples):
    module = built(net)
    partition = Partition.even(ParameterSpace.of(module))
    v = partition.random(0, 1, torch.float64)
    with opened(module) as loss:
        alone = EmpiricalFisher(loss, sample_of_batches(batches()).hessian, examples=examples)
        expected = [alone.matvec(v), alone.part([0, 3]).matvec(v), alone.gradient()]
    results = run(product_on_ranks, size, memory, examples)
    for found, _ in results:
        for image, target in zip(found, expected, strict=True):
            assert_close(image, target)
    assert len({evaluations for _, evaluations in results}) == 1  # a training step may have collectives of its own


def failing_on_one_rank():
    module, ranks = built(net), Ranks(dist.group.WORLD)
    partition = Partition.even(ParameterSpace.of(module), ranks)

    def loss_fn(module, batch, batch_idx):
        if fails and ranks.index == 1:
            raise ArithmeticError("deliberate")
        return classify(module, batch, batch_idx)

    fails = False
    with TrainingLoss(module, partition.space, loss_fn, dtype=torch.float64, order=1) as loss:
        sample = sample_of_batches(batches(), ranks=ranks)
        operator = EmpiricalFisher(loss, sample.hessian, memory=0.0, partition=partition)
        operator.gradient()
        fails = True
        try:
            return bool(operator.matvec(partition.random(0, 1, torch.float64)).isnan().all())
        except ArithmeticError as error:
            return str(error)


def test_a_rank_that_fails_contributes_nan_and_raises():
    assert run(failing_on_one_rank, 2) == [True, "deliberate"]


def on_shards():
    module = built(net, torch.float32)
    for layer in (module[0], module[2]):
        fully_shard(layer)
    fully_shard(module)
    data = batches(dtype=torch.float32)
    record = measure_subspace(
        module, data, k=2, tol=1e-5, loss_fn=classify, curvature="empirical-fisher", group=dist.group.WORLD
    )
    return record.subspace.eigenvalues.double()


def test_on_the_shards_of_fsdp2_it_is_measured_as_the_hessian_is():
    values, _ = top_eigenspace(dense(built(net), batches(), SIZES), 2)
    for found in run(on_shards, 2):
        torch.testing.assert_close(found, values, rtol=1e-4, atol=0.0)


# Whether single examples will do


def drawn_in_pairs(module, batch, batch_idx):
    """A contrast within the batch."""
    z = module(batch[0])
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def weighted(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))


def summed(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1], reduction="sum")


def noisy(module, batch, batch_idx):
    return F.cross_entropy(F.dropout(module(batch[0]), 0.5, training=module.training), batch[1])


# name -> (module, loss, mode, reason; None: single examples will do)
CHECKED = {
    "mean": (net, classify, "train", None),
    "dropout": (dropping, classify, "train", None),
    "functional dropout": (net, noisy, "train", None),
    "batch-norm": (normed, classify, "train", "batch-norm takes its statistics"),
    "batch-norm in eval mode": (normed, classify, "eval", None),
    "contrast": (net, drawn_in_pairs, "train", "is not the mean over its examples"),
    "contrast and dropout": (dropping, drawn_in_pairs, "train", "is not the mean over its examples"),
    "class weights": (net, weighted, "train", "is not the mean over its examples"),
    "sum": (net, summed, "train", "is not the mean over its examples"),
    "no batch of one": (net, lambda m, b, i: classify(m, (b[0][1:], b[1][1:]), i), "train", "is not the mean"),
    "an error": (net, lambda m, b, i: classify(m, b, i) + 0 * b[0][1].sum(), "train", "cannot be evaluated"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_the_check_finds_losses_that_are_no_means_over_examples(name):
    make, loss_fn, mode, reason = CHECKED[name]
    module, data = built(make), batches((12, 12))
    choice = CurvatureConfig(loss_fn, mode, curvature="empirical-fisher", dtype="float64")
    check = choice.check(module, sample_of_batches(data))
    assert check.outcome is (CheckOutcome.PASSED if reason is None else CheckOutcome.SKIPPED)
    choice, notice = choice.after_check(check)
    if reason is None:
        assert notice is None
    else:
        assert reason in check.reason
        assert "over micro-batches here" in notice
        assert check.reason in notice
    with choice.loss(module, ParameterSpace.of(module)) as loss:
        assert choice.operator(loss, sample_of_batches(data))._examples == (reason is None)


def test_what_cannot_be_cut_is_measured_over_micro_batches():
    data = [{"x": x, "y": y, "scale": torch.tensor(1.0)} for x, y in batches((5, 5))]
    loss_fn = lambda m, b, i: classify(m, (b["x"], b["y"]), i)  # noqa: E731
    options = {"k": 2, "tol": 1e-8, "loss_fn": loss_fn, "dtype": "float64", "weight": lambda b: len(b["y"])}
    with pytest.warns(UserWarning, match="over micro-batches here.*cannot be cut") as said:
        record = measure_subspace(built(net), data, curvature="empirical-fisher", **options)
    assert len(said) == 1
    values, _ = top_eigenspace(dense(built(net), batches((5, 5)), [5, 5], examples=False), 2)
    torch.testing.assert_close(record.subspace.eigenvalues, values, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("curvature", ["empirical-fisher", "empirical_fisher"])
def test_a_probe_finds_its_top_space(curvature):
    module = built(net)
    values, vectors = top_eigenspace(dense(module, batches(), SIZES), 3)
    options = {"k": 3, "tol": 1e-8, "loss_fn": classify, "dtype": "float64", "on_check_fail": "raise"}
    record = measure_subspace(module, batches(), curvature=curvature, **options)
    torch.testing.assert_close(record.subspace.eigenvalues, values, rtol=1e-8, atol=0.0)
    assert float((record.subspace.basis @ vectors.T).square().sum()) == pytest.approx(3.0, abs=1e-8)


# In the course of a training


class Net(LightningModule):
    def __init__(self, make):
        super().__init__()
        self.net, self.seen = make(), []

    def training_step(self, batch, batch_idx):
        return classify(self.net, batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append(copy.deepcopy(self.net).double())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(make, *callbacks):
    module = built(partial(Net, make), torch.float32)
    (data,) = batches((24,), torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=6))
    return module


@pytest.mark.parametrize(("make", "examples"), [(net, True), (normed, False)], ids=["examples", "micro-batches"])
def test_a_monitor_logs_its_eigenvalues(make, examples):
    data = batches((6, 6), torch.float32)
    options = {"sample": data, "every_n_steps": 2, "max_overhead": None, "tol": 1e-5, "curvature": "empirical-fisher"}
    monitor = SubspaceMonitor(k=2, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = trained(make, monitor)
    notices = [str(w.message) for w in said if "over micro-batches here" in str(w.message)]
    assert len(notices) == (not examples)
    same = trained(make)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), same.parameters(), strict=True))
    assert [record.step for record in monitor.history] == [0, 2, 4]
    wide = [(x.double(), y) for x, y in data]
    for record, step in zip(monitor.history, (0, 2), strict=False):
        matrix = dense(module.seen[step].train(), wide, [6, 6], examples=examples)
        values, _ = top_eigenspace(matrix, 2)
        torch.testing.assert_close(record.subspace.eigenvalues.double(), values, rtol=1e-4, atol=0.0)
        gradient = dense_gradient(module.seen[step].train(), lambda m: sum(classify(m, b, 0) for b in wide) / 2)
        assert record.metrics["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_a_projection_takes_its_space():
    data = batches((6, 6), torch.float32)
    options = {"k": 2, "sample": data, "refresh_every_n_steps": 1, "curvature": "empirical-fisher"}
    module, free = trained(net, SubspaceProjection("top", **options)), trained(net)
    before = built(partial(Net, net), torch.float32)
    matrix = dense(copy.deepcopy(before.net).double(), [(x.double(), y) for x, y in data], [6, 6])
    _, vectors = top_eigenspace(matrix, 2)
    flat = lambda m: torch.cat([p.detach().double().reshape(-1) for p in m.parameters()])  # noqa: E731
    update, unprojected = (flat(m.seen[1]) - flat(before.net) for m in (module, free))
    torch.testing.assert_close(update, vectors.T @ (vectors @ unprojected), rtol=0.0, atol=1e-3 * float(update.norm()))
