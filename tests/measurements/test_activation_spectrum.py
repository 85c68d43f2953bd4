"""Covariance spectra of outputs, against closed forms: a linear module on data of a prescribed covariance."""

import math
import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import ActivationSpectrum, SubspaceMonitor, measure_subspace
from lightning_subspace.curvature.gradient_mean import GradientMean
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements.moments import Moments
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks, world
from tests.processes import run

F64 = torch.float64
N, D, WIDTH = 120, 24, 20
SIZES = (50, 40, 30)  # unequal micro-batches


def white(n=N, d=D, seed=0):
    """(n, d): rows of mean 0 whose covariance is the identity."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(rows - rows.mean(0)).Q * n**0.5


def linear(eigenvalues, seed=1):
    """A linear module whose output on white inputs has a covariance with these eigenvalues, and a large mean."""
    generator = torch.Generator().manual_seed(seed)
    width = len(eigenvalues)
    left = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=F64)).Q
    right = torch.linalg.qr(torch.randn(D, width, generator=generator, dtype=F64)).Q
    module = nn.Linear(D, width).double()
    with torch.no_grad():
        module.weight.copy_(left @ torch.diag(eigenvalues.sqrt()) @ right.T)
        module.bias.fill_(1e3)
    return module


def power_law(alpha, width=WIDTH):
    return torch.arange(1, width + 1, dtype=F64) ** -alpha


class Net(nn.Module):
    """The linear module within a loss."""

    def __init__(self, eigenvalues, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = linear(eigenvalues)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(len(eigenvalues), 3).double()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, inputs):
        return self.head(self.drop(torch.sin(self.body(inputs))))


def loss_fn(module, batch, batch_idx):
    return module(batch).square().mean()


def measured(module, batches, *patterns, loss_fn=loss_fn, mode="train", **options):
    """What is found at an open loss: numbers and eigenvalues."""
    spectrum = ActivationSpectrum(list(patterns), **options)
    space = ParameterSpace.of(module)
    with TrainingLoss(module, space, loss_fn, mode=mode, dtype=F64, order=1) as loss:
        operator = GradientMean(loss, sample_of_batches(batches).hessian)
        probe = SimpleNamespace(operator=operator, partition=operator.partition, gradient=operator.gradient())
        found = spectrum.measure(probe)
    return found, spectrum.eigenvalues


def through_probe(module, batches, *patterns, **options):
    """The same numbers, from `measure_subspace`."""
    spectrum = ActivationSpectrum(list(patterns))
    record = measure_subspace(module, batches, k=0, loss_fn=loss_fn, measurements=[spectrum], **options)
    return {key: value for key, value in record.metrics.items() if key.startswith("activations/")}


def entropy_rank(eigenvalues):
    shares = [float(x) / float(eigenvalues.sum()) for x in eigenvalues]
    return math.exp(-sum(p * math.log(p) for p in shares))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_linear_module_has_the_spectrum_that_was_prescribed(alpha):
    expected = power_law(alpha)
    found, eigenvalues = measured(Net(expected), list(white().split(SIZES)), "body", tail=(4, 15))
    torch.testing.assert_close(eigenvalues["body"], expected, rtol=1e-10, atol=1e-13)
    assert found == {
        "activations/body/effective_rank": pytest.approx(entropy_rank(expected), rel=1e-10),
        "activations/body/participation_ratio": pytest.approx(
            float(expected.sum() ** 2 / expected.square().sum()), rel=1e-10
        ),
        "activations/body/tail_slope": pytest.approx(-alpha, rel=1e-9),
        "activations/body/variance": pytest.approx(float(expected.sum()), rel=1e-10),
    }


def test_equal_eigenvalues_use_every_direction_and_one_eigenvalue_one():
    flat, _ = measured(Net(torch.ones(WIDTH, dtype=F64)), list(white().split(SIZES)), "body")
    assert flat["activations/body/effective_rank"] == pytest.approx(WIDTH)
    assert flat["activations/body/participation_ratio"] == pytest.approx(WIDTH)
    assert flat["activations/body/tail_slope"] == pytest.approx(0.0, abs=1e-9)
    one = torch.zeros(WIDTH, dtype=F64)
    one[0] = 7.0
    found, eigenvalues = measured(Net(one), list(white().split(SIZES)), "body", tail=(1, 20))
    assert found["activations/body/effective_rank"] == pytest.approx(1.0, abs=1e-6)
    assert found["activations/body/participation_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert "activations/body/tail_slope" not in found  # the others are rounding
    assert float(eigenvalues["body"].min()) >= 0.0
    constant, _ = measured(Net(torch.zeros(WIDTH, dtype=F64)), list(white().split(SIZES)), "body")
    assert constant["activations/body/variance"] < 1e-18


def test_fewer_rows_than_features_have_the_tail_that_is_there():
    rows = white(12, 11)  # mean 0 and 12 rows: 11 eigenvalues that are not 0
    module = nn.Sequential(nn.Linear(11, 16, bias=False).double())
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(16, 11, dtype=F64) * power_law(0.5, 11))
    found, eigenvalues = measured(module, [rows], "0", tail=(2, 500))
    assert int((eigenvalues["0"] > 1e-10).sum()) == 11
    assert found["activations/0/tail_slope"] == pytest.approx(-1.0, rel=1e-9)


class Images(nn.Module):
    """Outputs of other shapes than (batch, features)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.line = nn.Conv2d(2, 3, 3), nn.Conv1d(3, 4, 1)
        self.tokens, self.recurrent = nn.Linear(4, 5), nn.LSTM(5, 6, batch_first=True)
        self.codes = nn.Identity()
        self.double()

    def forward(self, images):
        image = self.conv(images)
        line = self.line(image.flatten(2))
        tokens = self.tokens(line.movedim(1, 2))
        out, _ = self.recurrent(tokens)
        self.codes(out.argmax(dim=-1))
        return out, {"image": image, "line": line, "tokens": tokens, "out": out}


