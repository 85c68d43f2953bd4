"""IEEE arithmetic in a context, and every flag as it was behind it, whatever the user has set and mixed.

Two looks at the flags: what their getters say, or that they raise; and what a property inherits, which shows when those
above it are set to something else.
"""

import threading
import warnings

import pytest
import torch
from torch.backends import cudnn, mkldnn
from torch.backends.cuda import matmul

from lightning_subspace import _torch
from lightning_subspace.state import ieee
from lightning_subspace.state.cudnn import without_cudnn, without_search
from lightning_subspace.state.ieee import ieee_arithmetic
from lightning_subspace.state.joint import Joint

HAS_PROPERTIES = bool(_torch.FP32_PROPERTIES)
needs_properties = pytest.mark.skipif(not HAS_PROPERTIES, reason="torch < 2.9 has the legacy flags alone")

LEGACY = {
    "matmul precision": torch.get_float32_matmul_precision,
    "matmul.allow_tf32": lambda: matmul.allow_tf32,
    "cudnn.allow_tf32": lambda: cudnn.allow_tf32,
}


def setting(owner, **values):
    return lambda: [setattr(owner, name, value) for name, value in values.items()]


def matmul_precision(word):
    return lambda: torch.set_float32_matmul_precision(word)


def new(path, precision):
    """Setting a property of the new interface, by its place below torch.backends."""

    def act():
        owner = torch.backends
        for name in filter(None, path.split(".")):
            owner = getattr(owner, name)
        owner.fp32_precision = precision

    return act


