"""Gradient of the training loss on FSDP2's shards, by FSDP itself.

The module's own parameters are used with FSDP's hooks on. FSDP gathers and frees them layer by layer, and sums and
scatters the gradients, as in a training step; nothing else is communicated. A displacement is added to this rank's
shards in place, and undone by a copy of the old values. All other state is copies, as in `TrainingLoss`. If a training
step raises on one rank, the others wait in FSDP's collectives (see `parallel/README.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace._torch import without_gradient_hooks
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import LossError, LossFunction
from lightning_subspace.loss.mode import Mode
from lightning_subspace.loss.roots import extra_roots
from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.loss.training_loss import Evaluation, TrainingLoss
from lightning_subspace.parallel.fsdp import fsdp_modules, is_sharded, local_part, reshard, unsupported_reason
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks


class ShardedLoss(TrainingLoss):
    """A context in which `loss.gradient(assignments)` is this rank's shards of a gradient.

    Vectors are flat and of this rank's shards, in the order of the space. All ranks evaluate equally often: every
    method but the constructor is a collective. The arguments are those of `TrainingLoss`, where the module is sharded
    by `fully_shard`, and `ranks`: the process group that the parameters are sharded over, None for no checks.

    Attributes:
        n: number of coordinates of this rank.
        local_numels: number of coordinates of this rank for each parameter of the space.

    Raises:
        TypeError: without `loss_fn`, when the module has no `training_step` that takes a batch.
        ValueError: when a parameter of the space is not sharded, or gradients come in a type narrower than float32.
    """

    def __init__(
        self,
        module: nn.Module,
        space: ParameterSpace,
        loss_fn: LossFunction | None = None,
        *,
        mode: Mode = "train",
        seed: int = 0,
        replacements: Mapping[int, Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        reshard(module)
        super().__init__(module, space, loss_fn, mode=mode, seed=seed, order=1, replacements=replacements, ranks=ranks)
        if (reason := unsupported_reason(module)) is not None:
            raise ValueError(reason)
        for name, parameter in zip(space.names, space.tensors(module), strict=True):
            if not is_sharded(parameter):
                raise ValueError(
                    f"curvature: {name!r} is not sharded, so that FSDP2 does not sum its gradient over ranks; apply "
                    "fully_shard to the whole module, or use curvature='hessian'."
                )
        self._parameters: list[Any] = [*space.tensors(module)]  # DTensors
        self._count: int = self._parameters[0].device_mesh.size()
        self._offset_local: Tensor | None = None
        self.local_numels = tuple(len(part) for part in self._local_parts())
        self.n = sum(self.local_numels)

    def _make_shadow(self, stack: ExitStack) -> Shadow:
        self._values = stack.enter_context(_preserved(self.module))
        around = extra_roots(self.module)
        return Shadow(
            self.module,
            self._narrowest,
            None,
            around,
            replacements=self._replacements,
            parameters=False,
            loss_key=self._loss_key,
        )

    def _follow(self, value: Tensor, leaves: list[Tensor], batch: MicroBatch) -> None:
        """Nothing to follow: there are no copies."""

    @contextmanager
    def _around_step(self) -> Iterator[Callable[[Any], Any]]:
        # Checked: a rank without memory for its copies must not leave the others waiting in FSDP's first all-gather.
        with self._ranks.unchecked():
            yield lambda data: data

    def __call__(self, batch: MicroBatch) -> Evaluation:
        """Not available: sharded parameters are no leaves. See `gradient`."""
        raise TypeError("ShardedLoss: expected a call of gradient(...); sharded parameters are no leaves of a graph.")

    def displace(self, offset: Tensor | None) -> None:
        """Evaluate at theta + offset, (n,), from now on; None: at theta."""
        self._offset_local, self._is_displaced = offset, offset is not None

    def gradient(self, assignments: Iterable[tuple[MicroBatch, float]]) -> tuple[Tensor, float]:  # (n,)
        """Local shards of sum_b s_b grad L_b, and local sum_b s_b L_b.

        Args:
            assignments: this rank's micro-batches and their shares s_b, equally many on all ranks.

        Raises:
            LossError: when a loss cannot be evaluated (as in `TrainingLoss`, but one that is not finite passes).
            RuntimeError: when the context is not open.
        """
        value = 0.0
        with self._displaced():
            for batch, share in assignments:
                # If not finite, not refused, since the other ranks wait: it reaches all of them in the gradient.
                loss = self._evaluate(batch, finite=False).value
                (loss * (share * self._count)).backward()  # FSDP divides the sum by the number of ranks
                value += share * float(loss.detach())
            # None for a parameter that the losses of all ranks do not depend on.
            gradients = [parameter.grad for parameter in self._parameters]
            if all(gradient is None for gradient in gradients):
                raise LossError(
                    "FSDP2 has given no gradient to any shard; set_requires_gradient_sync(False) is in effect, or the "
                    "loss does not depend on these parameters."
                )
            flat = torch.zeros(self.n, dtype=self.dtype, device=self.device)
            for piece, gradient in zip(torch.split(flat, list(self.local_numels)), gradients, strict=True):
                if gradient is not None:
                    piece.copy_(_real(local_part(gradient)))
            return flat, value

    def _local_parts(self) -> list[Tensor]:
        """Views of this rank's shards of the space, flat and real."""
        return [_real(local_part(parameter)) for parameter in self._parameters]

    @contextmanager
    def _displaced(self) -> Iterator[None]:
        """Displaced shards without gradients; FSDP as between two training steps."""
        for parameter in self._values:
            parameter.grad = None
        try:
            if self._offset_local is not None:
                offsets = torch.split(self._offset_local, list(self.local_numels))
                for part, offset in zip(self._local_parts(), offsets, strict=True):
                    part.add_(offset.to(part))
            yield
        except BaseException:
            for m in fsdp_modules(self.module):
                with suppress(AttributeError, RuntimeError):  # newer versions of torch have it, for the outermost
                    m.reset_iter_state()
            raise
        finally:
            reshard(self.module)
            with torch.no_grad():
                for parameter, value in self._values.items():  # also frozen ones, such as a momentum teacher
                    parameter.grad = None
                    if not torch.equal(local_part(parameter), value):
                        local_part(parameter).copy_(value)


@contextmanager
def _preserved(module: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Copies of this rank's shards; preserves gradients, hooks and flags."""
    with torch.no_grad():
        values: dict[Any, Tensor] = {parameter: local_part(parameter).clone() for parameter in module.parameters()}
    others = {parameter: (parameter.grad, parameter.requires_grad) for parameter in values}
    try:
        with without_gradient_hooks(list(values)):
            yield values
    finally:
        for parameter, (gradient, requires_grad) in others.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().view(-1)
