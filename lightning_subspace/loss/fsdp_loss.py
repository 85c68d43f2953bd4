"""The training loss on the shards of FSDP2, as FSDP itself evaluates it, and its gradient there.

The module's own parameters are used, with FSDP's hooks on: it gathers and frees them layer by layer and sums and
scatters the gradients, as in a training step. A displacement is added to this rank's shards in place and taken back by
copying the old values; every other state of the module is copies, as in `TrainingLoss`.

    memory a rank      that of a training step, one more copy of all shards (to put them back), and the solver's vectors
    communication      that of a training step a gradient; nothing beside

FSDP divides the sum of the gradients by the number of ranks. Scaled by that number and by the micro-batch's share in
the mean over all ranks, unequal micro-batches are averaged exactly. A loss that is not finite is not refused here,
since the other ranks are waiting: it comes to all of them through the sum, as a gradient that is not finite.

The ranks compare notes at the last moment before each training step, so that one whose memory is used up by the copies
made here does not leave the others waiting in FSDP's first all-gather. What an exception in the training step of one
rank, or in its backward pass, leaves to the others, waiting in FSDP's own collectives, is the time limit of the process
group; the shards of every rank that leaves the context are put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_subspace._lightning import extra_roots
from lightning_subspace._torch import without_gradient_hooks
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import LossError, LossFunction, as_scalar
from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.loss.training_loss import Evaluation, Mode, TrainingLoss
from lightning_subspace.parallel.fsdp import fsdp_modules, is_sharded, local_part, reshard, unsupported_reason
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks


class ShardedLoss(TrainingLoss):
    """A context in which `loss.gradient(turns)` is this rank's shards of a gradient.

    Vectors are flat and of this rank's shards, in the order of the space. All ranks evaluate equally often: every
    method but the constructor is a collective.

    Args:
        module: a LightningModule, or any module when `loss_fn` is given; sharded by `fully_shard`.
        space: the parameters to differentiate by.
        loss_fn: see `TrainingLoss`.
        mode: see `TrainingLoss`.
        seed: see `TrainingLoss`.
        replacements: for buffers; see `TrainingLoss`.
        ranks: that the parameters are sharded over; they compare notes within their `agree`. None: they do not.

    Attributes:
        n: number of coordinates that this rank holds.
        local_numels: of these, those of each parameter of the space.

    Raises:
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
        super().__init__(module, space, loss_fn, mode=mode, seed=seed, order=1, replacements=replacements)
        if (refusal := unsupported_reason(module)) is not None:
            raise ValueError(refusal)
        for name, parameter in zip(space.names, space.tensors(module), strict=True):
            if not is_sharded(parameter):
                raise ValueError(
                    f"curvature: {name!r} is not sharded, so that FSDP2 does not sum its gradient over ranks; apply "
                    "fully_shard to the whole module, or use curvature='hessian'."
                )
        self._parameters: list[Any] = [*space.tensors(module)]  # DTensors
        self._count: int = self._parameters[0].device_mesh.size()
        self._step = _begun_together(self._step, Ranks() if ranks is None else ranks)
        self._offset_local: Tensor | None = None
        self.local_numels = tuple(len(part) for part in self._local_parts())
        self.n = sum(self.local_numels)

    def _contained(self, stack: ExitStack) -> Shadow:
        """The module on copies of its state but for the parameters, which will be put back."""
        self._kept = stack.enter_context(_preserved(self.module))
        around = extra_roots(self.module)
        return Shadow(self.module, self._narrowest, None, around, replacements=self._replacements, parameters=False)

    def __call__(self, batch: MicroBatch) -> Evaluation:
        """Not here: the parameters are in parts, and only `gradient` puts them in place."""
        raise TypeError("ShardedLoss: expected a call of gradient(turns); its parameters are no leaves of a graph.")

    def displace(self, offset: Tensor | None) -> None:
        """Evaluate at theta + offset from now on; a vector of this rank's shards, None goes back to theta."""
        self._offset_local = offset

    def gradient(
        self, turns: Iterable[tuple[MicroBatch, float]]
    ) -> tuple[Tensor, float]:  # (n,), a number of this rank alone
        """This rank's shards of sum_b s_b grad L_b over the micro-batches of all ranks, and its own sum_b s_b L_b.

        Args:
            turns: what this rank evaluates, equally often on all ranks: a micro-batch and its share s_b.

        Raises:
            LossError: when a loss cannot be evaluated (see `TrainingLoss`; but one that is not finite passes).
            RuntimeError: when the context is not open.
        """
        value = 0.0
        with self._displaced():
            for batch, share in turns:
                output, _ = self._evaluate(batch)
                loss = as_scalar(output, type(self.module).__name__, finite=False)
                (loss * (share * self._count)).backward()
                value += share * float(loss.detach())
            # A parameter that the loss does not depend on has none; but with all ranks' losses there is one somewhere.
            gradients = [parameter.grad for parameter in self._parameters]
            if all(gradient is None for gradient in gradients):
                raise LossError(
                    "FSDP2 has given no gradient to any shard: set_requires_gradient_sync(False) is in effect, or the "
                    "loss does not depend on these parameters."
                )
            return self._flat(gradients), value

    def _flat(self, tensors: Iterable[Any]) -> Tensor:
        """Shards as a vector."""
        flat = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for piece, tensor in zip(torch.split(flat, list(self.local_numels)), tensors, strict=True):
            if tensor is not None:
                piece.copy_(_real(local_part(tensor)))
        return flat

    def _local_parts(self) -> list[Tensor]:
        """This rank's shards of the space, flat and real, as views."""
        return [_real(local_part(parameter)) for parameter in self._parameters]

    @contextmanager
    def _displaced(self) -> Iterator[None]:
        """With the displacement in the shards and no gradients; FSDP in the state between two training steps."""
        for parameter in self._kept:
            parameter.grad = None
        try:
            if self._offset_local is not None:
                offsets = torch.split(self._offset_local, list(self.local_numels))
                for part, offset in zip(self._local_parts(), offsets, strict=True):
                    part.add_(offset.to(part))
            yield
        except BaseException:
            for m in fsdp_modules(self.module):
                with suppress(AttributeError, RuntimeError):  # of newer versions of torch, and of the outermost alone
                    m.reset_iter_state()
            raise
        finally:
            _put_back(self.module, self._kept)


def _begun_together(step: LossFunction, ranks: Ranks) -> LossFunction:
    """The loss function, evaluated by all ranks or by none; its collectives are FSDP's."""

    def begun_together(module: nn.Module, batch: Any, batch_idx: int) -> Tensor:
        with ranks.unchecked():
            return step(module, batch, batch_idx)

    return begun_together


@contextmanager
def _preserved(module: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
    """The values of this rank's shards, to be put back to the bit; gradients, hooks and flags go back in the end."""
    with torch.no_grad():
        kept: dict[Any, Tensor] = {parameter: local_part(parameter).clone() for parameter in module.parameters()}
    others = {parameter: (parameter.grad, parameter.requires_grad) for parameter in kept}
    try:
        with without_gradient_hooks(list(kept)):
            yield kept
    finally:
        for parameter, (gradient, requires_grad) in others.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _put_back(module: nn.Module, kept: Mapping[nn.Parameter, Tensor]) -> None:
    """The values of all shards, those of frozen parameters too: a training step may move a momentum teacher."""
    reshard(module)
    with torch.no_grad():
        for parameter, value in kept.items():
            parameter.grad = None
            if not torch.equal(local_part(parameter), value):
                local_part(parameter).copy_(value)


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().view(-1)
