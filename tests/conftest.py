"""Log levels, which a test leaves as it has found them."""

import logging

import pytest

LOGGERS = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]


@pytest.fixture(autouse=True)
def _log_levels():
    """Undo what a test mutes: another one looks for messages of the same logger."""
    levels = [logger.level for logger in LOGGERS]
    yield
    for logger, level in zip(LOGGERS, levels, strict=True):
        logger.setLevel(level)
