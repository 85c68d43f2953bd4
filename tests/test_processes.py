"""The helper that the distributed tests stand on: it tells what went wrong, and always ends."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.processes import RankErrorsError, run


def summed(value):
    total = torch.full((2,), float(value + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), int(os.environ["LOCAL_RANK"]), torch.get_num_threads(), total


def test_results_come_back_by_rank():
    results = run(summed, 3, 1)
    assert [result[:3] for result in results] == [(rank, rank, 1) for rank in range(3)]
    assert all(torch.equal(result[3], torch.full((2,), 6.0)) for result in results)


def failing(rank):
    if dist.get_rank() == rank:
        raise ValueError("on purpose")
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_exception_is_raised_again_with_all_tracebacks(rank):
    with pytest.raises(ValueError, match="on purpose") as info:
        run(failing, 2, rank)
    assert isinstance(info.value.__cause__, RankErrorsError)
    assert "in failing" in str(info.value.__cause__)


def sleeping():
    time.sleep(60.0)


def test_what_hangs_is_killed_and_told():
    with pytest.raises(TimeoutError, match="in sleeping"):
        run(sleeping, 2, timeout=1.0)


def dying():
    os._exit(1)


def test_a_process_that_dies_is_told():
    with pytest.raises(RankErrorsError, match="without a word"):
        run(dying, 2)


def refusing():
    raise ValueError("on purpose")


def test_processes_are_not_harmed_by_what_an_earlier_run_has_left():
    left = []
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose") as caught:
            run(refusing, 2)
        left.append(caught.value)  # with its traceback, and the frames of the run
    left.append(left)
    del caught, left  # a cycle, which the next processes are the first to collect
    run(gc.collect, 2)
