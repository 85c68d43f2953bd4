"""Products over joined micro-batches: the same numbers where the loss is a mean over examples, else refused."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_subspace import measure_subspace
from lightning_subspace.curvature import CurvatureConfig, GaussNewton, Hessian
from lightning_subspace.curvature import joining as room
from lightning_subspace.curvature.graph_memory import Footprint
from lightning_subspace.curvature.joining import Joined, JoinError, joined_operator
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.joined import grouped
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.loss_function import ElsewhereError, WrittenError
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import Reliability
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.joining import Joining
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.oracles import dense_hessian
from tests.processes import run
from tests.thorough import covering, usual

CLASSES = 3


class GPT(nn.Module):
    """One block of a language model."""

    def __init__(self, width=8, tokens=11):
        super().__init__()
        self.embedding, self.position = nn.Embedding(tokens, width), nn.Parameter(0.1 * torch.randn(16, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, tokens)

    def forward(self, text):
        x = self.embedding(text) + self.position[: text.shape[1]]
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.mlp(x))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, CLASSES))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES))


def language(module, text, batch_idx):
    return F.cross_entropy(module(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def classify(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def images(*shape, sizes=(4,) * 6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def texts(count=6):
    return list(torch.randint(11, (count, 2, 9), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def _left_out(monkeypatch):
    """What takes longer than what these tests are about."""
    leave_self_check_out(monkeypatch)
    leave_error_bar_out(monkeypatch)


CASES = {
    "MLP": (mlp, classify, images(4)),
    "MLP, sizes": (mlp, classify, images(4, sizes=(4, 3, 4, 5, 2, 4))),
    "CNN": (cnn, classify, images(1, 6, 6)),
    "GPT": (GPT, language, texts()),
}


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def opened(module, loss_fn, **options):
    return TrainingLoss(module, ParameterSpace.of(module), loss_fn, dtype=torch.float64, **options)


def tried(module, loss_fn, batches, **settings):
    """The configuration after a probe's check."""
    sample = sample_of_batches(batches)
    choice = CurvatureConfig(loss_fn, dtype="float64", **settings)
    return choice.joining(module, sample, Partition.even(ParameterSpace.of(module)))


@pytest.mark.parametrize(("case", "operator"), covering(list(CASES), [Hessian, GaussNewton]))
def test_products_gradients_values_and_parts_are_those_of_single_ones(case, operator):
    make, loss_fn, batches = CASES[case]
    module, sample = made(make), sample_of_batches(batches).hessian
    assert tried(module, loss_fn, batches).most_joined >= 4
    with opened(module, loss_fn) as loss:
        alone = operator(loss, sample)
        together = joined_operator(operator, loss, sample, Partition.even(loss.space), 8)
        assert isinstance(together, Joined)
        v = torch.randn(alone.n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        scale = float(alone.matvec(v).norm())
        for positions in (range(6), range(0, 6, 2), range(1, 6, 2), [4], [0, 1, 4]):
            one, other = alone.part(positions), together.part(positions)
            assert [batch.index for batch in other.batches] == list(positions)
            torch.testing.assert_close(other.matvec(v), one.matvec(v), rtol=0, atol=1e-13 * scale)
            torch.testing.assert_close(other.gradient(), one.gradient(), rtol=0, atol=1e-14)
            assert other.value(1e-2 * v) == pytest.approx(one.value(1e-2 * v), rel=1e-13)
        assert torch.equal(together.gradient(), alone.gradient())
        for (_, one), (_, other) in zip(alone.batch_gradients(), together.batch_gradients(), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-14)


class CountingLoss(TrainingLoss):
    evaluations = 0

    def __call__(self, batch):
        self.evaluations += 1
        return super().__call__(batch)


def test_a_product_has_fewer_forward_passes():
    module, sample = made(mlp), sample_of_batches(images(4, sizes=(2,) * 16)).hessian
    with CountingLoss(module, ParameterSpace.of(module), classify, dtype=torch.float64) as loss:
        counts = []
        for most in (1, 4, 8):
            rebuilt = lambda *args, **options: Hessian(*args, **{**options, "memory": 0.0})  # noqa: E731
            operator = joined_operator(rebuilt, loss, sample, Partition.even(loss.space), most)
            before = loss.evaluations
            operator.matvec(operator.gradient())
            counts.append(loss.evaluations - before)
        assert counts == [16, 4, 2]
        before = loss.evaluations
        half = operator.part(range(0, 16, 2))
        half.matvec(operator.gradient())
        assert loss.evaluations - before == 1  # the half that the error bar needs is one of both


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))

    def forward(self, x):
        return self.layers(x)


