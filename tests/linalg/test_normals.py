"""Random vectors: functions of seed, number and coordinate, standard normal, independent, the same everywhere."""

import itertools
import math
import struct

import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_subspace.linalg import normals as module
from lightning_subspace.linalg.normals import normals, words

F64 = torch.float64
GOLDEN = 0x9E3779B97F4A7C15
MANY = 1_000_000
PINNED = [-0.6844556445771165, 0.36119265415974294, 0.10653445861451559, -1.3203360909691637]
SMALLEST_P = 1e-3  # of a test with a fixed seed


def whole(n: int, seed: int = 0, number: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return normals(seed, number, [range(n)], dtype)


# -- the same numbers everywhere --------------------------------------------------------------------------------------


def test_words_are_those_of_splitmix64() -> None:
    """The first outputs from the seed 1234567, as its implementations in C and Java print them."""
    found = words(1234567, GOLDEN, torch.arange(5)).tolist()
    assert [word % 2**64 for word in found] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def bits(number: float) -> int:
    (found,) = struct.unpack("<q", struct.pack("<d", number))
    return int(found)


def number(bits: int) -> float:
    (found,) = struct.unpack("<d", struct.pack("<q", bits))
    return float(found)


def horner(x: float, coefficients: list[float]) -> float:
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


def one_by_one(word: int) -> tuple[float, float]:
    """The pair of a word in Python's own numbers, each operation rounded as IEEE 754 says."""
    u = (word & 0xFFFFFFFF) + 0.5
    exponent = (bits(u) - 0x3FE6A09E667F3BCD) >> 52
    mantissa = number(bits(u) - (exponent << 52))
    assert math.sqrt(0.5) <= mantissa < math.sqrt(2.0)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    atanh = horner(ratio * ratio, [1.0 / i for i in (13, 11, 9, 7, 5, 3, 1)]) * ratio
    square = (32 - exponent) * (2.0 * 0.6931471805599453) - atanh * 4.0
    root = number((bits(square) >> 1) + (0x1FF769E5 << 32))
    for _ in range(3):
        root = (square / root + root) * 0.5
    angle = (word >> 32) * (math.pi / 2**33)
    signs = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]
    sine = horner(angle * angle, [signs[i] / math.factorial(2 * i + 1) for i in (5, 4, 3, 2, 1, 0)]) * angle
    cosine = horner(angle * angle, [signs[i] / math.factorial(2 * i) for i in (6, 5, 4, 3, 2, 1, 0)])
    for _ in range(2):
        sine, cosine = sine * cosine * 2.0, cosine * cosine * 2.0 - 1.0
    return cosine * root, sine * root


def test_every_bit_is_what_ieee_754_says() -> None:
    """So no library's logarithm or sine is in it, nor a product and a sum rounded at once."""
    start, increment = module._stream(5, 7)
    every = words(start, increment, torch.arange(2000)).tolist()
    expected = list(itertools.chain.from_iterable(map(one_by_one, every)))
    assert whole(4000, 5, 7).tolist() == expected
    assert whole(4000, 5, 7, torch.float32).tolist() == torch.tensor(expected, dtype=F64).float().tolist()


@pytest.mark.parametrize("word", [0, 1, -1, 2**63 - 1, -(2**63), 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, -(2**32)])
def test_the_ends_of_the_ranges_are_right(word: int) -> None:
    out = torch.empty(1, 2, dtype=F64)
    module._box_muller(torch.tensor([word]), out)
    assert tuple(out[0].tolist()) == one_by_one(word)


