"""Products with the Hessian against dense Hessians, over the layers that people build networks of."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.curvature import GaussNewton, Hessian, graph_memory
from lightning_subspace.curvature.gradient import backward_gradient
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.oracles import EPS, dense_gradient, dense_hessian, dense_hessian_by_differences
from tests.thorough import usual

# Relative to the largest entry. Two orders of summation differ by rounding; differences err by EPS^(2/3) times a third
# derivative over a second one.
ROUNDING = 1e4 * EPS
DIFFERENCES = EPS**0.5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def operator_matrix(module, batches, loss_fn, **options):
    """The operator as a matrix, one product a column, with its gradient."""
    space = ParameterSpace.of(module, options.pop("params", None))
    memory = options.pop("memory", None)
    options = {"dtype": torch.float64} | options
    with TrainingLoss(module, space, loss_fn, **options) as loss:
        hessian = Hessian(loss, sample_of_batches(batches).hessian, memory=memory)
        identity = torch.eye(hessian.n, dtype=hessian.dtype)
        return torch.stack([hessian.matvec(column) for column in identity], dim=1), hessian.gradient()


class SameMasks:
    """A loss function whose random numbers can be replayed: it notes the generator's state at each batch.

    As it runs inside the probe it also checks that a batch meets the same state at every evaluation.
    """

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn
        self.states = {}

    def __call__(self, module, batch, batch_idx):
        state = self.states.setdefault(batch_idx, torch.get_rng_state())
        assert torch.equal(state, torch.get_rng_state())
        return self.loss_fn(module, batch, batch_idx)

    def replay(self, module, batch, batch_idx):
        if batch_idx in self.states:
            torch.set_rng_state(self.states[batch_idx])
        return self.loss_fn(module, batch, batch_idx)


def mean_objective(batches, loss_fn):
    """The mean loss with every batch weighted by its number of examples, as a plain function of a module."""

    def objective(module):
        sizes = [len(batch[0]) for batch in batches]
        losses = [loss_fn(module, batch, i) for i, batch in enumerate(batches)]
        return sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    return objective


def assert_close(actual, expected, tolerance, scale=None):
    scale = float(expected.abs().max()) if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


def assert_is_hessian(module, batches, loss_fn, *, mode="train"):
    """Operator and gradient equal the two dense oracles; returns the matrix."""
    recorded = SameMasks(loss_fn)
    with torch.random.fork_rng():
        matrix, gradient = operator_matrix(module, batches, recorded, mode=mode)
        subject = copy.deepcopy(module).train(mode == "train")
        objective = mean_objective(batches, recorded.replay)
        assert_close(gradient, dense_gradient(subject, objective), ROUNDING)
        assert_close(matrix, dense_hessian(subject, objective), ROUNDING)
        assert_close(matrix, dense_hessian_by_differences(subject, objective), DIFFERENCES)
    assert float(matrix.abs().max()) > 1e-3  # there is something to compare
    return matrix


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def in_batches(*tensors, sizes):
    """Cut tensors into batches along their first dimension."""
    return list(zip(*(tensor.split(sizes) for tensor in tensors), strict=True))


# Networks of convolutions and normalisations


def conv_net(norm=None):
    # A smooth activation in front of the pooling keeps the kinks of ReLU out, whose jumps differences would see.
    middle = [norm] if norm is not None else []
    return nn.Sequential(nn.Conv2d(1, 2, 3), *middle, nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))


IMAGES, LABELS = normal(10, 1, 6, 6), integers(3, 10, seed=1)
UNEVEN = in_batches(IMAGES, LABELS, sizes=[4, 4, 2])


def built(make):
    """A module built from a fixed seed, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
        for name, buffer in module.named_buffers():  # statistics that are not those of a fresh layer
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return module


NETS = {
    "conv": conv_net,
    "conv-relu-maxpool": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "batch-norm": lambda: conv_net(nn.BatchNorm2d(2)),
    "group-norm": lambda: conv_net(nn.GroupNorm(2, 2)),
    "layer-norm": lambda: nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 3)
    ),
    "dropout": lambda: nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9, 3), nn.Tanh(), nn.Dropout(0.4), nn.Linear(3, 3)
    ),
    "dropout-2d": lambda: conv_net(nn.Dropout2d(0.5)),
}


HAS_MODES = ("batch-norm", "dropout")
MODES = usual(
    [*((name, "train") for name in NETS if name != "conv"), *((name, "eval") for name in HAS_MODES)],
    thorough=[("conv", "train"), *((name, "eval") for name in NETS if name not in HAS_MODES)],  # others have a "conv"
)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_images(name, mode):
    assert_is_hessian(built(NETS[name]), UNEVEN, classify, mode=mode)


