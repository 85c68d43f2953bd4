"""Densities in a checkpoint: a few flat tensors, however many there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.linalg import Quadrature
from lightning_subspace.measurements.memory import tensor_entry
from lightning_subspace.subspace.spectral_density import SpectralDensity

# Of a density: known eigenvalues, vectors, nodes of a vector, dimension, number of chains.
COLUMNS = 5
ROUNDING = 1e-6  # of the sum of a few dozen weights


def encode_densities(densities: Sequence[SpectralDensity]) -> dict[str, Any]:
    """Densities as tensors; an empty dict for none.

    Example:
        >>> spectrum = Quadrature(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.ones(1, 2).double() / 2, 3)
        >>> decode_densities(encode_densities([SpectralDensity(7, spectrum)]), keep=9)[0].step
        7
    """
    if not densities:
        return {}
    spectra = [density.spectrum for density in densities]
    sizes = [(len(s.known), *s.nodes.shape, s.dimension, len(s.chains)) for s in spectra]
    lengths = [len(diagonal) for s in spectra for diagonal, _ in s.chains]
    values = [part.reshape(-1) for s in spectra for part in (s.known, s.nodes, s.weights, *_flat(s.chains))]
    return {
        "steps": torch.tensor([density.step for density in densities]),
        "sizes": torch.tensor(sizes),
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "values": torch.cat(values).double().cpu(),
    }


def decode_densities(state: Mapping[str, Any], keep: int) -> list[SpectralDensity]:
    """The densities that `encode_densities` was given.

    Args:
        state: what it returned.
        keep: how many there are at most.

    Raises:
        ValueError: for what it cannot have returned.
    """
    if not state:
        return []
    steps, lengths = (tensor_entry(state, name, torch.int64, 1).tolist() for name in ("steps", "lengths"))
    sizes, values = tensor_entry(state, "sizes", torch.int64, 2), tensor_entry(state, "values", torch.float64, 1)
    if steps != sorted(set(steps)) or not 0 < len(steps) <= keep or min(steps) < 0:
        raise ValueError(f"steps: expected up to {keep} ascending ones, got {len(steps)}")
    if sizes.shape != (len(steps), COLUMNS) or min(lengths, default=0) < 0 or int(sizes.min()) < 0:
        raise ValueError(f"sizes: expected {COLUMNS} numbers for each step, got {tuple(sizes.shape)}")
    rows = sizes.tolist()
    total = sum(k + 2 * vectors * nodes for k, vectors, nodes, _, _ in rows) + 2 * sum(lengths)
    if len(lengths) != sum(row[-1] for row in rows) or len(values) != total or not values.isfinite().all():
        raise ValueError(f"values: expected {total} finite numbers, got {len(values)}")
    if any(not vectors * nodes > 0 or not k <= dimension for k, vectors, nodes, dimension, _ in rows):
        raise ValueError("sizes: expected nodes, and no more eigenvalues than dimensions")
    pieces, each = _Pieces(values), iter(lengths)
    found = [SpectralDensity(step, pieces.spectrum(row, each)) for step, row in zip(steps, rows, strict=True)]
    if not all(_are_shares(density.spectrum.weights.sum(dim=1), density.spectrum.rest) for density in found):
        raise ValueError("values: expected weights with the sum 1 for each vector")
    return found


class _Pieces:
    """Takes tensors off a flat one, from the front."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._done = 0

    def spectrum(self, row: Sequence[int], lengths: Iterator[int]) -> Quadrature:
        k, vectors, nodes, dimension, chains = row
        known = self._take(k)
        theta, weights = (self._take(vectors * nodes).view(vectors, nodes) for _ in range(2))
        pairs = tuple((self._take(length), self._take(length)) for _ in range(chains) for length in [next(lengths)])
        return Quadrature(known, theta, weights, dimension, pairs)

    def _take(self, count: int) -> Tensor:
        self._done += count
        return self._values[self._done - count : self._done].clone()


def _are_shares(sums: Tensor, rest: int) -> bool:
    # Where all eigenvalues are known there is nothing to weigh.
    return not sums.any() if rest == 0 else bool(((sums - 1.0).abs() < ROUNDING).all())


def _flat(chains: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [part for chain in chains for part in chain]
