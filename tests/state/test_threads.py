"""Threads that may draw a probe's random numbers are found; those that do not are passed over."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lightning_subspace.state.thread_objects import in_other_threads
from lightning_subspace.state.threads import other_threads


@contextmanager
def running(thread, may_end):
    thread.start()
    try:
        yield
    finally:
        may_end.set()
        thread.join()


def wait_until(condition):
    end = time.monotonic() + 10.0
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def test_a_thread_of_the_users_is_found_until_it_ends():
    may_end = threading.Event()

    def prefetch():
        may_end.wait()

    with running(threading.Thread(target=prefetch, name="prefetching"), may_end):
        assert wait_until(lambda: other_threads() == ["prefetching"])
    assert other_threads() == []


def test_so_is_one_of_a_class_of_its_own():
    may_end = threading.Event()

    class Loader(threading.Thread):
        def run(self):
            may_end.wait()

    with running(Loader(name="loading"), may_end):
        assert wait_until(lambda: other_threads() == ["loading"])


def test_an_executor_counts_while_it_has_something_to_do():
    may_end = threading.Event()

    def work():
        may_end.wait()

    with ThreadPoolExecutor(1, thread_name_prefix="pool") as pool:
        future = pool.submit(work)
        assert wait_until(lambda: other_threads() == ["pool_0"])
        may_end.set()
        future.result()
        assert wait_until(lambda: other_threads() == [])


@pytest.mark.parametrize(("function", "found"), [(lambda: None, ["later"]), (print, [])])
def test_a_timer_counts_before_its_time(function, found):
    timer = threading.Timer(100.0, function)
    timer.name = "later"
    timer.start()
    try:
        assert other_threads() == found
    finally:
        timer.cancel()
        timer.join()


def test_what_others_have_running_beside_training_is_passed_over(tmp_path):
    file = (tmp_path / "bar").open("w")
    bar = tqdm(total=2, file=file)  # with a monitor
    writer = SummaryWriter(tmp_path)  # with a queue
    writer.add_scalar("loss", 1.0)
    batches = iter(DataLoader(TensorDataset(torch.arange(64.0)), num_workers=1))  # with the feeder of a queue
    next(batches)
    try:
        assert threading.active_count() > 1
        assert other_threads() == []
    finally:
        writer.close()
        bar.close()
        file.close()
        del batches


@pytest.mark.parametrize("look", [other_threads, in_other_threads])
def test_a_look_at_other_threads_keeps_nothing_of_its_caller(look):
    """Without a garbage collection: a frame that refers to itself keeps those that have called it."""

    def caller():
        local = torch.ones(2)
        look()
        return weakref.ref(local)

    done = threading.Event()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    gc.collect()
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
        done.set()
        thread.join()
