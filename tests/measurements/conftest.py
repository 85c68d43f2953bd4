"""What no measurement is about, and what would take as long as it."""

import pytest

from tests.left_out import leave_self_check_out


@pytest.fixture(autouse=True, scope="module")
def _without_self_check():
    """Its comparisons in float64 cost more than a probe of a small net; tests/curvature/ has it."""
    with pytest.MonkeyPatch.context() as patch:
        leave_self_check_out(patch)
        yield
