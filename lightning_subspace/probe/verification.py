"""Policy for verified probes, which exclude missed copies of equal eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from lightning_subspace.subspace.record import Record

# Every tenth probe is verified, beginning with the first; and all those after one that found copies, since a warm start
# does not remember them.
VERIFY_EVERY = 10
# Neighbours closer than this, in units of the largest |eigenvalue|, are taken for copies: a converged eigenvalue is off
# by about tol^2 / gap, 1e-6 by default, and to take two for copies by chance costs a few products.
COPIES = 1e-5
# Where no probe of these is verified, since there are no eigenvalues or none converge, none before them is looked for:
# a search through all of them at each probe would make a long run slow.
LOOKED_BACK = 10 * VERIFY_EVERY


def is_scheduled(number: int) -> bool:
    """Whether the probe of this number is verified in any case."""
    return number % VERIFY_EVERY == 0


def has_degenerate_values(history: Sequence[Record]) -> bool:
    """Whether the last verified probe found eigenvalues that occur more than once."""
    last = next(
        (r.subspace for r in islice(reversed(history), LOOKED_BACK) if r.subspace is not None and r.subspace.verified),
        None,
    )
    if last is None or last.k < 2:
        return False
    values = last.eigenvalues.sort().values
    return bool((values.diff() <= COPIES * values.abs().max()).any())
