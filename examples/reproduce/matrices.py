"""Gradients of a GPT's weight matrices have low rank, in a space that holds the top of the Hessian and keeps moving.

    python examples/reproduce/matrices.py [--quick]

A GPT of 2 layers, width 64 and 32 characters of context is trained on the source text of Python's standard library, by
AdamW (learning rate 3e-3, weight decay 0.1) and by Muon (0.02; AdamW for what is no matrix), both with a warm-up of 50
steps. `Matrices` looks at the gradients of its matrices over 512 sequences: how much lies in rank 8, how the space of
the first 8 left singular vectors overlaps with that of an earlier probe and of the other half of the sample, and how
much of the top 10 eigenvectors of the Hessian lies in it. GaLore (Zhao et al. 2024, arXiv 2403.03507) rests on the
first. Random matrices of these shapes have .24 to .38 in rank 8, and random spaces overlap by .125. The numbers to
compare with were found beforehand by a separate program on Shakespeare's text, over 1,024 sequences.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from common import BLUE, GREY, ORANGE, Reproduction, curve, from_step, seeded
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Matrices, SubspaceMonitor

WIDTH, CONTEXT, LAYERS, HEADS = 64, 32, 2, 4
SEQUENCES = 1024
FILES = ("argparse.py", "ast.py", "bdb.py", "cmd.py", "csv.py")  # of the standard library, in all versions
STEPS = [0, 25, 50, 100, 150, 200, 300]
QUICK_STEPS = [0, 50, 100]
WARM_UP = 50
K = 10
NULL = 0.125  # overlap of random 8-dimensional spaces among 64
GAUSSIAN = 0.38  # energy of a Gaussian 64 x 64 matrix in rank 8; less for longer ones


class Block(nn.Module):
    """Attention and a wide layer, each behind a norm and beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        """The stream, with what both add to it."""
        seen = self.first(x)
        split = [part(seen).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


class GPT(L.LightningModule):
    """Predicts each next character."""

    def __init__(self, characters: int, optimizer: str) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        self.optimizer = optimizer
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_table = name.startswith(("tokens", "places"))
                nn.init.normal_(parameter, std=0.02 if is_table else 0.5 * parameter.shape[1] ** -0.5)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next characters."""
        stream = self.tokens(batch[0]) + self.places.weight[: batch[0].shape[1]]
        logits = self.head(self.norm(self.blocks(stream)))
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> dict[str, object]:
        """With a linear warm-up."""
        if self.optimizer == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        else:
            optimizer = MuonBesideAdamW(list(self.parameters()))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MuonBesideAdamW(torch.optim.Optimizer):
    """Muon for matrices, which takes nothing else, and AdamW for the rest, as one optimizer."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        self.both = (
            torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(others, lr=0.002, weight_decay=0.0),
        )
        super().__init__([group for one in self.both for group in one.param_groups], {})  # the same groups

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """A step of both."""
        loss = None if closure is None else closure()
        for one in self.both:
            one.step()
        return loss


def main() -> None:
    reproduction = Reproduction.start(
        __file__,
        "Gradients of a GPT's matrices have low rank, in a space that holds the Hessian's top and keeps moving",
        "Zhao et al. 2024, arXiv 2403.03507 (GaLore); overlap with the Hessian's top space: own",
        __doc__,
    )
    optimizers = ["AdamW"] if reproduction.quick else ["AdamW", "Muon"]
    steps = QUICK_STEPS if reproduction.quick else STEPS
    runs = {name: trained(name, steps) for name in optimizers}
    for name, run in runs.items():
        check(reproduction, name, run)
    if len(runs) == 2:
        adamw, muon = (runs[name] for name in optimizers)
        last = steps[-1]
        pairs = [(run["overlap_anchor"][last], run["overlap_halves"][last]) for run in (adamw, muon)]
        reproduction.claim(
            f"with Muon the space of step {last} is farther from that of step {WARM_UP}, and known less well",
            ".30 and .41 of the anchor's; .36 and .56 between batches of 32",
            f"anchor {pairs[1][0]:.2f} and {pairs[0][0]:.2f}; halves {pairs[1][1]:.2f} and {pairs[0][1]:.2f}",
            pairs[1][0] < pairs[0][0] and pairs[1][1] < pairs[0][1],
        )
    reproduction.save(draw(runs))
    reproduction.finish()


