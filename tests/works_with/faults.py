"""Training under DDP, or FSDP2, in which one rank fails at a chosen place of a probe, once.

A place is a function of the package ("warm start"), something that the user's own code does meanwhile ("matvec 3
backward" is the backward pass in the third product of a probe), or an operation of torch that takes memory. `rig` makes
places of the functions, for good: it is for processes that end afterwards.
"""

import contextlib
import copy
import faulthandler
import inspect
import io
import logging
import math
import signal
import tempfile
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_subspace import Measurement, Needs, SubspaceMonitor, SubspaceProjection
from lightning_subspace import measurements as default
from lightning_subspace.callbacks import monitor, recorder
from lightning_subspace.curvature import CurvatureConfig, FiniteDifferenceHessian, Hessian, selection
from lightning_subspace.curvature.differences import DisplacedGradients
from lightning_subspace.curvature.forward_difference import ForwardDifferenceHessian
from lightning_subspace.curvature.fsdp_difference import ShardedDifferenceHessian
from lightning_subspace.curvature.gradient_field import GradientField
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel import fsdp as sharded
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe import examples, forecast, screening
from lightning_subspace.probe import measure as probe
from lightning_subspace.probe import run as tracker
from lightning_subspace.probe.resumed import Resumed
from lightning_subspace.report.progress import ProgressLine
from lightning_subspace.subspace.overlap_history import OverlapHistory
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.solver import Solver
from tests.left_out import leave_error_bar_out, leave_figures_out, leave_self_check_out
from tests.modules import Observer, differences, fingerprint, random_bytes
from tests.processes import RankErrorsError, run

SECONDS = 60  # that one fit may take, on a machine that does other things as well
LARGE = 30  # numbers: a hidden layer, a rank's part of a vector, but no small matrix of the eigensolver's
# Places in the self-check, and such as need that the first evaluation, where ranks agree, was one of its own.
CHECKING = ("self-check", "second evaluation", "diagnosis", "randomness", "of probe")
COSTS = ("solver/seconds", "solver/overhead", "solver/megabytes_moved")


class InjectedError(Exception):
    pass


ERRORS: dict[str, Callable[[str], Exception]] = {
    "exception": InjectedError,
    "value": ValueError,
    "memory": MemoryError,
    "device memory": torch.OutOfMemoryError,
}


@dataclass(frozen=True)
class Fault:
    """What happens once, and where.

    Attributes:
        place: see the top of this file.
        rank: where it happens; None: on all of them.
        kind: a key of `ERRORS`, "nan" (what the place computes is no number), "different" (it does something else) or
            "signal" (one arrives).
        step: of the probe in which it happens; None: outside of any.
        operation: which of the operations that take memory, where the place is one.
    """

    place: str
    rank: int | None
    kind: str = "exception"
    step: int | None = 1
    operation: int = 0

    @property
    def name(self) -> str:
        where = "all ranks" if self.rank is None else f"rank {self.rank}"
        what = "" if self.kind == "exception" else f", {self.kind}"
        return f"{self.place}{f' {self.operation}' if self.operation else ''} on {where}{what}"


class _Here(types.ModuleType):
    """Where this process is, and what is still to happen to it; a module, as the state of these is not put back."""

    def __init__(self) -> None:
        super().__init__("here")
        self.rank = 0
        self.faults: list[Fault] = []
        self.step: int | None = None
        self.phases: list[str] = []
        self.counts: Counter[str] = Counter()
        self.communicates = False
        self.num_operations = 0
        self.heard: list[tuple[str, list[str]]] = []

    @property
    def phase(self) -> str:
        return self.phases[-1] if self.phases else ""

    def due(self, place: str) -> Fault | None:
        for fault in self.faults:
            if fault.place == place and fault.rank in (self.rank, None) and fault.step == self.step:
                return fault
        return None


here = _Here()


def reach(place: str) -> bool:
    """Fail if it is to happen here and now; whether the result has to be spoiled instead."""
    fault = here.due(place)
    if fault is None:
        return False
    here.faults.remove(fault)
    if fault.kind == "signal":
        signal.raise_signal(signal.SIGUSR2)
        return False
    if fault.kind in ERRORS:
        raise ERRORS[fault.kind](f"at {place}")
    return True


# -- the package ------------------------------------------------------------------------------------------------------

MEASURED = (
    "GradientFraction",
    "GradientCurvature",
    "GapIndex",
    "SubspaceOverlap",
    "SharpnessOverThreshold",
    "Reliability",
)


