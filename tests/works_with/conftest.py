"""What tests of something else leave out, which costs as much as several probes."""

import pytest

from tests.left_out import leave_error_bar_out, leave_self_check_out

UNCHECKED = {
    *("test_averages.py", "test_data.py", "test_gathered.py", "test_iterable.py", "test_joined.py", "test_loggers.py"),
    *("test_loops.py", "test_manual.py", "test_namespaces.py", "test_several_loaders.py", "test_state.py"),
    *("test_transfer.py", "test_turns.py"),
}  # fmt: skip
WITHOUT_ERROR_BAR = {
    *("test_averages.py", "test_gathered.py", "test_iterable.py", "test_joined.py", "test_loggers.py", "test_loops.py"),
    *("test_manual.py", "test_namespaces.py", "test_turns.py"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _left_out(request, monkeypatch):
    if request.path.name in UNCHECKED:
        leave_self_check_out(monkeypatch)
    if request.path.name in WITHOUT_ERROR_BAR:
        leave_error_bar_out(monkeypatch)
