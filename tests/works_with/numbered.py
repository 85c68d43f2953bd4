"""Examples that are known wherever they go, in loaders of every kind."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
)

from tests.modules import BATCH, EXAMPLES, examples
from tests.works_with.same_run import Classifier


class Numbered(Dataset):
    """Example i is (x_i, y_i) with x_i[0] = i / 10: known wherever it goes. Holds `count` of them, from `first` on."""

    def __init__(self, first: int = 0, count: int = EXAMPLES) -> None:
        self.x, self.y = (column.clone() for column in examples().tensors)
        self.x[:, 0] = torch.arange(EXAMPLES) / 10
        self.first, self.count = first, count

    @property
    def tensors(self) -> TensorDataset:
        part = slice(self.first, self.first + self.count)
        return TensorDataset(self.x[part], self.y[part])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[self.first + index], self.y[self.first + index]


def loader(dataset: Any = None, **options: Any) -> DataLoader:
    """A loader of the numbered examples, by default as tensors in memory."""
    size = {} if "batch_sampler" in options else {"batch_size": BATCH}
    return DataLoader(Numbered().tensors if dataset is None else dataset, **{**size, **options})


def by_index(**options: Any) -> DataLoader:
    """A loader of the numbered examples from a dataset of another class."""
    return loader(Numbered(), **options)


def indices(batches: Any, read: Any = tuple) -> list[int]:
    """Which examples are in micro-batches."""
    return [round(10 * float(v)) for batch in batches for v in read(batch.data)[0][:, 0]]


def everything(sample: Any) -> tuple[Any, ...]:
    return (*sample.hessian, *sample.extra)


class ByList(Numbered):
    """Takes a list of indices."""

    def __getitem__(self, listed):
        return self.x[listed], self.y[listed]


class Stream(IterableDataset):
    """Gives its examples in order, and has counted how often it was begun."""

    def __init__(self, count=EXAMPLES):
        self.data, self.count, self.begun = Numbered(), count, 0
        self.generator = np.random.default_rng(1)

    def __iter__(self):
        self.begun += 1
        for i in range(self.count):
            self.generator.normal()
            yield self.data[i]


class Holding(Classifier):
    """Has the dataset in sight, so that its own random numbers are compared."""

    def __init__(self, dataset):
        super().__init__()
        self.data = dataset


def two(first: int = 20, second: int = EXAMPLES - 20, **options: Any) -> dict[str, DataLoader]:
    """Two loaders over different examples: 5 batches of 4, and 2 of 6."""
    return {
        "a": loader(Numbered(0, first).tensors, batch_size=4, shuffle=True, **options),
        "b": loader(Numbered(first, second).tensors, batch_size=6, shuffle=True, **options),
    }


def of_both(batch: Any) -> tuple[Tensor, Tensor]:
    parts = [part for part in (batch.values() if isinstance(batch, dict) else batch) if part is not None]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
