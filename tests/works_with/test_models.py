"""Models as people have them: compiled, with attention, recurrent, checkpointed. Products are exact in all of them.

The reference is an oracle that shares no code with the package: central differences, in float64, of the gradients that
`backward()` gives on a copy of the module.
"""

import copy
import logging
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.curvature import CheckOutcome, CurvatureConfig, Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.left_out import leave_self_check_out, without_error_bar
from tests.thorough import covering, usual

STEP = 1e-6
INPUTS = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(11, (12, 6), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(3, (12,), generator=torch.Generator().manual_seed(3))


class Classifier(LightningModule):
    """A body, then a linear layer on the mean over positions."""

    def __init__(self, body, width=8):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)

    def training_step(self, batch, batch_idx):
        hidden = self.body(batch[0])
        return F.cross_entropy(self.head(hidden.mean(dim=1) if hidden.ndim == 3 else hidden), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class SelfAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.layer, self.need_weights = nn.MultiheadAttention(8, 2, batch_first=True), need_weights

    def forward(self, x):
        return self.layer(x, x, x, need_weights=self.need_weights)[0]


class Scaled(nn.Module):
    """`scaled_dot_product_attention`, as a hand-written block calls it."""

    def __init__(self, causal):
        super().__init__()
        self.project, self.causal = nn.Linear(8, 24), causal

    def forward(self, x):
        heads = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*heads, is_causal=self.causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Scaled(causal=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class GPT(LightningModule):
    """A small language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.tokens.weight

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        logits = self.out(self.norm(self.blocks(x)))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    configure_optimizers = Classifier.configure_optimizers


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(8, 8, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.layer(x)[0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, **options)


def encoder():
    return nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)


def vision_transformer():
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=8)  # vit_b_16, reduced


# name -> (module, inputs)
MODELS = {
    "multihead-attention": (lambda: Classifier(SelfAttention(True)), INPUTS),
    "multihead-attention-without-weights": (lambda: Classifier(SelfAttention(False)), INPUTS),
    "encoder-layer": (lambda: Classifier(encoder_layer()), INPUTS),
    "encoder-layer-norm-first-gelu": (lambda: Classifier(encoder_layer(norm_first=True, activation="gelu")), INPUTS),
    "encoder": (lambda: Classifier(encoder()), INPUTS),
    "scaled-dot-product": (lambda: Classifier(Scaled(False)), INPUTS),
    "scaled-dot-product-causal": (lambda: Classifier(Scaled(True)), INPUTS),
    "vit": (lambda: Classifier(vision_transformer()), IMAGES),
    "gpt-tied": (GPT, TOKENS),
    "lstm": (lambda: Classifier(Recurrent(nn.LSTM), 16), INPUTS),
    "gru": (lambda: Classifier(Recurrent(nn.GRU), 16), INPUTS),
    "rnn": (lambda: Classifier(Recurrent(nn.RNN), 16), INPUTS),
    "checkpoint": (lambda: Classifier(Checkpointed()), INPUTS),
}


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
        for parameter in module.parameters():  # torchvision begins with a head of zeros
            nn.init.normal_(parameter, std=0.3)
    return module


def direction(n):
    v = torch.randn(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return v / v.norm()


def gradient_at(module, batch, offset):
    """`.grad` at theta + offset, with the random numbers of the package's micro-batch 0 at seed 0."""
    moved, start = copy.deepcopy(module), 0
    for parameter in moved.parameters():
        piece = offset[start : (start := start + parameter.numel())]
        parameter.data.add_(piece.view_as(parameter))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved.training_step(batch, 0).backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in moved.parameters()])


def reference(module, batch, v):
    """H v by central differences, in float64."""
    module = copy.deepcopy(module)
    module._trainer = None
    module = module.double()
    batch = [t.double() if t.is_floating_point() else t for t in batch]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # for equal dropout masks
        plus, minus = (gradient_at(module, batch, sign * STEP * v) for sign in (1, -1))
    return (plus - minus) / (2 * STEP)


def product(module, batch, v, dtype, mode="train"):
    with CurvatureConfig(dtype=dtype, mode=mode).loss(module, ParameterSpace.of(module)) as loss:
        return Hessian(loss, sample_of_batches([batch]).hessian).matvec(v).double()


@pytest.mark.parametrize(("name", "mode"), covering(list(MODELS), ["train", "eval"]))
def test_products_are_those_of_differences(name, mode):
    make, inputs = MODELS[name]
    module, batch = built(make).train(mode == "train"), (inputs, LABELS[: len(inputs)])
    v = direction(ParameterSpace.of(module).n)
    expected = reference(module, batch, v)
    assert (product(module, batch, v, "float64", mode) - expected).norm() < 1e-7 * expected.norm()
    if mode == "eval":  # without dropout, whose masks depend on the type
        assert (product(module, batch, v, "float32", mode) - expected).norm() < 1e-5 * expected.norm()
    sample = sample_of_batches([batch])
    assert CurvatureConfig(mode=mode).check(module, sample).outcome is CheckOutcome.PASSED


# Compiled


