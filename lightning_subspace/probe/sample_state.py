"""A gathered sample in a checkpoint, if it is small and plain.

A run that is resumed then goes on with the examples that it had. A large sample, one of objects that are not plain data
and one that is dealt to ranks are not written: they are gathered anew.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lightning_subspace.data.gathered import Gathered
from lightning_subspace.data.micro_batch import MicroBatch, SampleError
from lightning_subspace.probe.entries import CheckpointError, Entries
from lightning_subspace.state.copies import tensors_of

LARGEST = 16 << 20  # bytes; 8,192 greyscale images of 22 x 22 in float32
NAMES = tuple(field.name for field in fields(MicroBatch))


def encode_gathered(gathered: Gathered | None) -> dict[str, Any] | None:
    """A gathered sample as plain values; None if not to be written.

    Example:
        >>> batch = MicroBatch([torch.zeros(2), "a"], 2.0, 0, transferred=True, size=2)
        >>> encoded = encode_gathered(Gathered((batch,), 0, False))
        >>> decode_gathered(encoded).batches[0].data
        [tensor([0., 0.]), 'a']
    """
    if gathered is None or not gathered.batches:
        return None
    data = [batch.data for batch in gathered.batches]
    if not all(map(is_plain, data)) or sum(tensor.nbytes for one in data for tensor in tensors_of(one)) > LARGEST:
        return None
    batches = [{name: getattr(batch, name) for name in NAMES} for batch in gathered.batches]
    return {"batches": batches, "epoch": gathered.epoch, "is_closed": gathered.is_closed}


def decode_gathered(saved: Any) -> Gathered | None:
    """The sample that `encode_gathered` was given, or None.

    Raises:
        CheckpointError: for what it cannot have been given.
    """
    if saved is None:
        return None
    entries = Entries(saved, "sample")
    found = entries.any("batches")
    entries.require(isinstance(found, list) and bool(found), "batches", "a list of micro-batches")
    return Gathered(
        tuple(_micro_batch(Entries(one, f"sample.batches[{i}]"), i) for i, one in enumerate(found)),
        entries.integer("epoch"),
        entries.flag("is_closed"),
    )


def is_plain(data: Any) -> bool:
    """Whether data are dense tensors and plain values in plain containers."""
    if type(data) is Tensor:
        return data.layout is torch.strided and not vars(data)
    if type(data) in (list, tuple):
        return all(map(is_plain, data))
    if type(data) is dict:
        return all(type(key) in (str, int) and is_plain(value) for key, value in data.items())
    return data is None or type(data) in (str, int, float, bool)


def _micro_batch(entries: Entries, number: int) -> MicroBatch:
    values = {name: entries.any(name) for name in NAMES}
    entries.require(is_plain(values["data"]), "data", "plain data")
    entries.require(values["index"] == number, "index", f"{number}")
    for name in ("size", "checksum", "draw"):
        entries.integer(name)
    entries.flag("is_counted")
    for name in ("transferred", "is_local"):
        entries.require(entries.flag(name), name, "True, as in training")
    entries.require(isinstance(values["weight"], float), "weight", "a number")
    if values["batch_idx"] is not None:
        entries.integer("batch_idx")
    places = values["off_cpu"]
    is_right = places is None or (isinstance(places, tuple) and all(isinstance(one, bool) for one in places))
    entries.require(is_right, "off_cpu", "a tuple of truth values, or None")
    try:
        return MicroBatch(**values)
    except SampleError as error:
        raise CheckpointError(f"sample.batches[{number}]: {error}") from error