def test_it_is_the_transformation_of_box_and_muller() -> None:
    every = words(3, GOLDEN, torch.arange(100_000))
    radius = ((every & 0xFFFFFFFF).double().add(0.5) / 2**32).log().mul(-2.0).sqrt()
    angle = (every >> 32).double() * (math.pi / 2**31)
    out = torch.empty(len(every), 2, dtype=F64)
    module._box_muller(every.clone(), out)
    expected = torch.stack([angle.cos() * radius, angle.sin() * radius], dim=1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_blocks_do_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [range(3, 10), range(0), range(20, 21), range(21, 20 + 200), range(2)]
    expected = whole(220)[[i for piece in ranges for i in piece]]
    assert torch.equal(normals(0, 0, ranges, F64), expected)
    monkeypatch.setattr(module, "_BLOCK", block)
    assert torch.equal(normals(0, 0, ranges, F64), expected)
    assert torch.equal(normals(0, 0, ranges, torch.float32), expected.float())


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_parts_are_those_of_the_whole(ranks: int) -> None:
    n = 100_003
    cuts = [n * rank // ranks for rank in range(ranks + 1)]
    parts = [normals(4, 2, [range(*ends)], torch.float32) for ends in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole(n, 4, 2).float())


def test_threads_do_not_matter() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = whole(70_000)
        torch.set_num_threads(2)
        assert torch.equal(whole(70_000), expected)
    finally:
        torch.set_num_threads(threads)


def test_coordinates_may_be_many_and_seeds_large() -> None:
    far = normals(2**63 - 1, 2_000, [range(2**41 - 3, 2**41 + 3)], F64)
    assert torch.equal(normals(2**63 - 1, 2_000, [range(2**41, 2**41 + 1)], F64), far[3:4])
    assert len(far.unique()) == 6


def test_the_numbers_never_change() -> None:
    """Probes of one seed stay comparable."""
    assert whole(4, 1, 2).tolist() == PINNED


def test_defaults_of_torch_and_its_generator_are_left_alone() -> None:
    state, expected = torch.get_rng_state(), whole(11)
    torch.set_default_dtype(F64)
    try:
        with torch.device("meta"):
            assert torch.equal(whole(11), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


# -- standard normal and independent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_distribution_is_standard_normal(seed: int) -> None:
    drawn = whole(MANY, seed)
    for part in (drawn[0::2], drawn[1::2]):
        assert scipy.stats.kstest(part.numpy(), "norm").pvalue > SMALLEST_P
    for power in range(1, 9):
        mean = math.prod(range(1, power, 2)) if power % 2 == 0 else 0.0
        variance = math.prod(range(1, 2 * power, 2)) - mean**2
        assert abs(float(drawn.pow(power).mean()) - mean) < 4 * math.sqrt(variance / MANY)


def test_the_tails_are_as_heavy_as_they_should_be() -> None:
    drawn = torch.cat([whole(MANY, 3, number) for number in range(4)]).abs()
    for bound in (3.0, 4.0, 4.5):
        expected = 4 * MANY * math.erfc(bound / math.sqrt(2.0))
        assert abs(int((drawn > bound).sum()) - expected) < 4 * math.sqrt(expected)


def test_neighbouring_coordinates_are_independent() -> None:
    drawn = whole(MANY)
    for lag in (*range(1, 17), 64, 1024, 4096, 2 * 4096 + 1):
        for of in (drawn, drawn.square() - 1.0):  # the pairs share a radius and an angle
            one, other = of[:-lag], of[lag:]
            product = one * other
            assert abs(float(product.mean())) < 4.5 * float(product.std()) / math.sqrt(len(product))


def test_seeds_and_numbers_are_independent() -> None:
    """All inner products of 150 vectors are standard normal, up to a factor sqrt(n)."""
    n = 4096
    pairs = list(itertools.product([0, 1, 2, 3, 2**32, 2**63 - 1], [*range(20), 1000, 1001, 2000, 2001, 2002]))
    vectors = torch.stack([whole(n, *pair) for pair in pairs])
    gram = vectors @ vectors.T / math.sqrt(n)
    products = gram[tuple(torch.triu_indices(len(pairs), len(pairs), 1))]
    assert scipy.stats.kstest(products.numpy(), "norm").pvalue > SMALLEST_P
    # Nor is one of them another one moved.
    spectra = torch.fft.rfft(vectors, n=2 * n)
    for step in (1, 20, 25, 77):
        moved = torch.fft.irfft(spectra[step:] * spectra[:-step].conj(), n=2 * n) / math.sqrt(n)
        assert float(moved.abs().max()) < 6.5


def test_streams_have_increments_of_their_own() -> None:
    streams = [module._stream(seed, number) for seed in range(40) for number in range(40)]
    starts, increments = zip(*streams, strict=True)
    assert len(set(starts)) == len(set(increments)) == 1600
    assert all(increment % 2 == 1 for increment in increments)
    assert all((step ^ (step >> 1)).bit_count() >= 24 for step in increments)


@pytest.mark.parametrize("n", [3, 16, 200])
def test_directions_are_uniform(n: int) -> None:
    """The share of a direction along a fixed one has a beta distribution, as the certificate's risk assumes."""
    drawn = torch.stack([whole(n, 0, number) for number in range(1000)])
    share = (drawn / drawn.norm(dim=1, keepdim=True)).T
    place = torch.arange(n, dtype=F64)
    for fixed in (place == 0, place == n - 1, place > -1, (-1.0) ** place, place + 1.0, torch.cos(math.pi * place / n)):
        along = (fixed.double() / fixed.double().norm()) @ share
        assert scipy.stats.kstest(along.square().numpy(), "beta", args=(0.5, (n - 1) / 2)).pvalue > SMALLEST_P
        assert abs(int((along > 0).sum()) - 500) < 4 * math.sqrt(250)
