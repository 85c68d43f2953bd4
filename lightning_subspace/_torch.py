"""Everything that the package takes from torch beneath its public interface.

Each entry says what it is for and why nothing public does. Seen in torch 2.6 to 2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# A mode that sees every operation of ATen, also those of backward passes; torch.overrides sees calls from Python alone.
# Documented in torch's notes on extending it, under this name and nowhere public.
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = [
    "FP32_PROPERTIES",
    "FSDP",
    "DispatchMode",
    "base_of",
    "default_type_of_thread",
    "file_writer",
    "fp32_precision",
    "gradient_hook",
    "is_asked_for",
    "is_of_fsdp",
    "is_operator",
    "is_transformed",
    "managed_parameters",
    "module_hooks",
    "node_class",
    "set_fp32_precision",
    "storages_of",
    "uncompiled",
    "undispatched",
    "unwrap_fsdp_method",
    "version_of",
    "without_gradient_hooks",
    "without_mixed_precision",
]

# The package of FSDP2, by which its own functions are told from a user's.
FSDP = "torch.distributed.fsdp"

# The properties `fp32_precision` of torch.backends by backend and operation, each behind those that it inherits from.
# torch < 2.9 has none.
FP32_PROPERTIES = (
    ("generic", "all"),
    *((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("all", "matmul", "conv", "rnn")),
)
if not hasattr(torch._C, "_get_fp32_precision_getter"):
    FP32_PROPERTIES = ()


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that this is a view of, or the tensor itself.

    `untyped_storage` tells whether memory is shared, not whether its owner is a parameter.
    """
    return tensor if tensor._base is None else tensor._base


def storages_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors behind a tensor: itself, or a sparse one's parts.

    The public `indices()` and `values()` want a coalesced tensor, and `coalesce()` copies: it is not what is held.
    """
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def version_of(tensor: Tensor) -> int:
    """The number of in-place writes, which autograd itself relies on."""
    return tensor._version


def fp32_precision(backend: str, operation: str) -> str:
    """A property of `FP32_PROPERTIES`, or what it inherits where it is "none"."""
    return torch._C._get_fp32_precision_getter(backend, operation)


def set_fp32_precision(backend: str, operation: str, precision: str) -> None:
    """Set a property of `FP32_PROPERTIES`.

    The public setter of `torch.backends.mkldnn.fp32_precision` sets that of all backends.
    """
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def uncompiled(module: nn.Module) -> nn.Module | None:
    """The module in what `torch.compile` has returned, or None.

    It has no public reader. The class is told by its name, since importing it takes seconds.
    """
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else None  # type: ignore[return-value]


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work.

    An `autograd.Function` without rules for them is refused there. Public functions tell this of one tensor at most.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def is_asked_for(node: Any) -> bool:
    """Whether the backward pass at work goes on to a node.

    Torch's own operations leave out gradients that nobody asks for; a Python function gets to know of tensors that need
    none, but not what `torch.autograd.grad` was called for. A node that gathers the gradient of a leaf is refused.
    """
    return bool(torch._C._will_engine_execute_node(node))


def node_class(function: type[torch.autograd.Function]) -> type:
    """The class of a custom function's nodes."""
    return function._backward_cls


def module_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """All forward pre-hooks and forward hooks of a module."""
    return module._forward_pre_hooks, module._forward_hooks


def is_of_fsdp(hook: Any) -> bool:
    """Whether a hook is FSDP2's: nothing but its module says so."""
    return (getattr(hook, "__module__", None) or "").startswith(FSDP)


def unwrap_fsdp_method(value: Any) -> Any:
    """The method that `register_fsdp_forward_method` has covered, or None."""
    found = None
    # `functools.wraps` gives it the name and the module of the method, but its code is FSDP's own.
    while (function := getattr(value, "__func__", None)) is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith(FSDP):
            break
        found = value = getattr(function, "__wrapped__", None)
    return found


def managed_parameters(module: Any) -> list[Tensor]:
    """The parameters of FSDP2's groups, which have no public reader.

    Read from where FSDP puts them: before the first forward pass its own references may be old.
    """
    places = [parameter._module_info for group in _groups_of(module) for parameter in group.fsdp_params]
    return [getattr(place.module, place.param_name) for place in places]