def dropping():
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, CLASSES))


def contrastive(module, batch, batch_idx):
    features = F.normalize(module(batch[0]), dim=1)
    return F.cross_entropy(features @ features.T, torch.arange(len(features)))


def over_tokens(module, batch, batch_idx):
    """The mean over the examples with a label of 0 or 1, of which batches have different numbers."""
    return F.cross_entropy(module(batch[0]), batch[1], ignore_index=2)


def one_number_a_step(module, batch, batch_idx):
    return torch.rand((), dtype=torch.float64) * classify(module, batch, batch_idx)


def fixed_size(module, batch, batch_idx):
    return classify(module, (batch[0].view(4, 4), batch[1]), batch_idx)


APART = "the loss of two in one is not the mean of theirs"
REFUSED = {
    "sum": (mlp, lambda m, b, i: classify(m, b, i) * len(b[1]), images(4), APART),
    "batch-norm": (Norm, classify, images(4), APART),
    "contrastive": (mlp, contrastive, images(4), APART),
    "tokens": (mlp, over_tokens, images(4), APART),
    "weights": (mlp, classify, [(batch, 1.0 + i) for i, batch in enumerate(images(4))], APART),
    "batch_idx": (mlp, lambda m, b, i: (1 + i) * classify(m, b, i), images(4), APART),
    "dropout": (dropping, classify, images(4), "the loss draws random numbers"),
    "one number": (mlp, one_number_a_step, images(4), "the loss draws random numbers"),
    "view": (mlp, fixed_size, images(4), "the loss of two in one cannot be evaluated"),
    "shapes": (
        GPT,
        language,
        [text[:, : 5 + i] for i, text in enumerate(texts(4))],
        "no two have data of one structure",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_mean_over_examples_is_refused_and_measured_as_before(case):
    make, loss_fn, batches, reason = REFUSED[case]
    module = made(make)
    with pytest.raises(JoinError, match=reason):
        tried(module, loss_fn, batches)
    joins = Joining()
    sample, partition = sample_of_batches(batches), Partition.even(ParameterSpace.of(module))
    choice = joins.begin(CurvatureConfig(loss_fn, dtype="float64"), module, sample, partition)
    assert joins.remark.startswith(f"micro-batches not joined: {reason}")
    with choice.loss(module, partition.space) as loss:
        assert type(joins.operator(choice, Footprint())(loss, sample, partition)) is Hessian


def test_numbers_of_tokens_as_weights_make_a_mean():
    batches = [(batch, float((batch[1] != 2).sum())) for batch in images(4)]
    assert len({weight for _, weight in batches}) > 1
    assert tried(made(mlp), over_tokens, batches).most_joined > 1


def test_with_dropout_off_it_is_a_mean():
    assert tried(made(dropping), classify, images(4), mode="eval").most_joined > 1


@pytest.mark.parametrize("count", [1, 2])
def test_few_micro_batches_are_not_even_tried(count):
    with mock.patch.object(room, "_draws", side_effect=AssertionError):
        assert tried(made(mlp), classify, images(4)[:count]).most_joined == 1


def test_large_graphs_stay_apart(monkeypatch):
    monkeypatch.setattr(room, "CPU_BYTES", 100)
    with pytest.raises(JoinError, match="they are large enough"):
        tried(made(mlp), classify, images(4))


def test_other_operators_take_them_one_by_one():
    for curvature in ("finite-difference", "empirical-fisher"):
        assert tried(made(mlp), classify, images(4), curvature=curvature).most_joined == 1


def late_weights(module, batch, batch_idx):
    """A mean over examples for the pair of the check, and none where the third feature marks a batch."""
    return classify(module, batch, batch_idx) * (1.0 + 0.1 * (batch[0][0, 2] > 100.0))


def test_every_probe_compares_the_whole_sample():
    batches = images(4, sizes=(4,) * 8)
    batches[6][0][0, 2] = 1000.0
    tracker = ProbeRun(ProbeSettings(k=2, loss_fn=late_weights, dtype="float64"), module := made(mlp))
    sample = sample_of_batches(batches)
    tracker.check(module, sample)
    assert list(tracker.examples.told.values()) == ["micro-batches joined for products: 8 -> 2."]
    found = tracker.measure(module, sample, 0).record
    reason = "the loss of joined ones, over the whole sample, is not the mean of theirs"
    assert list(tracker.examples.told.values())[-1].startswith(f"micro-batches not joined: {reason}")
    expected = dense_hessian_of(module, late_weights, batches)
    torch.testing.assert_close(found.subspace.eigenvalues.double(), expected[:2], rtol=1e-5, atol=0.0)
    with mock.patch.object(room, "joined", side_effect=AssertionError):  # and it stays so
        tracker.measure(module, sample, 1)


def dense_hessian_of(module, loss_fn, batches):
    """Eigenvalues, largest first, of the mean with equal weights."""
    hessian = dense_hessian(module, lambda m: torch.stack([loss_fn(m, b, i) for i, b in enumerate(batches)]).mean())
    return torch.linalg.eigvalsh(hessian).flip(0)


def test_without_memory_for_it_the_probe_is_taken_without():
    batches, seen = images(4), []

    def short(*args, **options):
        seen.append(args)
        raise torch.OutOfMemoryError("out of memory")

    tracker = ProbeRun(ProbeSettings(k=2, loss_fn=classify, dtype="float64"), module := made(mlp))
    sample = sample_of_batches(batches)
    tracker.check(module, sample)
    with mock.patch.object(room, "joined", short):
        record = tracker.measure(module, sample, 0).record
    assert len(seen) == 1
    assert list(tracker.examples.told.values())[-1] == ("micro-batches not joined: there was not enough memory for it.")
    assert record.subspace.trusted


def measured(group=None):
    """Everything of a measurement whose micro-batches are joined, and how many products had them."""
    products = []
    matvec = Joined.matvec
    with mock.patch.object(Joined, "matvec", lambda self, v: (products.append(len(self.batches)), matvec(self, v))[1]):
        record = measure_subspace(
            made(mlp),
            images(4, sizes=(4,) * 13),
            k=2,
            tol=1e-8,
            loss_fn=classify,
            dtype="float64",
            measurements=[Reliability()],
            group=dist.group.WORLD if group else None,
        )
    return dict(record.metrics), len(products)


@pytest.mark.parametrize("count", usual([3], thorough=[2]))
def test_ranks_measure_what_one_process_measures(count):
    alone, products = measured()
    assert products > 0
    for found, its_products in run(measured, count, True):
        assert its_products > 0
        for key, value in alone.items():
            if not key.startswith("solver/"):
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-8), key


@pytest.mark.usefixtures("_left_out")
def test_one_rank_without_memory_is_enough():
    def probed():
        ranks = Ranks(dist.group.WORLD)
        sample = sample_of_batches(images(4), ranks=ranks)
        tracker = ProbeRun(ProbeSettings(k=2, loss_fn=classify, dtype="float64"), module := made(mlp), ranks)
        tracker.check(module, sample)
        joined, failing = room.joined, ranks.index == 1

        def short(members):
            if failing:
                raise torch.OutOfMemoryError("out of memory")
            return joined(members)

        with mock.patch.object(room, "joined", short):
            record = tracker.measure(module, sample, 0).record
        return record.metrics["sharpness"], list(tracker.examples.told.values())[-1]

    assert len({repr(found) for found in run(probed, 2)}) == 1


def test_single_precision_differs_by_rounding():
    module = made(mlp).float()
    batches = [(inputs.float(), labels) for inputs, labels in images(4, sizes=(2,) * 16)]
    found = measure_subspace(module, batches, k=2, loss_fn=classify)
    with mock.patch.object(CurvatureConfig, "joining", lambda self, *args: self):
        expected = measure_subspace(module, batches, k=2, loss_fn=classify)
    for key in ("sharpness", "eigenvalues/02", "gradient_fraction", "gradient_norm", "sample_loss"):
        assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-5), key


