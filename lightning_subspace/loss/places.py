"""Names of objects in messages: the path to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_subspace.state.fields import fields

MOST = 100_000  # objects that are looked through


def refusal(lost: list[Any], bare: list[Any], module: nn.Module, roots: Iterable[Any]) -> str:
    """Why a loss is not evaluated any more.

    Args:
        lost: what could not be put back.
        bare: what could be, and has no copy.
        module: the module.
        roots: objects around it.
    """
    how = (
        "could not be put back: training is changed by this one evaluation, and this loss is not evaluated again"
        if lost
        else "was put back, and is reached in a way on which no copy can take its place"
    )
    what = named(lost or bare, module, roots)
    return f"the training step writes to {what}, which {how}; pass loss_fn=, a loss without it."


def named(values: Iterable[Any], module: nn.Module, roots: Iterable[Any]) -> str:
    """The places of some values in words, three at most.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.memory = {"last": [torch_tensor := nn.Parameter(net.weight.detach())]}
        >>> named([torch_tensor], net, [])
        "self.memory['last'][0]"
    """
    wanted = {id(value): value for value in values}
    found: dict[int, str] = {}
    starts = [("self", module), *((_name(root), root) for root in roots)]
    queue, seen = deque(starts), set[int]()
    while queue and len(found) < len(wanted) and len(seen) < MOST:
        path, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if id(value) in wanted:
            found[id(value)] = path
        is_object = not isinstance(value, dict | list | tuple | deque)
        inside = vars(value) if isinstance(value, nn.Module) else {} if isinstance(value, Tensor) else fields(value)
        for key, item in inside.items():
            queue.append((f"{path}.{key}" if is_object else f"{path}[{_key(key)}]", item))
    words = [found.get(key, f"an object of type {type(value).__name__}") for key, value in wanted.items()]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _name(root: Any) -> str:
    return "trainer" if type(root).__name__ == "Trainer" else type(root).__name__


def _key(key: Any) -> str:
    return repr(key) if isinstance(key, str | int) else f"<{type(key).__name__}>"
