"""Projects whose training step changes far more than gradients, and what can be observed of a run of one.

Each project is a LightningModule that keeps some kinds of state in ways that are found in real projects. `train` runs
one through a real Trainer, with or without a monitor, and returns all that can be seen of the run: a dict from a path
to bytes or plain values. Two runs are the same if and only if their dicts are equal.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import io
import logging
import random
import types
import warnings
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from torchmetrics import Accuracy, CatMetric, MeanMetric, MetricCollection

FEATURES, CLASSES, EXAMPLES, BATCH = 5, 3, 32, 8


def examples(seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(EXAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(dim=1))


class Holder(nn.Module):
    """A module with whatever it is given as attributes."""

    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        for name, value in attributes.items():
            setattr(self, name, value)


class Project(LightningModule):
    """A smooth two-layer classifier; what comes below adds one kind of state each."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def dataset(self) -> Dataset[Any]:
        return examples()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=BATCH, shuffle=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Statistics(Project):
    """Batch-norm, dropout, spectral norm old and new, weight norm old and new."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
            old = nn.utils.weight_norm(nn.Linear(4, 4))
        self.net = nn.Sequential(
            nn.utils.spectral_norm(nn.Linear(FEATURES, 4)),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.Dropout(0.3),
            old,
            parametrizations.weight_norm(nn.Linear(4, 4)),
            nn.Softplus(),
            parametrizations.spectral_norm(nn.Linear(4, CLASSES)),
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.steps += 1
        loss = F.cross_entropy(self.net(x), y) * (1 + 0.01 * self.steps)
        return {"loss": loss, "x": x}


class Metrics(Project):
    """self.log in all its forms, and metrics of torchmetrics, logged as objects and by value."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy(task="multiclass", num_classes=CLASSES)
        self.collection = MetricCollection(
            {
                "top": Accuracy(task="multiclass", num_classes=CLASSES, average="micro"),
                "macro": Accuracy(task="multiclass", num_classes=CLASSES, average="macro"),
            }
        )
        self.seen = CatMetric()
        self.hidden = {"mean": MeanMetric()}  # not registered as submodule
        self.per_epoch: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.collection(logits, y), on_step=False, on_epoch=True)
        self.log("mean", self.hidden["mean"](loss.detach()), on_epoch=True)
        self.seen.update(loss.detach())
        self.per_epoch.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("seen", self.seen.compute().sum())
        self.log("per_epoch", torch.stack(self.per_epoch).sum())
        self.seen.reset()
        self.per_epoch.clear()


