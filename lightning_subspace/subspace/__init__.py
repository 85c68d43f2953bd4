"""The top eigenspace of the Hessian, its numbers, and its record."""

from lightning_subspace.subspace.record import Record as Record
from lightning_subspace.subspace.record import to_rows as to_rows
from lightning_subspace.subspace.subspace import Subspace as Subspace
from lightning_subspace.subspace.subspace import fraction as fraction
from lightning_subspace.subspace.subspace import overlap as overlap
from lightning_subspace.subspace.subspace import principal_angles as principal_angles
