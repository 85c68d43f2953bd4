"""What is counted of an attention's scores, where blocks take their place, and that a probe is the same with them."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, measure_subspace
from lightning_subspace.curvature import CheckOutcome, CurvatureConfig, GaussNewton, Hessian
from lightning_subspace.curvature.graph_memory import Footprint, SavedBytes
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss import attention, attention_scores
from lightning_subspace.loss.attention import NODES
from lightning_subspace.loss.attention_scores import KEPT, MADE, AttentionMode, AttentionScores
from lightning_subspace.loss.findings import findings_of
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace

WIDTH, HEADS, LENGTH, EXAMPLES = 8, 2, 12, 3
SCORES = EXAMPLES * HEADS * LENGTH * LENGTH


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""

    def set_to(nbytes):
        monkeypatch.setattr(attention_scores, "free_memory", lambda device: nbytes)

    monkeypatch.setitem(attention.ENTRIES, "cpu", 64)  # several blocks
    set_to(1e9)
    return set_to


class Block(nn.Module):
    """Attention with a residual, by the function or by torch's module, whole or as a checkpoint."""

    def __init__(self, kind="function", dropout=0.0):
        super().__init__()
        self.kind, self.dropout = kind, dropout
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.whole = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True)

    def mixed(self, x):
        if self.kind == "module":
            mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype)
            return self.whole(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        parts = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        return self.out(
            F.scaled_dot_product_attention(*parts, is_causal=True, dropout_p=dropout).transpose(1, 2).flatten(2).tanh()
        )

    def forward(self, x):
        if self.kind == "checkpoint":
            return x + checkpoint(self.mixed, x, use_reentrant=False)
        return x + self.mixed(x)


def net(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Block(**options), Block(**options), nn.Linear(WIDTH, 3)).double()


def batch(length=LENGTH):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, length, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (EXAMPLES, length), generator=generator)


def loss_fn(module, data, index):
    return F.cross_entropy(module(data[0]).flatten(0, 1), data[1].flatten())


