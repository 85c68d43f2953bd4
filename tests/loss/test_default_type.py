"""The default type of one thread: what torch would make if it were that of the process, and nothing elsewhere."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.default_type import DefaultType
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace

WHOLE, FLOATS = torch.arange(1, 4), torch.ones(3)
IS_LARGE = WHOLE > 1
CALLS = {
    "zeros": lambda: torch.zeros(3),
    "dtype is None": lambda: torch.ones(3, dtype=None),
    "eye": lambda: torch.eye(3),
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(3),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "normal of tensors": lambda: torch.normal(FLOATS, FLOATS),
    "linspace": lambda: torch.linspace(0.0, 1.0, 5),
    "complex linspace": lambda: torch.linspace(0.0, 1.0j, 5),
    "window": lambda: torch.hann_window(4),
    "frequencies": lambda: torch.fft.fftfreq(4),
    "arange": lambda: torch.arange(0.0, 1.0, 0.1),
    "arange of integers": lambda: torch.arange(3),
    "full": lambda: torch.full((2,), 0.1),
    "full of integers": lambda: torch.full((2,), 1),
    "full of a tensor": lambda: torch.full((2,), FLOATS[0]),
    "scalar_tensor": lambda: torch.scalar_tensor(0.1),
    "tensor": lambda: torch.tensor([0.1, 0.2]),
    "tensor by name": lambda: torch.tensor(data=[0.1], dtype=None),
    "nested": lambda: torch.tensor([[1, 2], [3, 0.1]]),
    "empty list": lambda: torch.tensor([]),
    "complex": lambda: torch.tensor(0.1j),
    "integers": lambda: torch.tensor([1, 2]),
    "of an array": lambda: torch.tensor(np.ones(3, "f")),
    "of an array's number": lambda: torch.tensor([np.float32(0.1)]),
    "of tensors": lambda: torch.tensor([FLOATS[0], FLOATS[1]]),
    "of a tensor and a number": lambda: torch.tensor([FLOATS[0], 0.1]),
    "as_tensor": lambda: torch.as_tensor(0.1),
    "as_tensor of a tensor": lambda: torch.as_tensor(FLOATS),
    "asarray": lambda: torch.asarray([0.1]),
    "quotient": lambda: WHOLE / 3,
    "floor": lambda: torch.div(WHOLE, 2, rounding_mode="floor"),
    "reflected quotient": lambda: 2 / WHOLE,
    "product": lambda: 0.1 * WHOLE,
    "complex product": lambda: WHOLE * 0.1j,
    "truth values": lambda: IS_LARGE * 0.1,
    "power": lambda: WHOLE**0.1,
    "reflected power": lambda: 0.1**WHOLE,
    "root": lambda: WHOLE.sqrt(),
    "function": lambda: torch.log(WHOLE),
    "special": lambda: torch.special.expit(WHOLE),
    "remainder": lambda: WHOLE % 0.7,
    "where": lambda: torch.where(IS_LARGE, 0.1, 0.2),
    "where of integers": lambda: torch.where(IS_LARGE, WHOLE, 0.2),
    "where as a method": lambda: WHOLE.where(IS_LARGE, 0.2),
    "where of floats": lambda: torch.where(IS_LARGE, FLOATS, 0.2),
    "transform": lambda: torch.fft.fft(WHOLE),
    "covariance": lambda: torch.cov(torch.stack([WHOLE, WHOLE * WHOLE])),
    "float": lambda: WHOLE.float(),
    "to": lambda: WHOLE.to(torch.float32),
    "to that of another": lambda: WHOLE.to(FLOATS),
    "type": lambda: WHOLE.type("torch.FloatTensor"),
    "one_hot": lambda: nn.functional.one_hot(WHOLE).float(),
    "asked for": lambda: torch.zeros(3, dtype=torch.float32),
    "like": lambda: torch.zeros_like(FLOATS),
    "like integers": lambda: torch.zeros_like(WHOLE, dtype=torch.float32),
    "new": lambda: FLOATS.new_zeros(3),
    "sum": lambda: WHOLE.sum(dtype=torch.float32),
    "out": lambda: torch.div(WHOLE, 3, out=torch.empty(3, dtype=torch.float32)),
    "bits": lambda: torch.ones(2, dtype=torch.int32).view(torch.float32),
    "parameter": lambda: nn.Parameter(torch.zeros(2)).detach(),
    "module": lambda: nn.Linear(2, 2).weight.detach(),
    "mask": lambda: nn.Transformer.generate_square_subsequent_mask(3),
    "noise": lambda: nn.functional.gumbel_softmax(torch.zeros(3)),
    "dropout": lambda: nn.functional.dropout(WHOLE / 2),
}


def made(call):
    torch.manual_seed(0)
    return call()


NARROWER = ("zeros", "rand", "tensor", "arange", "full", "quotient", "root", "where", "float", "asked for")


@pytest.mark.parametrize(
    ("name", "default"),
    [*((name, torch.float32) for name in CALLS), *((name, torch.bfloat16) for name in NARROWER)],
)
def test_it_gives_what_a_default_of_the_process_would(name, default):
    """To the bit, and the same type where one was asked for."""
    try:
        torch.set_default_dtype(torch.float64)
        expected = made(CALLS[name])
        torch.set_default_dtype(default)
        with torch.random.fork_rng(), DefaultType(torch.float64):
            found = made(CALLS[name])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def probe(loss_fn, dtype=torch.float64):
    """An evaluation and a product of a small loss."""
    net = nn.Linear(3, 1)
    with TrainingLoss(net, ParameterSpace.of(net), loss_fn, dtype=dtype) as loss:
        evaluation = loss(MicroBatch(torch.ones(4, 3), 4.0, 0))
        torch.autograd.grad(evaluation.value, evaluation.leaves)


def test_another_thread_keeps_its_own_all_through_a_probe():
    seen, within, before = [], [], torch.get_default_dtype
    done, is_inside = threading.Event(), threading.Event()

    def prepare():
        is_inside.wait(10.0)
        while not done.is_set():
            seen.append((torch.zeros(1).dtype, torch.tensor(0.5).dtype, (WHOLE / 2).dtype, torch.get_default_dtype()))

    def loss_fn(module, batch, batch_idx):
        is_inside.set()
        count = len(seen)
        while len(seen) < count + 50:  # the other thread has its turn in here
            within.append((torch.zeros(1).dtype, torch.get_default_dtype()))
        return (module(batch) + torch.rand(())).square().mean()

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        probe(loss_fn)
    finally:
        done.set()
        is_inside.set()
        thread.join()
    assert set(seen) == {(torch.float32,) * 4}
    assert set(within) == {(torch.float64,) * 2}
    assert torch.get_default_dtype is before


def types_seen(seen, x):
    seen.append((torch.zeros(1).dtype, (WHOLE / 2).dtype, threading.get_ident()))
    return x.sin()


@pytest.mark.parametrize(
    ("use_reentrant", "how"),
    [
        (False, "Tensor.backward"),
        (False, "autograd.backward"),
        (False, "autograd.grad"),
        (True, "Tensor.backward"),
        (True, "autograd.backward"),  # and `autograd.grad` is refused by torch
    ],
)
def test_a_checkpoint_is_computed_again_with_the_same_types(use_reentrant, how):
    """Torch sets a mode aside for these calls; the recomputation comes within them."""
    seen = []
    with DefaultType(torch.float64):
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        y = checkpoint(types_seen, seen, x, use_reentrant=use_reentrant).sum()
        if how == "autograd.grad":
            (gradient,) = torch.autograd.grad(y, x, create_graph=True)
            torch.autograd.grad(gradient.sum(), x)
        else:
            {"Tensor.backward": y.backward, "autograd.backward": lambda: torch.autograd.backward(y)}[how]()
    assert len(seen) >= 2
    assert {kinds[:2] for kinds in seen} == {(torch.float64, torch.float64)}


# A backward pass within a backward pass; beyond 60 of them torch goes on in another thread.
DEEP = """
import os
import threading
import torch
from lightning_subspace.loss.default_type import DefaultType