def _product(self: Any, *args: Any) -> str:
    """A product has a number in the solve, or in the measurement, that it belongs to."""
    if here.phase == "solve" and here.counts["restarts"] and not here.counts["matvec after a restart"]:
        here.counts["matvec after a restart"] += 1
        return "matvec after a restart"
    label = "matvec" if here.phase == "solve" else f"{here.phase} matvec"
    here.counts[label] += 1
    return f"{label} {here.counts[label]}"


def _contract(self: Any, rotation: Tensor) -> str:
    """A thick restart keeps more than the k wanted vectors, a fresh start does not; all fits here have ncv = k + 3."""
    if rotation.shape[1] <= self.basis.shape[0] - 4:
        return f"{here.phase} contract"
    here.counts["restarts"] += 1
    return "restart"


def _within(what: str) -> Callable[..., str]:
    return lambda *args, **kwargs: f"{here.phase} {what}"


def _in_a_probe(what: str) -> Callable[..., str]:
    return lambda *args, **kwargs: what if here.phase == "probe" else f"{here.phase} {what}"


PLACES: list[tuple[Any, str, str | Callable[..., str]]] = [
    (CurvatureConfig, "_compare", "self-check"),
    (selection, "require_value", "second evaluation"),
    (GradientField, "of", "diagnosis"),
    (examples, "is_random", "randomness"),
    (screening, "with_loss", "screening"),
    (TrainingLoss, "__enter__", _in_a_probe("enter")),
    (Hessian, "_retain", _in_a_probe("build")),
    (Hessian, "mean_gradient", _in_a_probe("extra")),
    (Hessian, "matvec", _product),
    (DisplacedGradients, "gradient", _in_a_probe("build")),
    (DisplacedGradients, "mean_gradient", _in_a_probe("extra")),
    (FiniteDifferenceHessian, "matvec", _product),
    (ForwardDifferenceHessian, "matvec", _product),
    (ShardedDifferenceHessian, "matvec", _product),
    (sharded, "full_tensors", _in_a_probe("gather")),
    (Solver, "solve", lambda self, operator, matvec=None, **kwargs: "solve" if here.phase == "probe" else here.phase),
    (Solver, "_warm_start", "warm start"),
    (Lanczos, "contract", _contract),
    (Partition, "random", lambda self, seed, number, *args, **kwargs: f"random vector {number}"),
    (ParameterSpace, "of", _within("space")),
    (ParameterSpace, "tensors", _within("tensors")),
    (ProgressLine, "update", "progress"),
    (forecast, "forecast", "forecast"),
    (tracker.ProbeRun, "refresh_parameters", "adapt"),
    (tracker.ProbeRun, "_partition_of", lambda *args: here.phase or "begin"),
    (Partition, "point", "theta"),
    (tracker.ProbeRun, "measure", "probe"),
    (tracker.ProbeRun, "close", "close"),
    (Record, "with_found", _within("record")),
    (tracker.OpenRecord, "see_gradient", "see gradient"),
    (Resumed, "complete", "complete"),
    (OverlapHistory, "compare", "compare sketches"),
    (probe, "sketch", "sketch"),
    (monitor, "encode", "state"),
    (tracker.ProbeRun, "resumed", "restore"),
    *((getattr(default, name), "measure", name) for name in MEASURED),
    (default.Trace, "measure", "Trace"),
    (default.UpdateFraction, "after_step", "UpdateFraction"),
]


def rig() -> None:
    """Make places of the package's functions in this process."""
    here.rank = dist.get_rank()
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # how long torch waits for a worker that has failed
    for owner, name, label in PLACES:
        _cover(owner, name, label)
    _follow_probes()
    _follow_collectives()


def _cover(owner: Any, name: str, label: str | Callable[..., str]) -> None:
    """A place before a function, one behind it, and a phase in between."""
    original = inspect.getattr_static(owner, name)
    is_of_class = isinstance(original, classmethod)
    if is_of_class:
        original = original.__func__

    def covered(*args: Any, **kwargs: Any) -> Any:
        phase = label if isinstance(label, str) else label(*args, **kwargs)
        reach(phase)
        here.phases.append(phase)
        place = f"an operation of {phase}"
        try:
            with contextlib.nullcontext() if here.due(place) is None else _FailingOperation(place):
                result = original(*args, **kwargs)
        finally:
            here.phases.pop()
        reach(f"behind {phase}")
        return result

    setattr(owner, name, classmethod(covered) if is_of_class else covered)


