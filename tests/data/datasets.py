"""Datasets whose examples can be told apart, and what is read from the batches of a sample."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

COUNT = 50


class Numbered(Dataset):
    """Example i is the number i, with noise from every generator there is."""

    def __init__(self, count=COUNT):
        self.count = count
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        noise = torch.rand(1, generator=self.generator) + torch.rand(1) + np.random.rand() + random.random()
        return torch.tensor(index), noise.float()


def loader(dataset=None, **options):
    if "batch_sampler" in options:
        options["batch_size"] = 1  # what torch expects beside it
    return DataLoader(Numbered() if dataset is None else dataset, **({"batch_size": 8} | options))


def indices(batches):
    return [i for batch in batches for i in batch.data[0].tolist()]


def sizes(batches):
    return [len(batch.data[0]) for batch in batches]


def all_states(dataset):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    return (
        torch_state.numpy().tobytes(),
        numpy_state[1].tobytes(),
        numpy_state[2:],
        random.getstate(),
        dataset.generator.get_state().numpy().tobytes(),
    )


class Ready(Dataset):
    """Items that are batches: item i has i examples, all of them i."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return (torch.full((index + 1,), index),)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class RandomStream(IterableDataset):
    def __init__(self):
        self.generator, self.count = torch.Generator().manual_seed(1), 0

    def __iter__(self):
        for _ in range(10):
            self.count += 1
            yield (torch.rand((), generator=self.generator),)
