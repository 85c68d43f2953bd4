"""Skips all tests of this folder where there is no card, and undoes what a test sets for the whole process."""

import pytest
import torch

from tests.gpu import device


@pytest.fixture(scope="session", autouse=True)
def _needs_a_card():
    if device.IS_CARD and not torch.cuda.is_available():
        pytest.skip(device.SKIPPED)


@pytest.fixture(autouse=True)
def _switches():
    """`Trainer(deterministic=True)` switches the process over and never back."""
    is_on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(is_on, warn_only=warns)
    torch.backends.cudnn.benchmark = benchmark


def pytest_terminal_summary(terminalreporter):
    """Name the card: a result without it says nothing."""
    passed = terminalreporter.stats.get("passed", [])
    if any("tests/gpu/" in report.nodeid for report in passed):
        terminalreporter.write_line(f"tests/gpu: on {device.name()}, torch {torch.__version__}")
