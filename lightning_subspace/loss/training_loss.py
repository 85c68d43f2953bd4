"""Training loss as a pure function of parameters and a micro-batch.

In the context the module runs on a `Shadow`. Each evaluation starts from the same state and from a random seed that
depends on the micro-batch alone: two give the same bits, dropout included. On exit everything is as it was. The context
must stay open through every product with the Hessian: hooks and activation checkpoints run in the backward pass.
Handlers of signals wait until it is closed, and an evaluation that finds one waiting raises a `SignalError`.

Off is what cannot be differentiated twice: compiled code, fused attention, autocast, cuDNN's recurrent kernels; TF32;
and FSDP2, whose shards are replaced by whole parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from lightning_subspace._lightning import attached_trainer, muted, transfer
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.dependence import Dependence
from lightning_subspace.loss.findings import findings_of
from lightning_subspace.loss.gradient_tally import GradientTally
from lightning_subspace.loss.loss_function import LossError, LossFunction, WrittenError, as_scalar, key_of, resolve_loss
from lightning_subspace.loss.mode import Mode, in_mode
from lightning_subspace.loss.precision import default_type, eager, twice_differentiable, widened, widened_array
from lightning_subspace.loss.roots import extra_roots
from lightning_subspace.loss.served import Served
from lightning_subspace.loss.shadow import Shadow
from lightning_subspace.parallel.fsdp import compute_device, reshard, without_fsdp
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.state.copies import copied
from lightning_subspace.state.rng import RandomState, preserved_random_state, seed_generators
from lightning_subspace.state.signals import give_up_again, give_up_if_signalled, waiting_signals

Around = Callable[[], AbstractContextManager[Any]]

SEED_STRIDE = 1_000_003  # keeps the draws of neighbouring seeds apart


@dataclass(frozen=True)
class Evaluation:
    """A value of the loss with its graph.

    Attributes:
        value: 0-dimensional.
        leaves: the copies of the parameters of the space that the graph ends in, in order.
    """

    value: Tensor
    leaves: list[Tensor]


class TrainingLoss:
    """A context in which `loss(micro_batch)` evaluates without a trace.

    Args:
        module: a LightningModule, or any module with `loss_fn`.
        space: the parameters to differentiate by.
        loss_fn: `loss_fn(module, batch, batch_idx) -> scalar`, in place of `module.training_step`.
        mode: "train" evaluates the objective of training, with submodules in the modes they are in (a module that is in
            eval mode as a whole is put into train mode); "eval" puts everything into eval mode.
        dtype: the narrowest floating-point type; wider ones stay. None: types and precision context of training.
        seed: of the random numbers in the loss (dropout masks).
        random_state: in place of a seed; with one from before a training step, the gradient is that of this step.
        order: how often the loss is differentiated; 1 keeps the attention and recurrent kernels of training.
        replacements: tensors to copy in place of a parameter or buffer, by its id: rank 0's values of a buffer, the
            whole of a sharded parameter (each needs one; see `full_tensors`).
        ranks: the processes that evaluate at the same time; None: this one alone.

    Attributes:
        dtype: of flat vectors; float32 or wider.
        values: the first value at theta of each micro-batch since the context was opened, by `place_of` it:
            0-dimensional, on its device.
        originals: the module's own parameters of the space, in an open context; not to be written to.
        dependence: what the losses since then depend on.
        served: the operators that live on its graphs.
        is_another: whether it lives in the context of another one; see `another.py`.
        tally: takes note of the gradients of single micro-batches at theta, where one is wanted.

    Raises:
        TypeError: without `loss_fn`, when the module has no `training_step` that takes a batch.

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
        replacements: Mapping[int, Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.module, self.space = module, space
        self.mode, self.seed = mode, seed
        self.dtype = space.widest_dtype(module, torch.float32 if dtype is None else dtype)
        self._narrowest = None if dtype is None else self.dtype
        self._random_state, self._order = random_state, order
        self._replacements = {} if replacements is None else replacements
        self.device = compute_device(space.tensors(module)[0])
        self._ranks = ranks or Ranks()
        self._step, self._loss_key = resolve_loss(module, loss_fn), key_of(loss_fn)
        self._scores = findings_of(module).scores
        self.originals: tuple[Tensor, ...] = ()
        self.values: dict[tuple[int, int, int], Tensor] = {}
        self._is_displaced = self.is_another = False
        self._displacement: dict[int, Tensor] = {}
        self._stack, self.served = ExitStack(), Served()
        self.tally: GradientTally | None = None
        self._shadow: Shadow | None = None
        self.dependence = Dependence({})
        self._followed: set[tuple[int, int, int]] = set()  # the micro-batches whose graph was followed

    def __enter__(self) -> TrainingLoss:
        reshard(self.module)
        originals = self.space.tensors(self.module)
        with ExitStack() as stack:  # closed again if anything below raises
            stack.enter_context(waiting_signals())  # before the first copy goes in, until the last one is out
            stack.enter_context(preserved_random_state())
            stack.enter_context(eager(self.device, self._narrowest))
            if self._order == 2:
                self._scores.begin(self._ranks.count)
                stack.enter_context(twice_differentiable(self.module, self._scores))
            stack.enter_context(in_mode(self.module, self.mode))
            stack.enter_context(muted(self.module))
            self._shadow = self._make_shadow(stack)
            stack.callback(self._shadow.close)
            self.dependence = stack.enter_context(Dependence(dict(zip(originals, self.space.names, strict=True))))
            self._stack = stack.pop_all()
        self.originals, self.served = tuple(originals), Served()  # also of a copy of this object
        self.values, self._followed, self._displacement = {}, set(), {}
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is None:
            self._stack.callback(give_up_again)  # what was measured behind a swallowed exception is worth nothing
        self.served.release()
        try:
            self._stack.close()
        finally:
            self._shadow = self.tally = None
            self._displacement, self._is_displaced, self.originals = {}, False, ()

    def release(self) -> None:
        """End one in the context of another."""
        self._shadow = None

    def _make_shadow(self, stack: ExitStack) -> Shadow:
        stack.enter_context(without_fsdp(self.module))
        around, offset = extra_roots(self.module), lambda parameter: self._displacement.get(id(parameter))
        return Shadow(
            self.module, self._narrowest, offset, around, replacements=self._replacements, loss_key=self._loss_key
        )

    def default_type(self) -> AbstractContextManager[None]:
        """Context for backward passes: hooks and checkpoints make new tensors."""
        return default_type(self._narrowest)

    def refuse(self, text: str) -> NoReturn:
        """Refuse this loss now, and whenever it is to be evaluated again.

        Raises:
            LossError: with the text.
        """
        findings_of(self.module).refusals[self._loss_key] = text
        raise LossError(text)

    def displace(self, offset: Tensor | None) -> None:
        """Evaluate at theta + offset, (n,), from now on; None: at theta."""
        self._is_displaced = offset is not None
        pieces = [] if offset is None else self.space.unflatten(offset)
        self._displacement.clear()  # in place: other losses in this context displace the same copies
        self._displacement.update(zip(map(id, self.originals), pieces, strict=False))

    def value_at(
        self, offset: Tensor | None, assignments: Iterable[tuple[MicroBatch, float]], around: Around = nullcontext
    ) -> float:
        """sum_b s_b L_b at theta + offset, one forward pass a micro-batch.

        Each is evaluated inside of `around()`. A loss that is not finite passes; one of share 0 does not count.

        Raises:
            LossError: when a loss cannot be evaluated.
        """
        total = 0.0
        self.displace(offset)
        try:
            for batch, share in assignments:
                value = self._evaluate(batch, finite=False, around=around).value
                total += share * float(value.detach()) if share else 0.0
        finally:
            self.displace(None)
            if self._shadow is not None:
                self._shadow.reset()  # a checkpoint that is recomputed in a later product must meet theta
        return total

    def seed_generators(self, batch: MicroBatch) -> None:
        """Set the global generators as for an evaluation of a micro-batch."""
        if self._random_state is not None:
            self._random_state.restore()
        else:  # one stream a micro-batch: the stride keeps those of neighbours apart; all generators take 63 bits
            seed_generators(((self.seed + 7_919 * batch.draw) * SEED_STRIDE + batch.index) % 2**63)

    def __call__(self, batch: MicroBatch) -> Evaluation:
        """Evaluate the loss of one micro-batch.

        Raises:
            LossError: when `training_step` returns no finite scalar loss that depends on the parameters.
            RuntimeError: when the context is not open.
        """
        return self._evaluate(batch)

    def _evaluate(self, batch: MicroBatch, *, finite: bool = True, around: Around = nullcontext) -> Evaluation:
        if self._shadow is None:
            raise RuntimeError("TrainingLoss is a context manager; use it inside `with TrainingLoss(...) as loss:`.")
        give_up_if_signalled()
        self._shadow.reset()
        leaves = self.space.tensors(self.module)
        self.seed_generators(batch)
        counted = self._scores.counted() if self._order == 2 else nullcontext()
        index = batch.index if batch.batch_idx is None else batch.batch_idx
        with self.default_type():
            data = self._copied(batch)
            with self._around_step() as convert, around(), counted:
                output = self._step(self.module, convert(data), index)
        for leaf in leaves:
            leaf.requires_grad_(True)  # if the step has frozen it, the graph does not lead to it: no gradient
        self._shadow.drop_written()
        if self._is_to_be_repeated(is_written=self._shadow.settle()):
            return self._evaluate(batch, finite=finite, around=around)
        value = as_scalar(output, type(self.module).__name__, finite=finite)
        self._follow(value, leaves, batch)
        if not self._is_displaced:
            # The first: a filler may be evaluated again, beside others. Not read, since that waits for a GPU.
            self.values.setdefault(place_of(batch), value.detach())
        return Evaluation(value, leaves)

    def _is_to_be_repeated(self, *, is_written: bool) -> bool:
        """Whether an evaluation is taken again, on copies."""
        if self._ranks.count == 1:
            return is_written
        findings = findings_of(self.module)
        if not findings.is_agreed:  # the first ones are repeated on all ranks: a training step may have collectives
            findings.is_agreed = bool(self._ranks.all_reduce_min(int(not is_written)))
            return not findings.is_agreed
        if is_written:
            raise WrittenError("the training step writes to state around the module that it left alone at first.")
        return False

    def _follow(self, value: Tensor, leaves: list[Tensor], batch: MicroBatch) -> None:
        """See once a micro-batch what the loss depends on."""
        if place_of(batch) not in self._followed:
            self._followed.add(place_of(batch))
            self.dependence.see(value, leaves)

    def _copied(self, batch: MicroBatch) -> Any:
        """A copy of the data for training_step, which may write into it."""
        off_cpu = iter(repeat(True) if batch.off_cpu is None else batch.off_cpu)

        def copy_tensor(tensor: Tensor) -> Tensor:
            wide = widened(tensor.detach(), self._narrowest, copy=True)
            return wide.to(self.device) if batch.transferred and next(off_cpu) else wide

        data = copied(batch.data, copy_tensor, partial(widened_array, narrowest=self._narrowest))
        return data if batch.transferred else transfer(self.module, data, self.device)

    @contextmanager
    def _around_step(self) -> Iterator[Callable[[Any], Any]]:
        """The trainer's precision context, if asked for; gives its batch conversion."""
        trainer = attached_trainer(self.module)
        if self._narrowest is not None or trainer is None:
            yield lambda data: data
            return
        with trainer.precision_plugin.train_step_context():
            yield trainer.precision_plugin.convert_input


def place_of(batch: MicroBatch) -> tuple[int, int, int]:
    """Key of an evaluation, another one for a batch and its examples."""
    return batch.index, batch.draw, batch.size