def product(module, operator=Hessian):
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64) as loss:
        made = operator(loss, sample_of_batches([batch()]).hessian, footprint=(footprint := Footprint()))
        direction = torch.randn(made.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return made.matvec(direction), made.gradient(), footprint.largest, findings_of(module).scores


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("kind", ["function", "module", "checkpoint"])
def test_products_with_blocks_are_those_of_math(kind, operator, free):
    expected, gradient, _, scores = product(net(kind=kind), operator)
    assert scores.calls == 2
    assert scores.nbytes == 2 * 3 * 8 * SCORES
    assert scores.avoided == 0
    free(0.0)
    found, own, _, scores = product(net(kind=kind), operator)
    assert scores.nbytes == 0
    assert scores.avoided == 2 * 3 * 8 * SCORES
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(own, gradient, rtol=0, atol=1e-12)


def test_blocks_are_in_the_graph_and_scores_are_not(free):
    free(0.0)
    module = net()
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64) as loss:
        value = loss(sample_of_batches([batch()]).hessian[0]).value
    nodes, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        nodes.add(type(node))
        stack += [following for following, _ in node.next_functions if following is not None]
    assert not nodes.isdisjoint(NODES)
    math = product(net())[-2]
    free(1e9)
    assert math < product(net())[-2] - 2 * 2 * 8 * SCORES


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_counted_is_what_math_attention_keeps(dropout):
    length = 128
    q, k, v = (torch.randn(2, length, 4).requires_grad_() for _ in range(3))
    scores, saved = AttentionScores(), SavedBytes()
    with (
        saved,
        scores.counted(),
        AttentionMode(scores),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        gradient = torch.autograd.grad(output, (q, k, v), output.detach(), create_graph=True)
    assert saved.count(gradient, [q, k, v]) == pytest.approx(scores.nbytes, rel=0.15)  # and tensors of T x 4 numbers


def test_all_calls_of_an_evaluation_have_to_fit(free):
    each = 8 * SCORES
    scores = AttentionScores()
    call = attention.AttentionCall.of(tuple(torch.randn(EXAMPLES, HEADS, LENGTH, 4).double() for _ in range(3)), {})
    scores.calls = 10
    free(2 * (10 * KEPT + MADE) * each - 1.0)
    assert scores.are_in_blocks(call)
    free(1e9)
    assert scores.are_in_blocks(call)  # as it was decided
    scores = AttentionScores()
    scores.calls = 10
    free(2 * (10 * KEPT + MADE) * each)
    assert not scores.are_in_blocks(call)
    free(0.0)
    assert not scores.are_in_blocks(call)
    scores = AttentionScores()
    scores.calls, scores.num_ranks = 10, 2
    free(2 * (10 * KEPT + MADE) * each)
    assert scores.are_in_blocks(call)


def test_before_calls_are_counted_only_what_draws_masks_is_decided_for_good(free):
    tensors = tuple(torch.randn(2, 4, 4) for _ in range(3))
    for dropout, expected in ((0.0, True), (0.5, False)):
        scores = AttentionScores()
        call = attention.AttentionCall.of(tensors, {"dropout_p": dropout})
        free(1e9)
        assert not scores.are_in_blocks(call)
        free(0.0)
        assert scores.are_in_blocks(call) is expected


def test_dropout_masks_are_the_same_at_every_evaluation(free):
    free(0.0)
    module = net(dropout=0.3)
    measure_subspace(module, [batch()], k=0, loss_fn=loss_fn, dtype="float64")  # refuses a loss of two values
    assert findings_of(module).scores.avoided > 0
    free(1e9)
    torch.testing.assert_close(product(module)[:2], product(module)[:2], rtol=0, atol=0)
    assert findings_of(module).scores.avoided > 0
    check = CurvatureConfig(loss_fn).check(module, sample_of_batches([batch()]))
    assert check.outcome is CheckOutcome.PASSED, check.reason


def test_a_module_without_attention_is_not_watched_for_long(monkeypatch):
    entered = []
    begin = AttentionMode.__init__
    monkeypatch.setattr(AttentionMode, "__init__", lambda self, scores: entered.append(1) or begin(self, scores))
    module = nn.Linear(WIDTH, 3).double()
    for _ in range(3):
        product(module)
    assert len(entered) == 1
    module = net()
    with TrainingLoss(module, ParameterSpace.of(module), loss_fn, order=1) as loss:
        loss(sample_of_batches([batch()]).hessian[0])
    assert findings_of(module).scores.calls is None


def test_the_words_of_a_forecast(free):
    text = product(net())[-1].text
    assert text == f"; attention scores (T x T a head) are {6 * 8 * SCORES / 1e6:.1f} MB of the largest graph"
    free(0.0)
    text = product(net())[-1].text
    assert text == f"; attention in blocks, since its scores (T x T a head) would be {6 * 8 * SCORES / 1e6:.1f} MB"
    assert product(nn.Linear(WIDTH, 3).double())[-1].text == ""


class Trained(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net().float()

    def training_step(self, batch, batch_idx):
        return loss_fn(self.net, batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_forecast_of_a_run_says_it(free, caplog):
    length = 128
    x, y = batch(length)
    data = DataLoader(TensorDataset(x.float(), y), batch_size=EXAMPLES)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    monitor = SubspaceMonitor(k=1, every_n_steps=1, sample=EXAMPLES, max_overhead=None)
    with caplog.at_level(logging.INFO):
        pl.Trainer(callbacks=[monitor], max_steps=1, enable_checkpointing=False, **options).fit(Trained(), data)
    (line,) = [message for message in caplog.messages if "s a probe, " in message]
    assert "; attention scores (T x T a head) are 2.4 MB of the largest graph" in line
    assert f"{2 * 3 * 4 * EXAMPLES * HEADS * length**2 / 1e6:.1f}" == "2.4"
