"""Runs without a self-check, which costs as much as several probes: for tests of something else."""

import pytest

from lightning_subspace.curvature import CurvatureConfig, SelfCheck
from lightning_subspace.curvature.self_check import CheckOutcome


def leave_self_check_out(patch: pytest.MonkeyPatch) -> None:
    """Let every self-check pass without a look."""
    patch.setattr(CurvatureConfig, "check", lambda *args: SelfCheck(CheckOutcome.PASSED, 0.0, reason="left out"))