class Randomness(Project):
    """Every source of random numbers a training step may draw from."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(4)
        self.numpy_legacy = np.random.RandomState(5)
        self.python = random.Random(6)
        self.unused = random.SystemRandom()
        self.sobol = torch.quasirandom.SobolEngine(FEATURES, scramble=True, seed=7)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        noise = torch.randn(len(x), 1) + torch.randn(len(x), 1, generator=self.generator)
        drawn = np.random.rand() + self.numpy_generator.normal() + self.numpy_legacy.rand()
        x = x + 0.1 * noise + 0.1 * self.sobol.draw(len(x)).to(x)
        scale = 1 + 0.01 * (drawn + random.random() + self.python.gauss(0, 1))
        return scale * F.cross_entropy(self.net(x), y)


class Pair(NamedTuple):
    total: Tensor
    tags: list[int]


@dataclass
class Helper:
    """A plain object with state."""

    count: int = 0
    values: list[float] = field(default_factory=list)
    average: Tensor = field(default_factory=lambda: torch.zeros(FEATURES))

    def see(self, x: Tensor) -> None:
        self.count += 1
        self.values.append(float(x.sum()))
        self.average.mul_(0.9).add_(x.mean(dim=0), alpha=0.1)


@dataclass(frozen=True, slots=True)
class Slotted:
    average: Tensor
    values: list[float]


class OldSlots:
    __slots__ = ("count", "later", "scale")

    def __init__(self) -> None:
        self.count = 0
        self.scale = torch.ones(())


class Attributes(Project):
    """Counters, containers at any depth, plain objects, attributes that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.scale = torch.ones(())
        self.same_scale = self.scale  # two names for one tensor
        self.window = self.scale_table()[1:3]
        self.array = np.zeros(3)
        self.names = {"b", "a"}
        self.recent: deque[float] = deque(maxlen=3)
        self.by_class: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.counts: Counter[int] = Counter()
        self.ordered = OrderedDict(first=1, second=2)
        self.nested = {"a": [{"deep": [torch.zeros(2)]}], "b": ({"in a tuple": []}, torch.zeros(()))}
        self.pair = Pair(torch.zeros(()), [])
        self.user = UserDict(seen=0)
        self.space = types.SimpleNamespace(step=0, last=None)
        self.helper = Helper()
        self.slotted = Slotted(torch.zeros(()), [])
        self.old_slots = OldSlots()
        self.read_only = types.MappingProxyType({"tensor": torch.zeros(())})
        self.partial = functools.partial(_weigh, torch.ones(CLASSES), seen=[])
        self.helpers = [Helper(), Helper()]
        self.keyed = {p: torch.zeros_like(p) for p in self.net.parameters()}
        self.to_delete = True

    def scale_table(self) -> Tensor:
        self.table = torch.ones(4)
        return self.table

    @functools.cached_property
    def lazy(self) -> Tensor:
        return torch.full((), 1.0 + self.count)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.count += 1
        self.scale += 0.01
        self.window.mul_(1.01)  # a view of self.table
        self.array += float(self.scale)
        self.names.add(f"step{self.count}")
        self.recent.append(float(x.mean()))
        self.by_class[int(y[0])].append(x[0])
        self.counts.update(y.tolist())
        self.ordered.move_to_end("first" if self.count % 2 else "second")
        self.nested["a"][0]["deep"][0].add_(x.mean())
        self.nested["b"][0]["in a tuple"].append(self.count)
        self.nested["b"][1].sub_(0.01)
        self.pair.total.add_(1)
        self.pair.tags.append(self.count)
        self.user["seen"] += 1
        self.space.step, self.space.last = self.space.step + 1, x
        self.helper.see(x)
        self.helpers[1].see(x)
        self.slotted.average.add_(x.mean())
        self.slotted.values.append(self.count)
        self.old_slots.count += 1
        self.old_slots.later = self.count
        self.old_slots.scale.mul_(1.01)
        self.read_only["tensor"].add_(0.01)
        for average in self.keyed.values():
            average.add_(0.1)
        if self.count == 1:
            self.register_buffer("buffer_made_later", torch.zeros(FEATURES))
            self.head_made_later = nn.Linear(FEATURES, 1).requires_grad_(False)
        self.buffer_made_later.add_(x.mean(dim=0))
        if hasattr(self, "to_delete"):
            del self.to_delete
        penalty = sum((self.keyed[p] * p).sum() for p in self.net.parameters())
        x = x * self.same_scale + self.helper.average + self.buffer_made_later + self.read_only["tensor"] * self.lazy
        loss = (self.partial(F.cross_entropy(self.net(x), y, reduction="none")) * self.table.mean()).mean()
        return loss * (1 + 0.001 * (self.space.step + len(self.recent) + self.slotted.average)) + 0.001 * penalty


def _weigh(weights: Tensor, losses: Tensor, *, seen: list[int]) -> Tensor:
    """Arguments of a partial are state like any other."""
    weights.mul_(0.99)
    seen.append(len(losses))
    return losses * weights.mean()


class Everything(Metrics):
    """What is above, in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics, self.randomness, self.attributes = Statistics(), Randomness(), Attributes()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        loss = loss + self.statistics.training_step(batch, batch_idx)["loss"]
        loss = loss + self.randomness.training_step(batch, batch_idx)
        return {"loss": loss + self.attributes.training_step(batch, batch_idx), "seen": self.attributes.count}


class Teacher(Project):
    """A momentum teacher, half of it rebound and half of it written in place; and a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).requires_grad_(False)
        self.pairs = list(zip(self.teacher.parameters(), self.net.parameters(), strict=True))
        self.unregistered = [nn.Linear(FEATURES, CLASSES)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        for i, (old, new) in enumerate(self.pairs):
            if i % 2:
                old.data = 0.9 * old.data + 0.1 * new.data
            else:
                old.data.mul_(0.9).add_(new.data, alpha=0.1)
        with torch.no_grad():
            for p in self.unregistered[0].parameters():
                p.mul_(0.99)
        logits = self.net(x)
        target = self.teacher(x) + self.unregistered[0](x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, target.detach())


class Clamped(Project):
    """Weights clamped before use, through `.data` and under no_grad; one parameter that carries attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].weight.history = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.net[0].weight.data.clamp_(-0.2, 0.2)
        self.net[0].weight.history.append(float(x.mean()))
        with torch.no_grad():
            self.net[2].weight.clamp_(-0.2, 0.2)
        return F.cross_entropy(self.net(x), y)


class ViewOfWeight(Project):
    """A differentiable view of a parameter, stored as attribute before training."""

    def __init__(self) -> None:
        super().__init__()
        self.first_row = self.net[0].weight[0]
        self.raw = self.net[2].weight.data

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.raw.mul_(0.999)
        return F.cross_entropy(self.net(x), y) + 0.1 * self.first_row.square().sum()


class Recurrent(Project):
    """An LSTM keeps its weights a second time, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 3, num_layers=2, batch_first=True, dropout=0.2)
        self.net = nn.Linear(3, CLASSES)
        self.state: tuple[Tensor, Tensor] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        out, state = self.lstm(x.unsqueeze(-1), self.state)
        self.state = tuple(s.detach() for s in state)  # carried over to the next batch
        return F.cross_entropy(self.net(out[:, -1]), y)