def bounded(module, batch, batch_idx):
    """A mean over examples of a loss that takes eight at most, as the pair of the check has."""
    if len(batch[1]) > 8:
        raise AssertionError("a buffer of 8 rows")
    return classify(module, batch, batch_idx)


def probe(loss_fn, batches, ranks=None, **settings):
    """A probe whose micro-batches seemed joinable; its run and its record."""
    settings = {"k": 2, "loss_fn": loss_fn, "dtype": "float64", "tol": 1e-8, **settings}
    tracker = ProbeRun(ProbeSettings(**settings), module := made(mlp), ranks)
    sample = sample_of_batches(batches, ranks=ranks)
    tracker.check(module, sample)
    assert tracker.examples.joining.remark.startswith("micro-batches joined")
    return tracker, tracker.measure(module, sample, 0).record


@pytest.mark.usefixtures("_left_out")
@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_that_fails_on_larger_batches_is_measured_as_before(count):
    def probed(with_group):
        ranks = Ranks(dist.group.WORLD) if with_group else None
        fails = not with_group or ranks.index == 1  # on one rank alone
        tracker, record = probe(bounded if fails else classify, images(4, sizes=(4,) * 12), ranks)
        return tracker.examples.joining.remark, record.metrics["sharpness"]

    expected = float(dense_hessian_of(made(mlp), classify, images(4, sizes=(4,) * 12))[0])
    for remark, found in run(probed, count, True) if count > 1 else [probed(False)]:
        assert remark == (
            "micro-batches not joined: the loss of joined ones cannot be evaluated "
            "(AssertionError: a buffer of 8 rows)."
        )
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_bound_of_a_graph_holds_for_the_longest_texts(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(11, (2, length), generator=generator) for length in (4, 16) for _ in range(8)]
    module, most = made(GPT), 200_000
    monkeypatch.setattr(room, "CPU_BYTES", most)
    choice = CurvatureConfig(language, dtype="float64")
    sample, partition = sample_of_batches(batches), Partition.even(ParameterSpace.of(module))
    choice = choice.joining(module, sample, partition)
    counts = {
        length: max(
            len(group)
            for group in grouped(sample.hessian, Ranks(), choice.most_joined, choice.joined_bytes)
            if batches[group[0]].shape[1] == length
        )
        for length in (4, 16)
    }
    assert counts[4] > counts[16]
    with choice.loss(module, partition.space) as loss:
        footprint = Footprint()
        assert isinstance(choice.operator(loss, sample, partition, footprint), Joined)
        assert footprint.largest <= most + sum(8 * p.numel() for p in module.parameters())  # its gradients beside


