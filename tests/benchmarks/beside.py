"""What a probe costs beside its products: its graphs, the noise of the gradient, and the loss after the step.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.beside [--json beside.json]

MLP, CNN and ViT of `workloads.py`, not trained, on their samples, in micro-batches of 64. Processor time, the fastest
of some, in gradients of the sample: making and keeping the graphs of products, which give the gradient, too; the norms
and sums of gradients that are there, as a probe tallies them for `noise/...`; a forward pass, which `step/...` takes.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from torch import nn

from lightning_subspace.curvature import Hessian
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss, place_of
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.gradient_pass import begin_tally
from tests.benchmarks.clock import seconds
from tests.benchmarks.workloads import WORKLOADS, Batch, colour_images, cross_entropy, digits

SIZE, ROUNDS = 64, 5  # examples in a micro-batch; calls, of which the fastest counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="the numbers")
    asked = parser.parse_args()
    data = {"digits": digits(), "colour": colour_images()}
    found = {}
    for name, workload in WORKLOADS.items():
        images, labels = (part[: workload.examples] for part in data[workload.data])
        found[name] = costs(workload.make(), list(zip(images.split(SIZE), labels.split(SIZE), strict=True)))
        print(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in found[name].items()), flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


def costs(module: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Each in gradients."""
    sample, fastest = sample_of_batches(batches), partial(seconds, rounds=ROUNDS)
    with TrainingLoss(module, ParameterSpace.of(module), cross_entropy) as loss:
        graph = fastest(lambda: Hessian(loss, sample.hessian))
        operator = Hessian(loss, sample.hessian)
        gradients = [(place_of(batch), gradient) for batch, gradient in operator.batch_gradients()]

        def tallied() -> None:
            tally = begin_tally(loss, sample)
            for place, gradient in gradients:
                tally.see(place, gradient)
            tally.gathered(Ranks())

        noise = fastest(tallied)
        loss.tally = None
        gradient = fastest(lambda: operator.mean_gradient(sample.hessian))
        forward = fastest(lambda: operator.value(None))
    return {what: taken / gradient for what, taken in (("graph", graph), ("noise", noise), ("forward", forward))}


if __name__ == "__main__":
    main()
