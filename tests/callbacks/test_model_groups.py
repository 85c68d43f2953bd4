"""DDP strategies of others: those whose processes may share a model are refused by name, plain ones are measured."""

import logging
import re
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, SubspaceProjection
from lightning_subspace._lightning import MisconfigurationException
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.processes import run

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(32, 5, generator=GENERATOR, dtype=torch.float64)
DATA = TensorDataset(INPUTS, INPUTS[:, :3].argmax(dim=1))
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


@pytest.fixture(autouse=True, scope="module")
def _left_out():
    with pytest.MonkeyPatch.context() as patch:
        leave_self_check_out(patch)
        leave_error_bar_out(patch)
        yield


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 3).double()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


# Those that share a model


class Groups(DDPStrategy):
    """As packages with models of several processes have it: a size, a data loader of its own, and groups in `setup`."""

    def __init__(self, num_gpus_per_model, **kwargs):
        super().__init__(**kwargs)
        self.model_comm_group_size = num_gpus_per_model

    def setup(self, trainer):
        size = self.model_comm_group_size
        groups = [dist.new_group(list(range(i, i + size))) for i in range(0, self.world_size, size)]
        self.lightning_module.model_comm_group = groups[self.global_rank // size]
        super().setup(trainer)

    def process_dataloader(self, dataloader):
        return dataloader


class Ensemble(DDPStrategy):
    num_gpus_per_ensemble = 2


class ByProperty(DDPStrategy):
    @property
    def tensor_parallel(self):
        return True


class Hidden(DDPStrategy):
    def __init__(self, num_gpus_per_model):
        super().__init__()
        self.size = num_gpus_per_model


class OneShare(DDPStrategy):
    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": 1, "rank": 0}


class NotYet(DDPStrategy):
    @property
    def distributed_sampler_kwargs(self):
        raise AssertionError("model parallel groups are not initialized")


class OwnLoaders(DDPStrategy):
    def process_dataloader(self, dataloader):
        return list(dataloader)


class Denied(DDPStrategy):
    data_parallel = False


class Holds(DDPStrategy):
    """Names that say nothing: seen when training starts."""

    def setup(self, trainer):
        self.us = [dist.new_group([0, 1])]
        super().setup(trainer)


class HandsOut(DDPStrategy):
    def setup(self, trainer):
        self.lightning_module.net.us = dist.new_group([0, 1])
        super().setup(trainer)


class HalfReduced(DDPStrategy):
    def _setup_model(self, model):
        alone = [dist.new_group([rank]) for rank in range(2)][self.global_rank]
        return DistributedDataParallel(model, process_group=alone)


SHARED = {
    "a size": (lambda: Groups(2), "Groups.*model_comm_group_size = 2"),
    "a size of its class": (Ensemble, "Ensemble.*num_gpus_per_ensemble = 2"),
    "a property": (ByProperty, "ByProperty.*it has tensor_parallel = True"),
    "a size that is not to be seen": (lambda: Hidden(2), "Hidden.*takes num_gpus_per_model"),
    "fewer shares of the data": (OneShare, "OneShare.*distributed_sampler_kwargs are {'num_replicas': 1, 'rank': 0}"),
    "no shares yet": (NotYet, "NotYet.*distributed_sampler_kwargs raise AssertionError"),
    "loaders of its own": (OwnLoaders, "OwnLoaders.process_dataloader"),
    "its own word": (Denied, "Denied.*its attribute data_parallel is False"),
    "a group": (Holds, "Holds.*it holds a process group"),
    "a group of a layer": (HandsOut, "HandsOut.*the module holds a process group .*, in net"),
    "gradients of one process": (HalfReduced, "HalfReduced.*DistributedDataParallel has a process group of some"),
}


def fit(make, callbacks, steps=2):
    """In one of several processes."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", devices=2, strategy=make(), callbacks=callbacks(), **QUIET
        )
        trainer.fit(Net(), DataLoader(DATA, batch_size=4))
    rows = [cb.to_rows() for cb in trainer.callbacks if isinstance(cb, SubspaceMonitor)]
    return rows, [str(w.message) for w in told if "Subspace" in str(w.message)], trainer.global_step


def monitor(every_n_steps=2):
    settings = {"k": 2, "every_n_steps": every_n_steps, "max_overhead": None, "sample": 16, "gradient_sample": 16}
    return [SubspaceMonitor(**settings, dtype="float64")]


def refusal(make, callbacks):
    try:
        fit(make, callbacks)
    except MisconfigurationException as error:
        return str(error)
    return None


def refusals():
    """By name of what is shared, and that of a projection: one after the other in the same processes."""
    found = {name: refusal(make, monitor) for name, (make, _) in SHARED.items()}
    return found, refusal(lambda: Groups(2), lambda: [SubspaceProjection("bulk", k=1)])


def test_strategies_whose_processes_may_share_a_model_are_refused_by_name():
    for found, of_projection in run(refusals, 2, group=False):
        for name, (_, pattern) in SHARED.items():
            expected = f"SubspaceMonitor: strategy: .*{pattern}.*data_parallel = T"
            assert re.match(expected, str(found[name])), (name, found[name])
        assert of_projection.startswith(
            "SubspaceProjection: strategy: expected processes that each have a whole model, got Gr"
        )


# Those that do not


class Plain(DDPStrategy):
    """What a user adds to a strategy: a constructor, an environment, a limit, hooks."""

    model_averaging = 3  # named a little alike
    devices = (0, 1)
    context_parallel = False

    def __init__(self, note="", **kwargs):
        super().__init__(timeout=timedelta(seconds=60), **kwargs)
        self.note = note

    def setup_environment(self):
        self.note += "environment"
        super().setup_environment()

    def setup(self, trainer):
        super().setup(trainer)
        self.note += ", set up"

    def optimizer_step(self, *args, **kwargs):
        return super().optimizer_step(*args, **kwargs)

    def on_train_batch_start(self, *args, **kwargs):
        self.note += "."

    @property
    def distributed_sampler_kwargs(self):
        return {"num_replicas": self.world_size, "rank": self.global_rank}


class Said(Groups):
    """By a class attribute, as YAML can name a class."""

    data_parallel = True

    def setup(self, trainer):
        DDPStrategy.setup(self, trainer)


def said_later():
    strategy = Hidden(2)
    strategy.data_parallel = True
    return strategy


def registered():
    if "plain_of_the_users" not in StrategyRegistry:
        StrategyRegistry.register("plain_of_the_users", Plain, note="registered")
    return "plain_of_the_users"


APART = {
    "plain": Plain,
    "by its name": registered,
    "said by a class": lambda: Said(2),
    "said by an attribute": said_later,
    "one process to a model": lambda: Groups(1),
    "a static graph": lambda: DDPStrategy(static_graph=True),
    "a subclass with a static graph": lambda: Plain(static_graph=True, find_unused_parameters=False),
    "a backend": lambda: DDPStrategy(process_group_backend="gloo"),
    "a state of a hook": lambda: DDPStrategy(ddp_comm_state=PowerSGDState(None)),
}


def shown(rows):
    """All but times and bytes, as text: a missing value is nan."""
    apart = {"solver/seconds", "solver/overhead", "solver/megabytes_moved"}
    return [{key: repr(value) for key, value in row.items() if key not in apart} for one in rows for row in one]


# Two of these at once, its type alone, and one way more to say what a class says or a constructor is given.
ALIKE = ["a subclass with a static graph", "plain", "said by an attribute", "a backend"]


def each(names):
    """What `ddp` comes to, and what others do, one after the other in the same processes."""
    return fit(lambda: "ddp", monitor), {name: fit(APART[name], monitor) for name in names}


def test_plain_ones_are_measured_as_ddp_is():
    for expected, found in run(each, 2, [name for name in APART if name not in ALIKE], group=False):
        for name, (rows, told, step) in found.items():
            assert (told, step) == ([], 2), name
            assert shown(rows) == shown(expected[0]), name
            assert rows[0][0]["gradient_fraction"] > 0.0


@pytest.mark.thorough
@pytest.mark.parametrize("name", APART)
def test_a_plain_one_is_measured_as_ddp_is_in_processes_of_its_own(name):
    (expected, _, _), _ = run(fit, 2, lambda: "ddp", monitor, group=False)
    for rows, told, step in run(fit, 2, APART[name], monitor, group=False):
        assert (told, step) == ([], 2)
        assert shown(rows) == shown(expected)


class Drift(Callback):
    """Leaves the parameters of each process to itself for a while, as models that are averaged now and then are."""

    def on_train_batch_end(self, trainer, module, *args):
        step = trainer.global_step
        with torch.no_grad():
            module.net.bias += (trainer.global_rank if step in (1, 2) else 0) * 1e-12
            if step == 3:
                for parameter in module.parameters():
                    dist.broadcast(parameter.data, 0)


def test_no_probe_is_taken_of_parameters_that_differ_between_processes():
    for rows, told, step in run(fit, 2, lambda: "ddp", lambda: [Drift(), *monitor(1)], 5, group=False):
        assert step == 5
        assert [row["step"] for row in rows[0]] == [0, 3, 4, 5]
        for text in told:
            assert "the probe at step 1 failed and is left out, training goes on" in text
            assert "the parameter 'net.bias' has other values on other ranks" in text
        assert len(told) <= 1  # on the first rank
