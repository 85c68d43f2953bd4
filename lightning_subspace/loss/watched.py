"""Tensors and arrays used as they are, noticed where written to.

State of the optimizer, the data, what objects of other packages hold: a copy for every evaluation would cost as much as
the parameters do. Small ones have a copy in each probe; large ones when they are met for the first time, until the
first evaluation has left them alone. From the copy they are put back. A tensor counts its writes, which is looked at
behind every evaluation. What passes the counter by (through `.data`) shows behind the first one and at the end of a
probe, where copies are compared, or else checksums.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_subspace._torch import version_of
from lightning_subspace.loss.findings import Findings
from lightning_subspace.parallel.bit_sums import as_integers
from lightning_subspace.parallel.fsdp import local_part
from lightning_subspace.state.free_memory import free_memory
from lightning_subspace.state.layouts import bytes_of, dense_parts

SHARE = 4  # copies take at most one part in so many of the free memory
MOST_COPIED = 1 << 32  # bytes on a CPU, where they take 2 s, once a run
MOST_SUMMED = 1 << 30  # bytes on a CPU, where they take 0.1 s; an accelerator is not limited
MOST_COMPARED = 1 << 24  # bytes of small ones that have a copy in each probe, which takes 5 ms
MOST_TENSORS = 4096  # small ones that have a copy in each probe, which takes 10 ms
MOST_HASHED = 1 << 28  # bytes of arrays once a probe, which take 0.1 s

ZERO = torch.zeros((), dtype=torch.int64)


class WatchedTensors:
    """Tensors that are not copied.

    Args:
        tensors: as they are before an evaluation.
        findings: what is known of them; those that were written to before keep a copy to be put back from.
        sums: whether those without a copy are summed, too.
    """

    def __init__(self, tensors: Sequence[Tensor], findings: Findings, *, sums: bool = True) -> None:
        self._tensors = tensors
        self._findings = findings
        self._backups: dict[int, Tensor] = {}
        self._once: set[int] = set()  # ids of those whose copies are dropped when they are known
        compared, number = MOST_COMPARED, MOST_TENSORS
        left: dict[torch.device, float] = {}
        for size, tensor in sorted(((_size(t), t) for t in tensors), key=lambda pair: pair[0]):
            device = tensor.device
            if device not in left:
                left[device] = min(free_memory(device) / SHARE, MOST_COPIED if device.type == "cpu" else math.inf)
            is_small = size <= compared and number > 0
            is_kept = is_small or findings.is_written(tensor)
            if (is_kept or not findings.is_verified(tensor)) and size <= left[device]:
                left[device] -= size
                compared, number = compared - size * is_small, number - is_small
                self._backups[id(tensor)] = local_part(tensor).detach().clone()
                self._once |= set() if is_kept else {id(tensor)}
        self._sums_left = MOST_SUMMED if sums else 0
        self._summed: list[Tensor] = []
        self._sums: list[int] = []
        self._sum([tensor for tensor in tensors if id(tensor) not in self._backups])
        self._counts = self._count()

    def begin(self) -> None:
        """Compare with the values of now."""
        before, self._counts = self._counts, self._count()
        for tensor, old, new in zip(self._tensors, before, self._counts, strict=True):
            if old != new and id(tensor) in self._backups:
                self._backups[id(tensor)] = local_part(tensor).detach().clone()

    def changed(self, *, thorough: bool) -> list[Tensor]:
        """Those that were written to; `thorough` also past their counters."""
        now = self._count()
        found = (
            []
            if now == self._counts
            else [tensor for tensor, a, b in zip(self._tensors, now, self._counts, strict=True) if a != b]
        )
        if thorough:
            seen = set(map(id, found))
            rest = [tensor for tensor in self._tensors if id(tensor) not in seen]
            found += [t for t in rest if id(t) in self._backups and not self._is_as_before(t)]
            found += [t for t, a, b in zip(self._summed, _sums(self._summed), self._sums, strict=True) if a != b]
            found = list({id(tensor): tensor for tensor in found}.values())
        return found

    def verify(self) -> None:
        """Remember that a first evaluation has left them as they were."""
        for tensor in self._tensors:
            self._findings.verify(tensor)
        dropped = [tensor for tensor in self._tensors if id(tensor) in self._once]
        self._backups = {key: copy for key, copy in self._backups.items() if key not in self._once}
        self._once = set()
        self._sum(dropped)

    def _sum(self, tensors: Iterable[Tensor]) -> None:
        """Take the checksums of more, as far as this is quick."""
        new: list[Tensor] = []
        for tensor in tensors:
            size = _size(tensor) if tensor.device.type == "cpu" else 1
            if size <= self._sums_left:
                self._sums_left -= size
                new.append(tensor)
        self._summed, self._sums = [*self._summed, *new], [*self._sums, *_sums(new)]

    def put_back(self, tensor: Tensor) -> bool:
        """Write the old values to a tensor, if there is a copy."""
        backup = self._backups.get(id(tensor))
        if backup is None or _size(tensor) != _size(backup):
            return False
        with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
            for part, old in zip(dense_parts(local_part(tensor).data), dense_parts(backup), strict=True):
                part.copy_(old)
        self._counts = self._count()
        return True

    def _count(self) -> list[int]:
        return [0 if tensor.is_inference() else version_of(tensor) for tensor in self._tensors]

    def _is_as_before(self, tensor: Tensor) -> bool:
        now, old = dense_parts(local_part(tensor).detach()), dense_parts(self._backups[id(tensor)])
        return len(now) == len(old) and all(
            a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_integers(a), as_integers(b))
            for a, b in zip(now, old, strict=True)
        )


class WatchedArrays:
    """Arrays that are not copied.

    Args:
        arrays: as they are before an evaluation.
        findings: what is known of them.
    """

    def __init__(self, arrays: Iterable[np.ndarray[Any, Any]], findings: Findings) -> None:
        self._findings = findings
        self._backups: dict[int, tuple[np.ndarray[Any, Any], Any]] = {}
        self._once: dict[int, tuple[np.ndarray[Any, Any], Any]] = {}
        self._hashes: dict[int, tuple[np.ndarray[Any, Any], int]] = {}
        compared, hashed, spare = MOST_COMPARED, MOST_HASHED, free_memory(torch.device("cpu")) / SHARE
        for array in sorted(arrays, key=lambda array: array.nbytes):
            if not array.flags.writeable or isinstance(array, np.memmap):
                continue
            if array.nbytes <= compared:
                compared -= array.nbytes
                self._backups[id(array)] = (array, array.copy())
            elif not findings.is_verified(array) and array.nbytes <= spare:
                spare -= array.nbytes
                self._once[id(array)] = (array, array.copy())
            elif array.nbytes <= hashed and not array.dtype.hasobject:
                hashed -= array.nbytes
                self._hashes[id(array)] = (array, _hash(array))

    def changed(self, *, thorough: bool) -> list[np.ndarray[Any, Any]]:
        """Those that were written to; `thorough` also the larger ones."""
        compared = [*self._backups.values(), *(self._once.values() if thorough else ())]
        found = [array for array, old in compared if not _is_equal(array, old)]
        return found + [array for array, old in self._hashes.values() if thorough and _hash(array) != old]

    def begin(self) -> None:
        """Compare the smaller ones with the values of now."""
        for key, (array, old) in self._backups.items():
            if not _is_equal(array, old):
                self._backups[key] = (array, array.copy())

    def verify(self) -> None:
        """Remember that a first evaluation has left them as they were."""
        for array, _ in self._once.values():
            self._findings.verify(array)
        self._once = {}

    def put_back(self, array: np.ndarray[Any, Any]) -> bool:
        """Write the old values to an array, if there is a copy."""
        _, old = self._backups.get(id(array)) or self._once.get(id(array)) or (array, None)
        if old is None or old.shape != array.shape:
            return False
        np.copyto(array, old)
        return True


class WatchedBulk:
    """Tensors and arrays in large containers, as many as there may be.

    Args:
        tensors, arrays: as they are before an evaluation.
        findings: what is known of them.
    """

    def __init__(self, tensors: list[Tensor], arrays: list[np.ndarray[Any, Any]], findings: Findings) -> None:
        self._tensors = WatchedTensors(tensors, findings, sums=False)
        self._arrays = arrays
        self._bytes = list(map(np.ndarray.tobytes, arrays))

    def changed(self, *, thorough: bool) -> list[Any]:
        """Those that were written to, looked for only if `thorough`."""
        if not thorough:
            return []
        found: list[Any] = [*self._tensors.changed(thorough=True)]
        now = list(map(np.ndarray.tobytes, self._arrays))
        if now != self._bytes:
            found += [array for array, a, b in zip(self._arrays, now, self._bytes, strict=True) if a != b]
        return found

    def begin(self) -> None:
        """Compare tensors with the values of now."""
        self._tensors.begin()

    def verify(self) -> None:
        """Remember that a first evaluation has left them as they were."""
        self._tensors.verify()

    def put_back(self, value: Any) -> bool:
        """Write the old values to one, if there is a copy."""
        if isinstance(value, Tensor):
            return self._tensors.put_back(value)
        [old] = [old for array, old in zip(self._arrays, self._bytes, strict=True) if array is value][:1]
        np.copyto(value, np.frombuffer(old, value.dtype).reshape(value.shape))
        return True


def _size(tensor: Tensor) -> int:
    # There may be many plain ones.
    return tensor.nbytes if type(tensor) is Tensor and tensor.layout is torch.strided else bytes_of(local_part(tensor))


def _sums(tensors: Iterable[Tensor]) -> list[int]:
    """A checksum of each tensor's bits, with one read from the device."""
    sums = [sum(map(_sum, dense_parts(local_part(tensor).detach())), ZERO) for tensor in tensors]
    return torch.stack([one.to(sums[-1].device) for one in sums]).tolist() if sums else []


def _sum(tensor: Tensor) -> Tensor:
    flat = as_integers(tensor).reshape(-1)
    whole = flat.numel() - flat.numel() % (8 // flat.dtype.itemsize)
    if not whole or flat.data_ptr() % 8:
        return flat.sum(dtype=torch.int64)
    # In words of 8 bytes, which takes a twentieth of the time.
    return flat[:whole].view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


def _is_equal(array: np.ndarray[Any, Any], old: np.ndarray[Any, Any]) -> bool:
    if array.shape != old.shape or array.dtype != old.dtype:
        return False
    if array.dtype.hasobject:
        return all(a is b for a, b in zip(array.ravel().tolist(), old.ravel().tolist(), strict=True))
    return array.tobytes() == old.tobytes()


def _hash(array: np.ndarray[Any, Any]) -> int:
    return zlib.adler32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