def test_features_are_channels_of_images_and_the_last_dimension_of_tokens():
    module = Images()
    batch = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    with torch.no_grad():
        parts = module(batch)[1]
    expected = {
        "conv": parts["image"].movedim(1, -1).reshape(-1, 3),
        "line": parts["line"].movedim(1, -1).reshape(-1, 4),
        "tokens": parts["tokens"].reshape(-1, 5),
        "recurrent": parts["out"].reshape(-1, 6),
    }

    def loss(module, batch, batch_idx):
        return module(batch)[0].square().mean()

    _, eigenvalues = measured(module, list(batch.split([4, 2])), *expected, loss_fn=loss)
    assert eigenvalues.keys() == expected.keys()
    for name, rows in expected.items():
        dense = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)
        torch.testing.assert_close(eigenvalues[name], dense, rtol=1e-9, atol=1e-14)
    other, _ = measured(module, [batch], "tokens", loss_fn=loss, dim=1)  # the 9 positions in place of 5 features
    rows = parts["tokens"].movedim(1, -1).reshape(-1, 9)
    assert other["activations/tokens/variance"] == pytest.approx(float(torch.cov(rows.T, correction=0).trace()))
    with pytest.raises(
        ValueError, match=r"expected outputs with a tensor of floating point, from 'codes', got torch.int"
    ):
        measured(module, [batch], "codes", loss_fn=loss)


def test_all_calls_count_and_a_module_without_one_has_no_key():
    class Twice(Net):
        def forward(self, inputs):
            return super().forward(inputs) + self.head(torch.sin(self.body(2.0 * inputs)))

    module, inputs = Twice(power_law(1.0)), white()
    found, eigenvalues = measured(module, list(inputs.split(SIZES)), "body", "unused")
    assert set(eigenvalues) == {"body"}
    with torch.no_grad():
        rows = torch.cat([module.body(inputs), module.body(2.0 * inputs)])
    torch.testing.assert_close(
        eigenvalues["body"], torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0), rtol=1e-9, atol=1e-12
    )
    assert all(key.startswith("activations/body/") for key in found)


def test_what_is_seen_are_the_outputs_of_the_loss_with_its_masks():
    module = Net(power_law(1.0), dropout=0.5)
    once, _ = measured(module, list(white().split(SIZES)), "drop")
    again, _ = measured(module, list(white().split(SIZES)), "drop")
    assert once == again
    module.eval()
    plain, _ = measured(module, list(white().split(SIZES)), "drop", mode="eval")
    assert plain["activations/drop/variance"] < 0.8 * once["activations/drop/variance"]
    assert not module.drop._forward_hooks


# What is refused


WRONG = {
    "modules": [("a list of patterns of module names", "body"), ("a list of patterns", [3]), ("a list of", [])],
    "tail": [
        ("a first and a last rank", (0, 5)),
        ("a first and a last rank, from 1, with 3 or more", (3, 4)),
        ("a first", 7),
        ("a first", (1.0, 9.0)),
    ],
    "dim": [("an integer or None", 1.0), ("an integer or None", True)],
    "every": [("a positive integer", 0)],
}
CASES = [(name, expected, value) for name, rows in WRONG.items() for expected, value in rows]


