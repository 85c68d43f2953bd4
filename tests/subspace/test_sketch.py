"""The sketch: a hash with the statistics of a random one, and overlap estimates within the error the module states."""

import math

import pytest
import torch
from torch import nn

from lightning_subspace.linalg.normals import mixed_
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.subspace import sketch as sketch_module
from lightning_subspace.subspace.sketch import CELLS, TABLES, Sketch, count_sketch, sketch, sketch_overlap
from lightning_subspace.subspace.subspace import orthonormality_defect, overlap, principal_angles

EPS32 = torch.finfo(torch.float32).eps
WIDTH = CELLS // TABLES


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormalised(rows):
    return torch.linalg.qr(rows.T)[0].T.contiguous()


def space_of(n, name="weight"):
    return Partition.even(ParameterSpace((name,), (torch.Size([n]),)))


def standard_deviation(squared_cosines, d=CELLS):
    """The formula of the module docstring."""
    x, k = squared_cosines, len(squared_cosines)
    return math.sqrt(4 * float((x * (1 - x) ** 2).mean()) / (k * d) + 2 * (1 - float(x.mean())) ** 2 / d**2)


def errors(basis, others, hashes, space=space_of):
    """Estimate minus truth, (others, hashes); every hash is a new name of the parameter."""
    n, rows = basis.shape[1], []
    for h in range(hashes):
        one = sketch(basis, space(n, f"weight.{h}"))
        rows.append([sketch_overlap(one, sketch(o, space(n, f"weight.{h}"))) - overlap(basis, o) for o in others])
    return torch.tensor(rows, dtype=torch.float64).T


def assert_within_stated_bound(measured, squared_cosines, outliers=4.5):
    """Bias, standard deviation and worst error against the docstring's formula."""
    deviation, count = standard_deviation(squared_cosines), len(measured)
    assert float(measured.mean().abs()) <= 1 / CELLS + 4 * deviation / math.sqrt(count)
    assert float(measured.std()) <= deviation * (1 + 4 / math.sqrt(2 * count)) + 1e-6
    assert float(measured.abs().max()) <= outliers * deviation + 1 / CELLS


def splitmix64(word):
    """The reference finaliser on Python's integers."""
    mask = (1 << 64) - 1
    word &= mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def words(name, n):
    """The 64 bits of every coordinate, as the sketch takes them."""
    return sketch_module._words(name, 0, torch.empty(1, n))


def cells_and_signs(name, n, table):
    bits = words(name, n) >> 16 * table
    return (bits & 0x7FFF) % WIDTH, ((bits >> 15) & 1) * 2 - 1


# the hash


def test_the_mixer_is_splitmix64():
    values = [0, 1, -1, 2**40 + 7, -(2**63), 2**63 - 1]
    mixed = mixed_(torch.tensor(values)).tolist()
    assert [m % 2**64 for m in mixed] == [splitmix64(v) for v in values]


def test_the_hash_never_changes():
    """Sketches in old checkpoints stay comparable."""
    assert words("layer.weight", 3).tolist() == [8706248789341556256, -8942836553877134801, -5694037645441803913]


@pytest.mark.parametrize("name", ["weight", "layers.0.bias"])
@pytest.mark.parametrize("table", range(TABLES))
def test_cells_are_uniform(name, table):
    """Chi-square with WIDTH - 1 degrees of freedom, within 4 standard deviations on both sides."""
    n = 200_000
    counts = cells_and_signs(name, n, table)[0].bincount(minlength=WIDTH).double()
    chi2 = float((counts - n / WIDTH).square().sum() / (n / WIDTH))
    assert abs(chi2 - (WIDTH - 1)) <= 4 * math.sqrt(2 * (WIDTH - 1))


