"""A small GPT on the characters of a text, by AdamW and by Muon from the same start, with the numbers of their steps.

    python examples/text/train.py [--file shakespeare.txt] [--steps 300] [--width 64] [--out runs/text] [--json FILE]

Without a file the text is that of Python's own help pages, half a million characters that lie on every machine with
Python. Muon moves the matrices of the blocks, and AdamW beside it all other parameters: two optimizers, which Lightning
has stepped by hand in the training step. `torch.optim.Muon` came with torch 2.9; with an older one AdamW runs alone.

What is measured needs no second derivative (`curvature="none"`), so a probe costs a few gradients and forward passes,
and means the same for every optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import CriticalSharpness, SubspaceMonitor

LENGTH = 64  # characters that the model sees at most
BATCH = 32
HEADS = 4
LAYERS = 2


class Block(nn.Module):
    """Causal attention and a GELU network, each behind a norm and added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.next_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        # Three matrices and not one of three times the width: Muon makes the singular values of each step equal.
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        """The same shape."""
        heads = self.norm(x)
        q, k, v = (f(heads).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.next_norm(x))))


class GPT(L.LightningModule):
    """Characters to the logits of the next ones.

    Args:
        vocabulary: number of characters.
        width: of the residual stream.
        optimizer: "adamw", or "muon" for the matrices of the blocks and AdamW for the rest.
    """

    def __init__(self, vocabulary: int, width: int, optimizer: str) -> None:
        super().__init__()
        self.automatic_optimization = False  # which takes a single optimizer
        self.optimizer = optimizer
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.zeros_(self.head.weight)  # so that the first loss is log(vocabulary)

    def forward(self, text: Tensor) -> Tensor:  # (B, T) -> (B, T, vocabulary)
        """Logits."""
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of each next character; this is what the monitor is given, too."""
        (text,) = batch
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        """A step of each optimizer with one gradient."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        loss = self.loss(batch, batch_idx)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One or two, without overlap."""
        if self.optimizer == "adamw":
            return [torch.optim.AdamW(self.parameters(), lr=3e-3)]
        matrices = [parameter for parameter in self.blocks.parameters() if parameter.ndim == 2]
        others = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
        return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--file", type=Path, help="text in UTF-8; without it Python's help pages")
    parser.add_argument("--steps", type=int, default=300, help="batches that each optimizer trains on")
    parser.add_argument("--width", type=int, default=64, help="of the network, a multiple of 4")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder for the logs")
    parser.add_argument("--json", type=Path, help="file for all numbers of the probes")
    arguments = parser.parse_args()

    text = help_pages() if arguments.file is None else arguments.file.read_text(encoding="utf-8")
    characters = sorted(set(text))
    index = {character: i for i, character in enumerate(characters)}
    windows = torch.tensor([index[character] for character in text]).unfold(0, LENGTH + 1, LENGTH).contiguous()
    print(f"{len(text):,} characters, {len(characters)} different ones, {len(windows):,} windows")

    optimizers = ["adamw", "muon"] if hasattr(torch.optim, "Muon") else ["adamw"]
    rows: dict[str, list[dict[str, float]]] = {}
    for name in optimizers:
        L.seed_everything(0, verbose=False)
        model = GPT(len(characters), arguments.width, name)
        monitor = train(model, DataLoader(TensorDataset(windows), BATCH, shuffle=True, drop_last=True), name, arguments)
        print_table(name, model, monitor)
        rows[name] = [{"step": record.step, **record.metrics} for record in monitor.history]
        last = monitor.history[-1].metrics["sample_loss"]
        assert last < 0.8 * math.log(len(characters)), "the model has learnt something of the text"
    if arguments.json is not None:
        found = {"seconds": time.process_time(), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nTensorBoard: tensorboard --logdir {arguments.out}")


def train(model: GPT, loader: DataLoader, name: str, arguments: argparse.Namespace) -> SubspaceMonitor:
    # Lightning counts the steps of all optimizers, and so does the monitor.
    per_batch = len(model.configure_optimizers())
    monitor = SubspaceMonitor(
        curvature="none",
        every_n_steps=50 * per_batch,
        sample=128,
        gradient_sample=512,
        max_overhead=None,
        loss_fn=GPT.loss,  # with manual optimization a training step returns none
        measurements=[CriticalSharpness(along="taken")],
        log="all",
    )
    trainer = L.Trainer(
        max_steps=arguments.steps * per_batch,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.out, name="", version=name),
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, loader)
    return monitor


def help_pages() -> str:
    """What `help("lambda")` and the like show."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def print_table(name: str, model: GPT, monitor: SubspaceMonitor) -> None:
    columns = {
        "sample_loss": "loss",
        "step/gain": "gain",
        "step/change": "change",
        "step/edge_ratio": "ratio",
        "critical_step": "critical",
        "step/curvature": "curvature",
        "step/relative_norm": "|u|/|theta|",
        "step/cosine_previous": "cosine",
        "noise/scale": "noise",
    }
    per_batch = len(model.configure_optimizers())
    print(f"\n{name}: {monitor.overhead:.0%} of the time went into {len(monitor.history)} probes")
    print(f"{'batch':>6} " + " ".join(f"{title:>11}" for title in columns.values()))
    for row in monitor.to_rows():
        values = (row.get(key, math.nan) for key in columns)
        print(f"{row['step'] / per_batch:6.0f} " + " ".join(f"{value:11.3g}" for value in values))


if __name__ == "__main__":
    main()