class Hooks(Project):
    """Hooks on parameters, a forward hook that appends to a list in its closure, a hook made in the step."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.net.parameters():
            p.register_hook(lambda g: g.clamp(-0.05, 0.05))
        self.outputs = activations = []
        calls = 0

        def record(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            activations.append(float(output.detach().mean()))
            return output * (1 + 0.01 * calls)

        self.net[0].register_forward_hook(record)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        handle = self.net[1].register_forward_hook(lambda module, args, output: output * 0.9)
        loss = F.cross_entropy(self.net(x), y)
        handle.remove()
        return loss


class Writers(Project):
    """Writes to the loggers themselves, through the module, the trainer, and a writer kept as attribute."""

    def on_fit_start(self) -> None:
        self.writer = self.loggers[1].experiment

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        step = self.global_step
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("written/scalar", float(x.mean()), step)
                logger.experiment.add_image("written/image", torch.rand(1, 4, 4), step)
        self.trainer.logger.log_metrics({"written/trainer": float(x.sum())}, step=step)
        self.logger.experiment.log_metrics({"written/logger": float(x.sum())}, step=step)
        self.writer.add_scalar("written/attribute", float(x.max()), step)
        with (Path(self.logger.log_dir) / f"{self.logger.name}{self.logger.version}.txt").open("w") as file:
            file.write("a file in the logger's folder, by whatever name it goes")
        self.print(f"step {batch_idx}")
        return F.cross_entropy(self.net(x), y)


class Toggled(Project):
    """Freezes and thaws in the step, also what is trained; changes modes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.calls += 1
        self.net[0].requires_grad_(self.calls % 2 == 0)
        self.head.requires_grad_(True)
        self.drop.train(self.calls % 3 == 0)
        self.train()
        self.net[1].eval()
        return F.cross_entropy(self.head(self.drop(self.net(x))), y)


class Cached(Project):
    """parametrize.cached, a buffer made anew at each step, and a table behind an lru_cache."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.net[2], orthogonal_map="householder")
        self.register_buffer("last", torch.zeros(FEATURES))

    @functools.cache  # noqa: B019 - as found in real projects
    def table(self, length: int) -> Tensor:
        return torch.arange(length) / length

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.last = 0.5 * self.last + 0.5 * x.mean(dim=0)
        with parametrize.cached():
            logits = self.net(x + self.last + self.table(FEATURES) + _positions(FEATURES))
            logits = logits + self.net(-x)
        return F.cross_entropy(logits, y)


@functools.cache
def _positions(length: int) -> Tensor:
    return torch.arange(length) / 10


class Bag:
    """A batch of a class of its own, with tensors, an array and a list."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.array, self.log = x, y, x.numpy().copy(), [len(x)]


class InPlaceBatch(Project):
    """Edits its batch in place, and consumes it."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=BATCH, shuffle=True, collate_fn=bag)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        held = batch["bag"]
        held.x.mul_(1.5)
        batch["array"] += 1.0
        held.array += 1.0
        held.log.append(1)
        batch["list"].pop()
        scale = 1 + 0.01 * (len(held.log) + float(held.array.mean()) + float(batch["array"].mean()))
        x = held.x + batch["x"].add_(0.1)
        return scale * F.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), held.y)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.left = (batch["bag"].x, batch["bag"].array, batch["bag"].log, batch["array"], batch["list"], batch["x"])


def bag(items: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    return {"bag": Bag(x, y), "array": np.ones(2), "list": [1, 2, 3], "x": x.clone()}


class RandomDataset(Dataset[Any]):
    """Augments at random: from a generator of its own, and from all the global ones."""

    def __init__(self) -> None:
        self.examples = examples()
        self.generator = torch.Generator().manual_seed(1)
        self.served: list[int] = []

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Any:
        self.served.append(index)
        x, y = self.examples[index]
        noise = torch.randn(FEATURES, generator=self.generator) + torch.randn(FEATURES)
        return x + 0.1 * noise + 0.1 * float(np.random.randn()) + 0.1 * random.random(), y


class Augmented(Project):
    """A dataset with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.data = RandomDataset()

    def dataset(self) -> Dataset[Any]:
        return self.data