@pytest.mark.parametrize(("name", "expected", "value"), CASES)
def test_a_wrong_argument_is_refused_by_name(name, expected, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}: expected {expected}")):
        ActivationSpectrum(**{"modules": ["body"], name: value})


def test_what_cannot_be_measured_is_refused_at_the_probe():
    batches = list(white().split(SIZES))
    with pytest.raises(ValueError, match=r"modules: expected patterns of module names, .* 'tail\.\*'; names: \['body'"):
        measured(Net(power_law(1.0)), batches, "body", "tail.*")
    with pytest.raises(ValueError, match="dim: expected a dimension of the output of 'body', which has 2, got 2"):
        measured(Net(power_law(1.0)), batches, "body", dim=2)
    wide = nn.Sequential(nn.Linear(D, 4097).double())
    with pytest.raises(ValueError, match="modules: expected outputs of at most 4096 features, from '0', got 4097"):
        measured(wide, batches, "0")
    with pytest.raises(ValueError, match="modules: expected outputs of as many features at every call, 50 from 'body'"):
        measured(Net(power_law(1.0)), batches, "body", dim=0)


# Moments


def test_moments_of_parts_are_those_of_the_whole():
    rows = torch.randn(70, 5, generator=torch.Generator().manual_seed(0), dtype=F64) + 1e6
    whole, first = Moments(5), Moments(5)
    first.join(Moments(5))
    for part in rows[:40].split([25, 15]):
        first.add(part)
    for part in rows[40:].split([1, 29]):
        whole.add(part)
    whole.add(rows[:0])
    whole.join(first)
    assert whole.count == 70
    torch.testing.assert_close(whole.mean, rows.mean(0), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(whole.covariance, torch.cov(rows.T, correction=0), rtol=0.0, atol=1e-9)
    torch.testing.assert_close(whole.total(Ranks()).covariance, whole.covariance, rtol=1e-14, atol=0.0)
    assert float(Moments(2).covariance.abs().max()) == 0.0


# Ranks, and training


class Here(nn.Module):
    """A net one of whose modules is called for single batches alone."""

    def __init__(self):
        super().__init__()
        self.net, self.rare = Net(power_law(1.0)), nn.Linear(3, 2).double()

    def forward(self, inputs):
        out = self.net(inputs)
        return self.rare(out) if len(inputs) == SIZES[1] else out


def test_any_number_of_ranks_finds_the_same():
    batches = list(white().split(SIZES))

    def ranked():
        group = world() if dist.is_initialized() else None
        torch.manual_seed(0)
        found = through_probe(Here(), batches, "net.body", "rare", dtype="float64", group=group)
        if group is None or dist.get_world_size() > 2:
            return [found]
        # On shards outputs are whole, with exact second derivatives and by differences.
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        sharded = []
        for curvature in ("hessian", "finite-difference"):
            torch.manual_seed(0)
            module = Net(power_law(1.0)).float()
            for child in (module.body, module.head, module.unused, module):
                fully_shard(child, mesh=mesh)
            narrow = [batch.float() for batch in batches]
            sharded.append(through_probe(module, narrow, "body", curvature=curvature, group=group))
        return [found, *sharded]

    [alone] = ranked()
    assert {key.split("/")[1] for key in alone} == {"net.body", "rare"}
    for count in (2, 3):
        for found, *sharded in run(ranked, count, timeout=60.0):
            assert found == pytest.approx(alone, rel=1e-9)
            for numbers in sharded:
                body = {key.replace("net.body", "body"): value for key, value in alone.items() if "body" in key}
                # float32, beside a mean of 1e3: the variance is 1e-6 of the square of the outputs
                assert numbers == pytest.approx(body, rel=2e-2)


def test_training_is_the_same_to_the_bit():
    class Trained(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trained(*callbacks):
        pl.seed_everything(0, verbose=False)
        inputs = TensorDataset(torch.randn(32, 5))
        trainer = pl.Trainer(
            max_steps=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module := Trained(), DataLoader(inputs, batch_size=8, shuffle=True))
        assert not any(child._forward_hooks for child in module.modules())
        return [value.clone() for value in module.state_dict().values()]

    monitor = SubspaceMonitor(
        k=0,
        every_n_steps=1,
        max_overhead=None,
        sample=16,
        gradient_sample=16,
        measurements=[ActivationSpectrum(["net.*"], every=2)],
        on_failure="raise",
    )
    assert all(map(torch.equal, trained(monitor), trained()))
    seen = [record.step for record in monitor.history if "activations/net.1/effective_rank" in record.metrics]
    assert len(seen) >= 2
    assert len(seen) < len(monitor.history)