@pytest.mark.parametrize("table", range(TABLES))
def test_signs_are_balanced_and_independent_of_cells_and_neighbours(table):
    n = 200_000
    cells, signs = cells_and_signs("weight", n, table)
    assert abs(int(signs.sum())) <= 4 * math.sqrt(n)
    assert abs(int((signs[1:] * signs[:-1]).sum())) <= 4 * math.sqrt(n)
    sums = torch.zeros(WIDTH, dtype=torch.int64).index_add_(0, cells, signs).double()
    counts = cells.bincount(minlength=WIDTH).double()
    chi2 = float((sums.square() / counts).sum())
    assert abs(chi2 - WIDTH) <= 4 * math.sqrt(2 * WIDTH)


def test_tables_are_independent():
    n = 200_000
    pairs = [(a, b) for a in range(TABLES) for b in range(a)]
    for a, b in pairs:
        (cells_a, signs_a), (cells_b, signs_b) = cells_and_signs("weight", n, a), cells_and_signs("weight", n, b)
        assert abs(int((signs_a * signs_b).sum())) <= 4 * math.sqrt(n)
        same = int((cells_a == cells_b).sum())
        assert abs(same - n / WIDTH) <= 4 * math.sqrt(n / WIDTH)


def test_every_coordinate_goes_to_one_cell_of_each_table():
    n = 5000
    image = count_sketch(torch.eye(n)[:50], space_of(n))
    assert image.shape == (50, CELLS)
    for table in range(TABLES):
        part = image[:, table * WIDTH : (table + 1) * WIDTH]
        cells, signs = cells_and_signs("weight", 50, table)
        assert torch.equal(part, torch.zeros(50, WIDTH).scatter_(1, cells[:, None], signs[:, None] / 2.0))


def test_the_hash_depends_on_the_name():
    n, rows = 5000, normal(2, 5000)
    assert not torch.equal(count_sketch(rows, space_of(n, "a")), count_sketch(rows, space_of(n, "b")))
    halves = (torch.Size([2500]),) * 2
    straight, swapped = (Partition.even(ParameterSpace(names, halves)) for names in (("a", "b"), ("b", "a")))
    assert not torch.equal(count_sketch(rows, straight), count_sketch(rows, swapped))


def test_the_same_offsets_of_two_parameters_are_hashed_independently():
    n = 200_000
    same = int((cells_and_signs("a", n, 0)[0] == cells_and_signs("b", n, 0)[0]).sum())
    assert abs(same - n / WIDTH) <= 4 * math.sqrt(n / WIDTH)


def test_the_order_of_parameters_does_not_matter():
    """A model that declares its layers in another order keeps the sketch."""
    shapes = {"a": torch.Size([40, 50]), "b": torch.Size([3000]), "c": torch.Size([20, 30, 5])}
    forward = Partition.even(ParameterSpace(tuple(shapes), tuple(shapes.values())))
    backward = Partition.even(ParameterSpace(tuple(shapes)[::-1], tuple(shapes.values())[::-1]))
    basis, other = orthonormalised(normal(3, forward.n)), orthonormalised(normal(3, forward.n, seed=1))
    other = orthonormalised(basis + 0.5 * other)

    def reordered(rows):
        return torch.cat(list(rows.split(forward.space.numels, dim=1))[::-1], dim=1)

    torch.testing.assert_close(
        count_sketch(reordered(basis), backward), count_sketch(basis, forward), rtol=0, atol=1e-15
    )
    estimate = sketch_overlap(sketch(basis, forward), sketch(other, forward))
    mixed = sketch_overlap(sketch(basis, forward), sketch(reordered(other), backward))
    assert mixed == pytest.approx(estimate, abs=16 * EPS32)


def test_parameters_that_are_left_out_count_as_zeros():
    whole = Partition.even(ParameterSpace(("a", "b"), (torch.Size([5000]), torch.Size([700]))))
    rows = normal(2, 5700)
    rows[:, 5000:] = 0.0
    assert torch.equal(count_sketch(rows, whole), count_sketch(rows[:, :5000], space_of(5000, "a")))


def test_the_dtype_does_not_matter():
    rows = normal(3, 9000)
    exact, rounded = count_sketch(rows, space_of(9000)), count_sketch(rows.float(), space_of(9000))
    assert (exact.dtype, rounded.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=64 * EPS32)


