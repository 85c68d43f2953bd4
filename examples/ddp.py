"""The monitor on several processes, by torchrun: one answer, and each holds its share of it.

    torchrun --nproc-per-node 2 examples/ddp.py [--steps 400] [--strategy ddp|fsdp2] [--out runs/ddp] [--json FILE]

It is the network of examples/digits.py, and nothing about the monitor is different: the Trainer's strategy decides. The
same script runs on several machines, started on each of them with

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp.py

At the end all ranks compare their records, which have to be equal to the last bit, and the first one prints what was
moved between them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor


class Digits(L.LightningModule):
    """64-20-20-10 with ReLU, plain SGD; sharded where the strategy has a mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 10))

    def configure_model(self) -> None:
        """FSDP2 shards every layer over the data-parallel ranks."""
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as in the paper."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"), help="folder for the logs")
    parser.add_argument("--json", type=Path, help="file for all numbers of the probes")
    arguments = parser.parse_args()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun, as the next one
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    L.seed_everything(0, verbose=False)
    data = load_digits()
    dataset = TensorDataset(torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target))
    monitor = SubspaceMonitor(k=10, every_n_steps=100, max_overhead=None, sample="all", batch_size=300, log="all")
    trainer = L.Trainer(
        max_steps=arguments.steps,
        accelerator="auto" if torch.cuda.is_available() else "cpu",  # on GPUs untested
        devices=per_machine,
        num_nodes=num_ranks // per_machine,
        strategy=strategy(arguments.strategy, num_ranks),
        logger=TensorBoardLogger(arguments.out, name="logs"),
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(Digits(), DataLoader(dataset, batch_size=64 // num_ranks, shuffle=True, drop_last=True))

    # What a clock says is each rank's own.
    records = [{k: v for k, v in r.metrics.items() if k not in CLOCKS} for r in monitor.history]
    everybody: list[object] = [None] * num_ranks
    if num_ranks > 1:
        distributed.all_gather_object(everybody, records)
    assert all(other == records for other in everybody if other is not None), "all ranks have the same numbers"
    if trainer.is_global_zero:
        print(f"{num_ranks} ranks, {arguments.strategy}")
        print(f"{'step':>6} {'lambda_1':>9} {'f_top':>9} {'overlap':>9} {'products':>9} {'MB moved':>9} {'seconds':>9}")
        for row in monitor.to_rows():
            print(f"{row['step']:6.0f} " + " ".join(f"{row.get(key, 0.0):9.3g}" for key in COLUMNS))
        if arguments.json is not None:
            rows = [{"step": record.step, **record.metrics} for record in monitor.history]
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
        late = [record.metrics["gradient_fraction"] for record in monitor.history if record.step >= 300]
        assert late, "no probe after step 300 had a subspace to trust"
        assert min(late) >= 0.8, "after the transient nearly all of the gradient lies in 10 of 1,930 directions"


def strategy(name: str, num_ranks: int) -> Strategy:
    # gloo is what the CPU has; None lets Lightning choose nccl for GPUs
    backend = None if torch.cuda.is_available() else "gloo"
    if name == "ddp":
        return DDPStrategy(process_group_backend=backend)
    return ModelParallelStrategy(data_parallel_size=num_ranks, tensor_parallel_size=1, process_group_backend=backend)


CLOCKS = ("solver/seconds", "solver/overhead")
COLUMNS = (
    "sharpness",
    "gradient_fraction",
    "overlap_previous",
    "solver/matvecs",
    "solver/megabytes_moved",
    "solver/seconds",
)

if __name__ == "__main__":
    main()
