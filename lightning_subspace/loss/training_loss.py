"""The user's own training loss as a pure function of (parameters, micro-batch).

Inside the context the module runs on a `Shadow`: copies of its parameters, as leaves, and of every other state. Each
evaluation starts from the same state and the same random seed, which depends on the micro-batch alone; so the same
dropout masks come back and two evaluations give the same number to the last bit. On exit everything is as it was.

The context has to stay open through every product with the Hessian as well: hooks and the recomputation of activation
checkpoints run inside the backward pass and must meet the copies.

For second derivatives the context sets aside what cannot be differentiated twice: compiled code, fused attention,
autocast, cuDNN's recurrent kernels.

By default everything is computed in float32 at least, whatever precision is trained in; `dtype=None` takes the loss as
it is trained, types, autocast and all.

Where FSDP2 has sharded the parameters, whole ones stand in for them, and FSDP is off as long as the context is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_subspace._lightning import attached_trainer, bystanders, move_data_to_device, muted, transfer
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import LossFunction, as_scalar, loss_of_training
from lightning_subspace.loss.precision import eager, twice_differentiable
from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.parallel.fsdp import reshard, without_fsdp
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import SEED_STRIDE
from lightning_subspace.state.copies import copied
from lightning_subspace.state.rng import RandomState, preserved_random_state, seed_generators

Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class Evaluation:
    """One value of the loss, with its graph.

    Attributes:
        value: 0-dimensional, finite.
        leaves: the copies of the selected parameters that the graph ends in, in the order of the space.
    """

    value: Tensor
    leaves: list[Tensor]


class TrainingLoss:
    """A context in which `loss(micro_batch)` evaluates the training loss without touching anything.

    Args:
        module: a LightningModule, or any module when `loss_fn` is given.
        space: the parameters to differentiate by.
        loss_fn: `loss_fn(module, batch, batch_idx) -> scalar`, in place of `module.training_step`.
        mode: "train" measures the objective that is being descended, with submodules in the modes they are in (a
            module that is in eval mode as a whole is put into train mode); "eval" puts everything in eval mode.
        dtype: the narrowest floating-point type used; wider ones stay. None takes the loss as it is trained: parameters
            and batch in their own types, inside the trainer's precision context.
        seed: of the random numbers inside the loss (dropout masks).
        random_state: where the generators stand at every evaluation, in place of a seed: with a snapshot taken before a
            training step, the gradient is that of this step.
        order: how often it can be differentiated. 1 leaves the attention and recurrent kernels of training in place.
        stand_ins: by the id of a parameter or buffer, a tensor that its copy is made from in its place: the values that
            rank 0 has in a buffer, the whole of a parameter that is sharded (each needs one; see `full_tensors`).

    Attributes:
        dtype: of flat vectors: at least float32.
        originals: the module's own parameters at these coordinates, while the context is open; not to be written to.

    Example:
        >>> net, batch = nn.Linear(2, 1), MicroBatch(torch.ones(4, 2), weight=4.0, index=0)
        >>> with TrainingLoss(net, ParameterSpace.of(net), lambda m, x, i: m(x).square().mean()) as loss:
        ...     value = loss(batch).value
        >>> value.shape
        torch.Size([])
    """

    def __init__(
        self,
        module: nn.Module,
        space: ParameterSpace,
        loss_fn: LossFunction | None = None,
        *,
        mode: Mode = "train",
        dtype: torch.dtype | None = torch.float32,
        seed: int = 0,
        random_state: RandomState | None = None,
        order: Literal[1, 2] = 2,
        stand_ins: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.module = module
        self.space = space
        self.mode = mode
        self.seed = seed
        self.dtype = space.widest_dtype(module, torch.float32 if dtype is None else dtype)
        self._narrowest = None if dtype is None else self.dtype
        self._random_state = random_state
        self._order = order
        self._stand_ins = {} if stand_ins is None else stand_ins
        self.device = space.tensors(module)[0].device
        self._step = loss_fn if loss_fn is not None else loss_of_training(module)
        self.originals: tuple[Tensor, ...] = ()
        self._displacement: dict[int, Tensor] = {}
        self._stack = ExitStack()
        self._shadow: Shadow | None = None

    def __enter__(self) -> TrainingLoss:
        reshard(self.module)
        originals = self.space.tensors(self.module)
        with ExitStack() as stack:  # closed again if anything below raises
            stack.enter_context(preserved_random_state())
            stack.enter_context(eager(self.device, self._narrowest))
            if self._order == 2:
                stack.enter_context(twice_differentiable(self.module))
            stack.enter_context(_in_mode(self.module, self.mode))
            stack.enter_context(muted(self.module))
            self._shadow = self._contained(stack)
            stack.callback(self._shadow.close)
            self._stack = stack.pop_all()
        self.originals = tuple(originals)
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._stack.close()
        finally:
            self._shadow = None
            self._displacement = {}
            self.originals = ()

    def _contained(self, stack: ExitStack) -> Shadow:
        """The module on copies of its state."""
        stack.enter_context(without_fsdp(self.module))
        around = bystanders(self.module)
        return Shadow(self.module, self._narrowest, self._offset, around, stand_ins=self._stand_ins)

    def displace(self, offset: Tensor | None) -> None:
        """Evaluate at theta + offset from now on; `offset` is a flat vector (n,), None goes back to theta."""
        pieces = [] if offset is None else self.space.unflatten(offset)
        self._displacement = dict(zip(map(id, self.originals), pieces, strict=False))

    def value_at(self, offset: Tensor | None, turns: Iterable[tuple[MicroBatch, float]]) -> float:
        """sum_b s_b L_b at theta + offset over micro-batches b with shares s_b, one forward pass each.

        A loss that is not finite passes, and one of share 0 does not count.

        Raises:
            LossError: when a loss cannot be evaluated.
        """
        total = 0.0
        self.displace(offset)
        try:
            for batch, share in turns:
                value = as_scalar(self._evaluate(batch)[0], type(self.module).__name__, finite=False)
                total += share * float(value.detach()) if share else 0.0
        finally:
            self.displace(None)
            if self._shadow is not None:
                self._shadow.reset()  # what is recomputed inside of a product must meet theta
        return total

    def __call__(self, batch: MicroBatch) -> Evaluation:
        """Evaluate the loss of one micro-batch.

        Raises:
            LossError: when `training_step` returns None, something without a loss, a value that is not a scalar, not
                finite, or independent of the parameters.
            RuntimeError: when the context is not open.
        """
        output, leaves = self._evaluate(batch)
        return Evaluation(as_scalar(output, type(self.module).__name__), leaves)

    def _evaluate(self, batch: MicroBatch) -> tuple[Any, list[Tensor]]:
        """What the training step returned, and the leaves of its graph."""
        if self._shadow is None:
            raise RuntimeError(
                "TrainingLoss is a context manager; evaluate it inside `with TrainingLoss(...) as loss:`."
            )
        self._shadow.reset()
        leaves = self.space.tensors(self.module)
        if self._random_state is not None:
            self._random_state.restore()
        else:  # one stream a micro-batch: the stride keeps the seeds of neighbouring monitors and batches apart
            seed_generators((self.seed + 7_919 * batch.draw) * SEED_STRIDE + batch.index)
        data = copied(batch.data, self._own_copy)
        data = (move_data_to_device if batch.transferred else partial(transfer, self.module))(data, self.device)
        with self._as_trained() as convert:
            output = self._step(self.module, convert(data), batch.index)
        for leaf in leaves:
            leaf.requires_grad_(True)  # where the step has frozen it, the graph does not lead to it: no gradient
        self._shadow.drop_written()
        return output, leaves

    def _offset(self, parameter: nn.Parameter) -> Tensor | None:
        return self._displacement.get(id(parameter))

    def _own_copy(self, tensor: Tensor) -> Tensor:
        """A copy, since training_step may write into its batch, at least as wide as the parameters."""
        dtype = tensor.dtype
        if self._narrowest is not None and (tensor.is_floating_point() or tensor.is_complex()):
            dtype = torch.promote_types(dtype, self._narrowest)
        return tensor.detach().to(dtype, copy=True)

    @contextmanager
    def _as_trained(self) -> Iterator[Callable[[Any], Any]]:
        """The precision that the trainer trains in, where it is asked for; gives its conversion of a batch."""
        trainer = attached_trainer(self.module)
        if self._narrowest is not None or trainer is None:
            yield lambda data: data
            return
        with trainer.precision_plugin.train_step_context():
            yield trainer.precision_plugin.convert_input


@contextmanager
def _in_mode(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Set train or eval mode and put back the mode of every submodule."""
    before = [(m, m.training) for m in module.modules()]
    try:
        if mode == "eval" or not module.training:
            module.train(mode == "train")
        yield
    finally:
        for m, training in before:
            m.training = training
