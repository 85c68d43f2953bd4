"""Number formats and kernels inside of a differentiated loss."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_subspace._lightning import attached_trainer
from lightning_subspace._torch import default_type_of_thread
from lightning_subspace.loss.attention_scores import AttentionMode, AttentionScores
from lightning_subspace.loss.default_type import DefaultType
from lightning_subspace.state.cudnn import without_cudnn, without_search
from lightning_subspace.state.ieee import ieee_arithmetic


@contextmanager
def eager(device: torch.device, narrowest: torch.dtype | None) -> Iterator[None]:
    """Turn off compiled code, inference mode and, with `narrowest`, autocast and TF32."""
    with torch.inference_mode(False), torch.enable_grad(), without_search, ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if narrowest is not None:
            stack.enter_context(ieee_arithmetic)
            for kind in {device.type, "cpu"}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def default_type(narrowest: torch.dtype | None) -> Iterator[None]:
    """Make new tensors no narrower, where a loss is evaluated or differentiated.

    Nowhere else: the mode takes note of every call of torch, also of `tensor.shape`.
    """
    default = torch.get_default_dtype()
    if narrowest is None or torch.promote_types(default, narrowest) == default:
        yield
        return
    with default_type_of_thread(), DefaultType(narrowest):
        yield


@contextmanager
def twice_differentiable(module: nn.Module, scores: AttentionScores) -> Iterator[None]:
    """Turn off kernels without a second derivative: fused attention, cuDNN's RNNs.

    Math attention takes their place, or blocks where its `scores` do not fit.
    """
    with sdpa_kernel(SDPBackend.MATH), ExitStack() as stack:
        if scores.calls != 0:  # a mode costs some microseconds a call of torch: only for a module that has attention
            stack.enter_context(AttentionMode(scores))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(without_cudnn)
        yield


def widened_array(array: np.ndarray[Any, Any], narrowest: torch.dtype | None) -> np.ndarray[Any, Any]:
    """A copy of a NumPy array, widened like a tensor."""
    if narrowest is None or array.dtype.kind not in "fc":
        return array.copy()
    return array.astype(np.promote_types(array.dtype, str(narrowest).removeprefix("torch.")))


def widened(tensor: Tensor, narrowest: torch.dtype | None, *, copy: bool) -> Tensor:
    """A tensor whose type, if floating-point, is at least `narrowest`.

    The types of 8 bits stay: nothing is computed in them, and torch does not promote them.
    """
    dtype = tensor.dtype
    if narrowest is not None and (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1:
        dtype = torch.promote_types(dtype, narrowest)
    return tensor.to(dtype, copy=copy)


def trained_in(module: nn.Module) -> torch.dtype:
    """Narrowest type that a trainer's precision may compute a loss in."""
    trainer = attached_trainer(module)
    precision = "32-true" if trainer is None else str(trainer.precision_plugin.precision)
    if "16" in precision or "transformer-engine" in precision:
        return torch.bfloat16
    return torch.float64 if "64" in precision else torch.float32
