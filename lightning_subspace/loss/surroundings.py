"""State around a module, put back, or noticed where it cannot be.

The trainer with its loops, callbacks, optimizers and data; objects of other packages that the module holds, such as
environments and data sets; globals and class attributes in the files of the module's classes. Python objects are put
back. Tensors and arrays are used as they are and watched (see `watched.py`): the first evaluation that writes to one is
undone and taken again on a copy. What cannot be undone ends the measurement of this loss.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_subspace.loss.findings import Findings
from lightning_subspace.loss.opaque import WatchedObjects
from lightning_subspace.loss.sealed import is_standard_stream
from lightning_subspace.loss.watched import WatchedArrays, WatchedBulk, WatchedTensors
from lightning_subspace.state.bulk import Bulk
from lightning_subspace.state.containers import MutableObject, fill_class, fill_dict, read_class, read_dict
from lightning_subspace.state.object_graph import ObjectGraph, may_be_watched, walk
from lightning_subspace.state.packages import ITSELF, TRAINING, WRITERS, own_places, package

MOST_AROUND = 20_000  # objects that are walked, which takes 0.1 s a probe
MOST_GLOBAL = 2_000  # objects that are walked in the files of the module's classes
# How a file was imported, which is no state of its code. Behind an import hook, pytest's say, there may be a program.
OF_IMPORT = frozenset({"__loader__", "__spec__"})
MOST_EACH = 1_000  # containers compared at every evaluation, in 1 ms; of more those alone that were found to change


class Surroundings:
    """What is around a module, from before the first evaluation until `close`.

    Args:
        module: the module.
        roots: objects around it whose attributes count.
        inside: what was found in the module.
        packages: of the module's classes.
        findings: of earlier evaluations; added to.
        threads: ids of objects that other threads use, which are left alone.

    Attributes:
        each: containers that are put back behind every evaluation.
        generators: of random numbers, with their states.
        iterators: that cannot be put back, and are to be replaced.
        kept: ids of tensors and arrays that are not copied.
        copied: ids of those that are, since an evaluation has written to them.
        tensors: all of them around, but for those in large containers.
    """

    def __init__(
        self,
        module: nn.Module,
        roots: Iterable[Any],
        inside: ObjectGraph,
        packages: frozenset[str],
        findings: Findings,
        threads: Iterable[int],
    ) -> None:
        self._findings = findings
        left_alone = {*threads}
        seen = (inside.seen | left_alone) - set(map(id, inside.others))
        roots = [root for root in roots if id(root) not in seen]  # what is in the module is replaced by copies
        around = walk(
            chain(map(vars, roots), inside.others), packages, seen, around=True, most=MOST_AROUND, bulk=findings.bulk
        )
        self._containers = around.containers
        is_small = len(around.containers) <= MOST_EACH
        self.each = [c for c in around.containers if is_small or c.key in findings.walked]
        self.generators = around.generators
        self.caches = around.caches
        self.iterators = [value for value in around.iterators if not is_left_open(value)]
        self.tensors = around.tensors
        self._bulks = [*inside.bulks, *around.bulks]
        unseen = [*around.others, *([] if around.is_whole else inside.others), *around.iterators]
        held = [value for value in unseen if may_be_watched(value)]
        leaves = [v for bulk in self._bulks for v in (*bulk.tensors, *bulk.arrays)]
        watched = [*around.tensors, *around.arrays, *leaves]
        self.copied = {id(value) for value in watched if findings.is_written(value)} if findings.written else set[int]()
        self.kept = set(map(id, watched)) - self.copied
        self._watches: list[Any] = [
            WatchedTensors(around.tensors, findings),
            WatchedArrays(around.arrays, findings),
            WatchedObjects(held, [*inside.mixed, *around.mixed], findings.skipped),
        ]
        self._find_globals(module, packages, around.seen | left_alone)
        self._watched_bulks = [
            (bulk, WatchedBulk(bulk.tensors, bulk.arrays, findings))
            for bulk in self._bulks
            if bulk.tensors or bulk.arrays
        ]
        findings.keep([*self._bulks, *self._global_bulks])

    def _find_globals(self, module: nn.Module, packages: frozenset[str], seen: set[int]) -> None:
        classes, files = own_places(module)
        places = (*map(vars, classes), *files)
        values = [v for place in places for name, v in list(place.items()) if name not in OF_IMPORT]
        names = {file["__name__"] for file in files}
        values = [v for v in values if not isinstance(v, types.FunctionType) or v.__closure__ or v.__module__ in names]

        def bulk(value: Any) -> Bulk | None:  # looked through less often than others: for very large ones alone
            return self._findings.bulk(value, smallest=MOST_EACH + 1)

        found = walk(values, packages, seen, around=True, most=MOST_GLOBAL, bulk=bulk)
        own = [MutableObject.of(read_class, fill_class, cls) for cls in classes]
        own += [MutableObject.of(read_dict, fill_dict, file) for file in files]
        self._globals = [*own, *found.containers]
        self.generators = [*self.generators, *found.generators]
        self._global_bulks = found.bulks
        files_open = [value for value in found.iterators if not is_left_open(value)]
        self._global_watches: list[Any] = [
            WatchedTensors(found.tensors, self._findings),
            WatchedArrays(found.arrays, self._findings),
            *(WatchedBulk(bulk.tensors, bulk.arrays, self._findings) for bulk in found.bulks),
            WatchedObjects([*files_open, *filter(may_be_watched, found.others)], found.mixed, self._findings.skipped),
        ]

    def begin(self) -> None:
        """Remember globals before an evaluation; put back lengths of large containers."""
        for bulk in self._bulks:
            if bulk.has_grown():
                self._findings.walked.add(id(bulk.root))
                bulk.restore()
        # What the user's own code beside of the training step does to a global is not undone.
        if len(self._globals) <= MOST_EACH:
            for container in self._globals:
                container.remember()
        for watch in self._global_watches:
            watch.begin()

    def _undo_globals(self) -> bool:
        changed = [container for container in self._globals if container.has_changed()]
        for container in changed:
            container.replace_contents(container.items)
        return bool(changed)

    def settle_first(self) -> tuple[bool, list[Any], list[Any]]:
        """Undo all that the first evaluation has done.

        Returns:
            Whether something was undone, what could not be, and what was, but has no copy to be used in its place.
        """
        found, each = False, set(map(id, self.each))
        for container in self._containers:
            if id(container) not in each and container.has_changed():
                container.replace_contents(container.items)
                self._findings.walked.add(container.key)
                found = True
        self._undo_globals()
        for bulk in self._global_bulks:
            if bulk.has_changed():
                bulk.restore()
                self._findings.walked.add(id(bulk.root))
                found = True
        changed, lost, bare = self._undo(self._watches, thorough=True)
        # Nothing refers to a global that could refer to a copy instead.
        globals_, more, again = self._undo(self._global_watches, thorough=True)
        found = self._undo_bulks() or found or bool(changed)
        lost, bare = [*lost, *more], [*bare, *again, *globals_]
        if not (found or lost or bare):
            for watch in (*self._watches, *self._global_watches, *(watch for _, watch in self._watched_bulks)):
                watch.verify()
        return found, lost, bare

    def settle(self) -> tuple[bool, list[Any], list[Any]]:
        """The same of any other evaluation, for tensors and arrays alone."""
        changed, lost, bare = self._undo(self._watches, thorough=False)
        globals_, more, again = self._undo(self._global_watches, thorough=False)
        if len(self._globals) <= MOST_EACH:
            self._undo_globals()
        return bool(changed), [*lost, *more], [*bare, *again, *globals_]

    def end_interrupted(self) -> list[Any]:
        """Undo what an evaluation that raised did to globals."""
        self._undo_globals()
        return self._undo(self._global_watches, thorough=True)[1]

    def put_back(self) -> None:
        """Put back the contents of all containers."""
        for container in self._containers:
            if container.has_changed():
                container.replace_contents(container.items)
        self._undo_bulks()

    def close(self) -> list[Any]:
        """Put everything back, and return what cannot be."""
        self.put_back()
        return self._undo([*self._watches, *self._global_watches], thorough=True)[1]

    def _undo(self, watches: Iterable[Any], *, thorough: bool) -> tuple[list[Any], list[Any], list[Any]]:
        """What was put back, what could not be, and what is copied."""
        back: list[Any] = []
        lost: list[Any] = []
        bare: list[Any] = []
        for watch in watches:
            for value in watch.changed(thorough=thorough):
                if not watch.put_back(value):
                    lost.append(value)
                elif self._findings.is_written(value):  # reached by a way on which no copy takes its place
                    bare.append(value)
                elif isinstance(value, Tensor | np.ndarray):
                    self._findings.write(value)
                    back.append(value)
        return back, lost, bare

    def _undo_bulks(self) -> bool:
        """Put back large containers that have changed; whether any had."""
        changed = [bulk for bulk in self._bulks if bulk.has_changed()]
        for bulk in changed:
            bulk.restore()
        for bulk, watch in self._watched_bulks:
            if self._undo([watch], thorough=True)[0]:
                changed.append(bulk)
        self._findings.walked.update(id(bulk.root) for bulk in changed)
        return bool(changed)


def is_left_open(value: Any) -> bool:
    """Whether a stream or an iterator is no state of a user's."""
    return is_standard_stream(value) or package(type(value)) in {*TRAINING, *WRITERS, ITSELF}