def fitted(make, inputs, *callbacks, wrap=lambda module: module):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = built(make)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(wrap(module), DataLoader(TensorDataset(inputs, LABELS), batch_size=4))
    return [parameter.detach().clone() for parameter in module.parameters()], number_of_graphs()


# With dropout and without, tied, and evaluated a second time: what the loss of a probe could differ by.
DIFFERING_IN_KIND = ["multihead-attention", "encoder-layer", "gpt-tied", "checkpoint"]


@pytest.mark.parametrize(
    "name", usual(DIFFERING_IN_KIND, thorough=[name for name in MODELS if name not in DIFFERING_IN_KIND])
)
def test_the_loss_of_the_sample_is_that_of_training(name, monkeypatch):
    """No word of a difference: any would be an error here."""
    leave_self_check_out(monkeypatch)  # which is above
    make, inputs = MODELS[name]
    monitor = SubspaceMonitor(
        k=0, every_n_steps=24, max_overhead=None, on_failure="raise", sample=len(inputs), gradient_sample=512
    )
    module = built(make)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer = Trainer(max_steps=48, enable_model_summary=False, callbacks=[monitor], **quiet)
        trainer.fit(module, DataLoader(TensorDataset(inputs, LABELS[: len(inputs)]), batch_size=4, shuffle=True))
    metrics = monitor.history[-1].metrics
    assert metrics["sample_loss"] < 2.0 * metrics["training_loss"]
    assert monitor._recorder.losses.opinion.last is not None


def number_of_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["multihead-attention-without-weights", "encoder-layer", "gpt-tied", "lstm"])
def test_training_is_left_alone(name):
    make, inputs = MODELS[name]
    monitor = SubspaceMonitor(
        k=1, every_n_steps=2, max_overhead=None, max_matvecs=40, on_failure="raise", sample=8, gradient_sample=24
    )
    with without_error_bar():
        with_monitor, _ = fitted(make, inputs, monitor)
    assert len(monitor.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(with_monitor, fitted(make, inputs)[0], strict=True))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8))


def compiled(function):
    return torch.compile(function, backend="aot_eager")


class CompiledPart(Classifier):
    def __init__(self):
        super().__init__(mlp())
        self.body = compiled(self.body)


class CompiledInPlace(Classifier):
    def __init__(self):
        super().__init__(mlp())
        self.body.compile(backend="aot_eager")


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1) + 1e-3 * logits.square().mean()


class CompiledLoss(Classifier):
    def __init__(self):
        super().__init__(mlp())
        self.criterion = compiled(smoothed)

    def training_step(self, batch, batch_idx):
        return self.criterion(self.head(self.body(batch[0])), batch[1])


class CompiledFunction(Classifier):
    """A free function, compiled where it is called."""

    def training_step(self, batch, batch_idx):
        return compiled(smoothed)(self.head(self.body(batch[0])), batch[1])


# name -> (module, what is done to it before fit)
COMPILED = {
    "module": (lambda: Classifier(mlp()), compiled),
    "attention-module": (lambda: Classifier(SelfAttention(False)), compiled),
    "submodule": (CompiledPart, lambda module: module),
    "in-place": (CompiledInPlace, lambda module: module),
    "loss": (CompiledLoss, lambda module: module),
    "function": (lambda: CompiledFunction(mlp()), lambda module: module),
}


class Compare(Callback):
    """Take a product after every second batch, and compare it with that of an uncompiled copy."""

    def __init__(self, make_plain):
        self.make_plain, self.errors = make_plain, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 0:
            plain = self.make_plain()
            for own, trained in zip(plain.parameters(), pl_module.parameters(), strict=True):
                own.data.copy_(trained.data)
            v = direction(ParameterSpace.of(pl_module).n)
            graphs = number_of_graphs()
            products = product(pl_module, (INPUTS, LABELS), v, "float64")
            assert number_of_graphs() == graphs
            with torch.compiler.set_stance("force_eager"):
                expected = reference(plain, (INPUTS, LABELS), v)
            self.errors.append(float((products - expected).norm() / expected.norm()))


# Products of attention are above, and a loss that is compiled is such a function.
ELSEWHERE = ("attention-module", "function")


# dynamo itself looks at `.grad` of what a compiled function is given
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", usual([name for name in COMPILED if name not in ELSEWHERE], thorough=ELSEWHERE))
def test_compiled(name):
    make, wrap = COMPILED[name]
    monitor = SubspaceMonitor(k=1, every_n_steps=2, max_overhead=None, on_failure="raise")
    compare = Compare(make)
    with without_error_bar():
        trained, graphs = fitted(make, INPUTS, compare, monitor, wrap=wrap)
    alone, graphs_alone = fitted(make, INPUTS, wrap=wrap)
    assert graphs == graphs_alone > 0  # compiled as often as without probes
    assert all(torch.equal(a, b) for a, b in zip(trained, alone, strict=True))
    assert len(compare.errors) == 2
    assert max(compare.errors) < 1e-7
    assert [record.step for record in monitor.history] == [0, 2, 3]
    assert all(math.isfinite(record.metrics["sharpness"]) for record in monitor.history)
