"""Everything used of Lightning beyond its documented callback interface, with reasons.

Lightning comes under two names, `lightning` and `pytorch_lightning`, whose classes are different objects: a Trainer of
one refuses an un-listed callback of the other, and so does a LightningCLI. What the package derives from is therefore
derived from both, where both can be imported, and nothing is asked with `isinstance` of one.

Seen working with lightning 2.6.6 and pytorch-lightning 2.6.6. Nothing else in the package touches a private attribute
of Lightning.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning_utilities.core import rank_zero
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
else:

    def _all(name: str, *modules: str) -> list[Any]:
        """The objects of this name in the modules that are installed."""
        found = []
        for module in modules:
            with suppress(ImportError):
                found.append(getattr(importlib.import_module(module), name))
        return list(dict.fromkeys(found))

    # Importing a namespace takes over the logger of Lightning's own messages: it stays with the one imported by the
    # user, or else with `lightning`.
    _is_first = not {"lightning.pytorch", "pytorch_lightning"} & set(sys.modules)
    _logger = rank_zero.log
    _all("Callback", "pytorch_lightning", "lightning.pytorch")
    if not _is_first:
        rank_zero.log = _logger

    class Callback(*_all("Callback", "lightning.pytorch", "pytorch_lightning")):
        """Callback for the Trainers and the LightningCLIs of both namespaces."""

    class MisconfigurationException(
        *_all(
            "MisconfigurationException",
            "lightning.pytorch.utilities.exceptions",
            "pytorch_lightning.utilities.exceptions",
        )
    ):
        """Caught by whoever expects the exception of either namespace."""

    CombinedLoader = _all("CombinedLoader", "lightning.pytorch.utilities", "pytorch_lightning.utilities")[0]
    DummyLogger = _all("DummyLogger", "lightning.pytorch.loggers.logger", "pytorch_lightning.loggers.logger")[0]
    move_data_to_device = _all("move_data_to_device", "lightning.fabric.utilities", "lightning_fabric.utilities")[0]

__all__ = [
    "Callback",
    "CombinedLoader",
    "DummyLogger",
    "MisconfigurationException",
    "attached_trainer",
    "bare_loader",
    "combined_loader",
    "given_loaders",
    "is_a",
    "move_data_to_device",
    "muted",
    "rank_zero_info",
    "rank_zero_warn",
    "skips_backward",
    "state_key",
    "training_bar",
    "training_loaders",
    "transfer",
    "undeclared",
    "undistributed",
]


class Trainer(Protocol):
    """The part of a Trainer that the package uses, in both namespaces.

    Its attributes are read-only but for one, and vague, so that Lightning's own Trainer satisfies it.
    """

    loggers: Any

    @property
    def accumulate_grad_batches(self) -> int: ...
    @property
    def limit_train_batches(self) -> int | float: ...
    @property
    def callback_metrics(self) -> dict[str, Any]: ...
    @property
    def current_epoch(self) -> int: ...
    @property
    def fit_loop(self) -> Any: ...
    @property
    def global_step(self) -> int: ...
    @property
    def interrupted(self) -> bool: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def lightning_module(self) -> Any: ...
    @property
    def lr_scheduler_configs(self) -> Sequence[Any]: ...
    @property
    def optimizers(self) -> Sequence[Any]: ...
    @property
    def precision_plugin(self) -> Any: ...
    @property
    def progress_bar_callback(self) -> Any: ...
    @property
    def strategy(self) -> Any: ...
    @property
    def train_dataloader(self) -> Any: ...
    @property
    def world_size(self) -> int: ...


def undeclared(trainer: Trainer, name: str) -> Any:
    """An attribute that connectors set and the Trainer class does not declare."""
    return getattr(trainer, name)


def is_a(value: Any, name: str) -> bool:
    """Whether a value is an instance of a class of this name.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> is_a(EarlyStopping("loss"), "EarlyStopping"), is_a(EarlyStopping("loss"), "Callback"), is_a(1, "Callback")
        (True, True, False)
    """
    return any(cls.__name__ == name for cls in type(value).__mro__)


def attached_trainer(module: nn.Module) -> Trainer | None:
    """The trainer of a LightningModule, or None, where `module.trainer` would raise."""
    return getattr(module, "_trainer", None)


def bare_loader(loader: Any) -> Any:
    """The DataLoader in what `fabric.setup_dataloaders` has returned, or the loader itself."""
    return loader._dataloader if is_a(loader, "_FabricDataLoader") else loader


def skips_backward(trainer: Trainer) -> bool:
    """Whether this is the epoch that StochasticWeightAveraging adds for batch-norm.

    The averaged weights are in the module, and nothing is trained. Nothing public tells.
    """
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def state_key(callback: Callback, **settings: str) -> str:
    """The key of a callback's state in checkpoints, one per instance."""
    return callback._generate_state_key(**settings)


