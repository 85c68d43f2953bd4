"""Cost of a curvature product: bytes that are kept, the peak of memory, and seconds."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.growth import peak_mb

T = TypeVar("T")


@dataclass(frozen=True)
class Product:
    graph: float  # MB that are retained
    peak_of_graph: float  # MB over what was there before, while it is built
    peak_of_product: float
    seconds_of_graph: float
    seconds_of_product: float
    image: Tensor  # of the direction


def product_of(make: Callable[..., Any], module: nn.Module, loss_fn: Any, batch: Tensor, repeats: int) -> Product:
    """The cost of an operator of a class, over one micro-batch."""
    space, footprint = ParameterSpace.of(module), Footprint()
    sample = sample_of_batches([batch])
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(1))
    with TrainingLoss(module, space, loss_fn) as loss:
        before = peak_mb(forget=True)
        started = time.perf_counter()
        operator = make(loss, sample.hessian, footprint=footprint)
        built, peak_of_graph = time.perf_counter() - started, peak_mb() - before
        image = operator.matvec(direction)
        peak_mb(forget=True)
        started = time.perf_counter()
        for _ in range(repeats):
            operator.matvec(direction)
        seconds, peak = (time.perf_counter() - started) / repeats, peak_mb() - before
    return Product(footprint.largest / 1e6, peak_of_graph, peak, built, seconds, image)


def alone(function: Callable[..., T], *args: Any) -> T:
    """What a function gives in a process of its own, whose memory nothing before has filled."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)