class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth, seen):
        ctx.depth, ctx.seen = depth, seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.depth == 0:
            ctx.seen.append((torch.zeros(1).dtype, (torch.arange(1, 4) / 2).dtype, threading.get_ident()))
        else:
            with torch.enable_grad():
                Deep.apply(gradient.detach().requires_grad_(), ctx.depth - 1, ctx.seen).sum().backward()
        return gradient, None, None


seen = []
with DefaultType(torch.float64):
    Deep.apply(torch.ones(3, requires_grad=True), 70, seen).sum().backward()
((*kinds, thread),) = seen
print((kinds, thread != threading.get_ident()), flush=True)
os._exit(0)
"""


def test_a_thread_of_autograd_has_the_type_too():
    """As those have in which torch runs the backward pass on a GPU."""
    # In a process of its own: torch refuses a backward pass in forks of one that has had such threads. It imports this
    # one type, as all of the package and of this file takes four times as long.
    # It leaves without the interpreter's end: the threads of nested backward passes still live then, and where one of
    # them wants the lock of an interpreter that is gone, torch aborts the process.
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DEEP], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "([torch.float64, torch.float64], True)"


class Tagged(torch.Tensor):
    """A class with functions of its own."""

    calls: list[str] = []  # noqa: RUF012  # of all

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_class_of_tensors_keeps_its_own_functions():
    Tagged.calls.clear()
    with DefaultType(torch.float64):
        x = torch.ones(2).as_subclass(Tagged).requires_grad_()
        torch.autograd.grad((x * x).sum(), x)
    assert "grad" in Tagged.calls


@pytest.mark.parametrize(
    ("default", "narrowest", "is_set"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float64, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float64, torch.float32, False),  # of training: a wider one stays
    ],
)
def test_it_is_set_where_the_type_of_the_process_is_narrower(default, narrowest, is_set):
    seen = []

    def loss_fn(module, batch, batch_idx):
        seen.append(torch.zeros(1).dtype)
        return module(batch).square().mean()

    torch.set_default_dtype(torch.float32)
    net = nn.Linear(3, 1)
    try:
        torch.set_default_dtype(default)
        with TrainingLoss(net, ParameterSpace.of(net), loss_fn, dtype=narrowest) as loss:
            loss(MicroBatch(torch.ones(4, 3, dtype=torch.float32), 4.0, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == [narrowest if is_set else default]
