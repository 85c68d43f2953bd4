"""LoRA by peft on a small Llama: what is measured, and what the two factors change in the reading.

    python examples/lora.py [--steps 300] [--out runs/lora] [--json FILE]

The Llama is built from its own configuration (nothing is downloaded) and trained on arithmetic progressions modulo 10.
LoRA then adapts it to Fibonacci's rule: W + (alpha / r) B A, with W frozen and B = 0 at the start. What is trained is
what is measured: the Hessian is that of the factors, with no argument for it. The script prints, and ends by checking:

- At the start all of the gradient is that of the B: while B = 0 nothing depends on A.
- (cB, A/c) is the same network for every c. The loss is equal, the sharpness is not, and neither is f_top: they belong
  to these factors, at this scale. Compare runs of one `lora_alpha`, rank and start.
- The network is also that of the merged weights, in whose space sharpness and f_top are different ones again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_subspace import Layers, Record, SubspaceMonitor, measure_subspace

BASE, LENGTH = 10, 8  # sequences of 8 digits, one for each pair that they begin with
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
FACTORS = {"A": "*lora_A*", "B": "*lora_B*"}


class NextDigit(L.LightningModule):
    """Any causal model of transformers, with adapters or without.

    Args:
        model: returns logits for `input_ids`.
        lr: of AdamW.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the digits that follow from the first two."""
        (digits,) = batch
        logits = self.model(input_ids=digits[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits[:, 1:].flatten(0, 1), digits[:, 2:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW of what is trainable."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of either training")
    parser.add_argument("--out", type=Path, default=Path("runs/lora"), help="folder for the logs")
    parser.add_argument("--json", type=Path, help="file for all numbers of the probes")
    arguments = parser.parse_args()

    L.seed_everything(0, verbose=False)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=BASE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    fit(NextDigit(llama, lr=3e-3), sequences(lambda a, b: 2 * b - a), arguments)

    adapted = get_peft_model(llama, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    monitor = SubspaceMonitor(
        k=5, every_n_steps=50, max_overhead=None, sample="all", log="all", measurements=[Layers(groups=FACTORS)]
    )
    task, fibonacci = NextDigit(adapted, lr=1e-2), sequences(lambda a, b: a + b)
    fit(task, fibonacci, arguments, monitor)

    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in task.parameters())
    print(f"trainable: {trainable:,} of {parameters:,} parameters")
    print_table(monitor)
    batches = [fibonacci.tensors]
    scaled = {c: measure_subspace(with_scale(task, c), batches, k=5) for c in (0.25, 0.5, 1.0, 2.0, 4.0)}
    merged = measure_subspace(merge(task), batches, k=5, params=[f"*{name}*" for name in TARGETS])
    networks = {**{f"(cB, A/c), c = {c:g}": record for c, record in scaled.items()}, "merged": merged}
    print_same_networks(networks)
    if arguments.json is not None:
        history = [{"step": record.step, **record.metrics} for record in monitor.history]
        same = {name: dict(record.metrics) for name, record in networks.items()}
        found = {"trainable": trainable, "parameters": parameters, "history": history, "networks": same}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nTensorBoard: tensorboard --logdir {arguments.out}")

    first = monitor.history[0].metrics
    assert first["layers/gradient/A"] == 0.0, "while B = 0 the gradient of A is zero"
    assert monitor.history[-1].metrics["layers/gradient/A"] > 0.01, "later it is not"
    losses = [record.metrics["sample_loss"] for record in (*scaled.values(), merged)]
    assert max(losses) - min(losses) <= 1e-4 * max(losses), "these are all the same network"
    sharpness = [record.metrics["sharpness"] for record in scaled.values()]
    assert max(sharpness) > 2 * min(sharpness), "and of different sharpness"


def sequences(rule: Callable[[Tensor, Tensor], Tensor]) -> TensorDataset:  # (100, 8) digits
    """All that there are under a rule for the next digit from the last two."""
    digits = [*torch.cartesian_prod(torch.arange(BASE), torch.arange(BASE)).T]
    while len(digits) < LENGTH:
        digits.append(rule(*digits[-2:]) % BASE)
    return TensorDataset(torch.stack(digits, dim=1))


def fit(module: L.LightningModule, data: TensorDataset, arguments: argparse.Namespace, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_steps=arguments.steps,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.out, name="") if callbacks else False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, DataLoader(data, batch_size=25, shuffle=True))


def with_scale(task: NextDigit, c: float) -> NextDigit:
    """The same network from other factors."""
    task = copy.deepcopy(task)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            if "lora_" in name:
                parameter.mul_(c if "lora_B" in name else 1 / c)
    return task


def merge(task: NextDigit) -> NextDigit:
    """The same network as W + (alpha / r) B A, without factors; all of it trainable."""
    adapted: PeftModel = copy.deepcopy(task.model)
    return NextDigit(adapted.merge_and_unload().requires_grad_(True), task.lr)


def print_table(monitor: SubspaceMonitor) -> None:
    columns = {
        "sample_loss": "loss",
        "sharpness": "lambda_1",
        "gradient_fraction": "f_top",
        "layers/gradient/A": "g in A",
        "layers/participation/A": "top in A",
        "layers/update/A": "update in A",
    }
    print(f"{'step':>6} " + " ".join(f"{title:>11}" for title in columns.values()))
    for row in monitor.to_rows():
        values = (row.get(key, math.nan) for key in columns)
        print(f"{row['step']:6.0f} " + " ".join(f"{value:11.3g}" for value in values))


def print_same_networks(records: dict[str, Record]) -> None:
    columns = {"sample_loss": "loss", "sharpness": "lambda_1", "gradient_fraction": "f_top", "gradient_norm": "|g|"}
    print(f"\n{'one network':>20} " + " ".join(f"{title:>11}" for title in columns.values()))
    for name, record in records.items():
        values = (record.metrics.get(key, math.nan) for key in columns)
        print(f"{name:>20} " + " ".join(f"{value:11.4g}" for value in values))


if __name__ == "__main__":
    main()
