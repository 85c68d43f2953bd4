"""Several loaders at once: training is unchanged, and the sample is one of combined batches."""

from typing import Any

import pytest
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.thorough import usual
from tests.works_with.numbered import indices, of_both, two
from tests.works_with.same_run import Classifier, compare

pytestmark = pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step")  # two eigenvalues may lie close together


# case: the loaders, how a batch is read, number of combined batches in an epoch, sizes of the parts in them
COMBINED = {
    "dict": (two, of_both, [(4, 6)] * 5),
    "list": (lambda: list(two().values()), of_both, [(4, 6)] * 5),
    "max_size_cycle": (lambda: CombinedLoader(two(), "max_size_cycle"), of_both, [(4, 6)] * 5),
    "min_size": (lambda: CombinedLoader(two(), "min_size"), of_both, [(4, 6)] * 2),
    "max_size": (lambda: CombinedLoader(two(), "max_size"), of_both, [(4, 0)] * 3 + [(4, 6)] * 2),
    "one in a dict": (lambda: {"a": two()["a"]}, of_both, [(4, 0)] * 5),
}


def composition(batches: Any, read: Any) -> list[tuple[int, int]]:
    found = [indices([batch], read) for batch in batches]
    return sorted((sum(i < 20 for i in one), sum(i >= 20 for i in one)) for one in found)


# Of a list a CombinedLoader is made as of a dictionary.
@pytest.mark.parametrize("case", usual([case for case in COMBINED if case != "list"], thorough=["list"]))
def test_several_loaders(case, tmp_path):
    make, read, expected = COMBINED[case]
    k = 1 if case == "dict" else 0  # a sample is the same for every k
    run = compare(tmp_path, lambda: Classifier(read), make, monitor={"sample": "all", "k": k})
    assert run.differing == []
    assert len(run.steps) >= 3
    assert composition(run.sample.hessian, read) == expected
    assert all(batch.weight == len(read(batch.data)[0]) for batch in run.sample.hessian)


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])  # Lightning refuses "sequential" in fit
def test_a_part_of_several_loaders(mode, tmp_path):
    run = compare(
        tmp_path,
        lambda: Classifier(of_both),
        lambda: CombinedLoader(two(), mode),
        monitor={"sample": 6, "gradient_sample": 14, "k": 0},
        limit_train_batches=3,
    )
    assert run.differing == []
    counts = [sum(batch.size for batch in part) for part in (run.sample.hessian, run.sample.extra)]
    assert 6 <= counts[0] < 16
    assert 14 <= sum(counts) < 24


def test_several_loaders_keep_their_batch_sizes(tmp_path):
    with pytest.raises(MisconfigurationException, match="batch_size: several training loaders keep"):
        compare(tmp_path, lambda: Classifier(of_both), two, monitor={"batch_size": 3})
