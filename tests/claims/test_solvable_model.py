"""`measure_subspace` against models that are solved by hand: every number it reports, at several steps of descent."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import measure_subspace
from tests.left_out import leave_error_bar_out, leave_self_check_out
from tests.oracles import EPS, Quadratic, SolvableModel, dense_hessian, dense_hessian_by_differences
from tests.thorough import usual

LEARNING_RATE = 0.7
STEPS = (0, 1, 10, 100)
# Residual / gap of the solver in these tests. Eigenvalues and fractions err by its square, or by itself at worst.
TOL = 1e-10
CLOSE = 1e-8


@pytest.fixture(autouse=True)
def _left_out(monkeypatch):
    """The self-check and the error bar: no closed form is about them."""
    leave_self_check_out(monkeypatch)
    leave_error_bar_out(monkeypatch)


def cross_entropy(module, batch, batch_idx):
    return F.cross_entropy(module(batch[0]), batch[1])


def class_batches(num_classes, counts=None, seed=0):
    """One batch a class, all its examples on the class mean; the means are orthonormal in K + 2 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    dimension = num_classes + 2
    frame, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
    counts = counts or [3] * num_classes
    return [(frame[c].expand(count, -1).clone(), torch.full((count,), c)) for c, count in enumerate(counts)]


def mean_loss(batches, model):
    def objective(module):
        losses = [cross_entropy(module, batch, 0) for batch in batches]
        return sum(share * loss for share, loss in zip(model.class_shares, losses, strict=True))

    return objective


def along_descent(model, batches):
    """The module and what is predicted for it, at STEPS; the module descends the full gradient from zero."""
    module = nn.Linear(model.num_classes + 2, model.num_classes, bias=model.bias).double()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    objective, optimizer = mean_loss(batches, model), torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            yield step, module, model.prediction(step)
        optimizer.zero_grad()
        objective(module).backward()
        optimizer.step()


def measure(module, batches, k, loss_fn=cross_entropy, **options):
    options = {"tol": TOL, "dtype": torch.float64, "max_matvecs": 1000} | options
    return measure_subspace(module, batches, k=k, loss_fn=loss_fn, **options)


def measured_loss(module, batches):
    sample = sample_of_batches(batches).hessian
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy, dtype=torch.float64) as loss:
        total = sum(batch.weight * loss(batch).value.item() for batch in sample)
    return total / sum(batch.weight for batch in sample)


def assert_predicted(record, predicted, k):
    """Everything in the record: the spectrum, and what lies along the gradient."""
    metrics = record.metrics
    assert record.subspace.converged, record.subspace.verdict
    assert record.subspace.verified
    scale = predicted.eigenvalues[0]
    measured = [metrics[f"eigenvalues/{i:02d}"] for i in range(1, k + 1)]
    assert measured == pytest.approx(predicted.eigenvalues[:k], rel=CLOSE, abs=CLOSE * scale)
    assert metrics["sharpness"] == pytest.approx(scale, rel=CLOSE)
    assert metrics["gradient_norm"] == pytest.approx(predicted.gradient_norm, rel=CLOSE)
    assert metrics["gradient_curvature"] == pytest.approx(predicted.curvature, rel=CLOSE)
    assert metrics["gradient_hessian_cosine"] == pytest.approx(predicted.cosine, rel=CLOSE)
    if k in predicted.gaps():
        assert metrics["gradient_fraction"] == pytest.approx(predicted.shares[k - 1], abs=CLOSE)


models = pytest.mark.parametrize(
    ("num_classes", "bias"),
    [
        pytest.param(k, bias, id=f"K={k}{'-bias' if bias else ''}")
        for k, bias in usual([(2, False), (4, True)], thorough=[(2, True), (4, False), (10, False), (10, True)])
    ],
)


@pytest.mark.parametrize(
    "model",
    [
        SolvableModel(2, LEARNING_RATE),
        SolvableModel(3, LEARNING_RATE, shares=(0.2, 0.3, 0.5)),
        SolvableModel(2, LEARNING_RATE, bias=True),
        SolvableModel(4, LEARNING_RATE, bias=True),
    ],
    ids=str,
)
def test_the_closed_forms_are_those_of_dense_derivatives(model):
    batches = class_batches(model.num_classes)
    objective = mean_loss(batches, model)
    for _, module, predicted in along_descent(model, batches):
        assert objective(module).item() == pytest.approx(predicted.loss, rel=1e-12)
        matrix, other = dense_hessian(module, objective), dense_hessian_by_differences(module, objective)
        torch.testing.assert_close(matrix, other, rtol=0.0, atol=EPS**0.5)
        values = torch.linalg.eigvalsh(matrix).flip(0).tolist()
        expected = predicted.eigenvalues + [0.0] * (len(values) - len(predicted.eigenvalues))
        assert values == pytest.approx(expected, abs=1000 * EPS)


@models
def test_all_eigenvalues_and_the_numbers_along_the_gradient(num_classes, bias):
    model = SolvableModel(num_classes, LEARNING_RATE, bias=bias)
    batches, rank = class_batches(num_classes), num_classes * (num_classes - 1)
    previous = None
    for _, module, predicted in along_descent(model, batches):
        assert measured_loss(module, batches) == pytest.approx(predicted.loss, rel=1e-12)
        record = measure(module, batches, rank, previous=previous)
        assert_predicted(record, predicted, rank)
        assert record.metrics["gradient_fraction"] == pytest.approx(1.0, abs=CLOSE)
        assert record.metrics["gap_index"] == rank  # everything behind it is zero
        if previous is not None:
            assert record.metrics["overlap_previous"] == pytest.approx(1.0, abs=CLOSE)
        previous = record


