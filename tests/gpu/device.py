"""The device that these tests run on: a card, or in a rehearsal the CPU.

With GPU_TESTS_DEVICE=cpu every test runs on the CPU. That shows that the tests themselves are sound, and nothing about
a card.
"""

import os

import pytest
import torch

IS_CARD = os.environ.get("GPU_TESTS_DEVICE", "cuda") != "cpu"
DEVICE = torch.device("cuda" if IS_CARD else "cpu")
ACCELERATOR = "gpu" if IS_CARD else "cpu"
BACKEND = "nccl" if IS_CARD else "gloo"
SKIPPED = "there is no card here (CUDA is not available); GPU_TESTS_DEVICE=cpu rehearses these tests on the CPU"
if IS_CARD:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic sums; read once, at the first product

# Which warnings torch and Lightning have for a given card is not known beforehand: they are shown, and are no errors.
shows_warnings = pytest.mark.filterwarnings("default")


def name() -> str:
    """The device, for a reader."""
    return torch.cuda.get_device_name() if IS_CARD else "the CPU (a rehearsal)"
