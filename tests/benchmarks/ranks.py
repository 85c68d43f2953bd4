"""What a probe takes on one and on two ranks: memory, bytes moved, calls, seconds.

    python tests/benchmarks/ranks.py [--n 5000000] [--ranks 1 2] [--examples 128]

Every number of ranks gets fresh processes of one thread that talk over gloo. Memory is the peak of the resident set
over what it was when the probe began; the part that ranks share is (ncv + 1 + k) n / W floats of basis and answer.
Where ranks outnumber the cores the seconds say nothing. Ends in an assertion on the memory that the second rank saves.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from lightning_subspace.parallel.partition import Partition
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.measure import take_probe
from lightning_subspace.subspace.solver import Solver

K = 10
NCV = 2 * K + 10
FLOAT = 4  # bytes


def net(n: int) -> nn.Module:
    """784-w-w-10 with about n parameters."""
    width = int(-397 + (397**2 + n) ** 0.5)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def probe(rank: int, num_ranks: int, n: int, examples: int, results: mp.Queue) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    module = net(n)
    space, ranks = ParameterSpace.of(module), Ranks(dist.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (examples,), generator=generator)
    means = torch.randn(10, 784, generator=generator)
    images = means[labels] + torch.randn(examples, 784, generator=generator)
    sample = sample_of_batches(list(zip(images.split(32), labels.split(32), strict=True)), ranks=ranks)
    before, started = resident(), time.monotonic()
    with ranks.agree(), TrainingLoss(module, space, loss_fn) as loss:
        _, record = take_probe(loss, sample, Solver(K), [], partition=Partition.even(space, ranks), verify=False)
    seconds, peak = time.monotonic() - started, peak_resident() - before
    assert record.subspace is not None
    found = (rank, space.n, record.subspace.num_matvecs, peak, seconds, dict(ranks.nbytes), dict(ranks.calls))
    results.put((*found, record.subspace.eigenvalues.tolist()))
    dist.destroy_process_group()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(n: int, counts: list[int], examples: int) -> None:
    print(
        "| ranks | n | products | peak MB a rank | (ncv + 1 + k) n / W | MB moved a product | 8 n | calls | seconds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    peaks, eigenvalues = [], []
    context = mp.get_context("spawn")
    for num_ranks in counts:
        results = context.Queue()
        processes = [context.Process(target=probe, args=(r, num_ranks, n, examples, results)) for r in range(num_ranks)]
        for process in processes:
            process.start()
        found = sorted(results.get() for _ in processes)
        for process in processes:
            process.join()
        _, dimension, products, _, seconds, nbytes, calls, values = found[0]
        peak = max(row[3] for row in found)
        transfers = ("all_gather", "reduce_scatter")
        moved = sum(nbytes[name] / calls[name] for name in transfers if name in calls)
        share = FLOAT * (NCV + 1 + K) * dimension / num_ranks
        measured = f"{dimension:,} | {products} | {peak / 1e6:,.0f} | {share / 1e6:,.0f} | {moved / 1e6:.1f}"
        expected = f"{2 * FLOAT * dimension * (num_ranks > 1) / 1e6:.1f}"
        print(f"| {num_ranks} | {measured} | {expected} | {sum(calls.values())} | {seconds:.1f} |", flush=True)
        peaks.append(peak - share)
        eigenvalues.append(torch.tensor(values))
    for other in eigenvalues[1:]:
        torch.testing.assert_close(other, eigenvalues[0], rtol=0, atol=1e-5 * float(eigenvalues[0][0]))
    # What is left beside the shared part are whole vectors and graphs, which do not grow with the number of ranks.
    assert max(peaks) - min(peaks) < 6 * FLOAT * dimension, "each rank holds its share of the basis alone"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=5_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--examples", type=int, default=128)
    arguments = parser.parse_args()
    main(arguments.n, arguments.ranks, arguments.examples)