def _follow_probes() -> None:
    """Which step a probe, and what is told of the step after it, belongs to."""

    def follow(name: str, step: Callable[..., int | None]) -> None:
        original = getattr(recorder.Recorder, name)

        def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
            here.step = step(self, *args)
            here.counts.clear()
            try:
                return original(self, *args, **kwargs)
            finally:
                here.step = None

        setattr(recorder.Recorder, name, followed)

    follow("take", lambda self, trainer, module, step: step)
    follow("close", lambda self, *args: None if self.open is None else self.open.record.step)


def _follow_collectives() -> None:
    """Inside of a collective no operation is made to fail: nothing can bound that."""
    begin, meet = Ranks._begin, Ranks._check

    def beginning(self: Any, *args: Any) -> None:
        begin(self, *args)
        here.communicates = True  # until the verb ends

    def meeting(self: Any, *args: Any) -> None:
        before, here.communicates = here.communicates, True
        try:
            meet(self, *args)
        finally:
            here.communicates = before

    def followed(verb: Any) -> Any:
        def ending(self: Any, *args: Any) -> Any:
            try:
                return verb(self, *args)
            finally:
                here.communicates = False

        return ending

    Ranks._begin, Ranks._check = beginning, meeting  # type: ignore[method-assign]
    for name in (
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "broadcast",
        "broadcast_object",
        "all_gather_object",
    ):
        setattr(Ranks, name, followed(getattr(Ranks, name)))


