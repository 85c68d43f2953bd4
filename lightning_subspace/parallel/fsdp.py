"""Support for modules sharded by FSDP2: `fully_shard`, Lightning's `ModelParallelStrategy`.

Each rank holds a part of every parameter, a DTensor, and hooks on the forward pass gather the whole. Double backward
does not go through this: `autograd.grad` by a shard gives nothing, silently. So for an exact Hessian the parameters are
gathered once and replace the shards, with FSDP's hooks off. Differences of gradients are taken on the shards
(`loss/fsdp_loss.py`). README.md in this folder has the memory and the communication of both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_subspace._torch import FSDP, is_of_fsdp, managed_parameters, module_hooks, unwrap_fsdp_method
from lightning_subspace.parallel.holding import first_row, shard_dim, shard_ranks, why_not_by_rows
from lightning_subspace.parallel.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is distributed over ranks.

    Example:
        >>> is_sharded(nn.Linear(1, 1).weight)
        False
    """
    tensors = sys.modules.get("torch.distributed.tensor")  # not imported here: it takes half a second
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def fsdp_modules(module: nn.Module) -> list[Any]:
    """The modules in the tree that `fully_shard` was applied to, outermost first."""
    fsdp = sys.modules.get(FSDP)
    return [] if fsdp is None else [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)]


