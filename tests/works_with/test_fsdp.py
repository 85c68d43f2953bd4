"""Training under FSDP2, Lightning's ModelParallelStrategy: nothing of it changes, whatever is evaluated in between."""

import contextlib
import functools
import io
import logging
import warnings
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_subspace import SubspaceMonitor
from lightning_subspace.callbacks.recorder import Recorder
from lightning_subspace.curvature import Hessian
from lightning_subspace.curvature.fsdp_difference import ShardedDifferenceHessian
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.loss.fsdp_loss import ShardedLoss
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.fsdp import full_tensors, rank_zero_buffers, reshard
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition, shards
from lightning_subspace.parallel.ranks import Ranks
from tests.left_out import leave_error_bar_out
from tests.modules import BATCH, CLASSES, FEATURES, differences, examples, fingerprint, random_bytes
from tests.oracles import dense_hessian
from tests.processes import run
from tests.thorough import usual
from tests.works_with import test_ddp as ddp


class Classifier(LightningModule):
    """With batch-norm, dropout, a frozen layer, an attribute that counts and logged values."""

    def __init__(self, reshard_after_forward=None):
        super().__init__()
        self.reshard_after_forward, self.count = reshard_after_forward, 0
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 7),
            nn.BatchNorm1d(7),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(7, 7).requires_grad_(False),
            nn.GELU(),
            nn.Linear(7, CLASSES),
        )
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[4]):
                fully_shard(layer, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch, batch_idx):
        self.count += 1
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def local(value):
    return value.to_local() if hasattr(value, "to_local") else value


def seen(trainer, module):
    """Everything of training that could have changed, as bytes."""
    with torch.no_grad():
        found = {f"parameter {n}": local(p).clone() for n, p in module.named_parameters()}
        found |= {f"gradient {n}": None if p.grad is None else local(p.grad) for n, p in module.named_parameters()}
        found |= {f"buffer {n}": b.clone() for n, b in module.named_buffers()}
        for i, state in enumerate(trainer.optimizers[0].state.values()):
            found |= {f"optimizer {i} {k}": local(v).clone() for k, v in state.items()}
    found |= {"random": random_bytes(), "count": module.count, "flags": [p.requires_grad for p in module.parameters()]}
    metrics = {k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith("subspace")}
    return fingerprint({**found, "metrics": metrics}, f"step {trainer.global_step}")


def settings(module):
    """What FSDP keeps of a module, by identity: its hooks, its states, its groups and their parameters."""
    found = {}
    for name, m in module.named_modules():
        found[name] = [
            (key, id(hook)) for hooks in (m._forward_pre_hooks, m._forward_hooks) for key, hook in hooks.items()
        ]
        if isinstance(m, FSDPModule):
            state = m._get_fsdp_state()
            found[f"{name} state"] = [(k, id(v)) for k, v in vars(state).items()]
            for group in state._fsdp_param_groups:
                found[f"{name} group"] = [
                    (k, id(v)) for k, v in vars(group).items() if k not in ("_all_reduce_state", "_post_reduce_event")
                ]
                found[f"{name} sharded"] = (group.is_sharded, group._reshard_after_forward)
                for i, p in enumerate(group.fsdp_params):
                    where = (id(p.sharded_param), p._sharded_param_data.data_ptr(), p.sharded_state)
                    found[f"{name} parameter {i}"] = where
    return found


@contextlib.contextmanager
def watched(trainer, module, changes):
    """What a block changes of training and of FSDP is added to the list."""
    reshard(module)  # a validation leaves the outermost gathered
    before, objects = seen(trainer, module), settings(module)
    yield
    changes += differences(before, seen(trainer, module)) + differences(objects, settings(module))


class Evaluate(Callback):
    """Evaluates the loss in one of the two ways, before training and after every step."""

    def __init__(self, way):
        self.way, self.products, self.models, self.changes = way, [], [], []

    def on_train_start(self, trainer, pl_module):
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer, pl_module)

    def look(self, trainer, module):
        with watched(trainer, module, self.changes):
            self.products.append(self.product(module))
            self.models.append({f"net.{name}": value for name, value in whole_state(module.net).items()})

    def product(self, module):
        space, rank = ParameterSpace.of(module), dist.get_rank()
        buffers = rank_zero_buffers(module, partial(dist.broadcast, src=0))
        held = [piece.cpu() for piece in batch_of(rank)]
        batch = MicroBatch(held, 1.0, rank)
        if self.way == "exact":
            with TrainingLoss(module, space, mode="eval", replacements={**full_tensors(module), **buffers}) as loss:
                product = Hessian(loss, [batch]).matvec(torch.ones(space.n)) / 2
            dist.all_reduce(product)
            return product
        with ShardedLoss(module, space, mode="eval", replacements=buffers) as loss:
            partition = Partition.of(space, module, Ranks(dist.group.WORLD))
            both = [batch if i == rank else replace(batch, index=i, is_local=False) for i in (0, 1)]
            part = ShardedDifferenceHessian(loss, both, partition=partition).matvec(torch.ones(loss.n))
        whole = torch.zeros(space.n)
        for piece, values in zip(held_by(space, module), part.split(list(loss.local_numels)), strict=True):
            whole[piece.start : piece.stop] = values
        dist.all_reduce(whole)
        return whole


