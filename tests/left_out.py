"""What runs leave out that costs as much as several probes: for tests of something else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lightning_subspace.curvature import CurvatureConfig, SelfCheck
from lightning_subspace.curvature.self_check import CheckOutcome
from lightning_subspace.measurements import Reliability
from lightning_subspace.report import Publisher


def leave_self_check_out(patch: pytest.MonkeyPatch) -> None:
    """Let every self-check pass without a look."""
    patch.setattr(CurvatureConfig, "check", lambda *args: SelfCheck(CheckOutcome.PASSED, 0.0, reason="left out"))


def leave_figures_out(patch: pytest.MonkeyPatch) -> None:
    """Draw none: they take ten times as long as a run."""
    patch.setattr(Publisher, "draw", lambda *args: None)


def leave_error_bar_out(patch: pytest.MonkeyPatch) -> None:
    """Take none of the gradient fraction: that takes two more eigensolves."""
    # a function: a mock would keep what it is called with, so every probe
    patch.setattr(Reliability, "measure", lambda *args: {})


@contextmanager
def without_error_bar() -> Iterator[None]:
    """The same for a while."""
    with pytest.MonkeyPatch.context() as patch:
        leave_error_bar_out(patch)
        yield
