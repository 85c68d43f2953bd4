"""Number formats and kernels inside of a loss: what is set aside so that it can be differentiated, twice if need be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def eager(device: torch.device, narrowest: torch.dtype | None) -> Iterator[None]:
    """Set aside compiled code and inference mode, and with a `narrowest` type autocast and the default type."""
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if narrowest is not None:
            for kind in {device.type, "cpu"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(narrowest)
        yield


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Set aside kernels without a second derivative: fused attention, cuDNN's RNNs."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
