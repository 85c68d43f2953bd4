"""Lightning programs that were not written here: each trains as without a monitor, and is measured.

Those of `lightning.pytorch.demos` always run; the others when they are installed (the extra `programs`).
"""

import importlib.util
import warnings

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.demos import boring_classes
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_subspace import SubspaceMonitor
from lightning_subspace.probe import randomness
from tests.left_out import without_error_bar
from tests.thorough import covering

VOCABULARY = 30
STEPS = 4


class Tokens(Dataset):
    """Random text in the form of `lightning.pytorch.demos.transformer.WikiText2`."""

    def __init__(self, count=16, length=12):
        self.text = torch.randint(VOCABULARY, (count, length + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        return self.text[index, :-1], self.text[index, 1:]


def offline(module):
    """Without the download."""
    module.prepare_data = lambda: None
    return module


def transformer():
    module = offline(LightningTransformer(VOCABULARY))
    module.model = Transformer(VOCABULARY, ninp=16, nhid=16, nlayers=1)
    return module, DataLoader(Tokens(), batch_size=4), {}


def lstm():
    module = offline(LightningLSTM(VOCABULARY))
    module.model = SimpleLSTM(VOCABULARY, ninp=16, nhid=16, nlayers=2)  # 8 million parameters otherwise
    return module, DataLoader(Tokens(), batch_size=4), {}


def boring():
    return boring_classes.BoringModel(), None, {}


def boring_manual():
    return boring_classes.ManualOptimBoringModel(), None, {"loss_fn": lambda m, batch, i: m(batch).square().mean()}


def demo_model():
    return boring_classes.DemoModel(), DataLoader(boring_classes.RandomDataset(32, 64), batch_size=4), {}


def boring_datamodule():
    return boring_classes.BoringModel(), boring_classes.BoringDataModule(), {}


def uq_box(name):
    from lightning_uq_box import uq_methods

    def collate(items):
        inputs, targets = zip(*items, strict=True)
        return {"input": torch.stack(inputs), "target": torch.stack(targets)}

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(64, 1, generator=generator)
    outputs = 2 if name == "MVERegression" else 1
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, outputs))
    arguments = {
        "MVERegression": {"burnin_epochs": 0},
        "MCDropoutRegression": {"num_mc_samples": 2, "loss_fn": nn.MSELoss()},
        "DeterministicRegression": {"loss_fn": nn.MSELoss()},
    }[name]
    module = getattr(uq_methods, name)(net, **arguments)
    return module, DataLoader(TensorDataset(x, y), batch_size=16, collate_fn=collate), {}


def forecasting(name):
    import pytorch_forecasting as pf
    from pytorch_forecasting.data.examples import generate_ar_data

    data = generate_ar_data(n_series=4, timesteps=40, seed=0)
    series = pf.TimeSeriesDataSet(
        data.astype({"series": str}),
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        max_encoder_length=12,
        min_encoder_length=12,
        max_prediction_length=4,
        min_prediction_length=4,
        **({} if name == "NBeats" else {"static_categoricals": ["series"]}),
    )
    small = {"NBeats": {"widths": [8, 16]}, "TemporalFusionTransformer": {"hidden_size": 4, "attention_head_size": 1}}
    module = getattr(pf, name).from_dataset(series, learning_rate=0.01, log_interval=-1, **small[name])
    return module, series.to_dataloader(train=True, batch_size=8, num_workers=0), {"weight": lambda b: len(b[1][0])}


PROGRAMS = {
    "lightning.pytorch.demos: LightningTransformer": (transformer, None),
    "lightning.pytorch.demos: LightningLSTM": (lstm, None),
    "lightning.pytorch.demos: BoringModel": (boring, None),
    "lightning.pytorch.demos: BoringModel with BoringDataModule": (boring_datamodule, None),
    "lightning.pytorch.demos: ManualOptimBoringModel": (boring_manual, None),
    "lightning.pytorch.demos: DemoModel": (demo_model, None),
    "lightning-uq-box: MVERegression": (lambda: uq_box("MVERegression"), "lightning_uq_box"),
    "lightning-uq-box: MCDropoutRegression": (lambda: uq_box("MCDropoutRegression"), "lightning_uq_box"),
    "lightning-uq-box: DeterministicRegression": (lambda: uq_box("DeterministicRegression"), "lightning_uq_box"),
    "pytorch-forecasting: NBeats": (lambda: forecasting("NBeats"), "pytorch_forecasting"),
    "pytorch-forecasting: TemporalFusionTransformer": (
        lambda: forecasting("TemporalFusionTransformer"),
        "pytorch_forecasting",
    ),
}


def train(make, with_monitor, sample="all"):
    seed_everything(0, verbose=False)
    module, data, arguments = make()
    monitor = SubspaceMonitor(
        k=1, every_n_steps=4, max_overhead=None, sample=sample, gradient_sample=4, on_failure="raise", **arguments
    )
    trainer = Trainer(
        max_steps=STEPS,
        callbacks=[monitor] if with_monitor else [],
        limit_val_batches=0,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, **({"datamodule": data} if hasattr(data, "prepare_data") else {"train_dataloaders": data}))
    return [*module.state_dict().values(), torch.rand(2)], monitor


@pytest.mark.parametrize(("name", "sample"), covering(list(PROGRAMS), ["all", 4]))
def test_a_program_from_elsewhere_trains_as_before_and_is_measured(name, sample, monkeypatch):
    make, needs = PROGRAMS[name]
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}: pip install lightning-subspace[programs]")
    monkeypatch.setattr(randomness, "HESSIAN", 4)  # evaluations for sample="all" where there is dropout, not hundreds
    monkeypatch.setattr(randomness, "GRADIENT", 8)
    with warnings.catch_warnings(), without_error_bar():
        warnings.simplefilter("ignore")  # the programs' own
        before, _ = train(make, with_monitor=False)
        after, monitor = train(make, with_monitor=True, sample=sample)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    steps = [record.step for record in monitor.history]
    assert steps == [0, STEPS] if sample == "all" else steps[-1] == STEPS
    assert any(record.subspace.converged for record in monitor.history)
    assert all("gradient_curvature" in record.metrics for record in monitor.history)
