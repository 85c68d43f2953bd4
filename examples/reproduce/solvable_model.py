"""The solvable model of Gur-Ari, Roberts and Dyer: every number of a training run known in advance.

    python examples/reproduce/solvable_model.py [--quick] [--out DIR]

Softmax regression without biases on K orthonormal points, one a class, from zero weights by full-batch gradient descent
(arXiv 1812.04754, section 3). With a the margin on the right class, q = 1 / (e^a + K - 1) and p = e^a q, one step is
a <- a + lr q, and then the loss is -log p, |g| = q sqrt(K - 1), the Hessian has K eigenvalues p q, K (K - 2) times
q / K and zeros, and all of the gradient lies in the space of the first K. Everything here is in float64 and compared
with that recursion. The K equal eigenvalues are also what a Lanczos iteration without care finds once.

The paper's equation (7) gives the gradient of the first class as 2 (mu_2 - mu_1) / (lr t); its own equation (6) makes
it (mu_2 - mu_1) / (2 lr t), and that is what training does. With biases the gradient is the K-th eigenvector exactly;
with noise on the inputs a bulk appears whose size is that of the noise squared; and linear regression, whose Hessian
does not change, is the control in which the gradient leaves the top space.
"""

from __future__ import annotations

import math

import torch
from common import BLUE, GREY, ORANGE, Reproduction, curve, fit, whole_set_monitor
from common import Task as BaseTask
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import SubspaceMonitor, measure_subspace

LEARNING_RATE = 1.0


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "A model in which every number is known: softmax regression on orthonormal class means",
        "Gur-Ari, Roberts and Dyer 2018, section 3",
        __doc__,
    )
    steps = [0, 1, 10, 100] if reproduction.quick else [0, 1, 10, 100, 1000, 10_000]
    runs = {num_classes: trained(num_classes, steps) for num_classes in (2, 4, 10)}
    for num_classes, monitor in runs.items():
        check_recursion(reproduction, num_classes, monitor)
    check_erratum(reproduction)
    for num_classes in (2, 4):
        check_biases(reproduction, num_classes)
    check_noise(reproduction)
    fractions = check_regression(reproduction)
    reproduction.save(draw(runs[10], fractions))
    reproduction.finish()


def softmax_regression(num_inputs: int, num_classes: int, *, bias: bool = False) -> nn.Linear:
    net = nn.Linear(num_inputs, num_classes, bias=bias)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return net


def points(num_classes: int) -> TensorDataset:
    return TensorDataset(torch.eye(num_classes, dtype=torch.float64), torch.arange(num_classes))


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def task(net: nn.Module, lr: float = LEARNING_RATE) -> BaseTask:
    return BaseTask(net, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))


def trained(num_classes: int, steps: list[int]) -> SubspaceMonitor:
    dataset = points(num_classes)
    monitor = whole_set_monitor(dataset, steps, k=num_classes, tol=1e-10, reference_step=0)
    net = softmax_regression(num_classes, num_classes)
    fit(task(net), dataset, steps=steps[-1], batch_size="all", callbacks=[monitor], double=True)
    return monitor


def margins(num_classes: int, steps: int) -> list[float]:
    """The margin after 0 ... steps steps."""
    a = [0.0]
    for _ in range(steps):
        a.append(a[-1] + LEARNING_RATE / (math.exp(a[-1]) + num_classes - 1))
    return a


def probabilities(margin: float, num_classes: int) -> tuple[float, float]:
    """The pair p, q."""
    q = 1.0 / (math.exp(margin) + num_classes - 1)
    return math.exp(margin) * q, q