OLD_STATES = {
    "as torch begins": [],
    "high": [matmul_precision("high")],
    "medium": [matmul_precision("medium")],
    "matmul allowed": [setting(matmul, allow_tf32=True)],
    "cudnn forbidden": [setting(cudnn, allow_tf32=False)],
    "high, cudnn forbidden": [matmul_precision("high"), setting(cudnn, allow_tf32=False)],
}
MATMUL, BOTH = {"matmul precision"}, {"matmul precision", "matmul.allow_tf32"}
CUDNN = {"cudnn.allow_tf32"}
# Each with the legacy flags that raise then.
NEW_STATES = {
    "matmul by the new": ([new("cuda.matmul", "tf32")], BOTH),
    "all tf32": ([new("", "tf32")], BOTH),
    "all ieee": ([new("", "ieee")], set()),
    "all bf16": ([new("", "bf16")], MATMUL),
    "cudnn tf32": ([new("cudnn", "tf32")], BOTH),
    "convolutions ieee": ([new("cudnn.conv", "ieee")], CUDNN),
    "recurrent ieee": ([new("cudnn.rnn", "ieee")], CUDNN),
    "both ieee": ([new("cudnn.conv", "ieee"), new("cudnn.rnn", "ieee")], CUDNN),
    "both inherit": ([new("cudnn.conv", "none"), new("cudnn.rnn", "none"), new("", "tf32")], BOTH),
    "onednn bf16": ([new("mkldnn.matmul", "bf16")], MATMUL),
    "onednn convolutions tf32": ([new("mkldnn.conv", "tf32")], set()),
    "all of onednn bf16": ([lambda: mkldnn.set_flags(_fp32_precision="bf16")], MATMUL),
    "by onednn's setter": ([new("mkldnn", "bf16")], MATMUL),  # it sets that of all backends
    "high, then matmul ieee": ([matmul_precision("high"), new("cuda.matmul", "ieee")], {"matmul.allow_tf32"}),
    "medium, then allowed": ([matmul_precision("medium"), setting(matmul, allow_tf32=True)], MATMUL),
    "forbidden, then tf32": ([setting(cudnn, allow_tf32=False), new("cudnn.conv", "tf32")], CUDNN),
    "high, then none": (
        [
            matmul_precision("high"),
            *(new(path, "none") for path in ("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "cudnn.rnn")),
        ],
        {"matmul.allow_tf32"} | CUDNN,
    ),
}
STATES = [
    *(pytest.param(actions, set(), id=name) for name, actions in OLD_STATES.items()),
    *(pytest.param(*state, id=name, marks=needs_properties) for name, state in NEW_STATES.items()),
]


def begin():
    """All flags as torch has them when a process begins."""
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = True
    for key in _torch.FP32_PROPERTIES:
        _torch.set_fp32_precision(*key, "tf32" if key in (("cuda", "conv"), ("cuda", "rnn")) else "none")


@pytest.fixture(autouse=True)
def _begin():
    begin()
    yield
    begin()


def apply(actions):
    for action in actions:
        action()


def legacy():
    found = {}
    for name, get in LEGACY.items():
        try:
            found[name] = get()
        except RuntimeError:
            found[name] = "raises"
    return found


def properties():
    return {key: _torch.fp32_precision(*key) for key in _torch.FP32_PROPERTIES}


def look():
    return legacy() | properties()


def look_below():
    """What each property is by itself, and each legacy flag where properties agree with it; changes them all."""
    seen = []
    for above in (("generic", "all"), ("cuda", "all"), ("mkldnn", "all")):
        for precision in ("tf32", "ieee", "none"):
            if HAS_PROPERTIES:
                _torch.set_fp32_precision(*above, precision)
            seen.append(look())
    for precision in ("ieee", "tf32"):
        for key in _torch.FP32_PROPERTIES:
            _torch.set_fp32_precision(*key, precision)
        seen.append(legacy())
    return seen


@pytest.mark.parametrize(("actions", "raising"), STATES)
def test_every_flag_comes_back(actions, raising):
    apply(actions)
    before = look()
    assert {name for name in LEGACY if before[name] == "raises"} == raising
    for _ in range(2):
        with ieee_arithmetic:
            assert set(properties().values()) <= {"ieee"}
            # No getter raises meanwhile: Lightning, inductor or the user may ask.
            assert list(legacy().values()) == ["highest", False, False]
        assert look() == before
    below = look_below()
    begin()
    apply(actions)
    assert below == look_below()


@pytest.mark.parametrize("actions", OLD_STATES.values(), ids=OLD_STATES)
def test_a_product_inside_has_the_bits_of_ieee_arithmetic(actions):
    """On a processor with bfloat16 "medium" gives others."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator)
    exact = left @ right
    apply(actions)
    with ieee_arithmetic:
        assert torch.equal(left @ right, exact)


@pytest.mark.parametrize("actions", OLD_STATES.values(), ids=OLD_STATES)
def test_without_the_new_properties_the_legacy_flags_are_set_and_come_back(actions, monkeypatch):
    monkeypatch.setattr(ieee, "FP32_PROPERTIES", ())

    def refuse(*arguments):
        raise AssertionError("torch < 2.9 has no such function")

    monkeypatch.setattr(ieee, "fp32_precision", refuse)
    monkeypatch.setattr(ieee, "set_fp32_precision", refuse)
    apply(actions)
    before = legacy()
    with ieee_arithmetic:
        assert list(legacy().values()) == ["highest", False, False]
    assert legacy() == before


def test_an_exception_inside_leaves_them_as_they_were():
    torch.set_float32_matmul_precision("high")
    before = look()
    with pytest.raises(KeyError), ieee_arithmetic, ieee_arithmetic:
        raise KeyError
    assert look() == before


@needs_properties
@pytest.mark.parametrize("state", ["medium, then allowed", "convolutions ieee", "high, then none"])
def test_an_interrupt_between_any_two_flags_leaves_them_as_they_were(state, monkeypatch):
    """Where a signal's KeyboardInterrupt comes in, in entering or in leaving."""
    actions, count, number = NEW_STATES[state][0], 0, -1
    flags, own = ieee.LEGACY, _torch.set_fp32_precision

    def interrupted(function):
        def call(*arguments):
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            function(*arguments)

        return call

    monkeypatch.setattr(ieee, "set_fp32_precision", interrupted(own))
    monkeypatch.setattr(ieee, "LEGACY", tuple(ieee.Flag(f.get, interrupted(f.set), f.exact) for f in flags))
    was_interrupted, number = True, 0
    while was_interrupted:
        begin()
        apply(actions)
        before, count, was_interrupted = look(), 0, False
        number += 1
        try:
            with ieee_arithmetic:
                pass
        except KeyboardInterrupt:
            was_interrupted = True
        assert look() == before, number
    assert number > 2 * len(_torch.FP32_PROPERTIES)


def test_what_torch_says_of_its_legacy_flags_is_not_heard(monkeypatch):
    """torch 2.9 calls them deprecated."""
    first, second = ieee.LEGACY

    def told(value):
        warnings.warn("Please use the new API settings", stacklevel=2)
        first.set(value)

    monkeypatch.setattr(ieee, "LEGACY", (ieee.Flag(first.get, told, first.exact), second))
    with ieee_arithmetic:  # warnings are errors here
        assert legacy()["matmul precision"] == "highest"


def test_threads_that_leave_in_the_order_in_which_they_came():
    """Otherwise the second would put back what the first one has set."""
    torch.set_float32_matmul_precision("high")
    before = look()
    is_in, may_leave, found = threading.Event(), threading.Event(), []

    def second():
        with ieee_arithmetic:
            is_in.set()
            may_leave.wait(10.0)
            found.append(legacy()["matmul precision"])

    thread = threading.Thread(target=second)
    with ieee_arithmetic:
        thread.start()
        assert is_in.wait(10.0)
    may_leave.set()
    thread.join()
    assert found == ["highest"]
    assert look() == before


def test_a_context_that_cannot_be_opened_has_nobody_in_it():
    class Refused:
        def __enter__(self):
            raise ValueError

        def __exit__(self, *exc_info):
            raise AssertionError

    joint = Joint(Refused)
    for _ in range(2):
        with pytest.raises(ValueError), joint:  # noqa: PT011  # a bare one
            pass


@pytest.mark.parametrize(("context", "name"), [(without_cudnn, "enabled"), (without_search, "benchmark")])
@pytest.mark.parametrize(("actions", "raising"), STATES)
def test_one_switch_of_cudnn_alone(context, name, actions, raising, monkeypatch):
    """`cudnn.flags` would raise where getters do, and set TF32 and the other switches."""
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", True)
    apply(actions)

    def switches():
        return {other: getattr(cudnn, other) for other in ("enabled", "benchmark", "deterministic")}

    before, others = switches(), look()
    with context:
        assert switches() == before | {name: False}
        assert look() == others
    assert switches() == before
    with pytest.raises(KeyError), context:
        raise KeyError
    assert switches() == before
    assert look() == others
