"""float32 means IEEE in a probe, however the user has set the switches for TF32, and all of them come back."""

from functools import partial

import pytest
import torch

from lightning_subspace import Measurement, Needs, measure_subspace
from tests.gpu import flags, fresh
from tests.gpu.device import DEVICE, IS_CARD, shows_warnings
from tests.gpu.models import LARGE, SMALL, on, trained
from tests.gpu.truth import Double

pytestmark = shows_warnings
NAMES = ["mlp", "cnn"]  # products of matrices, and convolutions, which have switches of their own
# TF32 has ten bits: products are then off by 1e-3 to 1e-2. In IEEE float32 they were within 1e-5 wherever measured.
ERROR = 2e-5


class Product(Measurement):
    """A product with the Hessian in a probe."""

    needs = Needs.NOTHING

    def __init__(self, direction, *, fails=False):
        self.direction, self.fails, self.found = direction, fails, None

    def measure(self, probe):
        self.found = probe.operator.matvec(self.direction.to(probe.gradient))
        if self.fails:
            raise ArithmeticError
        return {}


class Case:
    """A network with a random direction, and the true product in it."""

    def __init__(self, name):
        self.problem = (LARGE if IS_CARD else SMALL)[name]  # few channels do not get the kernels that have TF32
        self.module = trained(self.problem, DEVICE)
        self.batches = on(DEVICE, self.problem.batches())
        hessian = Double(self.problem, self.module, self.batches)
        n = len(hessian.gradient)
        self.direction = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(DEVICE)
        self.expected = hessian.product(self.direction)

    def error(self, product):
        return float((product.double() - self.expected).norm() / self.expected.norm())

    def in_a_probe(self, *, fails=False):
        product = Product(self.direction, fails=fails)
        call = partial(measure_subspace, self.module, self.batches, k=0, loss_fn=self.problem.loss)
        if fails:
            with pytest.raises(ArithmeticError):
                call(measurements=[product])
        else:
            call(measurements=[product])
        return self.error(product.found)

    def as_it_is(self):
        """By the user's own double backward."""
        parameters = list(self.module.parameters())
        pieces = self.direction.float().split([p.numel() for p in parameters])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = self.problem.loss(self.module, self.batches[0], 0)
            graph = torch.autograd.grad(loss, parameters, create_graph=True)
            views = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
            images = torch.autograd.grad(graph, parameters, views)
        return self.error(torch.cat([image.reshape(-1) for image in images]))


def all_states():
    """By state: how far products are off, and the switches that a probe has changed."""
    cases, found = {name: Case(name) for name in NAMES}, {}
    for state, enter in flags.STATES.items():
        flags.reset()
        enter()
        before, errors, changed = flags.read(), {}, []
        for name, case in cases.items():
            for fails in (False, True) if name == "cnn" else (False,):
                errors[name] = max(errors.get(name, 0.0), case.in_a_probe(fails=fails))
                after = flags.read()
                changed += [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]
        plain = {name: case.as_it_is() for name, case in cases.items()} if state == flags.HIGH else {}
        found[state] = errors, changed, plain
    return found


@pytest.fixture(scope="module")
def found():
    """In a process of its own: no other test sees any of these states."""
    return fresh.run(all_states)[0]


@pytest.mark.parametrize("state", flags.STATES)
def test_products_are_those_of_float32_and_the_switches_come_back(state, found):
    errors, changed, _ = found[state]
    assert max(errors.values()) < ERROR, errors
    assert changed == []


def test_tf32_would_show(found):
    """Or the test above would show nothing."""
    if not IS_CARD or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this device has no TF32")
    *_, plain = found[flags.HIGH]
    assert min(plain.values()) > ERROR, plain