def check_recursion(reproduction: Reproduction, num_classes: int, monitor: SubspaceMonitor) -> None:
    a = margins(num_classes, monitor.history[-1].step)
    worst = distance = 0.0
    for record in monitor.history:
        p, q = probabilities(a[record.step], num_classes)
        expected = {
            **{f"eigenvalues/{i:02d}": p * q for i in range(1, num_classes + 1)},
            "gradient_norm": q * math.sqrt(num_classes - 1),
            "gradient_curvature": p * q,
        }
        worst = max(worst, *(abs(record.metrics[key] / value - 1.0) for key, value in expected.items()))
        # At the start p = q = 1/K, so that for K > 2 all K (K - 1) eigenvalues are equal and there is no top K.
        if record.step > 0 or num_classes == 2:
            ones = (record.metrics[key] for key in ("gradient_fraction", "gradient_hessian_cosine"))
            distance = max(distance, *(abs(1.0 - one) for one in ones))
        else:
            assert "gradient_fraction" not in record.metrics, "withheld where it is not defined"
    overlaps = curve(monitor, "overlap_reference").values()
    distance = max(distance, *(abs(1.0 - overlap) for overlap in overlaps))
    reproduction.claim(
        f"K = {num_classes}: the {num_classes} largest eigenvalues, |g| and g.Hg/|g|^2 at steps 0 to "
        f"{monitor.history[-1].step:,} within 1e-8",
        "pq, q sqrt(K - 1), pq",
        f"largest relative difference {worst:.0e}",
        worst <= 1e-8,
    )
    reproduction.claim(
        f"K = {num_classes}: f_top, overlap(g, Hg) and the overlap with the first space are 1, within 1e-8"
        + (", from step 1 on" if num_classes > 2 else ""),
        "1",
        f"largest difference {distance:.0e}",
        distance <= 1e-8,
    )


def check_erratum(reproduction: Reproduction) -> None:
    steps = 3000 if reproduction.quick else 30_000
    weights = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    means, labels = points(2).tensors
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(F.cross_entropy(means @ weights.T, labels), weights)
        with torch.no_grad():
            weights -= LEARNING_RATE * gradient
    # The gradient of the first class is c (mu_2 - mu_1) / (lr t).
    factors = (gradient[0] @ (means[1] - means[0])) / 2.0 * LEARNING_RATE * steps
    reproduction.claim(
        f"K = 2: at step {steps:,} the first class has the gradient c (mu_2 - mu_1) / (lr t) with c = 1/2 within 5e-3",
        "2 in equation (7), 1/2 by equation (6)",
        f"c = {float(factors):.5f}",
        abs(float(factors) - 0.5) <= 5e-3,
    )


def check_biases(reproduction: Reproduction, num_classes: int) -> None:
    dataset = points(num_classes)
    monitor = whole_set_monitor(dataset, [0, 10, 100], k=num_classes, tol=1e-10)
    net = softmax_regression(num_classes, num_classes, bias=True)
    model = task(net)
    fit(model, dataset, steps=100, batch_size="all", callbacks=[monitor], double=True)
    fewer = measure_subspace(
        net,
        [tuple(dataset.tensors)],
        k=num_classes - 1,
        tol=1e-10,
        dtype="float64",
        loss_fn=cross_entropy,
    ).metrics["gradient_fraction"]
    enough = min(curve(monitor, "gradient_fraction").values())
    reproduction.claim(
        f"with biases, K = {num_classes}: the gradient is the K-th eigenvector, f_(K-1) < 1e-8 and f_K = 1",
        "K - 1 eigenvalues and one smaller",
        f"f_(K-1) = {fewer:.0e}, f_K = 1 - {1.0 - enough:.0e}",
        fewer < 1e-8 and abs(1.0 - enough) < 1e-8,
    )


