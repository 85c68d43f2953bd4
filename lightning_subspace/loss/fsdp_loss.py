"""Gradient of the training loss on FSDP2's shards, by FSDP itself.

The module's own parameters are used with FSDP's hooks on. FSDP gathers and frees them layer by layer, and sums and
scatters the gradients, as in a training step. Of a parameter that is not sharded, gradients are summed here, and what
several ranks hold is displaced alike on all of them (`parallel/replicas.py`); nothing else is communicated. A
`MixedPrecisionPolicy` is set aside: FSDP gathers, computes and sums in the parameters' own type. A displacement is
added to this rank's shards in place, and undone by a copy of the old values. All other state is copies, as in
`TrainingLoss`. If a training step raises on one rank, the others wait in FSDP's collectives (see `parallel/README.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace._torch import without_gradient_hooks, without_mixed_precision
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import LossError, LossFunction
from lightning_subspace.loss.mode import Mode
from lightning_subspace.loss.roots import extra_roots
from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.loss.training_loss import Around, Evaluation, TrainingLoss
from lightning_subspace.parallel.fsdp import fsdp_modules, is_sharded, local_part, reshard, unsupported_reason
from lightning_subspace.parallel.holding import own_index
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import holdings_of
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.parallel.replicas import Replicas


class ShardedLoss(TrainingLoss):
    """A context in which `loss.gradient(assignments)` is this rank's shards of a gradient.

    Vectors are flat and of this rank's shards, in the order of the space. All ranks evaluate equally often: every
    method but the constructor is a collective. The arguments are those of `TrainingLoss`, where the module is sharded
    by `fully_shard`, in whole or in part, and `ranks`: the process group that shares the data; None for no checks,
    where all parameters are sharded.

    Attributes:
        n: number of coordinates of this rank.
        local_numels: number of coordinates of this rank for each parameter of the space.

    Raises:
        TypeError: without `loss_fn`, when the module has no `training_step` that takes a batch.
        ValueError: when no parameter is sharded, one is not and `ranks` are not given, or one is narrower than float32.
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
        self._parameters: list[Any] = [*space.tensors(module)]  # DTensors, and whole ones
        holdings = holdings_of(space, module, self._ranks.members)
        if holdings is None:
            raise ValueError(f"curvature: {space.names[0]!r} is not sharded, nor is any other parameter of the module.")
        self._count = len(holdings[0].shard_of)
        self._is_whole = [not is_sharded(parameter) for parameter in self._parameters]
        if any(self._is_whole) and self._count != self._ranks.count:
            name = space.names[self._is_whole.index(True)]
            raise ValueError(
                f"curvature: {name!r} is not sharded, so that FSDP2 does not sum its gradient over ranks; pass the "
                "process group that does, or apply fully_shard to the whole module."
            )
        index = self._ranks.index if self._count == self._ranks.count else own_index(self._parameters[0])
        self._replicas = Replicas(space, self._parameters, holdings, self._ranks, index)
        self._offset_local: Tensor | None = None
        self.local_numels = tuple(piece.stop - piece.start for piece in self._replicas.dealt)
        self.n = sum(self.local_numels)

    def _make_shadow(self, stack: ExitStack) -> Shadow:
        stack.enter_context(without_mixed_precision(fsdp_modules(self.module)))
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

    def value_at(
        self, offset: Tensor | None, assignments: Iterable[tuple[MicroBatch, float]], around: Around = nullcontext
    ) -> float:
        """Local sum_b s_b L_b at theta + offset, (n,); arguments as `TrainingLoss.value_at`."""
        self.displace(offset)
        with self._displaced():
            return super().value_at(offset, assignments, around)

    def _evaluate(self, batch: MicroBatch, *, finite: bool = True, around: Around = nullcontext) -> Evaluation:
        reshard(self.module)  # a forward pass alone leaves whole parameters, and FSDP is to know that they are put back
        return super()._evaluate(batch, finite=finite, around=around)

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
            synced = [gradient for gradient, is_whole in zip(gradients, self._is_whole, strict=True) if not is_whole]
            if synced and all(gradient is None for gradient in synced):
                raise LossError(
                    "FSDP2 has given no gradient to any shard; set_requires_gradient_sync(False) is in effect, or the "
                    "loss does not depend on these parameters."
                )
            self._sum_whole(gradients)
            flat = torch.zeros(self.n, dtype=self.dtype, device=self.device)
            pieces = torch.split(flat, list(self.local_numels))
            for piece, gradient, own in zip(pieces, gradients, self._replicas.dealt, strict=True):
                if gradient is not None:
                    piece.copy_(_real(local_part(gradient))[own])
            return flat, value

    def _sum_whole(self, gradients: list[Any]) -> None:
        """Average the gradients of what FSDP does not shard."""
        places = [place for place, is_whole in enumerate(self._is_whole) if is_whole]
        if not places:
            return
        numels = [self.space.numels[place] for place in places]
        flat = torch.zeros(sum(numels), dtype=self.dtype, device=self.device)
        for place, piece in zip(places, torch.split(flat, numels), strict=True):
            if gradients[place] is not None:
                piece.copy_(_real(gradients[place].to_dense()))
        total = self._ranks.all_reduce(flat).div_(self._count)
        for place, piece in zip(places, torch.split(total, numels), strict=True):
            gradients[place] = piece

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
                offsets = self._replicas.held(self._offset_local)
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
