"""What commands print that the pages show: they run as the pages have them, in an empty folder.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.printed [--json printed.json]

Of the command line: the page's project is trained, and each command runs behind which the page has a block of text. Of
the callbacks: the line of the first probe, of the network of `examples/digits.py` and a monitor with its defaults; its
seconds are those of this machine. Ends in an error where a command does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.pages import ROOT

COMMAND, CALLBACKS = (f"lightning_subspace/{room}/README.md" for room in ("command", "callbacks"))
EXAMPLE = "It reads, for the network of `examples/digits.py`,"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What Lightning would tell and draw beside; and where there is a card, the same numbers as without.
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
FIRST_PROBE = """\
import lightning as L, torch
from digits import Digits, SubspaceMonitor, load_digits
from torch.utils.data import DataLoader, TensorDataset

L.seed_everything(0)
data = load_digits()
dataset = TensorDataset(torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target))
silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_steps=100, accelerator="cpu", callbacks=[SubspaceMonitor(k=10)], **silent)
trainer.fit(Digits(), DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True))
"""


@dataclass(frozen=True)
class Session:
    """What the page of the command line goes through.

    Attributes:
        project: text of `blobs.py`.
        training: the command that trains it.
        shown: what the page says is printed, by command, in their order.
    """

    project: str
    training: str
    shown: dict[str, str]

    @classmethod
    def on_page(cls) -> Session:
        """As it stands there."""
        blocks = BLOCK.findall((ROOT / COMMAND).read_text().split("## A run that had no monitor")[1])
        [project] = [text for kind, text in blocks if kind == "python"]
        training = next(text for _, text in blocks if "LightningCLI()" in text)
        shown = {command.strip(): text for (_, command), (kind, text) in itertools.pairwise(blocks) if kind == "text"}
        return cls(project, training.strip(), shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="what was printed, and where it belongs")
    asked = parser.parse_args()
    rows = []
    for part in (of_commands, of_first_probe):
        with tempfile.TemporaryDirectory() as folder:
            for page, before, text in part(Path(folder)):
                print(f"{page}\n\n{before}\n\n```text\n{text.rstrip()}\n```\n", flush=True)
                rows.append({"page": page, "before": before, "text": text})
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


def of_commands(folder: Path) -> list[tuple[str, str, str]]:
    """The page, the lines in front of each block, and what is printed now."""
    session = Session.on_page()
    (folder / "blobs.py").write_text(session.project)
    output(folder, *shlex.split(session.training)[1:], *QUIET)
    found = []
    for command in session.shown:
        name, *arguments = shlex.split(command)
        assert name == "lightning-subspace", name
        found.append((COMMAND, f"```\n{command}\n```", output(folder, "-m", "lightning_subspace", *arguments).stdout))
    return found


def of_first_probe(folder: Path) -> list[tuple[str, str, str]]:
    """The same for the line that forecasts a probe."""
    run = output(folder, "-c", FIRST_PROBE)
    [line] = re.findall(r"SubspaceMonitor: n = .* a probe, .*", run.stdout + run.stderr)
    return [(CALLBACKS, EXAMPLE, line)]


def output(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Of Python with these arguments."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    run = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run


if __name__ == "__main__":
    main()