def check(reproduction: Reproduction, name: str, run: dict[str, dict[int, float]]) -> None:
    """The claims of one optimizer."""
    least = 0.85 if name == "AdamW" else 0.7
    energy = run["energy"]
    reproduction.claim(
        f"{name}: at every probe at least {least} of a gradient is in rank 8, in the mean over matrices",
        "gradients are of low rank (GaLore); Gaussian matrices have at most .38",
        f"{min(energy.values()):.2f} to {max(energy.values()):.2f}",
        min(energy.values()) >= least,
    )
    inside = run["hessian_inside"]
    most = 0.5 if name == "AdamW" else 0.4
    reproduction.claim(
        f"{name}: from step 100 on at least {most} of the Hessian's top 10 lies in that space of each gradient",
        ".82 and .67" if name == "AdamW" else ".70 and .54",
        ", ".join(f"{value:.2f} at step {step}" for step, value in inside.items()) + f"; random: {NULL}",
        min(from_step(inside, 100)) >= most,
    )
    halves = from_step(run["overlap_halves"], 100)
    reproduction.claim(
        f"{name}: from step 100 on the spaces of two halves, of 256 sequences each, overlap by .8 at most",
        "a space from a part of the examples is partly noise: batches of 32 overlap by .35 to .63",
        f"{min(halves):.2f} to {max(halves):.2f}",
        max(halves) <= 0.8,
    )
    last = max(run["overlap_anchor"])
    anchor = run["overlap_anchor"][last]
    low, high = (0.3, 0.7) if reproduction.quick else (0.15, 0.55)
    reproduction.claim(
        f"{name}: at step {last} {low} to {high} of the space of step {WARM_UP} is left",
        ".53" if reproduction.quick else ".41" if name == "AdamW" else ".30",
        f"{anchor:.2f}; random: {NULL}",
        low <= anchor <= high,
    )


def draw(runs: dict[str, dict[str, dict[int, float]]]) -> Figure:
    """Energy on the left, overlaps on the right, a colour for each optimizer."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, run) in zip((BLUE, ORANGE), runs.items(), strict=False):
        energy, inside = run["energy"], run["hessian_inside"]
        left.plot(
            energy.keys(), energy.values(), "o-", color=colour, markersize=4, label=f"{name}: rank 8 of a gradient"
        )
        left.plot(
            inside.keys(), inside.values(), "s:", color=colour, markersize=5, label=f"{name}: Hessian's top 10 inside"
        )
        styles = (("overlap_halves", "--", "two halves"), ("overlap_previous", "-", "last probe"))
        for key, style, label in (*styles, ("overlap_anchor", ":", f"step {WARM_UP}")):
            points = {step: value for step, value in run[key].items() if step >= WARM_UP}
            right.plot(
                points.keys(), points.values(), style, color=colour, marker="o", markersize=3, label=f"{name}: {label}"
            )
    left.axhline(GAUSSIAN, color=GREY, linewidth=1.0)
    left.text(0, GAUSSIAN + 0.015, "Gaussian matrix in rank 8", fontsize=8, color=GREY)
    left.set_title("shares inside 8 left singular vectors", fontsize=10)
    right.set_title("overlap of these spaces", fontsize=10)
    for axes in (left, right):
        axes.axhline(NULL, color=GREY, linewidth=1.0)
        axes.text(axes.get_xlim()[0] + 15, NULL + 0.015, "random space", fontsize=8, color=GREY)
        axes.set_ylim(0.0, 1.03)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, loc="lower right" if axes is left else "upper right", ncols=1 if axes is left else 2)
    return figure


def trained(optimizer: str, steps: list[int]) -> dict[str, dict[int, float]]:
    """The means over matrices, by key and step."""
    late = [step for step in (100, steps[-1]) if step in steps]
    options = {"max_overhead": None, "log": "all", "on_failure": "raise", "verify": "never"}
    gradients = SubspaceMonitor(
        k=0,
        every_n_steps=steps,
        sample=512,
        gradient_sample=512,
        batch_size=128,
        curvature="none",
        measurements=[Matrices(anchor_step=WARM_UP)],
        name="gradients",
        **options,
    )
    spaces = SubspaceMonitor(
        k=K,
        every_n_steps=sorted(set(late)),
        sample=96,
        gradient_sample=512,
        batch_size=96,
        measurements=[Matrices()],
        name="spaces",
        **options,
    )
    dataset, characters = text()
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=steps[-1] + 1,
        accelerator="cpu",
        logger=False,
        callbacks=[gradients, spaces],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        seeded(lambda: GPT(characters, optimizer)),  # type: ignore[arg-type]
        DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True),
    )
    keys = ("energy", "stable_rank", "effective_rank", "overlap_halves", "overlap_previous", "overlap_anchor")
    found = {key: curve(gradients, f"matrices/{key}") for key in keys}
    return {**found, "hessian_inside": curve(spaces, "matrices/hessian_inside")}


def text() -> tuple[TensorDataset, int]:
    """Sequences of the standard library's source, with the number of characters."""
    source = "".join((Path(argparse.__file__).parent / name).read_text(encoding="utf-8") for name in FILES)
    codes = torch.tensor([ord(character) - 31 if " " <= character <= "~" else 0 for character in source])
    starts = torch.randint(len(codes) - CONTEXT, (SEQUENCES,), generator=torch.Generator().manual_seed(0))
    windows = codes[starts[:, None] + torch.arange(CONTEXT + 1)]
    return TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()), int(codes.max()) + 1


if __name__ == "__main__":
    main()
