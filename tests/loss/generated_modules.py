"""Modules with state of given kinds at given places, trained with and without measurements between the steps."""

import types
import zlib
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import LossError
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.loss import kinds_of_state as table
from tests.modules import random_bytes

OWNERS = (
    "module", "submodule", "parameter", "callback", "data module", "trainer", "optimizer", "class", "file", "hook",
)  # fmt: skip
TIMES = ("always", "at every second call", "for some batches", "later")
GLOBALS = {}  # what the file of the modules' class keeps


@dataclass(frozen=True)
class State:
    kind: str
    place: str
    owner: str
    time: str
    is_read: bool


class Watcher(Callback):
    """A callback of a user's own."""


class StandIn:
    """Takes the place of a Trainer or a part of it, and is taken for one by its package."""

    __module__ = "lightning.pytorch"

    def __init__(self, **attributes):
        vars(self).update(attributes)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(*examples()), batch_size=4)


class Generated(LightningModule):
    """A network of a few parameters, whose training step writes to whatever it is given."""

    def __init__(self, states):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
        for parameter in self.net.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.states, self.calls, self.late, self.seen = states, 0, False, ()

    def keep(self, trainer):
        GLOBALS.clear()
        for number, state in enumerate(self.states):
            kept = table.PLACES[state.place][0](table.KINDS[state.kind][0]())
            owner = self.owner(state, trainer)
            if isinstance(owner, dict):
                owner[f"state{number}"] = kept
            else:
                setattr(owner, f"state{number}", kept)

    def owner(self, state, trainer):
        return {
            "module": self,
            "submodule": self.net[1],
            "parameter": self.net[0].weight,
            "callback": trainer.callbacks[0],
            "data module": trainer.datamodule,
            "trainer": trainer,
            "optimizer": trainer.optimizers[0].state if trainer.optimizers else self,
            "class": type(self),
            "file": GLOBALS,
            "hook": vars(self.net[2]).setdefault("_held", types.SimpleNamespace()),
        }[state.owner]

    def kept(self, number):
        state = self.states[number]
        owner = self.owner(state, self._trainer)
        name = f"state{number}"
        if state.owner == "optimizer" and not (isinstance(owner, dict) and name in owner):
            owner = self  # there was no optimizer yet
        return owner[name] if isinstance(owner, dict) else getattr(owner, name)

    def use(self, number):
        state = self.states[number]
        return table.KINDS[state.kind][1](table.PLACES[state.place][1](self.kept(number)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        is_time = {
            "always": True,
            "at every second call": self.calls % 2 == 0,
            "for some batches": bool(x[0, 0] > 0),
            "later": self.late,
        }
        outs = [self.use(number) if is_time[state.time] else 0 for number, state in enumerate(self.states)]
        read = [out for out, state in zip(outs, self.states, strict=True) if state.is_read]
        loss = nn.functional.cross_entropy(self.net(x), y) * (1 + zlib.crc32(repr(read).encode()) % 997 / 997)
        self.seen = repr(outs)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def examples():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, 3, generator=generator), torch.arange(12) % 2


def made(states):
    """A module of a class of its own, as class attributes differ."""
    cls = type("Drawn", (Generated,), {"__module__": __name__})
    return cls(states)


def outcome(module, optimizer, seen):
    tensors = [
        *module.parameters(),
        *(s["momentum_buffer"] for s in optimizer.state.values() if isinstance(s, dict) and "momentum_buffer" in s),
    ]
    left = []
    for number in range(len(module.states)):
        try:
            left.append(repr([module.use(number) for _ in range(2)]))
        except StopIteration:
            left.append("at its end")
    return (
        [t.detach().numpy().tobytes() for t in tensors],
        seen,
        left,
        repr(random_bytes()["torch"].sum()),
        module.calls,
    )


def probe(module, batches, dtype):
    """What a measurement does: evaluations, and products from their graphs; whether they were equal."""
    space = ParameterSpace.of(module)
    with TrainingLoss(module, space, dtype=dtype) as loss:
        for _ in range(2):
            for index, batch in enumerate(batches):
                evaluation = loss(MicroBatch(batch, 4.0, index, transferred=True))
                gradient = torch.autograd.grad(evaluation.value, evaluation.leaves, create_graph=True)
                sum(g.square().sum() for g in gradients_of(gradient)).backward(inputs=evaluation.leaves)


def gradients_of(gradients):
    return [gradient for gradient in gradients if gradient.requires_grad]


def train(states, probes):
    """Three steps by hand, with a stand-in for a Trainer; what comes out, and what was told."""
    torch.manual_seed(1)
    module = made(states)
    optimizer = module.configure_optimizers()
    module._trainer = trainer = StandIn(
        optimizers=[optimizer], lr_scheduler_configs=[], callbacks=[Watcher()], datamodule=Data(), loggers=[],
        strategy=StandIn(), fit_loop=StandIn(), lightning_module=None, logger=None,
    )  # fmt: skip
    module.keep(trainer)
    x, y = examples()
    batches, seen, told = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)], [], []
    for step, batch in enumerate(batches):
        module.late = step > 0
        for dtype in (torch.float64, torch.float32) if probes and step != 1 else (torch.float32,) if probes else ():
            try:
                probe(module, batches[:2], dtype)
            except (LossError, TypeError, RuntimeError) as error:
                told.append(str(error))
        optimizer.zero_grad()
        loss = module.training_step(batch, step)
        seen.append((loss.item(), module.seen))
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + zlib.crc32(module.seen.encode()) % 7)
        optimizer.step()
    return outcome(module, optimizer, seen), told


def require_the_same(drawn):
    """Train twice and compare; what was refused, if anything."""
    (alone, _), (watched, told) = train(drawn, probes=False), train(drawn, probes=True)
    lost = [text for text in told if "could not be put back" in text]
    refused = [text for text in told if "is not evaluated again" in text or "no copy can take its place" in text]
    if refused:  # from the first time on, without another evaluation
        assert told[told.index(refused[0]) :] == [refused[0]] * (len(told) - told.index(refused[0]))
    if not lost:
        assert watched == alone
    if not refused and all(state.kind not in table.REFUSED for state in drawn):
        assert told == []
    if lost:  # what cannot be put back, and tensors in large containers that are left alone at first
        assert any(
            s.kind in table.REFUSED or (s.time != "always" and "replay memory, a tensor" in s.kind) for s in drawn
        )
    if refused and not lost:
        assert {state.owner for state in drawn} & {"class", "file"}
    return refused
