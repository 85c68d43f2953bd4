"""A program that uses the public names, for strict type checkers: what they see is what they would see at a user's.

`assert_type` fails where a type has become another one, or none; an ignored error that is none is an error by itself.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

from lightning_subspace import (
    Density,
    EigshResult,
    Measurement,
    Probe,
    Record,
    Subspace,
    SubspaceMonitor,
    eigsh,
    measure_subspace,
    read_history,
)


class Classifier(LightningModule):
    """A linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GradientLength(Measurement):
    """A measurement of one's own."""

    def measure(self, probe: Probe) -> dict[str, float]:
        """One number a probe."""
        return {"gradient_length": probe.norm(probe.gradient)}


def trained() -> SubspaceMonitor:
    """A fit with the callback."""
    data = TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
    monitor = SubspaceMonitor(k=2, every_n_steps=4, measurements=[Density(), GradientLength()])
    trainer = Trainer(max_epochs=1, callbacks=[monitor], logger=False)
    trainer.fit(Classifier(), DataLoader(data, batch_size=8))
    return monitor


def loss_fn(module: nn.Module, batch: Tensor, batch_idx: int) -> Tensor:
    """A loss for the function without a Trainer."""
    outputs: Tensor = module(batch)
    return outputs.square().mean()


def used() -> None:
    """All that a type checker is asked about."""
    monitor = trained()
    for record in monitor.history:
        assert_type(record, Record)
        assert_type(record.step, int)
        if record.subspace is not None:
            assert_type(record.subspace, Subspace)
            assert_type(record.subspace.eigenvalues, Tensor)
            assert_type(record.subspace.trusted, bool)
    once = measure_subspace(nn.Linear(4, 2), [torch.randn(8, 4)], k=1, loss_fn=loss_fn)
    assert_type(once, Record)
    assert_type(eigsh(lambda v: 2.0 * v, 10, 2), EigshResult)
    read_history("last.ckpt")
    SubspaceMonitor(k="ten")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SubspaceMonitor(curvature="hesian")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SubspaceMonitor(period=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


if __name__ == "__main__":
    used()