def fsdp_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters that `fully_shard` has made, while they are shards."""
    return [parameter for m in fsdp_modules(module) for parameter in managed_parameters(m)]


def type_name(module: nn.Module) -> str:
    """Name of the class of a module, before `fully_shard`.

    Example:
        >>> type_name(nn.Linear(1, 1))
        'Linear'
    """
    fsdp, kinds = sys.modules.get(FSDP), type(module).__mro__
    if fsdp is not None:
        kinds = tuple(kind for kind in kinds if not issubclass(kind, fsdp.FSDPModule))
    return kinds[0].__name__


def reshard(module: nn.Module) -> None:
    """Free whole parameters that a forward pass alone has left."""
    for m in fsdp_modules(module):  # before that, the module's parameters are not the shards
        m.reshard()


def sharded_parameters(module: nn.Module) -> dict[str, DTensor]:
    """The sharded parameters by name, in order, frozen ones included."""
    reshard(module)
    return {name: p for name, p in module.named_parameters() if is_sharded(p)}


def full_tensors(
    module: nn.Module, narrowest: torch.dtype | None = torch.float32, ranks: Ranks | None = None
) -> dict[int, Tensor]:
    """The whole of every sharded parameter, by its id. A collective.

    Args:
        module: any module; {} if nothing is sharded.
        narrowest: narrower types are widened at once, so that no second copy is needed; None keeps all.
        ranks: that the parameters are sharded over. Within `agree`, one that runs out of memory tells the others.
    """
    whole = {}
    with torch.no_grad():
        for parameter in sharded_parameters(module).values():
            tensor = _gathered(parameter, ranks)
            if narrowest is not None and (tensor.is_floating_point() or tensor.is_complex()):
                tensor = tensor.to(torch.promote_types(tensor.dtype, narrowest))
            whole[id(parameter)] = tensor
    return whole


def replacements(
    module: nn.Module, ranks: Ranks, *, whole: bool = True, narrowest: torch.dtype | None = torch.float32
) -> dict[int, Tensor]:
    """`rank_zero_buffers` and, if `whole`, `full_tensors`, for a `TrainingLoss`."""
    buffers = {} if ranks.count == 1 else rank_zero_buffers(module, lambda tensor: ranks.broadcast([tensor]))
    return {**buffers, **full_tensors(module, narrowest, ranks)} if whole else buffers


def rank_zero_buffers(module: nn.Module, broadcast: Callable[[Tensor], object]) -> dict[int, Tensor]:
    """Copies of rank 0's buffers, by the buffer's id. A collective.

    Batch-norm statistics differ between ranks; in eval mode the loss has to be one function on all. `broadcast`
    overwrites a contiguous tensor with that of rank 0.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> copies = rank_zero_buffers(norm, lambda tensor: None)
        >>> copies[id(norm.running_var)].tolist(), copies[id(norm.running_var)] is norm.running_var
        ([1.0, 1.0], False)
    """
    copies = {}
    for buffer in module.buffers():
        if is_sharded(buffer) or buffer.layout is not torch.strided:
            continue
        copy = buffer.detach().clone()
        if copy.numel():
            parts = torch.view_as_real(copy.resolve_conj()) if copy.is_complex() else copy
            sent = parts.to(torch.uint8) if copy.dtype is torch.bool else parts.contiguous()
            broadcast(sent)
            if sent is not copy:
                parts.copy_(sent)
        copies[id(buffer)] = copy
    return copies


@contextmanager
def without_fsdp(module: nn.Module) -> Iterator[None]:
    """Turn FSDP off: forward passes use the parameters as they are."""
    with ExitStack() as stack:
        for m in fsdp_modules(module):
            attributes = vars(m)
            for name, value in [*attributes.items()]:  # `register_fsdp_forward_method` sets a method on the instance
                if (original := unwrap_fsdp_method(value)) is not None:
                    stack.callback(attributes.__setitem__, name, value)
                    attributes[name] = original
        for m in module.modules():
            for hooks in module_hooks(m):
                items = list(hooks.items())
                kept = [(key, hook) for key, hook in items if not is_of_fsdp(hook)]
                if len(kept) < len(items):
                    stack.callback(
                        hooks.update, items
                    )  # in the same order, in the dict that `clear` has emptied before
                    stack.callback(hooks.clear)
                    hooks.clear()
                    hooks.update(kept)
        yield


def unsupported_reason(module: nn.Module) -> str | None:
    """Why these shards do not allow differences of gradients, or None."""
    wide = (torch.float32, torch.float64)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype.to_real() not in wide:
            return (
                f"curvature: expected parameters of float32 for finite differences on the shards of FSDP2, got "
                f"{parameter.dtype} for {name!r}; with curvature='hessian' every rank makes a float32 copy."
            )
    return None


def compute_device(tensor: Tensor) -> torch.device:
    """The device that a parameter is computed with on.

    Under a CPUOffloadPolicy its shards are elsewhere.
    """
    if not is_sharded(tensor) or (kind := tensor.device_mesh.device_type) in ("cpu", tensor.device.type):
        return tensor.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard, not a copy, or the tensor if not sharded."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # else the shard would be a node of a graph
        return tensor.to_local()


def local_slice(whole: Tensor, parameter: Tensor) -> Tensor | None:  # (d, ...) to (this rank's rows, ...)
    """View of this rank's shard in the whole, or None."""
    assert is_sharded(parameter)
    if why_not_by_rows(parameter) is not None:
        return None
    first = first_row(parameter)
    return whole[first : first + len(local_part(parameter))] if shard_dim(parameter) is not None else whole


def _gathered(parameter: DTensor, ranks: Ranks | None) -> Tensor:
    """The whole of a parameter, a copy, where it is computed with."""
    device = compute_device(parameter)
    if why_not_by_rows(parameter) is not None:  # a frozen one, which `shards` does not refuse
        return parameter.full_tensor().to(device).clone(memory_format=torch.contiguous_format)
    own, shape = local_part(parameter).to(device), parameter.shape
    if (sharing := shard_ranks(parameter, ranks)) is None:
        return own.clone(memory_format=torch.contiguous_format)
    # Not by `DTensor.full_tensor`: a rank that runs out of memory there would leave the others waiting. The check in
    # `Ranks` stands between the allocations here and the collective.
    size = -(-shape[0] // sharing.count)
    received = own.new_empty(sharing.count * size, *shape[1:])
    sent = own.contiguous()
    if len(own) < size:  # all ranks send equally much
        sent = own.new_zeros(size, *shape[1:])
        sent[: len(own)] = own
    # As bytes, since not every backend takes every type.
    sharing.all_gather(sent.view(-1).view(torch.uint8), received.view(-1).view(torch.uint8))
    return received[: shape[0]]