def test_graphs_of_single_ones_are_kept_where_those_of_joined_ones_did_not_fit():
    calls = []

    def short(module, batch, batch_idx):
        if len(batch[1]) > 8:
            calls.append(batch_idx)
            if len(calls) % 2 == 0:  # one is kept, and there is no room for the second
                raise torch.OutOfMemoryError("out of memory")
        return classify(module, batch, batch_idx)

    tracker, record = probe(short, images(4, sizes=(4,) * 12))
    assert calls
    assert tracker.examples.joining.remark == "micro-batches not joined: there was not enough memory for it."
    footprint = tracker.examples.footprint
    assert (footprint.kept, footprint.rounds, footprint.notice) == (12, 12, None)
    assert record.subspace.trusted


def test_too_little_memory_for_two_is_said_as_such():
    def short(module, batch, batch_idx):
        if len(batch[1]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return classify(module, batch, batch_idx)

    with pytest.raises(JoinError, match="there was not enough memory for it"):
        tried(made(mlp), short, images(4))


@pytest.mark.parametrize("kind", [ElsewhereError, WrittenError])
def test_what_is_for_others_to_answer_is_passed_on(kind):
    def raising(module, batch, batch_idx):
        if len(batch[1]) > 4:
            raise kind("elsewhere")
        return classify(module, batch, batch_idx)

    with pytest.raises(kind):
        tried(made(mlp), raising, images(4))


def test_rounding_of_bfloat16_is_refused_before_the_first_probe():
    module = made(mlp).bfloat16()
    batches = [(inputs.bfloat16(), labels) for inputs, labels in images(4)]
    choice = CurvatureConfig(classify, dtype="native")
    with pytest.raises(JoinError, match="rounding of bfloat16 would hide a difference"):
        choice.joining(module, sample_of_batches(batches), Partition.even(ParameterSpace.of(module)))


def test_micro_batches_without_a_size_are_joined():
    batches = [MicroBatch(data, 4.0, i) for i, data in enumerate(images(4))]
    module = made(mlp)
    with opened(module, classify) as loss:
        together = joined_operator(Hessian, loss, batches, Partition.even(loss.space), 8)
        assert isinstance(together, Joined)
        alone = [float(classify(module, batch.data, 0).detach()) for batch in batches]
        assert together.value(None) == pytest.approx(sum(alone) / len(alone), rel=1e-13)


def test_copies_of_the_data_are_counted():
    tracker, _ = probe(classify, images(4, sizes=(4,) * 12))
    assert tracker.examples.footprint.joined == 12 * 4 * (4 * 8 + 8)
    tracker, _ = probe(bounded, images(4, sizes=(4,) * 12))
    assert tracker.examples.footprint.joined == 0


def test_what_became_of_it_is_logged(caplog, monkeypatch):
    leave_error_bar_out(monkeypatch)
    with caplog.at_level("INFO", "lightning_subspace"):
        measure_subspace(made(mlp), images(4), k=2, loss_fn=classify, dtype="float64")
        measure_subspace(made(smooth), images(4), k=2, loss_fn=classify, curvature="finite-difference")
    assert caplog.messages[0] == "micro-batches joined for products: 6 -> 2."
    assert len(caplog.messages) == 2
    assert "differences" in caplog.messages[1]


def smooth():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).float()
