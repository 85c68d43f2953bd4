"""The error bar of the gradient fraction against the truth, on real digits.

The truth is the fraction with the whole training set for gradient and Hessian. The cases are all the combinations of
steps, sample sizes and seeds of the sample below, none is picked; usually they are those of one seed.
"""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace.data.drawn import sample_of_dataset
from lightning_subspace.data.sample import Sample
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.measurements import GradientFraction, Reliability
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver
from tests.thorough import usual

STEPS = (0, 200, 500, 1000, 2000)
GRADIENT_SAMPLES = (512, 1024, None)
SEEDS = usual([0], thorough=[1])


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@pytest.fixture(scope="module")
def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target))


@pytest.fixture(scope="module")
def trained(digits: TensorDataset) -> dict[int, nn.Module]:
    """The network of the paper's kind at several points of its training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = DataLoader(digits, batch_size=64, shuffle=True, drop_last=True)
    nets: dict[int, nn.Module] = {}
    step = 0
    while True:
        for batch in loader:
            if step in STEPS:
                nets[step] = nn.Sequential(
                    nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10)
                )
                nets[step].load_state_dict(net.state_dict())
            if step == STEPS[-1]:
                return nets
            optimizer.zero_grad()
            cross_entropy(net, batch, 0).backward()
            optimizer.step()
            step += 1


def probe(net: nn.Module, sample: Sample) -> dict[str, float]:
    with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
        _, record = take_probe(loss, sample, Solver(k=10), [GradientFraction(), Reliability()], verify=False)
    return dict(record.metrics)


@pytest.fixture(scope="module")
def measured(
    trained: dict[int, nn.Module], digits: TensorDataset
) -> dict[tuple[int, int | None, int], dict[str, float]]:
    """Every case: (step, gradient_sample, seed) -> metrics, with sample=512."""
    loader = DataLoader(digits, batch_size=128)
    return {
        (step, gradient_sample, seed): probe(net, sample_of_dataset(loader, 512, gradient_sample, seed=seed))
        for gradient_sample in GRADIENT_SAMPLES
        for seed in SEEDS
        for step, net in trained.items()
    }


@pytest.fixture(scope="module")
def truth(trained: dict[int, nn.Module], digits: TensorDataset) -> dict[int, dict[str, float]]:
    everything = sample_of_dataset(DataLoader(digits, batch_size=600), None)
    return {step: probe(net, everything) for step, net in trained.items()}


def test_the_band_covers_the_truth(
    measured: dict[tuple[int, int | None, int], dict[str, float]], truth: dict[int, dict[str, float]]
) -> None:
    distances = [
        max(
            metrics["gradient_fraction_low"] - truth[step]["gradient_fraction"],
            truth[step]["gradient_fraction"] - metrics["gradient_fraction_high"],
        )
        for (step, _, _), metrics in measured.items()
    ]
    assert len(distances) == 15 * len(SEEDS)
    assert sum(distance > 0.0 for distance in distances) <= 1  # about two standard errors: one in twenty may be out
    assert max(distances) < 0.002


def test_a_larger_gradient_sample_comes_closer_to_the_truth(
    measured: dict[tuple[int, int | None, int], dict[str, float]], truth: dict[int, dict[str, float]]
) -> None:
    def error(gradient_sample: int | None) -> float:
        errors = [
            abs(metrics["gradient_fraction"] - truth[step]["gradient_fraction"])
            for (step, examples, _), metrics in measured.items()
            if examples == gradient_sample
        ]
        return sum(errors) / len(errors)

    few, more, everything = (error(gradient_sample) for gradient_sample in GRADIENT_SAMPLES)
    assert everything < more < few
    assert len(SEEDS) == 1 or everything < 0.4 * few  # the factor is one of a mean over more than five cases


def test_the_band_narrows_with_the_gradient_sample(
    measured: dict[tuple[int, int | None, int], dict[str, float]],
) -> None:
    def width(gradient_sample: int | None) -> float:
        return sum(
            metrics["gradient_fraction_high"] - metrics["gradient_fraction_low"]
            for (_, examples, _), metrics in measured.items()
            if examples == gradient_sample
        )

    few, more, everything = (width(gradient_sample) for gradient_sample in GRADIENT_SAMPLES)
    assert everything < more < few


def test_the_whole_training_set_needs_no_error_bar(truth: dict[int, dict[str, float]]) -> None:
    for metrics in truth.values():
        assert "gradient_fraction" in metrics
        assert "gradient_fraction_low" not in metrics


def test_it_is_taken_at_every_fifth_probe(trained: dict[int, nn.Module], digits: TensorDataset) -> None:
    sample = sample_of_dataset(DataLoader(digits, batch_size=64), 128, 128)
    net = trained[500]
    with TrainingLoss(net, ParameterSpace.of(net), cross_entropy) as loss:
        taken = [
            "reliability"
            in take_probe(loss, sample, Solver(k=1), [Reliability()], number=number, verify=False)[1].metrics
            for number in (0, 1, 4, 5, 6, 10)
        ]
    assert taken == [True, False, False, True, False, True]


def test_the_interval_must_be_positive() -> None:
    with pytest.raises(ValueError, match="every: expected a positive integer, got 0"):
        Reliability(every=0)
