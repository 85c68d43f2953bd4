"""Switches of torch for TF32: what they say, ways in which people set them, and how to set them back.

torch 2.9 has added `fp32_precision` at nine places to the three older ones. Reading an older one raises where both have
been set and disagree; that, too, is something that a probe must not change.
"""

from collections.abc import Callable
from typing import Any

import torch

B = torch.backends
_PLACES = {
    "torch.backends": B,
    "cuda.matmul": B.cuda.matmul,
    "cudnn": B.cudnn,
    "cudnn.conv": getattr(B.cudnn, "conv", None),
    "cudnn.rnn": getattr(B.cudnn, "rnn", None),
    "mkldnn": B.mkldnn,
    "mkldnn.matmul": getattr(B.mkldnn, "matmul", None),
    "mkldnn.conv": getattr(B.mkldnn, "conv", None),
    "mkldnn.rnn": getattr(B.mkldnn, "rnn", None),
}
_OLDER: dict[str, Callable[[], Any]] = {
    "cuda.matmul.allow_tf32": lambda: B.cuda.matmul.allow_tf32,
    "cudnn.allow_tf32": lambda: B.cudnn.allow_tf32,
    "float32_matmul_precision": torch.get_float32_matmul_precision,
    "cudnn.enabled": lambda: B.cudnn.enabled,
    "cudnn.benchmark": lambda: B.cudnn.benchmark,
    "cudnn.deterministic": lambda: B.cudnn.deterministic,
}


def _newer() -> dict[str, str]:
    found = {}
    for name, place in _PLACES.items():
        try:
            found[name] = place.fp32_precision
        except (AttributeError, RuntimeError):  # of an earlier torch
            continue
    return found


HAS_NEWER = "cudnn.conv" in _newer()
_AT_FIRST = _newer()


def read() -> dict[str, str]:
    """What every switch says, or that it raises."""
    found = _newer()
    for name, get in _OLDER.items():
        try:
            found[name] = repr(get())
        except RuntimeError as error:
            found[name] = f"raises {type(error).__name__}"
    return found


def reset() -> None:
    """As torch is imported: the older ones first, since they write to the newer ones."""
    torch.set_float32_matmul_precision("highest")
    B.cuda.matmul.allow_tf32 = False
    B.cudnn.allow_tf32 = True
    B.cudnn.benchmark = False
    for name, value in _AT_FIRST.items():
        _set(name, value)


def _set(name: str, value: str) -> None:
    _PLACES[name].fp32_precision = value


def _older(matmul: bool | None = None, cudnn: bool | None = None) -> None:
    if matmul is not None:
        B.cuda.matmul.allow_tf32 = matmul
    if cudnn is not None:
        B.cudnn.allow_tf32 = cudnn


def _benchmark() -> None:
    B.cudnn.benchmark = True


def _steps(*steps: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        for step in steps:
            step()

    return call


HIGH = "older: matmul precision high, as Lightning advises"
_STATES: dict[str, Callable[[], None]] = {
    "as torch is imported": lambda: None,
    HIGH: lambda: torch.set_float32_matmul_precision("high"),
    "older: matmul precision medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older: all on": lambda: _older(True, True),
    "older: all off": lambda: _older(False, False),
    "older: matmul on, cuDNN off": lambda: _older(True, False),
    "benchmark": _benchmark,
}
_NEWER_STATES: dict[str, Callable[[], None]] = {
    "newer: all tf32": lambda: _set("torch.backends", "tf32"),
    "newer: all ieee": lambda: _set("torch.backends", "ieee"),
    "newer: matmul tf32": lambda: _set("cuda.matmul", "tf32"),
    "newer: conv tf32, rnn ieee": _steps(lambda: _set("cudnn.conv", "tf32"), lambda: _set("cudnn.rnn", "ieee")),
    "newer: oneDNN bf16": lambda: _set("mkldnn.matmul", "bf16"),
    "mixed: matmul tf32, older cuDNN off": _steps(lambda: _set("cuda.matmul", "tf32"), lambda: _older(cudnn=False)),
    "mixed: older high, then conv ieee": _steps(_STATES[HIGH], lambda: _set("cudnn.conv", "ieee")),
    "mixed: older all on, then all ieee": _steps(_STATES["older: all on"], lambda: _set("torch.backends", "ieee")),
}
STATES = _STATES | (_NEWER_STATES if HAS_NEWER else {})