@models
def test_the_gradient_fraction_at_every_gap(num_classes, bias):
    model = SolvableModel(num_classes, LEARNING_RATE, bias=bias)
    batches, fractions = class_batches(num_classes), {}
    for _, module, predicted in along_descent(model, batches):
        for k in sorted({num_classes - 1, num_classes} & set(predicted.gaps())):
            record = measure(module, batches, k)
            assert_predicted(record, predicted, k)
            assert record.subspace.trusted
            fractions.setdefault(k, []).append(record.metrics["gradient_fraction"])
    if bias:  # the gradient is the K-th eigenvector, behind K - 1 larger ones
        assert fractions[num_classes - 1] == pytest.approx([0.0] * len(fractions[num_classes - 1]), abs=CLOSE)
    assert fractions[num_classes] == pytest.approx([1.0] * len(fractions[num_classes]), abs=CLOSE)


@pytest.mark.parametrize(
    ("num_classes", "bias"),
    usual([(2, False), (4, True)], thorough=[(4, False), (10, False), (10, True)]),
)
def test_no_fraction_inside_a_multiple_eigenvalue(num_classes, bias):
    model = SolvableModel(num_classes, LEARNING_RATE, bias=bias)
    batches, rank = class_batches(num_classes), num_classes * (num_classes - 1)
    count = 0
    for _, module, predicted in along_descent(model, batches):
        candidates = {1, num_classes - 1, num_classes, num_classes + 1, rank - 1}
        for k in sorted(candidates & set(predicted.inside_multiples())):
            record = measure(module, batches, k)
            assert_predicted(record, predicted, k)
            assert not record.subspace.trusted
            assert "gradient_fraction" not in record.metrics
            assert record.sketch is None
            count += 1
    assert count


@pytest.mark.parametrize("num_classes", [2, 4, 10])
def test_the_top_space_never_moves(num_classes):
    model = SolvableModel(num_classes, LEARNING_RATE)
    batches, previous, overlaps = class_batches(num_classes), None, []
    for _, module, predicted in along_descent(model, batches):
        if num_classes not in predicted.gaps():  # at zero, for K > 2, the K-th eigenvalue is a multiple one
            continue
        record = measure(module, batches, num_classes, previous=previous)
        assert_predicted(record, predicted, num_classes)
        if previous is not None:
            overlaps.append(record.metrics["overlap_previous"])
        previous = record
    assert len(overlaps) >= 2
    assert overlaps == pytest.approx([1.0] * len(overlaps), abs=CLOSE)


@pytest.mark.parametrize("given_as", ["counts", "pairs", "weight"])
def test_unequal_shares(given_as):
    shares = (0.1, 0.15, 0.3, 0.45)
    model = SolvableModel(4, LEARNING_RATE, shares=shares)
    options = {}
    if given_as == "counts":  # one batch a class, of 2, 3, 6 and 9 examples
        batches = given = class_batches(4, counts=[2, 3, 6, 9])
    else:
        batches = class_batches(4)
        given = [(batch, 7 * share) for batch, share in zip(batches, shares, strict=True)]
    if given_as == "weight":
        given, options = batches, {"weight": lambda batch: 7 * shares[int(batch[1][0])]}
    for step, module, predicted in along_descent(model, batches):
        for k in sorted(usual([1, 12], thorough=[2, 3, 4, 8] if step else [2])):
            assert_predicted(measure(module, given, k, **options), predicted, k)


def test_one_batch_or_one_a_class_is_the_same():
    model, batches = SolvableModel(4, LEARNING_RATE), class_batches(4)
    whole = [tuple(torch.cat(column) for column in zip(*batches, strict=True))]
    for _, module, predicted in along_descent(model, batches):
        assert_predicted(measure(module, whole, 12), predicted, 12)


# The negative control: linear regression, where descent leaves the top space


def test_the_gradient_of_a_quadratic_leaves_the_top_space():
    generator = torch.Generator().manual_seed(0)
    eigenvalues = torch.tensor([4.0, 3.0, 2.0, 0.5, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64)
    n, num_examples, k, learning_rate = len(eigenvalues), 24, 3, 0.1
    vectors, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))  # columns
    factor, _ = torch.linalg.qr(torch.randn(num_examples, n, generator=generator, dtype=torch.float64))
    inputs = num_examples**0.5 * factor @ (eigenvalues.sqrt()[:, None] * vectors.T)
    targets = torch.randn(num_examples, 1, generator=generator, dtype=torch.float64)
    batches = [(inputs[:16], targets[:16]), (inputs[16:], targets[16:])]
    module = nn.Linear(n, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    start = -vectors.T @ (inputs.T @ targets).ravel() / num_examples
    model = Quadratic(eigenvalues, start, learning_rate)

    def half_square(module, batch, batch_idx):
        return 0.5 * F.mse_loss(module(batch[0]), batch[1])

    optimizer, fractions = torch.optim.SGD(module.parameters(), lr=learning_rate), []
    for step in range(101):
        if step % 10 == 0:
            record = measure(module, batches, k, loss_fn=half_square)
            assert record.subspace.eigenvalues.tolist() == pytest.approx(eigenvalues[:k].tolist(), rel=CLOSE)
            assert record.metrics["gap_index"] == 3
            fractions.append(record.metrics["gradient_fraction"])
            assert fractions[-1] == pytest.approx(model.share(k, step), abs=CLOSE)
        optimizer.zero_grad()
        half_square(module, (inputs, targets), 0).backward()
        optimizer.step()
    assert fractions[0] > 0.8
    assert fractions[-1] < 1e-3
