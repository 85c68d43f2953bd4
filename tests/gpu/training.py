"""A fit on the device, with all that a monitor could change of it, to the bit."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import BatchSharpness, CriticalSharpness, Stability, SubspaceMonitor, Trace
from tests.benchmarks.workloads import ViT, colour_images
from tests.gpu.device import ACCELERATOR, IS_CARD

BATCH, STEPS, EVERY = 16, 6, 2
QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Classifier(LightningModule):
    """A network for images, with AdamW, whose training step logs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Recurrent(Classifier):
    """Reads an image as 32 rows of 96 numbers; dropout between the layers is done by cuDNN."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(96, 16, num_layers=2, dropout=0.3, batch_first=True))
        self.head = nn.Linear(16, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows = batch[0].movedim(1, 2).flatten(2)
        return F.cross_entropy(self.head(self.net(rows)[0][:, -1]), batch[1])


def vision_transformer() -> Classifier:
    return Classifier(ViT(32, depth=2))


def loader(batch: int = BATCH, *, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*colour_images(count=batch * STEPS)), batch_size=batch, shuffle=shuffle)


def monitor(*, everything: bool = False, **arguments: Any) -> SubspaceMonitor:
    """A small one that looks at every second step.

    Args:
        everything: log all there is, with measurements that evaluate the loss in other ways.
        arguments: of the monitor.
    """
    settings: dict[str, Any] = {"k": 3, "every_n_steps": EVERY, "max_overhead": None, "on_failure": "raise"}
    settings |= {"sample": 2 * BATCH, "gradient_sample": 3 * BATCH}
    if everything:
        settings |= {"log": "all", "measurements": [BatchSharpness(), Stability(), Trace(), CriticalSharpness()]}
    return SubspaceMonitor(**settings | arguments)


def fit(
    module: LightningModule, callbacks: Iterable[Callback] = (), *, data: DataLoader[Any] | None = None, **options: Any
) -> dict[str, str]:
    """What is seen of a fit after every batch, by name: the same twice if and only if it is equal to the last bit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    observer = Observer()
    settings = {"accelerator": ACCELERATOR, "devices": 1, "max_steps": STEPS, "deterministic": True, **QUIET}
    trainer = Trainer(callbacks=[*callbacks, observer], **settings | options)
    trainer.fit(module, loader() if data is None else data)
    return observer.seen


def twice(
    make: Callable[[], LightningModule],
    *,
    options: Callable[[], dict[str, Any]] = dict,
    **arguments: Any,
) -> tuple[list[str], dict[str, str], SubspaceMonitor]:
    """Train without a monitor and with one: where the two differ, what was seen, and the monitor.

    Args:
        make: makes the module, from the seed.
        options: makes those of the Trainer.
        arguments: of `monitor`.
    """
    seen, watching = [], monitor(**arguments)
    for callbacks in ([], [watching]):
        seed_everything(1, verbose=False)
        seen.append(fit(make(), callbacks, **options()))
    return differences(*seen), seen[1], watching


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


class Observer(Callback):
    """Keeps a hash of everything of training after each batch."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found: dict[str, Any] = {f"parameter {name}": p for name, p in pl_module.named_parameters()}
        found |= {f"gradient {name}": p.grad for name, p in pl_module.named_parameters()}
        found |= {f"buffer {name}": b for name, b in pl_module.named_buffers()}
        found |= {f"optimizer {i}": list(o.state.values()) for i, o in enumerate(trainer.optimizers)}
        found |= {"outputs": outputs, "batch": batch, "precision": trainer.precision_plugin.state_dict()}
        metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("subspace")}
        found |= {"metrics": metrics, "random": random_state()}
        self.seen |= {f"batch {batch_idx}: {name}": digest(value) for name, value in found.items()}


def random_state() -> list[Any]:
    """Of all global generators."""
    found = [torch.get_rng_state(), repr(np.random.get_state()), random.getstate()]
    return [*found, torch.cuda.get_rng_state()] if IS_CARD else found


def digest(value: Any) -> str:
    """Of all bits of tensors, and of the representation of what is none."""
    leaves, structure = tree_flatten(value)
    total = hashlib.sha256(repr(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensor = (leaf.to_local() if hasattr(leaf, "to_local") else leaf).detach().cpu().contiguous()
            total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(repr(leaf).encode())
    return total.hexdigest()
