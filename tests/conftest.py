"""Which tests are fast or thorough; log levels, which a test leaves as they were; notices that go to the log."""

import gc
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.thorough import IS_THOROUGH

# Files and folders whose tests train little or nothing, in this process.
FAST = (
    "lightning_subspace",
    "tests/callbacks/test_arguments.py",
    "tests/claims/test_bill.py",
    "tests/claims/test_exceptions.py",
    "tests/claims/test_rooms.py",
    "tests/command/test_environment.py",
    "tests/command/test_show.py",
    "tests/command/test_table.py",
    "tests/data",
    "tests/linalg/test_blocked.py",
    "tests/linalg/test_certificate.py",
    "tests/linalg/test_lanczos.py",
    "tests/linalg/test_normals.py",
    "tests/linalg/test_selection.py",
    "tests/linalg/test_stopping.py",
    "tests/loss/test_places.py",
    "tests/loss/test_shadow.py",
    "tests/parallel/test_parameters.py",
    "tests/probe/test_freshness.py",
    "tests/probe/test_sample_state.py",
    "tests/probe/test_schedule.py",
    "tests/report/test_guard.py",
    "tests/report/test_loggers.py",
    "tests/report/test_progress.py",
    "tests/state",
    "tests/subspace",
    "tests/thorough.py",
)
ROOT = Path(__file__).parents[1]


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(config, items):
    for item in items:
        path = item.path.relative_to(ROOT)
        if any(path.is_relative_to(fast) for fast in FAST):
            item.add_marker("fast")
    left_out = [] if IS_THOROUGH else [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish(session):
    """What is imported and collected by now stays: collections of garbage, and forked processes, leave it alone."""
    gc.collect()
    gc.freeze()


def pytest_xdist_auto_num_workers(config):
    """Of `-n auto`: one more than processors, since tests of several processes, and of a browser, wait for these."""
    return (os.cpu_count() or 1) + 1


LOGGERS = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
NOTICES = logging.getLogger("lightning_subspace")


@contextmanager
def levels_kept():
    """Undo what is muted inside: another test looks for messages of the same logger."""
    levels = [logger.level for logger in LOGGERS]
    yield
    for logger, level in zip(LOGGERS, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def _log_levels_of_module():
    """Before the fixtures of a module, which may train in this process."""
    with levels_kept():
        yield


@pytest.fixture(autouse=True)
def _log_levels():
    with levels_kept():
        yield


class _Raising(logging.Handler):
    """Where warnings are errors, as in this suite, a notice goes to the log: here it is an error there as well."""

    def emit(self, record):
        raise UserWarning(record.getMessage())


@pytest.fixture(autouse=True)
def _notices_are_errors():
    handler = _Raising(logging.WARNING)  # information is none
    NOTICES.addHandler(handler)
    yield
    NOTICES.removeHandler(handler)


class _Keeping(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def logged(_notices_are_errors):
    """The notices that go to the log, which are no errors in this test."""
    before, keeping = list(NOTICES.handlers), _Keeping()
    NOTICES.handlers[:] = [keeping]
    yield keeping.texts
    NOTICES.handlers[:] = before