class Data(LightningDataModule):
    """A data module whose transfer hook draws from its own generator and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(8)
        self.drawn: list[float] = []
        self.count = 0

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(examples(), batch_size=BATCH, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        self.count += 1
        self.drawn.append(self.generator.normal())
        return x * (1 + 0.1 * self.drawn[-1] + 0.01 * self.count), y


class Conductor(Project):
    """Sets the learning rate in the step, steps the scheduler, writes to the trainer and to the data module."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.99
        if self.global_step > 1:
            self.lr_schedulers().step()
        self.trainer.datamodule.count += 1
        loss = F.cross_entropy(self.net(x), y)
        self.trainer.seen_by_user = getattr(self.trainer, "seen_by_user", 0) + 1
        return loss * (1 + 0.01 * self.trainer.datamodule.count + 0.01 * self.trainer.seen_by_user)


# The gradient these train with is not the gradient of their loss: they write to weights, freeze them, or hold singular
# vectors fixed that depend on the weights. A monitor rightly warns that their second derivatives are wrong.
NOT_A_GRADIENT = {"Statistics", "Everything", "Teacher", "Clamped", "ViewOfWeight", "Toggled"}

PROJECTS: dict[str, Callable[[], Project]] = {
    cls.__name__: cls
    for cls in (
        Statistics,
        Metrics,
        Randomness,
        Attributes,
        Everything,
        Teacher,
        Clamped,
        ViewOfWeight,
        Recurrent,
        Hooks,
        Writers,
        Toggled,
        Cached,
        InPlaceBatch,
        Augmented,
        Conductor,
    )
}


# -- what can be observed of a run ------------------------------------------------------------------------------------


