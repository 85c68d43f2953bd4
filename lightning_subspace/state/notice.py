"""Notices that stop nothing, also where warnings are errors.

With `python -W error`, pytest's `filterwarnings = error` or a filter for the messages of this package a warning is an
exception, and mostly on the first rank alone, which tells. What is told here is a word about numbers that are left out
or that mean something else, never a reason to stop: there it goes to the log instead.
"""

from __future__ import annotations

import logging
import warnings

LOG = logging.getLogger("lightning_subspace")


def warn(text: str, stacklevel: int = 2) -> None:
    """Warn of something, or log it where a warning would raise.

    Args:
        text: what there is to say.
        stacklevel: of the line that the warning names, counted from here as by `warnings.warn`.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("eigenvalues are left out")
        >>> str(caught[0].message)
        'eigenvalues are left out'
    """
    try:
        warnings.warn(text, stacklevel=stacklevel + 1)
    except Exception:  # the warning itself, or what somebody's `showwarning` makes of it
        LOG.warning(text)


def warn_on_first_rank(text: str) -> None:
    """Warn on the first rank alone; see `warn`."""
    from lightning_subspace._lightning import rank_zero_warn  # Lightning takes a while to import

    try:
        rank_zero_warn(text, stacklevel=5)  # of the caller: one further than it would name by itself
    except Exception:  # on the first rank
        LOG.warning(text)