def test_neither_the_global_generator_nor_the_default_dtype_matters():
    rows = normal(2, 5000)
    expected = count_sketch(rows, space_of(5000))
    state = torch.get_rng_state()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(count_sketch(rows, space_of(5000)), expected)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("block", [1000, 4999, 5000, 7001])
def test_blocks_do_not_matter(monkeypatch, block):
    rows = normal(2, 7001)
    expected = count_sketch(rows, space_of(7001))
    monkeypatch.setattr(sketch_module, "HASHED_AT_ONCE", block)
    torch.testing.assert_close(count_sketch(rows, space_of(7001)), expected, rtol=0, atol=1e-14)


# the image


def test_the_image_is_linear():
    """So that ranks can add up their parts."""
    u, v = normal(3, 6000), normal(3, 6000, seed=1)
    space = space_of(6000)
    combined = count_sketch(2.0 * u - 0.5 * v, space)
    torch.testing.assert_close(
        combined, 2.0 * count_sketch(u, space) - 0.5 * count_sketch(v, space), rtol=0, atol=1e-13
    )
    left, right = u.clone(), u.clone()
    left[:, 2500:], right[:, :2500] = 0.0, 0.0
    torch.testing.assert_close(
        count_sketch(left, space) + count_sketch(right, space), count_sketch(u, space), rtol=0, atol=1e-13
    )


def test_inner_products_are_right_on_average_with_the_stated_variance():
    n, hashes = 5000, 400
    u, v = orthonormalised(normal(2, n))
    v = 0.6 * u + 0.8 * v
    expected = (1 + 0.6**2 - 2 * float((u * v).square().sum())) / CELLS
    values = []
    for h in range(hashes):
        a, b = count_sketch(torch.stack([u, v]), space_of(n, f"{h}"))
        values.append(float(a @ b))
    values = torch.tensor(values, dtype=torch.float64)
    assert abs(float(values.mean()) - 0.6) <= 4 * math.sqrt(expected / hashes)
    assert float(values.var()) == pytest.approx(expected, rel=4 * math.sqrt(2 / hashes))


@pytest.mark.parametrize("cells", [0, 2, 1022, 2 * 65537, 1 << 18])
def test_numbers_of_cells_that_the_hash_cannot_serve_are_refused(cells):
    with pytest.raises(ValueError, match=f"multiple of 4 in .*, got {cells}"):
        count_sketch(torch.ones(1, 300_000), space_of(300_000), cells)


# the sketch


@pytest.mark.parametrize(("n", "exact"), [(CELLS - 1, True), (CELLS, True), (CELLS + 1, False)])
def test_no_hash_where_the_basis_fits(n, exact):
    basis, other = orthonormalised(normal(3, n)), orthonormalised(normal(3, n, seed=1))
    other = orthonormalised(basis + 0.7 * other)
    one, two = sketch(basis, space_of(n)), sketch(other, space_of(n))
    assert one.exact == exact
    if exact:
        assert torch.equal(one.basis, basis.float())
        assert sketch_overlap(one, two) == pytest.approx(overlap(basis, other), abs=8 * EPS32)


@pytest.mark.parametrize("n", [100, 5000])
def test_a_sketch_is_an_orthonormal_float32_basis_of_its_own(n):
    basis = orthonormalised(normal(3, n)).float().requires_grad_()
    result = sketch(basis, space_of(n))
    assert result.basis.dtype == torch.float32
    assert not result.basis.requires_grad
    assert result.basis.shape == (3, min(n, CELLS))
    assert orthonormality_defect(result.basis) <= 8 * EPS32
    before = result.basis.clone()
    with torch.no_grad():
        basis.zero_()  # the solver's workspace, used again
    assert torch.equal(result.basis, before)