@contextmanager
def without_mixed_precision(modules: list[Any]) -> Iterator[None]:
    """Have FSDP2 gather, compute and sum in the type of its parameters.

    A `MixedPrecisionPolicy` is set when a module is sharded, and nothing public changes it. The modules must hold their
    shards, before and after.
    """
    narrow = [module for module in modules if _policy_types(module)]
    with ExitStack() as stack:
        for module in narrow:
            state = module._get_fsdp_state()
            plain = type(state._mp_policy)()
            _set(stack, state, _mp_policy=plain)
            for group in _groups_of(module):
                stack.callback(group._init_mp_dtypes)  # behind the old policies: callbacks run from the last
                _set(stack, group, mp_policy=plain)
                for parameter in group.fsdp_params:
                    # Buffers of the other type, empty between two uses. FSDP makes them where there are none.
                    _set(stack, parameter, mp_policy=plain, all_gather_outputs=[])
                    _set_aside(stack, parameter, "_unsharded_param")
                group._init_mp_dtypes()
        yield


def _groups_of(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # older versions of torch have one at most
    found = [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


def _policy_types(module: Any) -> bool:
    """Whether the policy of a module names a type."""
    policy = module._get_fsdp_state()._mp_policy
    return any(getattr(policy, f"{kind}_dtype") is not None for kind in ("param", "reduce", "output"))


def _set(stack: ExitStack, owner: Any, **values: Any) -> None:
    """Set attributes until the stack is closed."""
    for name, value in values.items():
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _set_aside(stack: ExitStack, owner: Any, name: str) -> None:
    """Take an attribute away until the stack is closed."""
    missing = object()
    before = vars(owner).pop(name, missing)

    def put_back() -> None:
        vars(owner).pop(name, None)
        if before is not missing:
            vars(owner)[name] = before

    stack.callback(put_back)


@contextmanager
def without_gradient_hooks(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Set aside the hooks on gradients of leaves, not only one's own.

    An optimizer may step in one, or ranks may average what FSDP2 does not.
    """
    with ExitStack() as stack:
        for parameter in parameters:
            _set(stack, parameter, _post_accumulate_grad_hooks=None, _backward_hooks=None)
        yield


@contextmanager
def gradient_hook(tensor: Tensor, hook: Callable[[Tensor], Any]) -> Iterator[None]:
    """Call a hook with the gradient of a leaf, for a while.

    Removing a hook leaves an empty dict behind.
    """
    before = tensor._backward_hooks
    handle = tensor.register_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        if before is None:
            tensor._backward_hooks = None


@contextmanager
def default_type_of_thread() -> Iterator[None]:
    """Have `torch.get_default_dtype` ask for the type of its thread.

    A TorchFunctionMode does not see it, and torch's own code in Python (SobolEngine, distributions) goes by it. It is
    replaced for the process, by a function that gives every other thread what it had.
    """
    global _uses, _get_default_dtype
    with _lock:
        _uses += 1
        if _uses == 1:
            _get_default_dtype, torch.get_default_dtype = torch.get_default_dtype, _type_of_thread
    try:
        yield
    finally:
        with _lock:
            _uses -= 1
            if _uses == 0 and torch.get_default_dtype is _type_of_thread:
                torch.get_default_dtype = _get_default_dtype


_lock, _uses, _get_default_dtype = Lock(), 0, torch.get_default_dtype


def _type_of_thread() -> torch.dtype:
    return torch.empty(0, device="cpu").dtype


def file_writer(writer: Any) -> Any:
    """The writer of event files beneath a `SummaryWriter`.

    It takes summaries that none of the public methods makes.
    """
    return writer._get_file_writer()


def is_operator(function: Any) -> bool:
    """Whether a function is one of `torch.ops`: ATen's or a custom one."""
    return type(function).__module__ == "torch._ops"


def undispatched(function: Any) -> Any:
    """A Python function of torch without its first question for modes.

    Such a function begins with `if has_torch_function(...): return handle_torch_function(...)`, by which torch takes a
    TorchFunctionMode off the stack and calls it; the mode then calls the function, whose whole inside runs without the
    mode. For `backward` and `grad` that inside is the backward pass. Nothing public keeps a mode on.
    """
    own = dict.fromkeys(("has_torch_function", "has_torch_function_unary"), lambda *values: False)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **own},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
