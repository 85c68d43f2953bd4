"""The decisions of the eigensolver: after every matvec, whether to stop, to restart or to look once more.

1. *Search.* Expand until the wanted pairs pass the test, or the basis is invariant. When it is full, compress it to
   the best Ritz vectors (thick restart).
2. *Verify.* Keep the wanted Ritz vectors, start again from a random direction, and expand until a `Certificate`
   excludes that a copy of a multiple eigenvalue was missed. If something better turns up, go on searching with it.

All decisions are taken on numbers that are equal on all ranks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_subspace.linalg.certificate import Certificate
from lightning_subspace.linalg.lanczos import Lanczos
from lightning_subspace.linalg.result import EigshResult, Outcome
from lightning_subspace.linalg.ritz import UNSEEN, Neighbour, Ritz, beside_identity
from lightning_subspace.linalg.selection import (
    best_first,
    decisive_values,
    edge_values,
    ends,
    last_places,
    merit,
    outward,
    report_order,
)
from lightning_subspace.linalg.stopping import Rules

Progress = Callable[[int, float], None]

_ROUNDING = 10  # in units of eps * scale: no residual estimate means anything below
_SETTLED = 1.1  # if scale grew by less than this factor in a matvec, it can be trusted to judge the asymmetry


class Search:
    """One run: a factorisation, and what has to be remembered between matvecs.

    Args:
        lanczos: With its first vector pending.
        rules: What is wanted.
        draw: ``draw(i)`` gives this rank's slice of the i-th random vector; the 0-th is left for the start.
        on_matvec: See `eigsh`.
    """

    def __init__(
        self, lanczos: Lanczos, rules: Rules, draw: Callable[[int], Tensor], on_matvec: Progress | None = None
    ) -> None:
        self.lanczos = lanczos
        self.rules = rules
        self.draw = draw
        self.on_matvec = on_matvec
        self.num_matvecs = 0
        self.num_restarts = 0
        self.num_draws = 0
        self.num_passes = 0  # consecutive ones
        self.best_residual, self.best_matvec = math.inf, 0  # the smallest so far, relative to scale, and when
        # While there is a certificate, the first k rows of the basis are the pairs it is about, also through restarts.
        self.certificate: Certificate | None = None
        self.gap_certificate: Certificate | None = None  # the same for the last wanted values, where a gap is claimed
        self.excluded = False  # whether the last ones held
        self.found = torch.zeros(0, device="cpu")  # merits of the pairs it is about
        # A fresh start throws away what was seen behind the wanted values: this is kept of it, one for each end.
        self.remembered: list[Neighbour] = []

    def step(self) -> EigshResult | None:
        """One matvec and what follows from it: the result, or None to go on."""
        lanczos, rules = self.lanczos, self.rules
        scale_before = lanczos.scale
        expansion = None
        if lanczos.agreement.finite:  # a fresh direction may not be
            expansion = lanczos.expand()
            self.num_matvecs += 1
        ritz = self._ritz()
        if expansion is None:
            return self._result(Outcome.NONFINITE, self._answer(ritz, converged=False))
        if self.certificate is not None and self.gap_certificate is not None:
            if not lanczos.invariant:
                self.certificate.follow(*expansion)
                self.gap_certificate.follow(*expansion)
            self.excluded = self.certificate.holds and (self.gap_certificate.holds or self._gap_has_closed(ritz))
            # What improves less than a copy that is looked for is not waited for, nor passed over once it was seen.
            if self._missed(ritz, rules.tol * lanczos.scale if self.excluded else self._copy_margin):
                self._resume_search()
        converged = self._test(ritz)
        self._report(ritz)
        outcome, verified = self._judge(ritz, converged, settled=lanczos.scale <= _SETTLED * scale_before)
        if outcome is not None:
            return self._result(outcome, self._answer(ritz, converged), verified)
        if self.certificate is None and (converged or lanczos.invariant):
            self._start_again(ritz)
        elif lanczos.size == rules.ncv:
            self._restart(ritz)
        return None

    # What is known

    def _ritz(self) -> Ritz:
        """Ritz pairs of the whole basis."""
        values, rotation = self.lanczos.ritz()
        order = best_first(values, self.rules.which)
        return self._estimated(values[order], rotation[:, order])

    def _locked_ritz(self) -> Ritz:
        """The pairs found, as they were when the verification began, and behind them the Ritz pairs of its chain."""
        k, projected = self.rules.k, self.lanczos.projected
        values, rotation = torch.linalg.eigh(projected[k:, k:])
        order = best_first(values, self.rules.which)
        found = projected.diagonal()[:k]
        return self._estimated(torch.cat([found, values[order]]), beside_identity(k, rotation[:, order]))

    def _answer(self, ritz: Ritz, converged: bool) -> Ritz:
        """What to return: a verification that found nothing better confirms the pairs it began with."""
        return ritz if converged or self.certificate is None else self._locked_ritz()

    def _estimated(self, values: Tensor, rotation: Tensor) -> Ritz:
        return Ritz(values, rotation, *self.lanczos.residuals(rotation))

    def _neighbours(self, ritz: Ritz) -> list[Neighbour]:
        """The closest unwanted value at each end, seen now or remembered; none while there is none."""
        k, which = self.rules.k, self.rules.which
        closest = []
        for end, place in enumerate(last_places(k, which)):
            merits = outward(ritz.values, place, which)
            candidates = []
            if merits.numel() > k:
                i = k + int(merits[k:].argmax())
                gap = float(merits[place] - merits[i])
                candidates.append(Neighbour(gap, float(ritz.values[i]), float(ritz.residuals[i])))
            for before in self.remembered[end : end + 1]:
                merit_then = outward(ritz.values.new_tensor(before.value), place, which)
                candidates.append(before._replace(gap=float(merits[place] - merit_then)))
            closest += [min(candidates)] if candidates else []
        return closest

    @property
    def _copy_margin(self) -> float:
        return self.rules.copy_margin(self.lanczos.scale)

    def _to_exclude(self, ritz: Ritz) -> list[float]:
        """The values of which a certificate has to exclude missed copies."""
        wanted, which, margin = ritz.values[: self.rules.k], self.rules.which, self._copy_margin
        closest = min(self._neighbours(ritz), default=UNSEEN)
        # Copies of almost equal values change no eigenvalue, but if there seems to be a gap, they make it an illusion.
        at_stake = self.rules.subspace_tol is not None and closest.gap > closest.residual
        return decisive_values(wanted, which, margin) or (edge_values(wanted, which, margin) if at_stake else [])

    def _values_at_gap(self, ritz: Ritz) -> list[float]:
        """The last wanted value of each end, if the gap behind them is wide enough for a missed copy to matter."""
        gap = min(self._neighbours(ritz), default=UNSEEN).gap
        if self.rules.subspace_tol is None or not gap > self._copy_margin:
            return []
        return edge_values(ritz.values[: self.rules.k], self.rules.which, margin=0.0)

    def _gap_has_closed(self, ritz: Ritz) -> bool:
        """Whether something has settled in the gap: copies of the last wanted value are not looked for any more."""
        closest = min(self._neighbours(ritz), default=UNSEEN)
        is_settled = closest.residual <= max(self.rules.tol * self.lanczos.scale, closest.gap / 2)
        return is_settled and closest.gap <= self._copy_margin

    # Decisions

    def _test(self, ritz: Ritz) -> bool:
        """Whether the wanted pairs have converged; keeps the records of passes and of progress."""
        lanczos, k = self.lanczos, self.rules.k
        if lanczos.size < k:
            return False
        # Only what further matvecs can reduce is tested: what was dropped has passed this test before.
        reducible = ritz.reducible[:k]
        worst = float(reducible.max()) / lanczos.scale if lanczos.scale else 0.0
        # The progress of a verification is that of its certificate.
        if worst < self.best_residual or self.certificate is not None:
            self.best_residual, self.best_matvec = worst, self.num_matvecs
        gap = min(self._neighbours(ritz), default=UNSEEN).gap
        if self.num_matvecs - self.best_matvec >= self.rules.space_patience:
            gap = math.inf  # the space is as good as it gets, short of a fresh direction
        passed = bool((reducible <= self.rules.thresholds(ritz.values[:k], gap, lanczos.scale)).all())
        self.num_passes = self.num_passes + 1 if passed else 0
        return passed and (lanczos.invariant or self.num_passes >= self.rules.passes_needed)

    def _missed(self, ritz: Ritz, margin: float) -> bool:
        """Whether more values lie beyond the last one found than before the fresh start, by more than ``margin``."""
        # They are counted: in a dense list a missed copy of the first value moves every other one by very little.
        found, now = self.found, merit(ritz.values[: self.rules.k], self.rules.which)
        return any(
            int((now[end] > found[end].min() + margin).sum()) > int((found[end] > found[end].min() + margin).sum())
            for end in ends(self.rules.k, self.rules.which)
        )

    def _needs_no_verification(self, ritz: Ritz) -> bool:
        """Whether missed copies could not matter, or are excluded already."""
        return (self.excluded and not self._missed(ritz, self._copy_margin)) or not self._to_exclude(ritz)

    def _judge(self, ritz: Ritz, converged: bool, settled: bool) -> tuple[Outcome | None, bool]:
        """Why to stop, or None to go on; and whether the answer is verified."""
        lanczos, rules = self.lanczos, self.rules
        verifying = self.certificate is not None
        outcome: Outcome | None = None
        verified = False
        if lanczos.size == rules.dimension:
            outcome, verified = Outcome.EXACT, True
        elif verifying and (self.excluded or lanczos.invariant):
            outcome, verified = Outcome.CONVERGED, True
        elif converged and not verifying and (not rules.verify or self._needs_no_verification(ritz)):
            outcome, verified = Outcome.CONVERGED, rules.verify
        elif self.num_matvecs >= rules.max_matvecs:
            outcome = Outcome.CONVERGED if converged or verifying else Outcome.MAX_MATVECS
        elif lanczos.size >= rules.k and self.num_matvecs - self.best_matvec >= rules.patience:
            outcome = Outcome.STAGNATED
        # In the first matvecs scale may be far below the norm of the operator, and rounding would look like asymmetry.
        if lanczos.asymmetry > rules.max_asymmetry * lanczos.scale and (settled or outcome is not None):
            outcome, verified = Outcome.ASYMMETRIC, False
        return outcome, verified

    # Actions

    def _start_again(self, ritz: Ritz) -> None:
        """Keep the wanted Ritz vectors and start again from a random direction, to verify them or to find the rest."""
        lanczos, rules = self.lanczos, self.rules
        kept = min(lanczos.size, rules.k)
        if kept == rules.k:
            self.remembered = self._neighbours(ritz)
            self.found = merit(ritz.values[:kept], rules.which)
            self.certificate = Certificate(self._to_exclude(ritz), kept, rules.dimension, rules.delta)
            self.gap_certificate = Certificate(self._values_at_gap(ritz), kept, rules.dimension, rules.delta)
            self.excluded = False
        lanczos.contract(ritz.rotation[:, :kept])
        self.num_draws += 1
        if not lanczos.inject(lambda: self.draw(self.num_draws)):
            raise ValueError(
                f"Expected `random(seed, {self.num_draws})` to be independent of the vectors before, but it has no "
                f"part outside the {kept} vectors found. Check `random`, and `dimension` if slices are padded."
            )
        self._forget_progress()

    def _resume_search(self) -> None:
        """Go on from the basis as it is, until what was found has converged too."""
        self.certificate = self.gap_certificate = None
        self._forget_progress()

    def _forget_progress(self) -> None:
        self.num_passes = 0
        self.best_residual, self.best_matvec = math.inf, self.num_matvecs

    def _restart(self, ritz: Ritz) -> None:
        """Compress a full basis; while verifying, leave the pairs found as they are and compress the chain."""
        kept = self.rules.k + (self.rules.ncv - self.rules.k) // 3
        rotation = (ritz if self.certificate is None else self._locked_ritz()).rotation[:, :kept]
        self.lanczos.contract(rotation)
        for certificate in (self.certificate, self.gap_certificate):
            if certificate is not None:
                certificate.contract(rotation)
        self.num_restarts += 1

    def _report(self, ritz: Ritz) -> None:
        if self.on_matvec is None:
            return
        k, scale = self.rules.k, self.lanczos.scale
        worst = float(ritz.residuals[:k].max()) if self.lanczos.size >= k else math.inf
        with self.lanczos.agreement.local():
            self.on_matvec(self.num_matvecs, worst / scale if scale else worst)

    def _result(self, outcome: Outcome, ritz: Ritz, verified: bool = False) -> EigshResult:
        """The record of the run."""
        lanczos, rules = self.lanczos, self.rules
        num_pairs = min(lanczos.size, rules.k)
        exact = lanczos.size == rules.dimension
        closest = self._neighbours(ritz) if num_pairs == rules.k else []
        behind = min(closest, default=UNSEEN._replace(gap=math.inf if rules.k == rules.dimension else 0.0))
        order = report_order(num_pairs, rules.which)
        # Whatever was dropped on the way, nothing of it lies outside a basis of the whole space.
        estimates = torch.zeros_like(ritz.residuals) if exact else ritz.residuals
        rounding = max(lanczos.asymmetry, _ROUNDING * torch.finfo(lanczos.basis.dtype).eps * lanczos.scale)
        # With the last sum, behind all that may fail: whoever could not form its part of the answer says so in it.
        eigenvectors, gram = lanczos.rotated(ritz.rotation[:, order])
        deviation = (gram - torch.eye(num_pairs, dtype=torch.float64, device="cpu")).abs()
        if not lanczos.agreement.finite:
            outcome, verified = Outcome.NONFINITE, False
        return EigshResult(
            eigenvalues=ritz.values[order],
            eigenvectors=eigenvectors,
            residuals=estimates[order].clamp(min=rounding),
            outcome=outcome,
            verified=verified,
            num_matvecs=self.num_matvecs,
            num_restarts=self.num_restarts,
            orthogonality=float(deviation.max()) if num_pairs else 0.0,
            asymmetry=lanczos.asymmetry / lanczos.scale if lanczos.scale else 0.0,
            scale=lanczos.scale,
            next_eigenvalue=behind.value,
            next_residual=max(behind.residual, rounding),
            gap=behind.gap,
        )
