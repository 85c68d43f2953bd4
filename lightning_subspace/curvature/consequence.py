"""Consequence of a self-check that has not passed, by `on_check_fail`.

README.md has the table. Nothing wrong is measured without a mark in the record; finite differences take over only where
they are the Hessian of something.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_subspace.curvature.self_check import CheckOutcome, SelfCheck

# Metrics of a record whose numbers rest on second derivatives that are wrong (by how much), or not checked (1).
CHECK_ERROR, UNCHECKED = "solver/check_error", "solver/unchecked"
LEFT_OUT = "Numbers that rest on second derivatives are left out; those of the step and of the gradient are measured"
BY_DIFFERENCES = "on_check_fail='finite-difference'"


class CheckError(RuntimeError):
    """The self-check has not passed, so nothing is measured; see `on_check_fail`."""


def consequence(policy: str, check: SelfCheck, curvature: str, *, has_differences: bool) -> tuple[dict[str, Any], str]:
    """What changes in the configuration, and a notice to the user.

    Args:
        policy: `on_check_fail`.
        check: FAILED, UNAVAILABLE or INCONCLUSIVE.
        curvature: what was checked.
        has_differences: whether finite differences measure the same matrix.

    Raises:
        CheckError: where nothing is measured.
    """
    has_failed, text = check.outcome is CheckOutcome.FAILED, check.text
    if check.outcome is CheckOutcome.INCONCLUSIVE:
        if policy == "raise":
            raise CheckError(f"{text} Nothing is measured; on_check_fail='warn' measures unchecked.")
        told = f"What rests on them is measured unchecked, and marked by {UNCHECKED} = 1; on_check_fail='raise' stops"
        return {"marks": ((UNCHECKED, 1.0),)}, f"{text} {told} instead."
    if policy == "omit" and (has_failed or not has_differences):
        return {"omits_products": True}, f"{text} {LEFT_OUT}."
    if not has_differences:
        advice = _another_matrix(check, curvature)
        # What trains is then no gradient of the loss, or may be none: no number of the step would be right either.
        if policy == "raise" or check.is_no_gradient:
            raise CheckError(f"{text} Nothing is measured.{advice}")
        return {"omits_products": True}, f"{text} {LEFT_OUT}.{advice}"
    # Differences of this very loss were taken then, and are symmetric.
    advice = f" {BY_DIFFERENCES} measures without second derivatives." if check.is_gradient else ""
    if has_failed and policy == "raise":
        raise CheckError(f"{text} Nothing is measured.{advice}")
    if has_failed and policy == "warn" and check.error < math.inf:
        told = f"What rests on them is marked by {CHECK_ERROR} = {check.error:.2g}; on_check_fail='omit' leaves it out."
        return {"marks": ((CHECK_ERROR, check.error),)}, f"{text} {told}{advice}"
    if check.is_no_gradient:
        raise CheckError(f"{text} Finite differences are no symmetric matrix here, so nothing is measured.")
    told = "This run is measured with finite differences of float64 gradients instead."
    return {"curvature": "finite-difference"}, f"{text} {told}"


def require_products(had: bool, has: bool, policy: str, notice: str | None) -> None:
    """Refuse to go on without the products that were asked for.

    Args:
        had: whether there were products to be had before the check.
        has: whether there are any behind it.
        policy: `on_check_fail`.
        notice: of the check.

    Raises:
        CheckError: where they have gone and "omit" has not asked for that.
    """
    if had and not has and policy != "omit":
        raise CheckError(f"{notice} on_check_fail='omit' goes on without what is left out.")


def _another_matrix(check: SelfCheck, curvature: str) -> str:
    """What to pass where differences would be another matrix."""
    if check.is_no_gradient:
        return " (A part was tried with curvature='hessian'.)"
    if curvature == "finite-difference":
        return ""
    way_out = f"curvature='hessian', {BY_DIFFERENCES}" if check.is_gradient else "curvature='hessian'"
    return f" Finite differences would measure another matrix than curvature={curvature!r}; pass {way_out}."
