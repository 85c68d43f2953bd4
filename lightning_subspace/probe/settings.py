"""Settings of a probe, as users give them, checked in one place.

The callbacks and `measure_subspace` take them as flat arguments and make one `ProbeSettings` of them. What a layer
below needs is cut from it: the `Solver`, the `CurvatureConfig` of an operator, the `SampleSpec`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral
from typing import Any, get_args

from lightning_subspace._arguments import require_seed
from lightning_subspace.curvature import CurvatureConfig
from lightning_subspace.curvature.selection import Curvature, OnCheckFail, Precision
from lightning_subspace.data.given import require_given_batches
from lightning_subspace.data.micro_batch import Weight
from lightning_subspace.data.reading import READ_TIMEOUT
from lightning_subspace.data.sample import SampleSpec
from lightning_subspace.linalg.selection import Which
from lightning_subspace.loss.loss_function import LossFunction
from lightning_subspace.loss.mode import Mode
from lightning_subspace.measurements import Density, Measurement, SpectralSharpness, Trace, default_measurements
from lightning_subspace.measurements.base import Needs
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.arguments import (
    require_flag,
    require_function,
    require_integer,
    require_loss,
    require_measurements,
    require_number,
    require_patterns,
    require_word,
    wrong,
)
from lightning_subspace.probe.verification import Verify, require_verify
from lightning_subspace.subspace.room import BasisChoice
from lightning_subspace.subspace.solver import MAX_TOL, Solver

# Those whose every number takes products.
OF_PRODUCTS = (Density, SpectralSharpness, Trace)
# What is about eigenpairs alone.
OF_EIGENPAIRS = ("which", "tol", "ncv", "max_matvecs", "verify", "basis", "reference_step")


@dataclass(frozen=True, eq=False)
class ProbeSettings:
    """Settings of every probe; see `SubspaceMonitor` for the arguments.

    Attributes:
        defaults: whether the default measurements are taken, beside `measurements`.

    Raises:
        ValueError: for a wrong argument, naming it, what was expected, what came, and the way out.

    Example:
        >>> ProbeSettings(k=3, tol=0.5)
        Traceback (most recent call last):
        ValueError: tol: expected a number in (0, 0.1], got 0.5; it is relative to the largest eigenvalue.
    """

    k: int = 10
    which: Which = "LA"
    tol: float = 1e-3
    ncv: int | None = None
    max_matvecs: int = 200
    verify: Verify | int = "always"
    seed: int = 0
    sample: int | str | Iterable[Any] = 1024
    gradient_sample: int | str = 8192
    resample: bool = True
    read_timeout: float = READ_TIMEOUT
    batch_size: int | None = None
    weight: Weight | None = None
    params: Sequence[str] | None = None
    loss_fn: LossFunction | None = None
    mode: Mode = "train"
    dtype: Precision = "float32"
    curvature: Curvature = "hessian"
    on_check_fail: OnCheckFail = "warn"
    measurements: Sequence[Measurement] | None = None
    defaults: bool = True
    reference_step: int | None = None
    basis: BasisChoice = "auto"

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **others: Any) -> ProbeSettings:
        """Settings from the arguments of a function; `others` take precedence."""
        known = {field.name: arguments[field.name] for field in fields(cls) if field.name in arguments}
        return cls(**{**known, **others})

    def __post_init__(self) -> None:
        self._take("k", require_integer("k", self.k, 0))
        self._check_sample()
        require_flag("resample", self.resample)
        self._take(
            "read_timeout",
            require_number("read_timeout", self.read_timeout, "a positive number of seconds", lambda x: x > 0.0),
        )
        self._take("batch_size", require_integer("batch_size", self.batch_size, 1, optional=True))
        require_function("weight", self.weight, ("batch",))
        require_word("which", self.which, get_args(Which))
        expected, way_out = f"a number in (0, {MAX_TOL}]", "it is relative to the largest eigenvalue"
        self._take("tol", require_number("tol", self.tol, expected, lambda x: 0.0 < x <= MAX_TOL, way_out))
        self._take("max_matvecs", require_integer("max_matvecs", self.max_matvecs, 1))
        self._take("ncv", require_integer("ncv", self.ncv, 1, optional=True))
        self._take("verify", require_verify(self.verify))
        self._take("params", require_patterns("params", self.params))
        require_loss("loss_fn", self.loss_fn)
        for name in ("curvature", "on_check_fail"):
            if isinstance(word := getattr(self, name), str):
                self._take(name, word.replace("_", "-"))
        for name, words in (
            ("mode", Mode),
            ("dtype", Precision),
            ("curvature", Curvature),
            ("on_check_fail", OnCheckFail),
            ("basis", BasisChoice),
        ):
            require_word(name, getattr(self, name), get_args(words))
        if self.curvature == "none":
            if not self.defaults:
                raise wrong("curvature", "a matrix, as its eigenvectors are asked for", "none")
            if self.k not in (0, type(self).k):  # the default was not asked for
                way_out = "leave it out, or pass another curvature"
                raise wrong("k", "0 or the default beside curvature='none', without eigenpairs", self.k, way_out)
            self._take("k", 0)
        self._take("seed", require_seed("seed", self.seed))
        _ = self.choice  # checks how they go together
        self._check_measurements()
        self._take("reference_step", require_integer("reference_step", self.reference_step, 0, optional=True))

    @cached_property
    def solver(self) -> Solver:
        """The settings of the eigensolver."""
        return Solver(self.k, self.which, self.tol, self.ncv, self.max_matvecs, self.seed, self.basis)

    @cached_property
    def choice(self) -> CurvatureConfig:
        """The settings of the operator."""
        return CurvatureConfig(self.loss_fn, self.mode, self.seed, self.dtype, self.curvature, self.on_check_fail)

    @cached_property
    def taken(self) -> tuple[Measurement, ...]:
        """All measurements; the user's replace default ones of their class."""
        own = tuple(self.measurements or ())
        defaults = default_measurements(self.k) if self.defaults else []
        return (*(default for default in defaults if not any(type(one) is type(default) for one in own)), *own)

    @property
    def measures_without_products(self) -> bool:
        """Whether anything is measured that needs no eigenpairs."""
        return any(measurement.needs is Needs.NOTHING for measurement in self.taken)

    @property
    def without_effect(self) -> str | None:
        """Sentence on given arguments that change nothing, or None.

        Example:
            >>> ProbeSettings(k=0, tol=1e-4).without_effect
            'tol without effect: no eigenpairs are computed with k=0.'
        """
        defaults = {field.name: field.default for field in fields(self)}
        unused = [name for name in OF_EIGENPAIRS if self.k == 0 and getattr(self, name) != defaults[name]]
        why = "curvature='none'" if self.curvature == "none" else "k=0"
        return f"{', '.join(unused)} without effect: no eigenpairs are computed with {why}." if unused else None

    @property
    def sample_spec(self) -> SampleSpec:
        """The examples, without those for the gradient where nothing is measured."""
        gradient_sample = self.gradient_sample
        if isinstance(self.sample, int) and not self.taken:
            gradient_sample = self.sample
        return SampleSpec(
            self.sample,
            gradient_sample,
            self.batch_size,
            self.weight,
            self.seed,
            resample=self.resample,
            read_timeout=self.read_timeout,
        )

    def require_measurable(self, space: ParameterSpace) -> None:
        """Refuse parameters that one of the measurements does not fit.

        Raises:
            ValueError: from `Measurement.require_space`.
        """
        for measurement in self.taken:
            measurement.require_space(space)

    def same_subspace_as(self, other: ProbeSettings) -> bool:
        """Whether both compute the same subspace, whatever they measure in it.

        Given batches are the same if they are the same object.
        """
        apart = {"sample", "measurements", "defaults", "reference_step", "basis"}
        names = [field.name for field in fields(self) if field.name not in apart]
        is_named = isinstance(self.sample, int | str) and isinstance(other.sample, int | str)
        same = self.sample == other.sample if is_named else self.sample is other.sample
        return same and all(getattr(self, name) == getattr(other, name) for name in names)

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_sample(self) -> None:
        if isinstance(self.sample, str):
            require_word("sample", self.sample, ("all", "current"))
        elif isinstance(self.sample, Integral):
            self._take("sample", require_integer("sample", self.sample, 1))
        else:
            require_given_batches("sample", self.sample, "a number of examples, 'all', 'current', ")
        if isinstance(self.gradient_sample, str):
            return require_word("gradient_sample", self.gradient_sample, ("all",))
        self._take("gradient_sample", require_integer("gradient_sample", self.gradient_sample, 1))
        if isinstance(self.sample, int) and self.gradient_sample < self.sample:
            expected = f"at least the {self.sample} of `sample`, which it contains"
            raise wrong("gradient_sample", expected, self.gradient_sample)
        return None

    def _check_measurements(self) -> None:
        if self.measurements is None:
            return
        given = require_measurements(self.measurements)
        self._take("measurements", given)
        for item in given:
            if self.curvature == "none" and (item.needs is not Needs.NOTHING or isinstance(item, OF_PRODUCTS)):
                raise wrong(
                    "measurements",
                    "ones without Hessian products or eigenpairs beside curvature='none'",
                    type(item).__name__,
                    "leave it out, or pass another curvature, with k=0 if no eigenpairs are wanted",
                )


def require_sizes(settings: ProbeSettings) -> None:
    """Enough products and basis vectors for the pairs that are wanted.

    Raises:
        ValueError: for `max_matvecs` or `ncv` below that.
    """  # noqa: DOC501  # `wrong` makes one
    if settings.max_matvecs < settings.k:
        expected, way_out = f"at least as many products as k={settings.k} eigenpairs", "raise it, or lower k"
        raise wrong("max_matvecs", expected, settings.max_matvecs, way_out)
    require_integer("ncv", settings.ncv, settings.k + 3, optional=True)