def training_bar(callback: Any) -> Any:
    """The bar of a TQDMProgressBar, or None, where `train_progress_bar` would raise."""
    return getattr(callback, "_train_progress_bar", None)


def combined_loader(trainer: Trainer) -> CombinedLoader | None:
    """The loaders of training, once they are combined."""
    return getattr(trainer.fit_loop, "_combined_loader", None)


def training_loaders(trainer: Trainer) -> CombinedLoader:
    """The loaders of training, with their mode and their limits.

    `trainer.train_dataloader`, which is public, has lost mode and limits: it is what is inside of the CombinedLoader.
    """
    combined = combined_loader(trainer)
    return CombinedLoader(trainer.train_dataloader, "max_size_cycle") if combined is None else combined


def given_loaders(trainer: Trainer) -> CombinedLoader | None:
    """The loaders that `fit` was given; None where hooks give them later."""
    source = getattr(trainer.fit_loop, "_data_source", None)
    if source is None or source.instance is None or source.is_module():
        return None
    instance = source.instance
    return instance if is_a(instance, "CombinedLoader") else CombinedLoader(instance, "max_size_cycle")


def undistributed(sampler: Any) -> tuple[Any, int]:
    """A sampler's single-process equivalent, and its number of ranks.

    Lightning puts a DistributedSampler in the place of torch's own samplers, and wraps any other in one, which keeps it
    in a private attribute. One of a class of the user's own stays what it is.
    """
    if is_a(sampler, "DistributedSamplerWrapper"):
        return sampler.dataset._sampler, sampler.num_replicas
    if type(sampler) is not DistributedSampler:
        return sampler, 1
    dataset: Any = sampler.dataset
    return (RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset)), sampler.num_replicas


@contextmanager
def muted(module: nn.Module) -> Iterator[None]:
    """Swallow what training_step logs: `self.log`, `self.log_dict`, `self.print` and `self.logger.experiment`.

    The methods are covered on the instances of every LightningModule in the tree, found by their attribute
    `_current_fx_name` since classes of both namespaces may meet. `self.log` must not reach the result collection: it
    would enter the epoch's averages. Silent stand-ins take the place of the loggers, in the trainer and where a module
    keeps one, or its experiment, as attribute. What training_step prints by itself appears once more an evaluation.
    """
    trainer = attached_trainer(module)
    loggers = [] if trainer is None else list(trainer.loggers)
    with ExitStack() as stack:
        for m in module.modules():
            if hasattr(m, "_current_fx_name"):
                for name in ("log", "log_dict", "print"):
                    _cover(stack, m, name, lambda *args, **kwargs: None)
            for name, value in list(vars(m).items()):
                if _writes(value, loggers):
                    _cover(stack, m, name, Silent(value))
        if trainer is not None:
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [Silent(logger) for logger in loggers]
        yield


class Silent:
    """Logger that has the plain attributes of another one and does nothing.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = Silent(CSVLogger("folder"))
        >>> logger.save_dir, logger.experiment.log_metrics({}), isinstance(logger, CSVLogger)
        ('folder', None, True)
    """

    def __init__(self, original: Any) -> None:
        self.__dict__["_original"] = original

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # a training step may ask which logger it has
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        return value if value is None or isinstance(value, str | int | float | Path) else Silent(value)

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> Any:
        return DummyLogger().experiment  # of a kind that cannot be known

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def transfer(module: nn.Module, batch: Any, device: torch.device) -> Any:
    """Move a batch to the device through the trainer's transfer hooks."""
    trainer = attached_trainer(module)
    hooks: Any = module
    if trainer is not None and trainer.lightning_module is module:
        # the training loop calls the first hook itself, through this method, before it asks the strategy
        batch = hooks._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, device=device, dataloader_idx=0)
    if hasattr(module, "transfer_batch_to_device"):
        batch = hooks.on_before_batch_transfer(batch, 0)
        batch = hooks.transfer_batch_to_device(batch, device, 0)
        return hooks.on_after_batch_transfer(batch, 0)
    return move_data_to_device(batch, device)


def _writes(value: Any, loggers: list[Any]) -> bool:
    """Whether a value is a logger, its experiment, or a TensorBoard writer."""
    # `logger.experiment` would open it; `_experiment` is where Lightning's loggers keep an open one
    known = [*loggers, *(getattr(logger, "_experiment", None) for logger in loggers)]
    return (value is not None and any(value is other for other in known)) or is_a(value, "SummaryWriter")


def _cover(stack: ExitStack, module: nn.Module, name: str, cover: Any) -> None:
    own = vars(module)
    undo = (own.__setitem__, name, own[name]) if name in own else (own.pop, name, None)
    stack.callback(*undo)
    own[name] = cover