def check_noise(reproduction: Reproduction) -> None:
    ratios, fractions = [], []
    for sigma in (0.01, 0.1):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(2000) % 2
        means = torch.eye(20, dtype=torch.float64)[:2]
        inputs = means[labels] + sigma * torch.randn(2000, 20, generator=generator, dtype=torch.float64)
        dataset = TensorDataset(inputs, labels)
        monitor = whole_set_monitor(dataset, [0, 1, 10, 100], k=2, tol=1e-8)
        fit(task(softmax_regression(20, 2)), dataset, steps=100, batch_size="all", callbacks=[monitor], double=True)
        wide = measure_subspace(
            softmax_regression(20, 2).double(),
            [(inputs, labels)],
            k=3,
            tol=1e-8,
            dtype="float64",
            loss_fn=cross_entropy,
        )
        assert wide.subspace is not None
        ratios.append(float(wide.subspace.eigenvalues[2]) / sigma**2)
        fractions += curve(monitor, "gradient_fraction").values()
    reproduction.claim(
        "with noise sigma = .01, .1 on the inputs, K = 2: lambda_3 / sigma^2 at the start is the same within 10 %",
        "sigma^2",
        f"{ratios[0]:.3f} and {ratios[1]:.3f}",
        abs(ratios[0] / ratios[1] - 1.0) <= 0.1,
    )
    reproduction.claim(
        "with noise: f_2 >= .98 at all steps", "about 1", f"smallest {min(fractions):.4f}", min(fractions) >= 0.98
    )


def check_regression(reproduction: Reproduction) -> dict[int, tuple[float, float]]:
    """Linear regression: fraction measured and fraction by the formula, by step."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0.2, -0.5, 20, dtype=torch.float64)
    inputs = torch.randn(500, 20, generator=generator, dtype=torch.float64) * scales
    targets = inputs @ torch.randn(20, 1, generator=generator, dtype=torch.float64)
    dataset = TensorDataset(inputs, targets)
    hessian = inputs.T @ inputs / len(inputs)
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(0), vectors.flip(1)
    start = vectors.T @ (-inputs.T @ targets / len(inputs))[:, 0]  # the gradient at zero, in eigenvectors
    lr, k = 0.03, 5

    def half_square(outputs: Tensor, wanted: Tensor) -> Tensor:
        return 0.5 * (outputs - wanted).square().mean()

    steps = [0, 1, 10, 50, 100, 200]
    monitor = whole_set_monitor(dataset, steps, k=k, tol=1e-11)
    model = BaseTask(softmax_regression(20, 1), half_square, lambda parameters: torch.optim.SGD(parameters, lr=lr))
    fit(model, dataset, steps=steps[-1], batch_size="all", callbacks=[monitor], double=True)
    found = {}
    for step, fraction in curve(monitor, "gradient_fraction").items():
        squares = ((1.0 - lr * values) ** step * start).square()
        found[step] = (fraction, float(squares[:k].sum() / squares.sum()))
    off = max(abs(a - b) for a, b in found.values())
    reproduction.claim(
        "control, linear regression: f_5 at steps 0 to 200 is that of the closed form within 1e-6, and falls below .01",
        "not aligned: H is constant",
        f"largest difference {off:.0e}; f_5 from {found[0][0]:.3f} to {found[steps[-1]][0]:.1e}",
        off <= 1e-6 and found[steps[-1]][0] < 0.01,
    )
    return found


def draw(monitor: SubspaceMonitor, fractions: dict[int, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(9.0, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    a = margins(10, monitor.history[-1].step)
    expected = [probabilities(margin, 10) for margin in a]
    left.plot([p * q for p, q in expected], color=GREY, label="pq, by the recursion")
    for index, marker in ((1, "o"), (10, "x")):
        points_of = curve(monitor, f"eigenvalues/{index:02d}")
        left.plot(*zip(*points_of.items(), strict=True), marker, color=BLUE, label=f"eigenvalue {index}, measured")
    left.set_xscale("symlog", linthresh=1.0)
    left.set_yscale("log")
    left.set_title("K = 10: ten equal eigenvalues", fontsize=10)
    steps = list(fractions)
    right.plot(steps, [fractions[step][1] for step in steps], color=GREY, label="closed form")
    right.plot(steps, [fractions[step][0] for step in steps], "o", color=ORANGE, label="measured")
    right.set_yscale("log")
    right.set_title("linear regression: the gradient leaves the top 5", fontsize=10)
    right.set_ylabel("f_5")
    for axes in (left, right):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
