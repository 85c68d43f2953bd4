"""Iterable datasets: training is unchanged, and the sample is what was seen of it first."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import (
    DataLoader,
)

from lightning_subspace import SubspaceMonitor
from tests.modules import BATCH, EXAMPLES
from tests.works_with.numbered import Holding, Numbered, Stream, indices, loader, of_both
from tests.works_with.same_run import Classifier, KeepSample, Validated, compare

pytestmark = pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step")  # two eigenvalues may lie close together


def run_with(tmp_path: Any, module: Any, data: Any, monitor: Any = None, **options: Any) -> Any:
    """A compared run whose monitor looks for no eigenvalue: a sample is the same for every k."""
    return compare(tmp_path, module, data, monitor={"k": 0, **(monitor or {})}, **options)


class Sources:
    """Makes a module that holds the stream it is trained on."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def module(self) -> Holding:
        self.stream = Stream(*self.args)
        return Holding(self.stream)

    def data(self) -> DataLoader:
        return loader(self.stream)


def test_an_iterable_dataset_gives_the_first_examples_seen(tmp_path):
    source = Sources()
    run = compare(tmp_path, source.module, source.data, monitor={"sample": 16, "gradient_sample": 24})
    assert run.differing == []
    assert source.stream.begun == 2  # once an epoch
    assert run.steps == [1, 2, 4, 6, 8]  # from the batch with which the sample is full
    assert indices(run.samples[1].hessian) == list(range(16))
    assert indices(run.samples[1].extra) == []
    for step in run.steps[1:]:
        assert indices(run.samples[step].hessian) == list(range(16))
    assert indices(run.sample.extra) == list(range(16, 24))
    assert run.sample.hessian_share == 0.0


def test_a_short_iterable_dataset_is_complete_after_an_epoch(tmp_path):
    source = Sources()
    run = run_with(tmp_path, source.module, source.data, monitor={"sample": 1000, "gradient_sample": 2000})
    assert run.differing == []
    assert run.steps == [4, 6, 8]  # an epoch has four batches
    assert indices(run.sample.hessian) == list(range(EXAMPLES))


def test_a_run_that_ends_before_its_sample_is_full_is_probed_at_the_end(tmp_path):
    source = Sources()
    run = run_with(tmp_path, source.module, source.data, monitor={"sample": 1000, "gradient_sample": 1000}, max_steps=3)
    assert run.differing == []
    assert run.steps == [3]
    assert indices(run.sample.hessian) == list(range(24))


def test_an_iterable_dataset_has_no_all(tmp_path):
    for sizes in ({"sample": "all"}, {"gradient_sample": "all"}):
        with pytest.raises(MisconfigurationException, match="whose end is known for 'all', got an iterable one"):
            compare(tmp_path, Classifier, lambda: loader(Stream()), monitor=sizes)


def test_an_iterable_dataset_beside_another(tmp_path):
    def data():
        return {"a": loader(Stream(20), batch_size=4), "b": loader(Numbered(20, 12), batch_size=6)}

    run = run_with(tmp_path, lambda: Classifier(of_both), data, monitor={"sample": 12, "gradient_sample": 20})
    assert run.differing == []
    assert run.steps == [1, 2, 4, 6, 8, 10]  # a combined batch has ten examples
    assert [indices([batch], lambda b: b["a"]) for batch in run.sample.hessian] == [[0, 1, 2, 3], [4, 5, 6, 7]]


class AnyLoader:
    """Not a DataLoader: anything that gives batches."""

    def __iter__(self):
        x, y = Numbered().x, Numbered().y
        return iter([(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, EXAMPLES, BATCH)])

    def __len__(self):
        return EXAMPLES // BATCH


def test_any_iterable_of_batches(tmp_path):
    run = run_with(tmp_path, Classifier, AnyLoader)
    assert run.differing == []
    assert indices(run.sample.hessian) == list(range(16))


def test_a_streamed_sample_is_kept_when_training_writes_into_its_batches(tmp_path):
    class Writing(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step([batch[0].clone(), batch[1]], batch_idx)
            batch[0].zero_()
            return loss

    run = run_with(tmp_path, Writing, lambda: loader(Stream()))
    assert run.differing == []
    assert indices(run.sample.hessian) == list(range(16))


def test_accumulated_batches_of_an_iterable_dataset(tmp_path):
    run = run_with(
        tmp_path, Classifier, lambda: loader(Stream()), accumulate_grad_batches=3, monitor={"every_n_steps": 1}
    )
    assert run.differing == []
    assert run.steps == [0, 1, 2, 3, 4]  # the sample is full at the second batch of the first step


# -- an iterable dataset over several fits ----------------------------------------------------------------------------


def streaming(sample: int = 16) -> SubspaceMonitor:
    return SubspaceMonitor(k=0, every_n_steps=2, max_overhead=None, sample=sample, on_failure="raise")


def trainer_of(monitor: SubspaceMonitor, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [monitor, *options.pop("callbacks", [])]
    return Trainer(accelerator="cpu", logger=False, callbacks=callbacks, **{"max_epochs": 2, **quiet, **options})


def steps_of(monitor: SubspaceMonitor) -> list[int]:
    return [record.step for record in monitor.history]


def test_a_streamed_sample_is_kept_when_a_run_goes_on():
    torch.manual_seed(0)
    keep = KeepSample()
    monitor = SubspaceMonitor(
        k=0, every_n_steps=2, max_overhead=None, sample=16, gradient_sample=16, on_failure="raise", measurements=[keep]
    )
    trainer, module = trainer_of(monitor, max_epochs=1), Validated()
    trainer.fit(module, loader(Stream()), loader())
    trainer.validate(module, loader(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(Stream()), loader())
    assert steps_of(monitor) == [1, 2, 4, 6, 8]
    assert [indices(sample.hessian) for sample in keep.samples.values()] == [list(range(16))] * 5
    trainer_of(monitor, max_epochs=1).fit(Classifier(), loader(Stream(8)))  # a new run gathers anew
    assert steps_of(monitor) == [1]
    assert indices(keep.samples[1].hessian) == list(range(8))


class Interrupting(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
@pytest.mark.parametrize(("batch", "steps"), [(0, []), (2, [1, 2])])
def test_an_interrupt_before_and_after_a_streamed_sample_is_full(batch, steps):
    torch.manual_seed(0)
    monitor = streaming()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer_of(monitor, callbacks=[Interrupting(batch)]).fit(Classifier(), loader(Stream()))
    assert steps_of(monitor) == steps
    trainer_of(monitor).fit(Classifier(), loader(Stream()))
    assert steps_of(monitor) == [1, 2, 4, 6, 8]
