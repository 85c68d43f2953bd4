"""Policy for verified probes, which exclude missed copies of equal eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal, TypeAlias, get_args

from lightning_subspace._arguments import is_integer, wrong
from lightning_subspace.subspace.record import Record
from lightning_subspace.subspace.subspace import Subspace

Verify: TypeAlias = Literal["always", "never"]
# Neighbours closer than this, in units of the largest |eigenvalue|, are taken for copies: a converged eigenvalue is off
# by about tol^2 / gap, 1e-6 by default, and to take two for copies by chance costs a few products.
COPIES = 1e-5
# A probe that found copies is followed by verified ones. So where none of these is verified, none before them is looked
# for: a search through all of them at each probe would make a long run slow.
LOOKED_BACK = 100


def require_verify(value: Any) -> Any:
    """A word, or a positive number of probes."""
    if isinstance(value, str) and value in get_args(Verify):
        return value
    if not is_integer(value) or value < 1:
        expected = "'always', 'never', or an integer of at least 1"
        raise wrong("verify", expected, value, "10 verifies every tenth probe, and those after one that found copies")
    return int(value)


def is_scheduled(number: int, verify: Verify | int) -> bool:
    """Whether the probe of this number is verified in any case."""
    if isinstance(verify, int):
        return number % verify == 0
    return verify == "always"


def is_verified(number: int, verify: Verify | int, history: Sequence[Record]) -> bool:
    """Whether the probe is verified: as scheduled, or after found copies.

    A warm start does not remember copies, so that they would be missed at the next probe.
    """
    return is_scheduled(number, verify) or (verify != "never" and has_degenerate_values(history))


def unverified(subspace: Subspace, verify: Verify | int) -> str | None:
    """Sentence on a space that is not verified, or None."""
    if subspace.verified or not subspace.converged:
        return None
    reason = "a verification would have taken too many products; choose k at a wider gap of the spectrum"
    if verify != "always":
        reason = f"with verify={verify!r} nobody has looked for more; verify='always' does"
    return (
        f"an eigenvalue may occur more often than it was found, and the space of the first {subspace.k} may be one of "
        f"many: {reason}. solver/verified is 0 at such probes."
    )


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