def train(
    make: Callable[[], Project],
    folder: Path,
    *callbacks: Callback,
    accumulate: int = 1,
    steps: int = -1,
) -> dict[str, Any]:
    """Train a project for two epochs of four batches, and return all that can be seen of it."""
    seed_everything(1, verbose=False)
    _positions.cache_clear()
    module, observer = make(), Observer()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    loggers = [CSVLogger(folder, name="csv", flush_logs_every_n_steps=1), TensorBoardLogger(folder, name="board")]
    trainer = Trainer(
        max_epochs=2,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=loggers,
        callbacks=[*callbacks, observer],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.fit(module, datamodule=Data() if isinstance(module, Conductor) else None)
    for logger in loggers:
        logger.finalize("success")
    seen = observer.seen
    seen["printed"] = printed.getvalue()
    seen["csv"] = _rows(Path(loggers[0].log_dir) / "metrics.csv")
    seen["board"] = _events(Path(loggers[1].log_dir))
    seen["files"] = sorted(p.name for p in Path(loggers[0].log_dir).iterdir() if p.suffix == ".txt")
    seen["finished"] = (trainer.global_step, trainer.current_epoch, trainer.should_stop)
    return seen


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The paths at which two runs differ, in the order of the run."""
    paths = list(dict.fromkeys([*one, *other]))
    return [path for path in paths if one.get(path, "absent") != other.get(path, "absent")]


class Observer(Callback):
    """Keeps a fingerprint of everything after each batch, where no probe looks: it would take longer at each step."""

    def __init__(self) -> None:
        self._kept = types.ModuleType("seen")
        self._kept.seen = {}

    @property
    def seen(self) -> dict[str, Any]:
        return self._kept.seen

    def _look(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        self.seen.update(fingerprint(module, f"{when} module"))
        self.seen.update(fingerprint([o.state_dict() for o in trainer.optimizers], f"{when} optimizers"))
        self.seen.update(fingerprint([c.scheduler.state_dict() for c in trainer.lr_scheduler_configs], f"{when} lr"))
        self.seen.update(fingerprint(random_bytes(), f"{when} random"))
        self.seen[f"{when} counts"] = getattr(trainer, "seen_by_user", None)
        if trainer.datamodule is not None:
            self.seen.update(fingerprint(vars(trainer.datamodule), f"{when} data"))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.update(fingerprint(batch, f"batch {len(self.seen)}"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module, f"epoch {trainer.current_epoch} batch {batch_idx}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(trainer, pl_module, "end")
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith("subspace")}
        self.seen.update(fingerprint(metrics, "callback_metrics"))


@contextlib.contextmanager
def counting_tensors() -> Iterator[Callable[[], int]]:
    """How many tensors that did not exist at the start are alive."""
    gc.collect()
    gc.freeze()  # what exists now is not looked at again

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    try:
        yield count
    finally:
        gc.unfreeze()


def random_bytes() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def fingerprint(root: Any, name: str, *, identity: bool = False) -> dict[str, Any]:
    """Everything below `root` as a dict from paths to bytes and plain values; shared objects are told by their path.

    Args:
        root: a module, or anything else.
        name: the path of the root.
        identity: tell objects by their ids too, and tensors by address and version.
    """
    found: dict[str, Any] = {}
    places: dict[int, str] = {}
    keep: list[Any] = []  # an id is an identity only as long as the object lives

    def visit(value: Any, path: str) -> None:
        if isinstance(value, bool | int | float | complex | str | bytes | type(None) | torch.dtype | torch.device):
            found[path] = repr(value)
            return
        if id(value) in places:
            found[path] = f"the same as {places[id(value)]}"
            return
        places[id(value)] = path
        keep.append(value)
        if identity:
            found[f"{path} id"] = id(value)
        if isinstance(value, Tensor):
            is_dense = value.layout is torch.strided and not value.is_nested
            if identity and is_dense:
                version = None if value.is_inference() else value._version
                found[f"{path} address"] = (value.data_ptr(), version)
            dense = value.detach().unbind() if value.is_nested else [value.detach().to_dense()]
            data = [(part.contiguous().numpy().tobytes(), part.shape) for part in dense]
            found[path] = (data, value.dtype, value.layout, value.requires_grad, value.is_leaf)
            if value.is_leaf and value.grad is not None:
                visit(value.grad, f"{path}.grad")
            if vars(value) and not value.is_nested:  # a nested one keeps its parts there
                visit(vars(value), f"{path}.")
        elif isinstance(value, np.ndarray):
            found[path] = (value.tobytes(), value.dtype, value.shape)
        elif isinstance(value, torch.Generator):
            found[path] = value.get_state().numpy().tobytes()
        elif isinstance(value, np.random.Generator):
            found[path] = repr(value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            found[path] = repr(
                [part if isinstance(part, str | int | float) else part.tobytes() for part in value.get_state()]
            )
        elif isinstance(value, random.SystemRandom):
            found[path] = "nothing to see"
        elif isinstance(value, random.Random):
            found[path] = repr(value.getstate())
        elif isinstance(value, dict | types.MappingProxyType):
            by_id = path.endswith(("hooks", "_metric_attributes"))  # numbers that differ between any two runs
            found[path] = [type(key).__name__ if by_id or isinstance(key, Tensor) else repr(key) for key in value]
            for i, (key, item) in enumerate(value.items()):
                if isinstance(key, Tensor):
                    visit(key, f"{path} key {i}")
                visit(item, f"{path}.{key}" if isinstance(key, str) else f"{path}.{i}")
        elif isinstance(value, list | tuple | deque):
            found[path] = (type(value).__name__, len(value))
            for i, item in enumerate(value):
                visit(item, f"{path}[{i}]")
        elif isinstance(value, set | frozenset):
            found[path] = sorted(map(repr, value))
        elif isinstance(value, functools.partial):
            for part in (value.args, value.keywords):
                visit(part, f"{path}({type(part).__name__})")
        elif isinstance(value, types.FunctionType):
            for i, cell in enumerate(value.__closure__ or ()):
                visit(cell.cell_contents, f"{path}<{i}>")
        elif isinstance(value, Trainer | SummaryWriter | weakref.ref):
            found[path] = type(value).__name__
        elif isinstance(value, types.MethodType | types.BuiltinFunctionType | type):
            found[path] = value.__qualname__
        else:
            found[path] = type(value).__name__
            for cls in type(value).__mro__:
                slots = vars(cls).get("__slots__", ())
                for slot in (slots,) if isinstance(slots, str) else slots:
                    if not slot.startswith("__") and hasattr(value, slot):
                        visit(getattr(value, slot), f"{path}.{slot}")
            if hasattr(value, "__dict__"):
                visit(vars(value), path + ".")

    visit(root, name)
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    """What the user logged to CSV, without the monitor's columns and empty cells."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if v != "" and not k.startswith("subspace")} for row in csv.DictReader(file)
        ]
    return [row for row in rows if set(row) - {"step", "epoch"}]


def _events(folder: Path) -> list[tuple[str, int, Any]]:
    """What the user logged to TensorBoard, in the order of writing."""
    found = []
    for path in sorted(folder.glob("events*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.startswith(("subspace", "custom_scalars")):
                    value.ClearField("metadata")
                    found.append((value.tag, event.step, value.SerializeToString()))
    return found
