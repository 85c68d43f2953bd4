"""The progress line waits, is seen, and leaves the screen as it was."""

from __future__ import annotations

import importlib.util
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from lightning_subspace.report import ProgressLine


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A terminal of one line."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> str:
        shown = ""
        for text in self.getvalue().split("\r"):
            shown = text + shown[len(text) :]
        return shown.rstrip()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


def trainer(callback: Any = None, **attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(progress_bar_callback=callback, is_global_zero=True, **attributes)


def test_nothing_is_shown_in_the_first_second(clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(trainer(), clock=clock, stream=terminal) as line:
        clock.now += 0.9
        line.update("1 product")
    assert terminal.getvalue() == ""


def test_the_line_is_shown_refreshed_and_erased(clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(trainer(), clock=clock, stream=terminal) as line:
        clock.now += 1.0
        line.update("10 products, a long line")
        assert terminal.screen == "10 products, a long line"
        clock.now += 0.1
        line.update("too early")
        assert terminal.screen == "10 products, a long line"
        clock.now += 0.2
        line.update("12\nproducts")
        assert terminal.screen == "12 products"
    assert terminal.screen == ""
    assert "\n" not in terminal.getvalue()


def test_at_most_four_refreshes_a_second(clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(None, clock=clock, stream=terminal) as line:
        clock.now += 1.0
        for _ in range(1000):
            line.update("x")
            clock.now += 0.001
        assert terminal.getvalue().count("x") == 4


def test_a_line_never_wraps(clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    with ProgressLine(None, clock=clock, stream=terminal) as line:
        clock.now += 1.0
        line.update("x" * 50)
        assert terminal.screen == "x" * 19
    assert terminal.screen == ""


def test_it_is_erased_also_when_the_probe_fails(clock: Clock, terminal: Terminal) -> None:
    line = ProgressLine(None, clock=clock, stream=terminal)

    def probe() -> None:
        with line:
            clock.now += 2.0
            line.update("x")
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        probe()
    assert terminal.getvalue() != ""
    assert terminal.screen == ""


def test_a_line_can_be_used_again(clock: Clock, terminal: Terminal) -> None:
    line = ProgressLine(None, clock=clock, stream=terminal)
    for text in ("first", "second"):
        with line:
            line.update("too early")
            clock.now += 1.0
            line.update(text)
            assert terminal.screen == text


def test_log_files_get_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressLine(trainer(), clock=clock) as line:
        clock.now += 2.0
        line.update("x")
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_the_terminal_is_stderr(clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressLine(trainer(), clock=clock) as line:
        clock.now += 2.0
        line.update("x")
        assert terminal.screen == "x"


def test_other_ranks_are_silent(clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(SimpleNamespace(is_global_zero=False), clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("x")
    assert terminal.getvalue() == ""


def test_nothing_is_raised_by_a_closed_terminal(clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(None, clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("x")
        terminal.close()
        clock.now += 1.0
        line.update("x")
        clock.now += 1.0
        line.update("x")


def test_a_tqdm_bar_lends_its_postfix(clock: Clock, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", bar_output := Terminal())
    callback = TQDMProgressBar()
    callback.train_progress_bar = bar = callback.init_train_tqdm()
    bar.total = 10
    bar.set_postfix(loss=0.5)
    with ProgressLine(trainer(callback), clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("12 products")
        assert bar_output.screen.endswith("12 products]")
    assert "loss=0.5" in bar_output.screen
    assert "products" not in bar_output.screen
    bar.close()
    assert terminal.getvalue() == ""


def test_before_tqdm_has_a_bar_the_line_is_our_own(clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(trainer(TQDMProgressBar()), clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("x")
        assert terminal.screen == "x"


@pytest.mark.parametrize("callback", [TQDMProgressBar(refresh_rate=0), ProgressBar()])
def test_a_silenced_or_unknown_bar_is_left_alone(callback: Any, clock: Clock, terminal: Terminal) -> None:
    with ProgressLine(trainer(callback), clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("x")
    assert terminal.getvalue() == ""


@pytest.fixture
def rich_bar() -> Any:
    if importlib.util.find_spec("rich") is None:
        pytest.skip("rich is not installed")
    output = io.StringIO()
    callback = RichProgressBar(console_kwargs={"file": output, "force_terminal": True, "width": 120})
    # The column of the metrics asks the trainer what it is doing; outside of fit it stays empty.
    state = SimpleNamespace(fn="validate")
    callback._init_progress(trainer(callback, state=state))  # type: ignore[arg-type]
    yield callback, output
    callback.progress.stop()


def test_a_rich_bar_lends_its_description(rich_bar: Any, clock: Clock, terminal: Terminal) -> None:
    callback, output = rich_bar
    callback.train_progress_bar_id = callback._add_task(10, "Epoch 0", visible=True)
    tasks = [task.id for task in callback.progress.tasks]
    with ProgressLine(trainer(callback), clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("12 [of 200] products")
        assert "12 [of 200] products" in output.getvalue()
    assert callback.train_progress_bar.description == "Epoch 0"
    assert [task.id for task in callback.progress.tasks] == tasks
    assert terminal.getvalue() == ""


def test_a_rich_display_without_a_task_is_left_alone(rich_bar: Any, clock: Clock, terminal: Terminal) -> None:
    callback, _ = rich_bar
    with ProgressLine(trainer(callback), clock=clock, stream=terminal) as line:
        clock.now += 2.0
        line.update("x")
    assert terminal.getvalue() == ""
