"""Log levels, which a test leaves as it has found them, and notices that go to the log."""

import logging

import pytest

LOGGERS = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
NOTICES = logging.getLogger("lightning_subspace")


@pytest.fixture(autouse=True)
def _log_levels():
    """Undo what a test mutes: another one looks for messages of the same logger."""
    levels = [logger.level for logger in LOGGERS]
    yield
    for logger, level in zip(LOGGERS, levels, strict=True):
        logger.setLevel(level)


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
