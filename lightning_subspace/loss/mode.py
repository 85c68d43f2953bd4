"""Mode of a module and its submodules inside of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import nn

Mode = Literal["train", "eval"]


@contextmanager
def in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Set train or eval mode; put back every submodule's at the end."""
    with ExitStack() as stack:
        for m in module.modules():
            stack.callback(setattr, m, "training", m.training)
        if mode == "eval" or not module.training:
            module.train(mode == "train")
        yield