class _FailingOperation(TorchDispatchMode):
    """Counts the operations of torch that take memory, and fails in the place of one of them."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        is_new = not function.is_view and not function._schema.is_mutable
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if is_new and not here.communicates and max(sizes, default=0) >= LARGE:
            here.counts[self._place] += 1
            here.num_operations = here.counts[self._place]
            fault = here.due(self._place)
            if fault is not None and fault.operation == here.counts[self._place]:
                reach(self._place)
        return result


# -- a user's project -------------------------------------------------------------------------------------------------


class Net(LightningModule):
    """A net whose two sharpest directions are known: few products find them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.Identity(), nn.Linear(8, 3)

    def activation(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.first(batch["x"])
        is_spoiled = here.phase and reach(f"{here.phase} forward")
        hidden.register_hook(self.in_backward)
        output = self.second(F.dropout(self.activation(self.norm(hidden)), 0.2))
        sharp = 10.0 * self.second.bias[0] ** 2 + 5.0 * self.second.bias[1] ** 2
        loss = F.cross_entropy(output, batch["y"]) + sharp
        return loss * float("nan") if is_spoiled else loss

    def in_backward(self, gradient: Tensor) -> Tensor | None:
        return gradient * float("nan") if here.phase and reach(f"{here.phase} backward") else None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Normed(Net):
    """With statistics to be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


class Kinked(Net):
    def activation(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden)


class Skipping(Normed):
    """Without a loss for one micro-batch, the first of the second rank, in a probe alone."""

    skipped = math.inf  # what the second rank's first batch adds up to

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, total = super().training_step(batch, batch_idx), float(batch["x"].sum())
        if here.rank == 1 and not here.phase and math.isinf(self.skipped):
            self.skipped = total
        is_first = bool(here.phase) and math.isclose(total, self.skipped, rel_tol=1e-3)
        return None if is_first else loss  # type: ignore[return-value]


class OnCtx(torch.autograd.Function):
    """Softplus whose second derivative is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = torch.sigmoid(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.slope


class Wrong(Net):
    def activation(self, hidden: Tensor) -> Tensor:
        activated: Tensor = OnCtx.apply(hidden)
        return activated


class Layered(Net):
    """Large enough for a rank's shard to be `LARGE`; FSDP2 goes by forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, batch: Any) -> Tensor:
        return self.training_step(batch, 0)


class Sharded(Net):
    """The same, by FSDP2."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = Layered()

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch)
        return loss


class OfShards(Observer):
    """This rank's shards, without what FSDP keeps beside them."""

    def _look(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        gradients = {name: p.grad for name, p in module.named_parameters()}
        states = [module.state_dict(), gradients, *(o.state_dict() for o in trainer.optimizers)]
        self.seen.update(fingerprint([tree_map(sharded.local_part, states), random_bytes()], when))


class Numbers(Dataset[Any]):
    def __init__(self, count: int = 40) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        reach("item")  # first for the sample, where the dataset is read, and in training only then
        return {"x": self.x[index], "y": int(self.x[index, :3].argmax())}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        numbers = Numbers()
        return (numbers[i] for i in range(here.rank, len(numbers), dist.get_world_size()))


class Fragile(dict[str, Any]):
    """A batch that can fail to be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        reach("copy")
        return Fragile({key: copy.deepcopy(value, memo) for key, value in self.items()})


def collate(items: list[Any]) -> Any:
    reach("collate")
    return Fragile(torch.utils.data.default_collate([dict(item) for item in items]))


def unpicklable(items: list[Any]) -> Any:
    return Fragile(collate(items), function=lambda: None)


def weigh(batch: Any) -> float:
    return float("nan") if reach("weight") else float(len(batch["y"]))


class Watching(Measurement):
    """With collectives."""

    needs = Needs.NOTHING

    def measure(self, probe: Any) -> dict[str, float]:
        reach("measure before")
        norm = probe.norm(probe.gradient)
        reach("measure between")
        if reach("measure more"):
            probe.norm(probe.gradient)
        square = probe.dot(probe.gradient, probe.gradient)
        is_spoiled = reach("measure behind")
        return {"watched_norm": float("nan") if is_spoiled else norm, "watched_square": square}

    def after_step(self, probe: Any, gradient: Any, update: Any) -> dict[str, float]:
        reach("after_step before")
        moved = probe.norm(update)
        if reach("after_step behind"):
            probe.norm(update)
        return {"watched_move": moved}


class Text(Measurement):
    """What it gives is no number, now and then."""

    def measure(self, probe: Any) -> Any:
        return {"text": "none"} if reach("text") else {"text": 1.0}

    def after_step(self, probe: Any, gradient: Any, update: Any) -> Any:
        return {"text_after": "none"} if reach("text after step") else {"text_after": 1.0}


class Stubborn(Measurement):
    """Hears of no exception but its own."""

    needs = Needs.NOTHING

    def measure(self, probe: Any) -> dict[str, float]:
        reach("stubborn measure")
        with contextlib.suppress(Exception):
            return {"stubborn": probe.norm(probe.gradient)}
        return {}

    def after_step(self, probe: Any, gradient: Any, update: Any) -> dict[str, float]:
        reach("stubborn after_step")
        with contextlib.suppress(Exception):
            return {"stubborn_move": probe.norm(update)}
        return {}


class Solving(Measurement):
    """With an operator of its own: twice the Hessian."""

    def measure(self, probe: Any) -> dict[str, float]:
        count = 0

        def matvec(v: Tensor) -> Tensor:
            nonlocal count
            count += 1
            reach(f"own product {count} before")
            image: Tensor = 2.0 * probe.operator.matvec(v)
            if reach(f"own product {count} more"):
                probe.norm(v)
            return image * float("nan") if reach(f"own product {count} behind") else image

        found = probe.solve(matvec)
        return {"twice": float(found.eigenvalues[0]) if found.converged else float("nan")}


class Deciding(SubspaceMonitor):
    def should_measure(self, step: int) -> bool:
        return reach("should_measure") or super().should_measure(step)


class CometLogger(Logger):
    """What of a logger's is asked for by its name."""

    name, version = "name", "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any("subspace" in key for key in metrics):
            reach("scalars")

    @property
    def experiment(self) -> Any:
        return self

    def log_histogram_3d(self, *args: Any, **kwargs: Any) -> None:
        reach("histogram")

    def log_figure(self, *args: Any, **kwargs: Any) -> None:
        reach("figure")

    def log_asset_data(self, *args: Any, **kwargs: Any) -> None:
        """At the end of a fit, when no fault is due any more."""


class Hiding(Callback):
    """Takes a gradient away on the last rank, or puts it back."""

    def __init__(self, kept: list[Any], *, takes: bool) -> None:
        self.kept, self.takes = kept, takes

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_rank != trainer.world_size - 1:
            return
        if self.takes:
            self.kept.append(pl_module.second.weight.grad)
            pl_module.second.weight.grad = None
        else:
            pl_module.second.weight.grad = self.kept.pop()

    @property
    def state_key(self) -> str:
        return f"hiding {self.takes}"


def project(name: str, folder: Path) -> dict[str, Any]:
    """The module, the data, the callbacks before and behind the monitor, and the arguments of the Trainer."""
    kept: list[Any] = []
    fsdp = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    return {
        "module": {"smooth": Net, "kinked": Kinked, "sharded": Sharded, "skipping": Skipping, "wrong": Wrong}.get(
            name, Normed
        ),
        "observer": OfShards() if name == "sharded" else Observer(),
        "data": Stream() if name == "stream" else Numbers(),
        "collate": unpicklable if name == "unpicklable" else collate,
        "before": [Hiding(kept, takes=True)] if name == "hidden gradient" else [],
        "behind": [Hiding(kept, takes=False)] if name == "hidden gradient" else [],
        "options": {
            "strategy": fsdp if name == "sharded" else "ddp",
            "logger": CometLogger() if name == "logged" else False,
            "enable_checkpointing": name == "saved",
            "callbacks": [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)] if name == "saved" else [],
        },
    }


# -- fits -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A fit with faults.

    Attributes:
        faults: what goes wrong.
        monitor: its arguments.
        callback: its class.
        measurements: makes the user's measurements.
        project: see `project`.
        max_steps: of the fit.
        resumes: whether it goes on from a checkpoint after one step.
        note: for the name.
    """

    faults: Sequence[Fault]
    monitor: dict[str, Any] = field(default_factory=dict)
    callback: type[SubspaceMonitor] = SubspaceMonitor
    measurements: Callable[[], Sequence[Measurement]] = lambda: [Watching()]
    project: str = "usual"
    max_steps: int = 2
    resumes: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        others = f"and {len(self.faults) - 1} more" if len(self.faults) > 1 else ""
        return " ".join(filter(None, [self.faults[0].name, others, self.note]))

    def goes_by(self, *parts: str) -> bool:
        """Whether a fault is at a place with some of these words."""
        return any(part in fault.place for fault in self.faults for part in parts)

    @contextlib.contextmanager
    def without_the_rest(self) -> Iterator[None]:
        """Leave out what takes most of a short fit, where no fault, and nothing that is told, hangs on it."""
        is_checked = self.project in ("kinked", "wrong", "unpicklable") or self.goes_by(*CHECKING)
        with pytest.MonkeyPatch.context() as patch:
            if not is_checked:
                leave_self_check_out(patch)
            if not self.goes_by("Reliability", "of probe"):
                leave_error_bar_out(patch)
            if not self.goes_by("figure"):
                leave_figures_out(patch)
            yield


@dataclass(frozen=True)
class Fit:
    """What a case came to on one rank.

    Attributes:
        changed: what of training differs from a fit without the monitor.
        left: faults that did not happen.
        error: what `Trainer.fit` raised.
        told: the warnings of the monitor.
        steps: of its records.
        rows: their metrics, without what they cost.
        verified: whether missed copies of eigenvalues were excluded.
        num_probes: how many the tracker has counted.
        overlaps: the matrix.
        heard: signals that a handler has got, with the phases of a probe that it ran in.
        num_operations: that took memory, in the last probe in which they were counted.
        seconds: that it took.
    """

    changed: list[str]
    left: list[Fault]
    error: str | None
    told: list[str]
    steps: list[int]
    rows: list[dict[str, float]]
    verified: list[bool]
    num_probes: int
    overlaps: Any
    heard: list[tuple[str, list[str]]]
    num_operations: int
    seconds: float


def run_cases(cases: Sequence[Case], world_size: int) -> dict[str, list[Fit]]:
    """What every case comes to, by rank: one after the other in the same processes.

    Raises:
        AssertionError: with the case and the stacks of all ranks, when one takes longer than `SECONDS`.
    """

    def in_a_process(folder: str) -> list[Fit]:
        rank = dist.get_rank()
        rig()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        alone: dict[Any, Observer] = {}
        found = []
        with Path(folder, f"{rank}.txt").open("w") as log:
            for number, case in enumerate(cases):
                print(f"rank {rank}: {case.name}", file=log, flush=True)
                faulthandler.dump_traceback_later(SECONDS, exit=True, file=log)
                key = case.project, case.max_steps, case.resumes
                if key not in alone:
                    alone[key] = _fit_alone(case, Path(folder, f"alone {number}"))
                found.append(_fit(case, alone[key], Path(folder, str(number))))
                faulthandler.cancel_dump_traceback_later()
        return found

    with tempfile.TemporaryDirectory() as folder:
        try:
            results = run(in_a_process, world_size, folder, timeout=SECONDS * (len(cases) + 1.0))
        except RankErrorsError as error:
            stacks = [path.read_text().splitlines()[-40:] for path in sorted(Path(folder).glob("*.txt"))]
            raise AssertionError("\n".join(line for lines in stacks for line in lines)) from error
    return {case.name: list(of_ranks) for case, of_ranks in zip(cases, zip(*results, strict=True), strict=True)}


def _fit_alone(case: Case, folder: Path) -> Observer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.resumes:
            train(replace(case, max_steps=1), None, folder)
        return train(case, None, folder)[0]


def train(
    case: Case, callback: Callback | None, folder: Path, module: LightningModule | None = None
) -> tuple[Observer, str | None]:
    """One fit: what was seen of it, and what it raised."""
    seed_everything(7, verbose=False)
    its = project(case.project, folder)
    observer, options = its["observer"], its["options"]
    ours = [] if callback is None else [callback]
    options["callbacks"] = [*its["before"], *ours, *its["behind"], *options["callbacks"], observer]
    trainer = Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        default_root_dir=folder,
        max_steps=case.max_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = DataLoader(its["data"], batch_size=4, collate_fn=its["collate"])
    path = folder / "resumed.ckpt" if case.resumes and case.max_steps > 1 else None
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            trainer.fit(its["module"]() if module is None else module, loader, ckpt_path=path)
        except Exception as error:
            return observer, f"{type(error).__name__}: {error}"
    if case.resumes and case.max_steps == 1:
        trainer.save_checkpoint(folder / "resumed.ckpt")
    return observer, None


def _monitor(case: Case) -> SubspaceMonitor:
    arguments = {"every_n_steps": [1, 2], "max_overhead": None, "sample": 8, "gradient_sample": 16, "batch_size": 4}
    return case.callback(
        **{"k": 2, "ncv": 5, "log": "all", **arguments, "measurements": case.measurements(), **case.monitor}
    )


def project_updates(
    found: Sequence[tuple[Fault, dict[str, Any]]], world_size: int
) -> list[tuple[tuple[str | None, list[str], Tensor], ...]]:
    """Fits whose updates are projected, each with a fault and arguments of the projection.

    Returns:
        For each, by rank: what was raised and told, and the parameters at the end.
    """

    def in_a_process(folder: str) -> list[tuple[str | None, list[str], Tensor]]:
        rig()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        return [_project(fault, options, Path(folder, str(number))) for number, (fault, options) in enumerate(found)]

    with tempfile.TemporaryDirectory() as folder:
        return [*zip(*run(in_a_process, world_size, folder, timeout=SECONDS * len(found)), strict=True)]


def _project(fault: Fault, options: dict[str, Any], folder: Path) -> tuple[str | None, list[str], Tensor]:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    here.faults = [fault]
    module = Net()
    projection = SubspaceProjection("bulk", k=2, ncv=5, **options)
    case = Case([fault], max_steps=3)
    with warnings.catch_warnings(record=True) as caught, case.without_the_rest():
        warnings.simplefilter("always")
        _, error = train(case, projection, folder, module)
    faulthandler.cancel_dump_traceback_later()
    told = [text for warning in caught if "SubspaceProjection" in (text := str(warning.message))]
    return error, told, nn.utils.parameters_to_vector(module.parameters()).detach()


def _fit(case: Case, alone: Observer, folder: Path) -> Fit:
    start = time.monotonic()
    if case.resumes:
        with warnings.catch_warnings(), case.without_the_rest():
            warnings.simplefilter("ignore")
            train(replace(case, max_steps=1), _monitor(case), folder)
    here.faults, here.step, here.communicates = list(case.faults), None, False
    here.phases.clear()
    here.heard.clear()
    signal.signal(
        signal.SIGUSR2, lambda signum, frame: here.heard.append((signal.Signals(signum).name, [*here.phases]))
    )
    its_monitor = _monitor(case)
    with warnings.catch_warnings(record=True) as caught, case.without_the_rest():
        warnings.simplefilter("always")
        observer, error = train(case, its_monitor, folder)
    left, here.faults = here.faults, []
    texts = [str(warning.message) for warning in caught]
    its, records = its_monitor._runner.run, its_monitor.history
    return Fit(
        changed=differences(alone.seen, observer.seen)[:5],
        left=left,
        error=error,
        told=[text for text in texts if "SubspaceMonitor" in text or "InjectedError" in text],
        steps=[record.step for record in records],
        rows=[{k: v for k, v in record.metrics.items() if k not in COSTS} for record in records],
        verified=[record.subspace is not None and record.subspace.verified for record in records],
        num_probes=0 if its is None else its.num_probes,
        overlaps=its_monitor.overlap_matrix()[1].tolist(),
        heard=list(here.heard),
        num_operations=here.num_operations,
        seconds=time.monotonic() - start,
    )