@pytest.mark.parametrize("k", [1, 2, 10, 50])
def test_the_diagonal_is_one_and_the_estimate_symmetric(k):
    n = 20_000
    basis, other = orthonormalised(normal(k, n)), orthonormalised(normal(k, n, seed=1))
    one, two = sketch(basis, space_of(n)), sketch(orthonormalised(basis + other), space_of(n))
    assert sketch_overlap(one, one) == pytest.approx(1.0, abs=1e-6)
    assert sketch_overlap(one, two) == pytest.approx(sketch_overlap(two, one), abs=1e-6)
    turned = orthonormalised(normal(k, k, seed=2)) @ basis
    assert sketch_overlap(sketch(turned, space_of(n)), one) == pytest.approx(1.0, abs=1e-6)
    assert sketch_overlap(sketch(turned, space_of(n)), two) == pytest.approx(sketch_overlap(one, two), abs=1e-6)


@pytest.mark.parametrize(("k", "hashes"), [(1, 60), (2, 40), (10, 24), (50, 6)])
def test_overlaps_are_estimated_within_the_stated_error(k, hashes):
    n, truths = 20_000, [0.0, 0.25, 0.5, 0.75, 1.0]
    frame = orthonormalised(normal(2 * k, n, seed=k))
    others = [math.sqrt(o) * frame[:k] + math.sqrt(1 - o) * frame[k:] for o in truths]
    for truth, measured in zip(truths, errors(frame[:k], others, hashes), strict=True):
        assert_within_stated_bound(measured, torch.full((k,), truth, dtype=torch.float64))
        stated = {1: 0.012, 2: 0.0085, 10: 0.0038, 50: 0.0017}[k]
        assert float(measured.square().mean().sqrt()) <= 1.5 * stated
        if 0.0 < truth < 1.0:  # and the formula is no mere bound
            deviation = standard_deviation(torch.full((k,), truth, dtype=torch.float64))
            assert float(measured.std()) >= deviation * (1 - 4 / math.sqrt(2 * hashes))


def test_the_error_does_not_depend_on_n():
    frame = orthonormalised(normal(20, 300_000)).float()
    other = math.sqrt(0.5) * (frame[:10] + frame[10:])
    (measured,) = errors(frame[:10], [other], 8)
    assert_within_stated_bound(measured, torch.full((10,), 0.5))


def test_the_error_that_is_reported_is_the_largest_one_of_the_formula():
    equal = [torch.full((10,), x, dtype=torch.float64) for x in torch.linspace(0, 1, 301)]
    reported = sketch(orthonormalised(normal(10, 5000)), space_of(5000)).error
    assert max(standard_deviation(x) for x in equal) <= reported <= 1.01 * max(standard_deviation(x) for x in equal)
    assert reported < 0.0038 + 1e-4
    assert sketch(orthonormalised(normal(10, 50)), space_of(50)).error == 0.0


@pytest.mark.parametrize("shared", [2, 5, 8])
def test_spaces_that_share_some_directions_are_estimated_better_still(shared):
    """Every principal angle is 0 or 90 degrees: what is left of the bias of QR would show."""
    k = 10
    frame = orthonormalised(normal(2 * k, 20_000, seed=3))
    (measured,) = errors(frame[:k], [frame[k - shared : 2 * k - shared]], 24)
    squared_cosines = torch.tensor([1.0] * shared + [0.0] * (k - shared))
    assert standard_deviation(squared_cosines) < 3e-4
    assert_within_stated_bound(measured, squared_cosines)


def test_spaces_of_different_dimensions():
    frame = orthonormalised(normal(24, 20_000, seed=4))
    others = [frame[:4], frame[2:6], frame[20:]]
    measured = errors(frame[:20], others, 12)
    assert float(measured.abs().max()) <= 4.5 * math.sqrt(2 * 20 / 4) / CELLS + 1 / CELLS
    one, two = sketch(frame[:20], space_of(20_000)), sketch(frame[2:6], space_of(20_000))
    assert sketch_overlap(one, two) == pytest.approx(sketch_overlap(two, one), abs=1e-6)


# bases that are not random


