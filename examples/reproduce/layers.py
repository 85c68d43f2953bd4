"""Which layers the sharpest directions are in, and what single layers do not say.

    python examples/reproduce/layers.py [--quick]

Three networks under `Layers`: a 64-20-20-10 ReLU network on the handwritten digits of scikit-learn, by parameter tensor
(SGD with learning rate 0.1 and batches of 64); a convolutional one on 1,000 of these images, by module (learning rate
0.3, batches of 50); and a GPT of two layers on the characters of Python's own documentation, by kind of module (AdamW
with learning rate 3e-3, batches of 32 sequences). A group's share of the top space is the mean of |v_l|^2 over the
first 10 eigenvectors, and that of a random space its share of the parameters. The largest eigenvalue of a group's block
of the Hessian is known for nothing from the 10 eigenpairs, and by an eigensolve of its own. That sharpness differs by
kind of module is from Wang et al. 2025 (arXiv 2502.19002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import BLUE, ORANGE, Reproduction, Task, digits, fit, fully_connected, seeded, whole_set_monitor
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_subspace import Layers, Record, SubspaceMonitor, Trace

K = 10
TRAINED = 500  # step of the first network from which its blocks are claimed to be known
WIDTH, LENGTH, HEADS, CHARACTERS, WARM_UP = 64, 32, 4, 64, 50
KINDS = {
    "token": "*.token.*",
    "position": "*.position.*",
    "q": "*.q.*",
    "k": "*.k.*",
    "v": "*.v.*",
    "o": "*.o.*",
    "up": "*.up.*",
    "down": "*.down.*",
    "norm": "*norm*",
    "head": "*.head.*",
}
EXACT = ("token", "position", "down", "head")  # the sharpest ones


@dataclass(frozen=True)
class Case:
    """A network's records, and the shares of its groups in the parameters."""

    name: str
    records: Sequence[Record]
    shares: Mapping[str, float]

    @classmethod
    def of(cls, name: str, monitor: SubspaceMonitor) -> Case:
        """The records of a monitor, whose table has all of its groups."""
        table = monitor.history[0].tables["layers"]
        return cls(name, monitor.history, dict(zip(table.groups, table.rows["null"].tolist(), strict=True)))

    def row(self, step: int, name: str) -> dict[str, float]:
        """The numbers of a step by group, where they are known."""
        [record] = [record for record in self.records if record.step == step]
        start = f"layers/{name}/"
        return {key.removeprefix(start): value for key, value in record.metrics.items() if key.startswith(start)}

    def ratios(self, step: int) -> dict[str, float]:
        """Blocks from the eigenpairs over exact ones."""
        exact = self.row(step, "block_sharpness_exact")
        free = self.row(step, "block_sharpness")
        return {group: value / exact[group] for group, value in free.items() if group in exact}

    def sharpest(self, step: int) -> float:
        """The largest eigenvalue of any block over that of the whole."""
        [record] = [record for record in self.records if record.step == step]
        return max(self.row(step, "block_sharpness_exact").values()) / record.metrics["sharpness"]

    @property
    def steps(self) -> list[int]:
        """Those that were measured."""
        return [record.step for record in self.records]


class Convolutional(nn.Module):
    """Four convolutions and two dense layers for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.conv4 = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.dense1, self.dense2 = nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of ten classes."""
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x.view(-1, 1, 8, 8))))), 2)
        x = F.max_pool2d(F.relu(self.conv4(F.relu(self.conv3(x)))), 2)
        return self.dense2(F.relu(self.dense1(x.flatten(1))))