def test_dropout_masks_are_fixed_and_differ_between_batches():
    module = built(NETS["dropout"])
    first, _ = operator_matrix(module, UNEVEN, classify)
    torch.manual_seed(99)
    again, _ = operator_matrix(module, UNEVEN, classify)
    other_seed, _ = operator_matrix(module, UNEVEN, classify, seed=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other_seed)
    twice = [UNEVEN[0], UNEVEN[0]]
    assert not torch.allclose(
        operator_matrix(module, twice, classify)[0], operator_matrix(module, twice[:1], classify)[0]
    )


# Which parameters


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.outer = nn.Linear(3, 5)
        self.again = nn.Linear(5, 3)
        self.again.weight = self.inner.weight

    def forward(self, x):
        code = torch.tanh(self.inner(x))
        return self.again(torch.tanh(self.outer(code)) + F.linear(code, self.inner.weight.T))


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(5, 4).requires_grad_(False)
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)
        self.linear_part = nn.Parameter(torch.ones(2))  # the loss is linear in it: a gradient without a graph
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.used(self.frozen(x))))


VECTORS = normal(9, 5)
VECTOR_BATCHES = in_batches(VECTORS, integers(3, 9, seed=1), sizes=[4, 4, 1])


def test_tied_weights():
    assert_is_hessian(built(TiedAutoencoder), VECTOR_BATCHES, classify)


def test_frozen_and_unused_parameters():
    module = built(PartlyUsed)

    def with_a_linear_part(m, batch, batch_idx):
        return classify(m, batch, batch_idx) + m.linear_part.sum()

    matrix = assert_is_hessian(module, VECTOR_BATCHES, with_a_linear_part)
    names = ParameterSpace.of(module).names
    assert not any(name.startswith("frozen") for name in names)
    assert names[0] == "linear_part"
    assert not matrix[:2].any()  # linear: no curvature
    unused = slice(2 + 20, 2 + 20 + 6)
    assert not matrix[unused].any()
    assert not matrix[:, unused].any()


@pytest.mark.parametrize("patterns", [["head.*"], ["*.bias"], ["used.weight", "head.bias"]])
def test_patterns_give_the_principal_submatrix(patterns):
    module = built(PartlyUsed)
    whole, gradient = operator_matrix(module, VECTOR_BATCHES, classify)
    part, part_gradient = operator_matrix(module, VECTOR_BATCHES, classify, params=patterns)
    space, chosen = ParameterSpace.of(module), ParameterSpace.of(module, patterns)
    marks = torch.cat(
        [torch.full((n,), name in chosen.names) for name, n in zip(space.names, space.numels, strict=True)]
    )
    assert 0 < chosen.n < space.n
    assert_close(part, whole[marks][:, marks], ROUNDING)
    assert_close(part_gradient, gradient[marks], ROUNDING)


# Sequences


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Embedded(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.embed = nn.Embedding(6, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)).mean(dim=1))