def held_by(space, module):
    return shards(space, module)[dist.get_rank()]


def batch_of(index):
    x, y = examples().tensors
    return x[index * BATCH : (index + 1) * BATCH], y[index * BATCH : (index + 1) * BATCH]


class Observe(Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen |= seen(trainer, pl_module)


def whole_state(net):
    whole = {}
    for name, value in net.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        if "running" in name:
            dist.broadcast(value, 0)
        whole[name] = value
    return whole


def trained(way, folder, reshard_after_forward):
    evaluate = Evaluate(way)
    observed = fitted(Classifier(reshard_after_forward), folder, [] if way == "alone" else [evaluate])
    return observed, evaluate.changes, evaluate.products, evaluate.models


def fitted(module, folder, callbacks=(), steps=3, ranks=2):
    """What is observed of a fit."""
    seed_everything(1, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    observe = Observe()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=ranks,
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend="gloo"),
        callbacks=[*callbacks, observe],
        max_steps=steps,
        num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(examples(), batch_size=BATCH)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.fit(module, loader, loader)
    return observe.seen


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    cache = {}

    def result(reshard_after_forward):
        if reshard_after_forward not in cache:
            folder = tmp_path_factory.mktemp("alone")
            cache[reshard_after_forward] = run(trained, 2, "alone", folder, reshard_after_forward, group=False)
        return cache[reshard_after_forward]

    return result


WAYS = usual([("exact", None), ("differences", False)], thorough=[("differences", None)])


@pytest.mark.parametrize(("way", "reshard"), WAYS)
def test_training_and_the_sharding_are_untouched_and_products_are_right(way, reshard, alone, tmp_path):
    expected = alone(reshard)
    runs = run(trained, 2, way, tmp_path, reshard, group=False)
    for (seen_alone, *_), (seen_watched, changes, products, models) in zip(expected, runs, strict=True):
        assert differences(seen_alone, seen_watched) == []
        assert changes == []
        assert len(products) == 4
        for product, state in zip(products, models, strict=True):
            plain = Plain(state)
            hessian = dense_hessian(plain, Plain.mean_loss)
            exact = hessian @ torch.ones(len(hessian), dtype=torch.float64)
            assert (product - exact).norm() < (1e-5 if way == "exact" else 5e-3) * exact.norm()


class Plain(Classifier):
    """The same in one process, in eval mode and float64."""

    def __init__(self, state):
        super().__init__()
        self.configure_model()
        self.load_state_dict(state)
        self.double().eval()

    def mean_loss(self):
        losses = [F.cross_entropy(self.net(x.double()), y) for x, y in map(batch_of, (0, 1))]
        return torch.stack(losses).mean()


# -- the monitor ------------------------------------------------------------------------------------------------------

CURVATURES = ["hessian", "finite-difference"]
K, NCV = 2, 8


def monitor(**arguments):
    settings = {"k": K, "ncv": NCV, "every_n_steps": 1, "max_overhead": None, "sample": 16, "gradient_sample": 24}
    return SubspaceMonitor(**{**settings, "on_failure": "raise", **arguments})


def all_monitored(ranks, curvatures, folder):
    alone = fitted(Classifier(), folder, ranks=ranks)
    return [monitored(alone, ranks, curvature, folder) for curvature in curvatures]


def monitored(alone, ranks, curvature, folder):
    """A fit with the monitor: its differences from one without, and what the probes changed, held and recorded."""
    one = monitor(curvature=curvature, every_n_steps=[0, 2], tol=0.1)
    changes, bases, numbers = [], [], []

    def take(self, trainer, module, *args, original=Recorder.take):
        with watched(trainer, module, changes):
            original(self, trainer, module, *args)
        numbers.append(sum(local(p).numel() for p in module.parameters() if p.requires_grad))

    def close(self, trainer, module=None, *args, original=Recorder.close, **kwargs):
        with contextlib.nullcontext() if module is None else watched(trainer, module, changes):
            original(self, trainer, module, *args, **kwargs)

    def made(self, *args, original=Lanczos.__init__, **kwargs):
        original(self, *args, **kwargs)
        bases.append((self.basis.shape, self.basis.nbytes // 4, self.basis.dtype))

    watch = mock.patch.multiple(Recorder, take=take, close=close)
    with watch, mock.patch.object(Lanczos, "__init__", made):
        observed = fitted(Classifier(), folder, [one], ranks=ranks)
    return len(alone), differences(alone, observed), changes, bases, numbers, ddp.rows(one)


@pytest.mark.parametrize(("ranks", "curvatures"), usual([(2, CURVATURES)], thorough=[(3, ["hessian"])]))
def test_a_monitored_run_is_untouched_and_a_rank_holds_its_shards_of_the_basis(
    ranks, curvatures, tmp_path, monkeypatch
):
    """Weights, gradients, buffers, the optimizer, random numbers and metrics; FSDP's hooks, states and settings."""
    leave_error_bar_out(monkeypatch)
    for found in zip(*run(all_monitored, ranks, ranks, curvatures, tmp_path, group=False), strict=True):
        ddp.assert_equal_on_all([rows for *_, rows in found])
        for size, differing, changes, bases, numbers, rows in found:
            assert size > 50
            assert differing == []
            assert changes == []
            assert len(rows) == 2
            (own,) = set(numbers)
            assert len(bases) >= len(numbers) == len(rows)
            for shape, held, dtype in bases:
                assert dtype is torch.float32
                assert shape[1] == own
                assert held <= (NCV + 1) * own


class Sharded(ddp.Net):
    def configure_model(self):
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def fit_in_shards(ranks, data, *callbacks, **options):
    """On several ranks sharded; in float64, where that is training in one process."""
    if ranks == 1:
        return ddp.fit(ddp.Net(), data, *callbacks, strategy="auto", **options)
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    return ddp.fit(Sharded(), data, *callbacks, ranks=ranks, strategy=strategy, **options)


def measured(ranks, curvature):
    options = {"none": {"k": 0}, "finite-difference": {"batch_size": 12}}.get(curvature, {})  # fewer gradients
    one = ddp.monitor(**{"every_n_steps": [0, 1], "curvature": curvature, "tol": 1e-5, **options})
    with ddp.probes_alone():
        fit_in_shards(ranks, ddp.in_turn(ranks), one, steps=2)
    return ddp.rows(one), [[] if r.subspace is None else r.subspace.eigenvalues.tolist() for r in one.history]


@functools.cache
def measured_alone(curvature):
    return ddp.on(1, measured, curvature)


@pytest.mark.parametrize(("ranks", "curvatures"), usual([(2, CURVATURES)], thorough=[(3, ["hessian"])]))
def test_records_are_those_of_one_process(ranks, curvatures):
    """Differences of gradients on the shards too, which are another approximation there."""
    ((expected, eigenvalues),) = measured_alone("hessian")
    for curvature in curvatures:
        found = ddp.on(ranks, measured, curvature)
        assert_step_of(found[0][0], expected, 1e-9 if curvature == "hessian" else 2e-3)
        ddp.assert_equal_on_all(found)
        rows, values = found[0]
        assert len(rows) == 2
        exact = curvature == "hessian"
        for one, other, theirs, own in zip(rows, expected, eigenvalues, values, strict=True):
            assert own == pytest.approx(theirs, rel=0, abs=(1e-9 if exact else 1e-5) * theirs[0])
            for key in ("gradient_fraction", "overlap_previous"):
                assert (key in one) == (key in other)
                if key in other:
                    assert one[key] == pytest.approx(other[key], abs=1e-9 if exact else 1e-4, nan_ok=True)
        assert "overlap_previous" in rows[-1]


def assert_step_of(rows, expected, tolerance):
    """The step that was taken, from float32 parameters: the loss itself is right to 1e-7."""
    for one, other in zip(rows, expected, strict=True):
        for key in ("gain", "change", "curvature", "edge_ratio", "norm", "relative_norm"):
            assert one[f"step/{key}"] == pytest.approx(other[f"step/{key}"], rel=tolerance)
        if other["step"] > 0:
            assert one["step/cosine_previous"] == pytest.approx(other["step/cosine_previous"], abs=1e-5)


def test_the_step_is_measured_on_shards_without_second_derivatives():
    """Nothing whole is made of the shards: the parameters, the gradient and the update are parts."""
    ((expected, _),) = ddp.on(1, measured, "none")
    found = ddp.on(2, measured, "none")
    ddp.assert_equal_on_all(found)
    assert_step_of(found[0][0], expected, 2e-3)
    assert not any(key.startswith("eigenvalues") for row in found[0][0] for key in row)


def resumed(ranks, folder, resume, every_n_steps=2):
    """Train to step 7, from the start or from a checkpoint of shards, and leave one behind every step."""
    one = ddp.monitor(every_n_steps=every_n_steps, reference_step=2)
    data = ddp.in_turn(ranks, ddp.COUNT)  # one step an epoch
    with ddp.probes_alone():
        fit_in_shards(ranks, data, one, ddp.Saving(folder), steps=7, max_epochs=-1, ckpt_path=resume)
    return ddp.rows(one), *one.overlap_matrix()


@pytest.mark.thorough  # test_meshes.py goes on from shards, of two ranks on two and on four, between two probes
@pytest.mark.parametrize(("before", "at", "after"), [(2, 4, 3), (2, 5, 3), (3, 4, 2)])
def test_a_checkpoint_of_shards_can_be_resumed_on_another_number_of_ranks(before, at, after, tmp_path):
    """Behind a probe, whose record is open, and between two: as the straight run of one process."""
    ((history, steps, matrix),) = ddp.on(1, resumed, tmp_path / "alone", None)
    ddp.on(before, resumed, tmp_path / "before", None)
    found = ddp.on(after, resumed, tmp_path / "after", tmp_path / "before" / f"{at}.ckpt")
    ddp.assert_equal_on_all([rows for rows, *_ in found])
    rows, steps_then, overlaps = found[0]
    assert steps_then == steps == [0, 2, 4, 6, 7]
    torch.testing.assert_close(torch.as_tensor(overlaps), torch.as_tensor(matrix), rtol=0, atol=1e-6)
    for one, expected in zip(rows, history, strict=True):
        assert one.keys() == expected.keys()
        # The losses of training are those that this process has seen: a checkpoint has none of them.
        apart = ("solver/", "training_loss", *(["step/cosine_previous"] if expected["step"] == at else []))
        for key in (key for key in expected if not key.startswith(apart)):
            assert one[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6, nan_ok=True), (expected["step"], key)


# -- what is refused --------------------------------------------------------------------------------------------------


class Kinked(Classifier):
    def configure_model(self):
        if self.net is None:
            super().configure_model()
            self.net[2] = nn.ReLU()


class Narrow(Classifier):
    def configure_model(self):
        if self.net is None:
            policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
            with mock.patch(f"{__name__}.fully_shard", partial(fully_shard, mp_policy=policy)):
                super().configure_model()


def refused(folder):
    """Of a loss with kinks: the differences that a monitor makes, its records, and what it tells."""
    alone = fitted(Kinked(), folder, steps=2)
    one = monitor(curvature="finite-difference", on_failure="warn", every_n_steps=[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observed = fitted(Kinked(), folder, [one], steps=2)
    told = [str(warning.message) for warning in caught if "SubspaceMonitor" in str(warning.message)]
    return differences(alone, observed), [(record.subspace, dict(record.metrics)) for record in one.history], told


def test_of_a_loss_with_kinks_the_step_is_measured_and_no_product(tmp_path):
    for rank, (differing, records, told) in enumerate(run(refused, 2, tmp_path, group=False)):
        assert differing == []
        ((subspace, metrics),) = records
        assert subspace is None
        assert metrics["step/curvature"] > 0.0
        assert bool(told) == (rank == 0)
        for text in told:
            assert "the loss has kinks (relu)" in text
            assert "use curvature='hessian'" in text


def narrow(folder):
    alone, found = fitted(Narrow(), folder, steps=2), []
    for curvature in CURVATURES:
        one = monitor(curvature=curvature, every_n_steps=[1])
        observed = fitted(Narrow(), folder, [one], steps=2)
        found.append((differences(alone, observed), one.history[0].subspace.eigenvalues.tolist()))
    return found


def test_a_policy_of_narrow_types_is_set_aside_for_probes(tmp_path, monkeypatch):
    """By both ways the same in float32, and training goes on in the types of the policy."""
    leave_error_bar_out(monkeypatch)
    for (differing, exact), (differing_too, found) in run(narrow, 2, tmp_path, group=False):
        assert differing == differing_too == []
        assert found == pytest.approx(exact, rel=1e-3)
