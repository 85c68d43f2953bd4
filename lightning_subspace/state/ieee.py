"""IEEE arithmetic in float32, in place of TensorFloat-32 and bfloat16.

On a GPU torch may round the factors of a float32 product to 10 bits (TF32), and oneDNN to 7 (bfloat16): convolutions do
so by default, matrix products by `torch.set_float32_matmul_precision`. Products with a Hessian are then wrong by 1 %.

torch has two interfaces. The legacy flags are the matmul precision (`allow_tf32` of cuBLAS is the same one) and
`torch.backends.cudnn.allow_tf32`; setting one sets properties of the new interface, too. From torch 2.9 on these count:
`fp32_precision` of each backend and operation, which is that of the backend, or of all, where it is "none" itself. The
legacy flags do not follow them, and reading a flag raises where the two do not agree. So:

    save      legacy flags that can be read; properties from above, each set to "none", so that those below it show
              their own value; the other legacy flags, where properties agree with them
    set       legacy flags, then all properties, so that nobody who reads a flag meanwhile meets an error
    put back  legacy flags, then properties, which the former have changed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_subspace._torch import FP32_PROPERTIES, fp32_precision, set_fp32_precision
from lightning_subspace.state.joint import Joint
from lightning_subspace.state.quiet import quiet


@dataclass(frozen=True)
class Flag:
    """A legacy flag, and its value for IEEE arithmetic."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    exact: Any


LEGACY = (
    Flag(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    Flag(lambda: torch.backends.cudnn.allow_tf32, partial(setattr, torch.backends.cudnn, "allow_tf32"), False),
)


class _Saved:
    """What was set by the user, as far as it was touched."""

    def __init__(self) -> None:
        self._properties: dict[tuple[str, str], str] = {}
        self._flags: dict[Flag, Any] = {}

    def exchange(self) -> None:
        """Save all, and set IEEE arithmetic."""
        found: dict[Flag, Any] = {}
        self._read(found)
        for key in FP32_PROPERTIES:
            self._properties[key] = fp32_precision(*key)
            set_fp32_precision(*key, "none")
        for precision in ("ieee", "tf32"):
            if len(found) < len(LEGACY):
                self._set_properties(precision)
                self._read(found)
        for flag, value in found.items():
            self._flags[flag] = value  # not before: what puts it back changes properties
            flag.set(flag.exact)
        self._set_properties("ieee")

    def put_back(self) -> None:
        """Set all that was touched to what it was."""
        for flag, value in self._flags.items():
            flag.set(value)
        for key, value in self._properties.items():
            set_fp32_precision(*key, value)

    def _read(self, found: dict[Flag, Any]) -> None:
        for flag in LEGACY:
            if flag not in found:
                with suppress(RuntimeError):  # the user has mixed both interfaces
                    found[flag] = flag.get()

    def _set_properties(self, precision: str) -> None:
        for key in FP32_PROPERTIES:
            set_fp32_precision(*key, precision)


@contextmanager
def _exchanged() -> Iterator[None]:
    saved = _Saved()
    try:
        with quiet():  # some versions warn of the legacy flags
            saved.exchange()
        yield
    finally:
        with quiet():
            try:
                saved.put_back()
            except BaseException:  # a KeyboardInterrupt between two of them
                saved.put_back()
                raise


# Context in which float32 is IEEE float32, for the process.
ieee_arithmetic = Joint(_exchanged)