def structured(kind, rows, n):
    t = torch.arange(n, dtype=torch.float64) + 0.5
    if kind == "sinusoids":
        return torch.stack([torch.cos(math.pi * j * t / n) for j in range(1, rows + 1)])
    if kind == "layers":  # constant on a block of coordinates each
        return torch.stack([(t // (n / rows) == j).double() for j in range(rows)])
    if kind == "outer products":  # class direction times feature, as for a softmax layer
        return torch.stack(
            [torch.kron(torch.eye(10).double()[j % 10] - 0.1, f) for j, f in enumerate(normal(rows, n // 10))]
        )
    if kind == "power law":
        return normal(rows, n) / t.sqrt()
    if kind == "steep power law":
        return normal(rows, n) / t
    support = torch.zeros(n, dtype=torch.float64)
    support[torch.randperm(n, generator=torch.Generator().manual_seed(0))[: int(kind)]] = 1.0
    return normal(rows, n) * support


@pytest.mark.parametrize(
    ("kind", "outliers"),
    [
        ("sinusoids", 4.5),
        ("layers", 4.5),
        ("outer products", 4.5),
        ("power law", 4.5),
        ("steep power law", 6.0),
        ("300", 4.5),
        ("30", 6.0),
    ],
)
def test_structured_and_concentrated_bases_obey_the_same_bound(kind, outliers):
    k, n = 10, 20_000
    rows = structured(kind, 2 * k, n)
    basis, other = orthonormalised(rows[:k]), orthonormalised(0.6 * rows[:k] + 0.4 * rows[k:])
    (measured,) = errors(basis, [other], 24)
    assert_within_stated_bound(measured, principal_angles(basis, other).cos().square(), outliers)


@pytest.mark.parametrize(
    ("k", "shared", "deviation", "worst"),
    [(1, 0, 0.01, 0.07), (2, 1, 0.005, 0.04), (10, 0, 0.005, 0.03), (10, 5, 0.004, 0.02), (50, 25, 0.004, 0.015)],
)
def test_one_hot_bases_err_by_a_sixteenth_of_a_direction_a_collision(k, shared, deviation, worst):
    n = 20_000
    coordinates = torch.randperm(n, generator=torch.Generator().manual_seed(k))[: 2 * k - shared]
    frame = torch.zeros(len(coordinates), n).scatter_(1, coordinates[:, None], 1.0)
    (measured,) = errors(frame[:k], [frame[k - shared :]], 60 if k < 50 else 12)
    assert float(measured.square().mean().sqrt()) <= deviation
    assert float(measured.abs().max()) <= worst


def test_two_coordinates_in_one_cell_are_still_told_apart():
    """With a single table their images would be parallel and the overlap 1."""
    n = 20_000
    cells = cells_and_signs("weight", n, 0)[0]
    p = int((cells == cells[0]).nonzero()[1])
    frame = torch.zeros(2, n)
    frame[0, 0] = frame[1, p] = 1.0
    assert orthonormality_defect(count_sketch(frame, space_of(n))) == pytest.approx(1 / TABLES)
    one, two = (sketch(row[None], space_of(n)) for row in frame)
    assert sketch_overlap(one, two) == pytest.approx(1 / 16, abs=1 / CELLS)
    both = sketch(frame, space_of(n))
    assert sketch_overlap(both, one) == pytest.approx(1.0, abs=1e-6)


# what cannot be compared


def test_sketches_of_different_kinds_are_refused():
    exact = sketch(orthonormalised(normal(2, 8)), Partition.even(ParameterSpace.of(nn.Linear(3, 2))))
    hashed = sketch(orthonormalised(normal(2, 5000)), space_of(5000))
    coarse = sketch(orthonormalised(normal(2, 5000)), space_of(5000), cells=1024)
    full = Sketch(hashed.basis, exact=True)
    for one, two in [(exact, hashed), (hashed, coarse), (hashed, full)]:
        with pytest.raises(ValueError, match="sketches can be compared if"):
            sketch_overlap(one, two)
