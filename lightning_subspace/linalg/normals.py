"""Standard normal numbers that depend on seed, number and coordinate alone.

A coordinate of a random vector is computed from its place, not drawn in turn: whoever needs a part of a vector, on
whatever device, computes that part, in blocks of any size. Two coordinates share 64 bits from SplitMix64, in which
every (seed, number) has an increment of its own, so that no two vectors walk through the same states; the
transformation of Box and Muller makes two normal numbers of them.

All devices give the same bits. Integers are exact, and of float64 only +, -, * and / are used, each in a call of its
own: these IEEE 754 rounds in one way, whereas every library has its own logarithm and sine. Here those are sums of
Taylor series, right to 1e-11. The numbers end at 6.8 standard deviations.

Sources: G. Steele, D. Lea and C. Flood, Fast splittable pseudorandom number generators (OOPSLA 2014), section 4;
G. Box and M. Muller, A note on the generation of random normal deviates, Ann. Math. Stat. 29 (1958), 610-611.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: the increment of the stream of keys
_FEWEST_CHANGES, _ALTERNATING = 24, 0xAAAAAAAAAAAAAAAA  # of neighbouring bits in an increment, and what mends it
_BLOCK, _BLOCK_ELSEWHERE = 1 << 15, 1 << 22  # coordinates at once: on a CPU in its cache, elsewhere for few launches
_ROOT_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2) in float64
_HALF_BIAS = 0x1FF769E5 << 32  # added to half the bits of a float64 it gives about those of the square root
_LOG_2 = 0.6931471805599453
# Of atanh(s) / s in s^2, for |s| < .172, and of sin(t) / t in t^2, for |t| <= pi / 4; the highest power first.
_ATANH = [1.0 / (2 * i + 1) for i in range(6, -1, -1)]
_SINE = [(-1.0) ** i / math.factorial(2 * i + 1) for i in range(5, -1, -1)]
_COSINE = [(-1.0) ** i / math.factorial(2 * i) for i in range(6, -1, -1)]


def normals(
    seed: int, number: int, ranges: Sequence[range], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Coordinates of a random vector, standard normal and independent.

    Args:
        seed: any number; neighbouring ones give unrelated vectors.
        number: of the vector, at least 0.
        ranges: of coordinates, one after another in the result.
        dtype: of the result, rounded from float64.
        device: of the result.

    Example:
        >>> whole = normals(0, 1, [range(5)], torch.float64)
        >>> torch.equal(normals(0, 1, [range(3, 5), range(2)], torch.float64), whole[[3, 4, 0, 1]])
        True
    """
    device = torch.device(device)
    if device.type == "mps":  # has no float64
        return normals(seed, number, ranges, dtype).to(device)
    out = torch.empty(sum(map(len, ranges)), dtype=dtype, device=device)
    start, increment = _stream(seed, number)
    done = 0
    for pieces in _batches(ranges, _BLOCK if out.is_cpu else _BLOCK_ELSEWHERE):
        counters = [torch.arange(piece.start // 2, (piece.stop + 1) // 2, device=device) for piece in pieces]
        both = out.new_empty(sum(map(len, counters)), 2)
        _box_muller(words(start, increment, counters[0] if len(counters) == 1 else torch.cat(counters)), both)
        place = 0
        for piece, own in zip(pieces, counters, strict=True):
            first = place + piece.start % 2
            out[done : done + len(piece)] = both.view(-1)[first : first + len(piece)]
            done += len(piece)
            place += 2 * len(own)
    return out


def words(start: int, increment: int, counters: Tensor) -> Tensor:
    """Outputs of SplitMix64, 64 bits each, by their place in the sequence."""
    return mixed_(counters.mul(_signed(increment)).add_(_signed(start + increment)))


def mixed_(word: Tensor) -> Tensor:
    """The finaliser of SplitMix64 in place: a bijection of int64."""
    # int64 wraps as uint64 does; the masks make its shifts logical.
    word.bitwise_xor_((word >> 30).bitwise_and_((1 << 34) - 1)).mul_(-0x40A7B892E31B1A47)
    word.bitwise_xor_((word >> 27).bitwise_and_((1 << 37) - 1)).mul_(-0x6B2FB644ECCEEE15)
    return word.bitwise_xor_((word >> 31).bitwise_and_((1 << 33) - 1))


def _stream(seed: int, number: int) -> tuple[int, int]:
    """First state and increment of a vector's own SplitMix64."""
    key = int(mixed_(torch.tensor(_signed(seed), device="cpu")))
    start, increment = words(key, _GOLDEN, torch.arange(2 * number, 2 * number + 2, device="cpu")).tolist()
    increment = (increment | 1) % 2**64
    if (increment ^ (increment >> 1)).bit_count() < _FEWEST_CHANGES:  # section 4 of Steele et al.
        increment ^= _ALTERNATING
    return start, increment


def _box_muller(word: Tensor, out: Tensor) -> None:  # (pairs,), (pairs, 2)
    """Write two numbers a word: 32 bits for radius and angle each."""
    # radius^2 = -2 log(u / 2^32) with u = m 2^e, m between sqrt(1/2) and sqrt(2): log m = 2 atanh((m - 1) / (m + 1)).
    bits = (word & 0xFFFFFFFF).to(torch.float64).add_(0.5).view(torch.int64)
    exponent = bits.sub(_ROOT_HALF).bitwise_right_shift_(52)
    mantissa = bits.sub_(exponent << 52).view(torch.float64)
    ratio = (mantissa - 1.0).div_(mantissa.add_(1.0))
    logarithm = _series(ratio.square(), _ATANH).mul_(ratio).mul_(4.0)
    radius = _root(exponent.neg_().add_(32).to(torch.float64).mul_(2.0 * _LOG_2).sub_(logarithm))
    # Sine and cosine of a quarter of the angle, then of half of it, then of the angle.
    quarter = word.bitwise_right_shift_(32).to(torch.float64).mul_(math.pi / 2**33)
    square = quarter.square()
    sine, cosine = _series(square, _SINE).mul_(quarter), _series(square, _COSINE)
    for _ in range(2):
        sine, cosine = sine * cosine * 2.0, cosine.square().mul_(2.0).sub_(1.0)
    out[:, 0] = cosine.mul_(radius)
    out[:, 1] = sine.mul_(radius)


def _root(square: Tensor) -> Tensor:
    """The square root, by Heron's method; right to 1e-13."""
    # Half the exponent, and half the mantissa for want of its root: right to 4 %. On a CPU torch's own `sqrt` starts
    # threads for 2,048 numbers, and waits for them where the processor has others to run.
    root = (square.view(torch.int64) >> 1).add_(_HALF_BIAS).view(torch.float64)
    for _ in range(3):
        root = (square / root).add_(root).mul_(0.5)
    return root


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """A polynomial by Horner's rule, highest power first."""
    total = x.mul(coefficients[0])
    for coefficient in coefficients[1:-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(coefficients[-1])


def _batches(ranges: Iterable[range], most: int) -> Iterator[list[range]]:
    """The ranges cut in pieces and put together, `most` coordinates at once."""
    batch: list[range] = []
    size = 0
    for whole in ranges:
        for first in range(whole.start, whole.stop, most):
            piece = range(first, min(first + most, whole.stop))
            if size + len(piece) > most:
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
    if batch:
        yield batch


def _signed(word: int) -> int:
    """The int64 with the bits of a uint64."""
    return (word + 2**63) % 2**64 - 2**63
