"""Handlers of signals wait, run in order and as they were called, and nothing of them is moved."""

import asyncio
import os
import signal
import threading
import time

import pytest

from lightning_subspace.state import signals
from lightning_subspace.state.signals import SignalError, give_up_again, give_up_if_signalled, waiting_signals

ONE, OTHER = signal.SIGUSR1, signal.SIGUSR2


@pytest.fixture(autouse=True)
def _handlers():
    kept = {signum: signal.getsignal(signum) for signum in (ONE, OTHER, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)}
    kept[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


@pytest.fixture
def heard():
    """What two handlers have got, in order."""
    got = []
    for signum in (ONE, OTHER):
        signal.signal(signum, lambda *arguments: got.append(arguments))
    return got


def raise_within_a_block(*signums):
    with waiting_signals():
        for signum in signums:
            signal.raise_signal(signum)


def test_handlers_run_behind_the_block_in_order_and_with_what_they_would_have_got(heard):
    def inside():
        for signum in (OTHER, ONE, OTHER):
            signal.raise_signal(signum)

    with waiting_signals():
        inside()
        assert heard == []
    assert [signum for signum, _ in heard] == [OTHER, ONE, OTHER]
    assert {frame.f_code.co_name for _, frame in heard} == {"inside"}


def test_the_same_handlers_are_there_afterwards(heard):
    before = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    with pytest.raises(KeyError), waiting_signals():
        raise KeyError
    assert {signum: signal.getsignal(signum) for signum in signal.valid_signals()} == before


def test_a_block_within_a_block_is_part_of_it(heard):
    with waiting_signals():
        with waiting_signals():
            signal.raise_signal(ONE)
        assert heard == []
    assert len(heard) == 1


def test_one_that_waits_is_given_up_for():
    signal.signal(ONE, lambda *arguments: None)
    give_up_if_signalled()
    with waiting_signals():
        give_up_if_signalled()
        signal.raise_signal(ONE)
        give_up_again()  # nobody has given up so far
        for function in (give_up_if_signalled, give_up_again):
            with pytest.raises(SignalError, match=r"^gave up since signal SIGUSR1 arrived$") as raised:
                function()
        assert raised.value.signals == ("SIGUSR1",)
    give_up_if_signalled()


def test_what_a_handler_raises_reaches_the_caller_and_the_others_run(heard):
    def leave(signum, frame):
        raise SystemExit(3)

    signal.signal(signal.SIGTERM, leave)
    with pytest.raises(SystemExit) as left:
        raise_within_a_block(signal.SIGTERM, ONE)
    assert left.value.code == 3
    assert [signum for signum, _ in heard] == [ONE]
    assert signal.getsignal(signal.SIGTERM) is leave


def test_an_interrupt_does_not_wait(heard):
    with pytest.raises(KeyboardInterrupt):
        raise_within_a_block(ONE, signal.SIGINT, OTHER)
    assert [signum for signum, _ in heard] == [ONE]


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_what_is_no_handler_of_pythons_is_left_alone(handler):
    signal.signal(signal.SIGTERM, handler)
    with waiting_signals():
        assert signal.getsignal(signal.SIGTERM) is handler


def test_signals_that_ask_nothing_of_a_program_do_not_wait():
    """A loader's worker that ends is one of them."""
    got = []
    signal.signal(signal.SIGCHLD, lambda *arguments: got.append(arguments))
    with waiting_signals():
        signal.raise_signal(signal.SIGCHLD)
        assert len(got) == 1
        give_up_if_signalled()


def test_asyncio_is_left_alone():
    async def listen():
        loop, got = asyncio.get_running_loop(), []
        loop.add_signal_handler(ONE, got.append, "called")
        before = signal.getsignal(ONE)
        with waiting_signals():
            assert signal.getsignal(ONE) is before
            signal.raise_signal(ONE)
            give_up_if_signalled()
        await asyncio.sleep(0.05)
        loop.remove_signal_handler(ONE)
        return got

    assert asyncio.run(listen()) == ["called"]


def test_a_handler_that_is_set_meanwhile_is_dropped_and_does_not_run(heard):
    """A training step that is evaluated sets it again when it is run: so it is set when it would have been."""
    before, other = signal.getsignal(ONE), []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with waiting_signals():
        for signum in (ONE, signal.SIGHUP):
            signal.signal(signum, lambda *arguments: other.append(arguments))
        give_up_if_signalled()
        signal.raise_signal(ONE)
        assert other == []
    assert (len(heard), other) == (1, [])
    assert (signal.getsignal(ONE), signal.getsignal(signal.SIGHUP)) == (before, signal.SIG_IGN)


def test_a_handler_may_set_another_one_for_the_next(heard):
    second = []

    def first(*arguments):
        heard.append(arguments)
        signal.signal(ONE, lambda *arguments: second.append(arguments))

    signal.signal(ONE, first)
    with waiting_signals():
        signal.raise_signal(ONE)
        signal.raise_signal(ONE)
    assert (len(heard), len(second)) == (1, 1)
    signal.signal(ONE, lambda *arguments: signal.signal(ONE, signal.SIG_IGN))
    with waiting_signals():
        signal.raise_signal(ONE)
        signal.raise_signal(ONE)
    assert signal.getsignal(ONE) is signal.SIG_IGN


def test_a_handler_may_let_the_default_act():
    """As many do: tidy up, set the default, and raise the signal again."""
    child = os.fork()
    if child == 0:

        def again(signum, frame):
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

        signal.signal(signal.SIGTERM, again)
        with waiting_signals():
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_nothing_waits_in_another_thread(heard):
    """Python lets the main thread alone set handlers; it runs them there, at once."""
    inside, may_end, found = threading.Event(), threading.Event(), []

    def measure():
        with waiting_signals():
            inside.set()
            may_end.wait()
            give_up_if_signalled()
        found.append("well")

    thread = threading.Thread(target=measure)
    thread.start()
    inside.wait()
    signal.raise_signal(ONE)
    assert len(heard) == 1
    may_end.set()
    thread.join()
    assert found == ["well"]


def test_a_fork_waits_for_nothing():
    """It has the handlers of its parent."""
    signal.signal(signal.SIGTERM, lambda *arguments: os._exit(7))
    with waiting_signals():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_signal_that_comes_while_another_is_named_waits_too(heard, monkeypatch):
    named = signals._name

    def naming(signum):
        signal.raise_signal(OTHER)
        return named(signum)

    with waiting_signals():
        signal.raise_signal(ONE)
        with monkeypatch.context() as patch:
            patch.setattr(signals, "_name", naming)
            with pytest.raises(SignalError, match="SIGUSR1"):
                give_up_if_signalled()
    assert [signum for signum, _ in heard] == [ONE, OTHER]


def test_no_handler_runs_inside_however_the_signal_falls():
    """A thread sends them without a pause, also while a block begins and ends."""
    is_inside, wrong, outside = False, [], [0]

    def handler(signum, frame):
        wrong.extend([frame] * is_inside)
        outside[0] += 1

    def send():
        while not done.is_set():
            os.kill(os.getpid(), ONE)
            time.sleep(1e-5)

    signal.signal(ONE, handler)
    done, sender = threading.Event(), threading.Thread(target=send)
    sender.start()
    given_up = 0
    try:
        for _ in range(1000):
            try:
                with waiting_signals():
                    is_inside = True
                    try:
                        time.sleep(0)
                        give_up_if_signalled()
                    finally:
                        is_inside = False
            except SignalError:
                given_up += 1
    finally:
        done.set()
        sender.join()
    assert wrong == []
    assert given_up > 0
    assert outside[0] >= given_up
    assert signal.getsignal(ONE) is handler
