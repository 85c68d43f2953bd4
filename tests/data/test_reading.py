"""Reading a dataset beside training: what is said, when it ends, and what it leaves behind."""

import logging
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_subspace.data.drawn import sample_of_dataset
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.reading import ReadProgress
from tests.data.datasets import COUNT, Numbered, RandomStream, loader


@pytest.fixture(autouse=True, scope="module")
def _impatient():
    """How long torch waits for the end of a worker that hangs, or has raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        yield


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def messages(caplog):
    return [record.message for record in caplog.records]


def test_the_progress_is_told_every_ten_seconds(caplog):
    clock = Clock()
    progress = ReadProgress(600.0, clock)
    progress.count = 2_000
    with caplog.at_level(logging.INFO):
        progress.begin(0)
        progress.begin(0)  # of a second loader
        for _ in range(25):
            clock.now += 1.0
            progress.add(50)
    assert messages(caplog) == [
        "lightning_subspace: reading 2,000 examples for the sample, in this process, as the loader has no workers, for "
        "at most 600 s.",
        "lightning_subspace: 500 of 2,000 examples read for the sample after 10 s.",
        "lightning_subspace: 1,000 of 2,000 examples read for the sample after 20 s.",
    ]


def test_a_reading_ends_in_time():
    clock = Clock()
    progress = ReadProgress(60.0, clock)
    progress.add(7)
    clock.now = 60.5
    with pytest.raises(TimeoutError, match=r"read_timeout: .* within 60 s, got 7 of the examples by then; pass"):
        progress.check()
    ReadProgress(clock=clock).check()  # without a limit


class Slow(Numbered):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


def test_it_is_checked_at_every_example():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"got 0 of {COUNT} examples"):
        sample_of_dataset(loader(Slow(0.05), batch_size=COUNT), None, progress=ReadProgress(0.2))
    assert time.monotonic() - began < 1.0  # all of them take 2.5 s


def test_a_worker_that_hangs_is_given_up():
    with pytest.raises(TimeoutError, match="read_timeout"):
        sample_of_dataset(loader(Slow(120.0), num_workers=1), None, progress=ReadProgress(0.5))


def test_an_error_of_the_dataset_is_its_own():
    class Broken(Numbered):
        def __getitem__(self, index):
            raise RuntimeError("on purpose")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="on purpose"):
            sample_of_dataset(loader(Broken(), num_workers=workers), None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_line_says_what_is_read_and_where(workers, caplog):
    with caplog.at_level(logging.INFO):
        sample_of_batches(loader(num_workers=workers))
    where = "in 2 workers." if workers else "in this process, as the loader has no workers."
    assert messages(caplog) == [f"lightning_subspace: reading {COUNT} examples for the sample, {where}"]


def test_nothing_is_said_of_tensors_in_memory(caplog):
    with caplog.at_level(logging.INFO):
        sample_of_dataset(loader(TensorDataset(torch.zeros(9, 2))), 4)
    assert messages(caplog) == []


class Lines(Dataset):
    """Reads on in an open file, whatever the index."""

    def __init__(self, path):
        self.file = open(path)  # noqa: SIM115  # held open, as in the projects that do this
        self.read = []

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.read.append(index)
        return float(self.file.readline())


def test_the_position_in_a_file_is_put_back(tmp_path):
    path = tmp_path / "numbers"
    path.write_text("\n".join(map(str, range(20))))
    dataset = Lines(path)
    try:
        assert dataset[0] == 0.0
        (batch,) = sample_of_dataset(DataLoader(dataset, batch_size=6), None).hessian
        assert batch.data.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert dataset[0] == 1.0
        assert dataset.read == [0, 0]
    finally:
        dataset.file.close()


class Own:
    """A sampler with a state of its own."""

    def __init__(self):
        self.epochs = []

    def __iter__(self):
        self.epochs.append(len(self.epochs))
        return iter([3, 1, 2])

    def __len__(self):
        return 3


def test_the_state_of_a_sampler_is_put_back():
    sampler = Own()
    sample = sample_of_batches(loader(sampler=sampler, batch_size=2))
    assert [batch.data[0].tolist() for batch in sample.hessian] == [[3, 1], [2]]
    assert sampler.epochs == []


def test_a_stream_that_is_read_in_this_process_is_put_back():
    dataset = RandomStream()
    assert sample_of_batches(loader(dataset)).hessian[0].size == 8
    assert dataset.count == 0
