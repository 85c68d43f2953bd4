"""The empirical Fisher beside the Hessian: the gradient in their top spaces, and what its products cost.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.fisher [--json fisher.json]

Shares: an MLP 64-20-20-10 on 1,024 of scikit-learn's digits, in float64, trained by SGD in batches of 32, at steps from
0 to 2,000; the Fisher over the 32 micro-batches of the sample, whose mean gradient is that of the loss. Costs: an MLP
784-100-10 on 1,024 MNIST images in batches of 64, over single examples, in gradients of that sample, by processor time,
the fastest of some. Ends in an error where a product with the Fisher is not that of the gradients.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_subspace.curvature import EmpiricalFisher
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.benchmarks.clock import seconds
from tests.benchmarks.workloads import cross_entropy, digits, mlp

EXAMPLES, BATCHES, K = 1024, 32, 10
STEPS = (0, 50, 100, 200, 500, 1000, 1500, 2000)
LEARNING_RATE = 0.1
SIZE, ROUNDS = 64, 5  # examples in a batch where costs are measured, and how often


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the numbers")
    asked = parser.parse_args()
    rows, cost = shares(), costs()
    print("| step | gradient in F's top 10 | in the Hessian's | overlap |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['step']} | {row['fisher']:.3f} | {row['hessian']:.3f} | {row['overlap']:.2f} |")
    print(f"n = {cost['n']:,}; in gradients of the sample:", *(f"{k} {cost[k]:.1f};" for k in ("made", "kept", "anew")))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"shares": rows, "costs": cost}, indent=1) + "\n")


def shares() -> list[dict[str, float]]:
    """Shares of the gradient in both top spaces, and how far these are one, at some steps."""
    torch.manual_seed(0)
    module = mlp(64, (20, 20)).double()
    data = load_digits()
    inputs, labels = torch.tensor(data.data[:EXAMPLES] / 16.0), torch.tensor(data.target[:EXAMPLES])
    batches = list(zip(inputs.chunk(BATCHES), labels.chunk(BATCHES), strict=True))
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(0)
    rows = []
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            rows.append({"step": step} | compared(module, batches))
        taken = torch.randperm(EXAMPLES, generator=order)[: EXAMPLES // BATCHES]
        optimizer.zero_grad()
        cross_entropy(module, (inputs[taken], labels[taken])).backward()
        optimizer.step()
    return rows


def compared(module: nn.Module, batches: list[Any]) -> dict[str, float]:
    """By dense matrices: of the gradients of the batches, and of the loss by torch."""
    parameters = list(module.parameters())
    gradients = torch.stack([flat(torch.autograd.grad(cross_entropy(module, batch), parameters)) for batch in batches])
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    slopes = torch.autograd.grad(cross_entropy(module, whole), parameters, create_graph=True)
    hessian = torch.stack(
        [
            flat(torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True))
            for slope in flat(slopes)
        ]
    )
    gradient = gradients.mean(0)
    fisher = torch.linalg.svd(gradients, full_matrices=False).Vh[:K]
    top = torch.linalg.eigh(0.5 * (hessian + hessian.T)).eigenvectors[:, -K:].T
    require_the_same(module, batches, gradients)
    share = {name: float((rows @ gradient).square().sum() / gradient.square().sum()) for name, rows in
             (("fisher", fisher), ("hessian", top))}  # fmt: skip
    return share | {"overlap": float((fisher @ top.T).square().sum() / K)}


def require_the_same(module: nn.Module, batches: list[Any], gradients: Tensor) -> None:
    """The operator's product is that of the gradients."""
    direction = torch.randn(gradients.shape[1], dtype=gradients.dtype, generator=torch.Generator().manual_seed(1))
    sample = sample_of_batches(batches)
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy, order=1, dtype=torch.float64) as loss:
        image = EmpiricalFisher(loss, sample.hessian, examples=False).matvec(direction)
    expected = gradients.T @ (gradients @ direction) / len(gradients)
    assert torch.allclose(image, expected, rtol=1e-9, atol=1e-12), "the product is not that of the gradients"


def costs() -> dict[str, float]:
    """Processor time of the gradients of all examples, and of a product with them kept and taken anew."""
    torch.manual_seed(0)
    module = mlp(widths=(100,))
    inputs, labels = (part[:EXAMPLES] for part in digits())
    sample = sample_of_batches(list(zip(inputs.split(SIZE), labels.split(SIZE), strict=True)))
    batches: list[MicroBatch] = list(sample.hessian)
    space = ParameterSpace.of(module)
    direction = torch.randn(space.n, generator=torch.Generator().manual_seed(1))
    with TrainingLoss(module, space, cross_entropy, order=1) as loss:
        fastest = partial(seconds, rounds=ROUNDS)
        made = fastest(lambda: EmpiricalFisher(loss, batches))
        kept, anew = EmpiricalFisher(loss, batches), EmpiricalFisher(loss, batches, memory=0.0)
        gradient = fastest(lambda: anew.mean_gradient(batches))
        products = {name: fastest(partial(of.matvec, direction)) for name, of in (("kept", kept), ("anew", anew))}
    return {"n": space.n, "made": made / gradient} | {name: taken / gradient for name, taken in products.items()}


def flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


if __name__ == "__main__":
    main()
