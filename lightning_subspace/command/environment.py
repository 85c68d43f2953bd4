"""Command `env`: versions, platform and devices, for an issue.

Versions are read from what is installed, without importing it; only the devices need torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator

from lightning_subspace import __version__

NAME, SUMMARY = "env", "print versions, platform and devices, for an issue"
DESCRIPTION = """\
Print what a maintainer needs in an issue: versions, the platform, the devices, and variables that matter. Nothing
is sent anywhere. Copy it as it is."""
EXAMPLES = """\
example:
  lightning-subspace env"""

PACKAGES = (
    "torch",
    "lightning",
    "pytorch-lightning",
    "torchmetrics",
    "numpy",
    "tensorboard",
    "matplotlib",
    "jsonargparse",
)
# They change threads, devices, processes or memory; none of them holds a secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "LOCAL_WORLD_SIZE",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "WORLD_SIZE",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command: there are none."""


def run(options: argparse.Namespace) -> int:
    """Print the environment; the exit code."""
    for name, value in facts():
        print(f"{name}: {value}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    """Names and values, in the order they are printed.

    Yields:
        One of them.
    """
    yield "lightning_subspace", __version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    for name in PACKAGES:
        yield name, _version(name)
    yield "tab of TensorBoard", _tab()
    yield "CPU", f"{platform.machine()}, {os.cpu_count()} cores"
    yield from _devices()
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # not for the help of other commands

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _tab() -> str:
    from importlib.metadata import entry_points

    found = {entry.name for entry in entry_points(group="tensorboard_plugins")}
    return "installed" if "lightning_subspace" in found else "not installed; install the package, not its folder"


def _devices() -> Iterator[tuple[str, str]]:
    """What torch finds; that it cannot be imported is a finding, too."""
    try:
        import torch
    except Exception as error:
        yield "torch", f"cannot be imported ({type(error).__name__}: {error})"
        return
    yield "threads of torch", str(torch.get_num_threads())
    if torch.version.cuda is not None:
        yield "CUDA of torch", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    elif torch.version.hip is not None:
        yield "ROCm of torch", str(torch.version.hip)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    if not count:
        is_apple = sys.platform == "darwin" and torch.backends.mps.is_available()
        yield "GPU", "Apple's (mps)" if is_apple else "none"
    if torch.distributed.is_available():
        backends = [name for name in ("gloo", "nccl", "mpi") if getattr(torch.distributed, f"is_{name}_available")()]
        yield "backends of torch.distributed", ", ".join(backends) or "none"