class Attending(nn.Module):
    """One of three ways to attend."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind == "multihead":
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        elif kind == "encoder":
            self.attention = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.2, activation="gelu", batch_first=True)
        else:
            self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if self.kind == "multihead":
            x, _ = self.attention(x, x, x, need_weights=False)
        elif self.kind == "encoder":
            x = self.attention(x)
        else:
            query, key, value = self.project(x).chunk(3, dim=-1)
            x = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(x.mean(dim=1))


def test_lstm():
    assert_is_hessian(built(Recurrent), in_batches(normal(5, 3, 2), integers(2, 5), sizes=[3, 2]), classify)


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding(sparse):
    module = built(lambda: Embedded(sparse))
    matrix = assert_is_hessian(module, in_batches(integers(5, 7, 4), integers(3, 7), sizes=[4, 3]), classify)
    never_seen = slice(5 * 4, 6 * 4)  # token 5
    assert not matrix[never_seen].any()


@pytest.mark.parametrize(
    ("kind", "mode"),
    usual(
        [("multihead", "train"), ("encoder", "train"), ("function", "train")],  # one has dropout
        thorough=[("multihead", "eval"), ("encoder", "eval"), ("function", "eval")],
    ),
)
def test_attention(kind, mode):
    batches = in_batches(normal(5, 3, 4), integers(3, 5), sizes=[3, 2])
    assert_is_hessian(built(lambda: Attending(kind)), batches, classify, mode=mode)


# How the sample is cut


def cuts(num_batches):
    sizes = [len(IMAGES)] if num_batches == 1 else [1, 2, 1, 3, 1, 1, 1]
    return in_batches(IMAGES, LABELS, sizes=sizes)


@pytest.mark.parametrize("name", ["conv", "batch-norm", "layer-norm"])
def test_a_mean_over_examples_does_not_depend_on_the_cut(name):
    module = built(NETS[name])
    whole, gradient = operator_matrix(module, cuts(1), classify, mode="eval")
    cut, cut_gradient = operator_matrix(module, cuts(7), classify, mode="eval")
    assert_close(cut, whole, ROUNDING)
    assert_close(cut_gradient, gradient, ROUNDING)


def test_batch_norm_in_train_mode_does_depend_on_the_cut():
    module = built(NETS["batch-norm"])
    whole, _ = operator_matrix(module, cuts(1), classify)
    cut, _ = operator_matrix(module, UNEVEN, classify)
    assert not torch.allclose(whole, cut, rtol=0.01)


PADDING = -100


def token_loss(module, batch, batch_idx):
    tokens, targets = batch
    return F.cross_entropy(module(tokens).flatten(0, 1), targets.flatten(), ignore_index=PADDING)


def test_padded_sequences_weighted_by_tokens_are_the_mean_over_tokens():
    lengths = [5, 1, 2, 3, 4, 1, 5]
    tokens, targets = integers(6, 7, 5), integers(3, 7, 5, seed=1)
    for row, length in enumerate(lengths):
        targets[row, length:] = PADDING
    batches = in_batches(tokens, targets, sizes=[3, 3, 1])
    module = built(lambda: nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 3)))
    weighted = [(batch, int((batch[1] != PADDING).sum())) for batch in batches]
    matrix, gradient = operator_matrix(module, weighted, token_loss)

    def mean_over_tokens(m):
        return token_loss(m, (tokens, targets), 0)

    assert_close(matrix, dense_hessian(module, mean_over_tokens), ROUNDING)
    assert_close(gradient, dense_gradient(module, mean_over_tokens), ROUNDING)
    by_examples, _ = operator_matrix(module, batches, token_loss)
    assert not torch.allclose(by_examples, matrix, rtol=0.01)


# How it is computed


@pytest.mark.parametrize("name", ["conv-relu-maxpool", "batch-norm", "dropout"])
def test_retained_and_rebuilt_graphs_give_the_same_bits(name):
    module = built(NETS[name]).float()
    batches = [(images.float(), labels) for images, labels in UNEVEN]
    space = ParameterSpace.of(module)
    directions = normal(2, space.n).float()
    results = {}
    with TrainingLoss(module, space, classify) as loss:
        for memory in (None, 0.0, *range(1_000, 30_000, 500)):
            hessian = Hessian(loss, sample_of_batches(batches).hessian, memory=memory)
            if hessian.num_retained in results:
                continue
            results[hessian.num_retained] = [hessian.matvec(v) for v in directions] + [hessian.gradient()]
            if len(results) > len(batches):
                break
    assert results.keys() == {0, 1, 2, 3}
    for pieces in zip(*results.values(), strict=True):
        assert all(torch.equal(pieces[0], piece) for piece in pieces[1:])


WIDE = in_batches(normal(8, 200).float(), integers(50, 8, seed=1), sizes=2)  # four, of two examples each


def num_retained(kind, module, memory):
    with TrainingLoss(module, ParameterSpace.of(module), classify) as loss:
        return kind(loss, sample_of_batches(WIDE).hessian, memory=memory).num_retained


@pytest.mark.parametrize(("kind", "vectors"), [(Hessian, 1), (GaussNewton, 2)])
def test_the_memory_budget_counts_gradients(kind, vectors):
    module = nn.Linear(200, 50)  # what autograd saves, two examples and what they give, is a tenth of n numbers
    size = vectors * 4 * ParameterSpace.of(module).n
    for count in range(1, 5):
        assert num_retained(kind, module, count * size) == count - 1
        assert num_retained(kind, module, count * 1.1 * size) == count


def test_the_memory_budget_does_not_count_parameters_nor_views_of_them():
    trained = nn.Sequential(nn.Linear(200, 50), nn.Tanh(), nn.Linear(50, 400))  # saved: the second weight, transposed
    frozen = nn.Sequential(nn.Linear(200, 50), nn.Linear(50, 200).requires_grad_(False))
    for module in (trained, frozen):
        size = 4 * ParameterSpace.of(module).n
        assert num_retained(Hessian, module, 4 * 1.3 * size) == 4


def test_the_memory_budget_is_half_of_what_is_free_shared_by_ranks(monkeypatch):
    monkeypatch.setattr(graph_memory, "free_memory", lambda device: 6_000.0)
    assert graph_memory.memory_budget(torch.device("cpu"), 1) == 3_000
    assert graph_memory.memory_budget(torch.device("cpu"), 2) == 1_500


def test_part_is_the_hessian_of_some_batches():
    module = built(NETS["batch-norm"])
    for memory in (None, 0.0):
        with TrainingLoss(module, ParameterSpace.of(module), classify, dtype=torch.float64) as loss:
            sample = sample_of_batches(UNEVEN).hessian
            hessian = Hessian(loss, sample, memory=memory)
            part, alone = hessian.part([0, 2]), Hessian(loss, [sample[0], sample[2]])
            v = normal(hessian.n)
            assert torch.equal(part.matvec(v), alone.matvec(v))
            assert torch.equal(part.gradient(), alone.gradient())
            assert part.batches == (sample[0], sample[2])
            # and the parts make up the whole, by weight
            rest = hessian.part([1])
            assert_close((6 * part.matvec(v) + 4 * rest.matvec(v)) / 10, hessian.matvec(v), ROUNDING)
            assert_close((6 * part.gradient() + 4 * rest.gradient()) / 10, hessian.gradient(), ROUNDING)


def test_batch_gradients_are_those_of_each_batch():
    module = built(NETS["batch-norm"])
    with TrainingLoss(module, ParameterSpace.of(module), classify, dtype=torch.float64) as loss:
        hessian = Hessian(loss, sample_of_batches(UNEVEN).hessian)
        for batch, gradient in hessian.batch_gradients():
            assert_close(gradient, backward_gradient(loss, batch), ROUNDING)


@pytest.mark.parametrize("name", ["conv", "conv-relu-maxpool", "layer-norm", "dropout"])
def test_float32_is_float64_to_its_rounding(name):
    module = built(NETS[name])
    mode = "eval" if name == "dropout" else "train"  # masks differ between the two types
    exact, gradient = operator_matrix(module, UNEVEN, classify, mode=mode)
    single = copy.deepcopy(module).float()
    batches = [(images.float(), labels) for images, labels in UNEVEN]
    rounded, rounded_gradient = operator_matrix(single, batches, classify, mode=mode, dtype=torch.float32)
    assert rounded.dtype == torch.float32
    assert_close(rounded.double(), exact, 1e-5)
    assert_close(rounded_gradient.double(), gradient, 1e-5)


def test_low_precision_parameters_are_measured_in_float32():
    module = built(NETS["conv"]).bfloat16()
    batches = [(images.bfloat16(), labels) for images, labels in UNEVEN]
    matrix, _ = operator_matrix(module, batches, classify, dtype=torch.float32)
    wide = [(images.double(), labels) for images, labels in batches]
    exact, _ = operator_matrix(copy.deepcopy(module).double(), wide, classify)
    assert matrix.dtype == torch.float32
    assert_close(matrix.double(), exact, 1e-5)


def test_the_operator_is_linear_and_symmetric():
    module = built(lambda: Attending("encoder"))
    batches = in_batches(normal(5, 3, 4), integers(3, 5), sizes=[3, 2])
    with TrainingLoss(module, ParameterSpace.of(module), classify, dtype=torch.float64) as loss:
        hessian = Hessian(loss, sample_of_batches(batches).hessian)
        u, v = normal(2, hessian.n)
        hu, hv = hessian.matvec(u), hessian.matvec(v)
        assert float(u @ hv) == pytest.approx(float(v @ hu), abs=ROUNDING * float(u.norm() * hv.norm()))
        assert_close(hessian.matvec(2 * u - v), 2 * hu - hv, ROUNDING)
        assert torch.equal(hessian.matvec(v), hv)


def test_the_argument_is_not_written_to():
    module = built(NETS["conv"])
    with TrainingLoss(module, ParameterSpace.of(module), classify, dtype=torch.float64) as loss:
        hessian = Hessian(loss, sample_of_batches(UNEVEN).hessian)
        v = normal(hessian.n)
        before = v.clone()
        hessian.matvec(v)
        hessian.gradient().zero_()
        assert torch.equal(v, before)
        assert hessian.gradient().any()


def test_an_empty_sample_is_refused():
    module = built(NETS["conv"])
    with TrainingLoss(module, ParameterSpace.of(module), classify) as loss, pytest.raises(ValueError, match="batches"):
        Hessian(loss, [])