class Block(nn.Module):
    """Causal attention and a dense part, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        seen = self.norm1(x)
        q, k, v = (part(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf")).softmax(dim=-1)
        x = x + self.o((scores @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Two blocks between embeddings and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                is_embedding = "token" in name or "position" in name
                nn.init.normal_(parameter, std=0.02 if is_embedding else 0.5 * parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next character at each place."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Language(Task):
    """The next character, by AdamW with a warm-up."""

    def configure_optimizers(self) -> Any:
        """Stepped once a batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def sequences(count: int, seed: int) -> TensorDataset:
    """Pieces of Python's documentation, (count, LENGTH) characters and those that follow; rare ones are blanks."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    common = sorted(set(text), key=lambda character: (-text.count(character), character))[:CHARACTERS]
    number = {character: place for place, character in enumerate(common)}
    blank = number[" "]
    codes = torch.tensor([number.get(character, blank) for character in text])
    starts = torch.randint(len(codes) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    pieces = codes[starts[:, None] + torch.arange(LENGTH + 1)]
    return TensorDataset(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())


def next_character(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def fully_connected_case(steps: Sequence[int]) -> tuple[Case, dict[str, float]]:
    """The first network, and how much smaller taking the eigenpairs out makes the errors of traces."""
    dataset = digits()
    traces = {name: Trace(vectors=40, groups="tensors") for name in ("deflated", "plain")}
    layers = whole_set_monitor(dataset, steps, k=K, measurements=[Layers(exact=["*weight"])], name="layers")
    others = [
        whole_set_monitor(dataset, [TRAINED], k=k, measurements=[traces[name]], name=name)
        for name, k in (("deflated", K), ("plain", 0))
    ]
    task = Task(seeded(lambda: fully_connected(64, 20, 20, 10)))
    fit(task, dataset, steps=steps[-1], callbacks=[layers, *others])
    deflated, plain = (monitor.history[0].metrics for monitor in others)
    errors = {key: deflated[key] / plain[key] for key in plain if key.startswith("trace_error/")}
    return Case.of("fully connected", layers), {key.removeprefix("trace_error/"): e for key, e in errors.items()}


def convolutional_case(steps: Sequence[int]) -> Case:
    images, labels = digits().tensors
    dataset = TensorDataset(images[:1000], labels[:1000])
    monitor = whole_set_monitor(dataset, steps, k=K, measurements=[Layers("modules", exact=True)])
    task = Task(seeded(Convolutional), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3))
    fit(task, dataset, steps=steps[-1], batch_size=50, callbacks=[monitor])
    return Case.of("convolutional", monitor)


def language_case(steps: Sequence[int]) -> Case:
    monitor = SubspaceMonitor(
        k=K,
        every_n_steps=list(steps),
        max_overhead=None,
        sample=[tuple(sequences(32, seed=99).tensors)],
        measurements=[Layers(KINDS, exact=EXACT)],
        log="all",
        on_failure="raise",
    )
    task = Language(seeded(Gpt), next_character)
    fit(task, sequences(2048, seed=0), steps=steps[-1], batch_size=32, callbacks=[monitor])
    return Case.of("GPT", monitor)


def main() -> None:
    """State what was found of the three networks."""
    reproduction = Reproduction.start(
        __file__,
        "A few layers hold the sharpest directions, and no single layer is as sharp as the whole",
        "Wang et al. 2025, arXiv 2502.19002",
        __doc__,
    )
    quick = reproduction.quick
    dense, errors = fully_connected_case([0, 100, TRAINED] if quick else [0, 100, TRAINED, 2000])
    cases = [dense, convolutional_case([0, 50] if quick else [0, 400])]
    if not quick:
        cases.append(language_case([0, 100, 300]))

    late = [step for step in dense.steps if step >= TRAINED]
    held = {step: dense.row(step, "participation")["net.4.weight"] for step in late}
    share = dense.shares["net.4.weight"]
    reproduction.claim(
        f"fully connected: from step {TRAINED} on the last weights hold at least .25 of the top space",
        "layers differ in sharpness",
        ", ".join(f"{value:.2f} at {step}" for step, value in held.items())
        + f"; they are {share:.2f} of the parameters",
        min(held.values()) >= 0.25,
    )
    ratios = [ratio for step in late for group, ratio in dense.ratios(step).items() if group.endswith("weight")]
    reproduction.claim(
        f"fully connected: from step {TRAINED} on the blocks of the three weights are known from 10 eigenpairs within "
        "2 %",
        "not in a paper",
        f"{min(ratios):.3f} to {max(ratios):.3f} of the exact ones",
        len(ratios) == 3 * len(late) and max(abs(ratio - 1.0) for ratio in ratios) < 0.02,
    )
    reproduction.claim(
        f"fully connected: at step {TRAINED} the errors of the traces of all blocks are at most .3 of what they are "
        "without the eigenpairs",
        "not in a paper",
        f"{min(errors.values()):.2f} to {max(errors.values()):.2f}",
        max(errors.values()) < 0.3,
    )
    given = {case.name: len(case.row(0, "block_sharpness")) for case in cases}
    reproduction.claim(
        "before training no block is told from the eigenpairs",
        "not in a paper",
        ", ".join(
            f"{count} of {len(case.shares)} {case.name}" for case, count in zip(cases, given.values(), strict=True)
        ),
        not any(given.values()),
    )
    sharpest = {case.name: [case.sharpest(step) for step in case.steps] for case in cases}
    reproduction.claim(
        "the sharpest block has at most .9 of the largest eigenvalue of the whole, at every measured step",
        "not in a paper",
        "; ".join(f"{name} {min(values):.2f} to {max(values):.2f}" for name, values in sharpest.items()),
        max(max(values) for values in sharpest.values()) <= 0.9,
    )
    if not quick:
        claim_of_language(reproduction, cases[-1])
    reproduction.save(draw(cases))
    reproduction.finish()


def claim_of_language(reproduction: Reproduction, case: Case) -> None:
    """State what was found of the GPT."""
    trained = [step for step in case.steps if step > 0]
    held = {step: case.row(step, "participation") for step in trained}
    token, up = case.shares["token"], case.shares["up"]
    reproduction.claim(
        "GPT: once it trains, the token embedding holds at least 4 times its share of the parameters of the top space, "
        "and the up projections at most half of theirs",
        "types of modules differ in sharpness",
        "; ".join(f"{row['token']:.2f} and {row['up']:.2f} at step {step}" for step, row in held.items())
        + f"; of the parameters they are {token:.2f} and {up:.2f}",
        all(row["token"] >= 4.0 * token and row["up"] <= 0.5 * up for row in held.values()),
    )
    spread = {record.step: record.metrics["layers/inverse_participation"] for record in case.records}
    reproduction.claim(
        "GPT: n sum_j v_j^4 is at least 50 in the mean over the top eigenvectors",
        "3 for random vectors",
        ", ".join(f"{value:.0f} at step {step}" for step, value in spread.items()),
        min(spread.values()) >= 50.0,
    )


def draw(cases: Sequence[Case]) -> Figure:
    """Shares of the top space before and after training, beside those of the parameters."""
    figure = Figure(figsize=(4.4 * len(cases), 3.8), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        groups = list(case.shares)
        places = list(range(len(groups)))
        for offset, step, colour in ((-0.2, case.steps[0], ORANGE), (0.2, case.steps[-1], BLUE)):
            values = list(case.row(step, "participation").values())
            axes.barh([place + offset for place in places], values, 0.4, color=colour, label=f"step {step}")
        axes.plot(list(case.shares.values()), places, "|", color="black", markersize=16, label="of the parameters")
        axes.set_yticks(places, groups)
        axes.invert_yaxis()
        axes.set_title(f"{case.name}: share of the top space", fontsize=10)
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
        axes.grid(axis="x", alpha=0.25)
    return figure


if __name__ == "__main__":
    main()
