"""With and without the monitor training is the same to the last bit: four precisions, compiled, recurrent."""

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.gpu import fresh, training
from tests.gpu.device import DEVICE, shows_warnings

pytestmark = shows_warnings
NUM_PROBES = 1 + training.STEPS // training.EVERY


def precision(name: str) -> dict[str, Any]:
    """Options of the Trainer; a scale that moves within a few steps: it starts too large, and grows every two."""
    if name != "16-mixed":
        return {"precision": name}
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**40, backoff_factor=2.0**-12, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", DEVICE.type, scaler)]}


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_training_is_untouched(name):
    differing, seen, watching = training.twice(
        training.vision_transformer, options=lambda: precision(name), everything=name == "32-true"
    )
    assert differing == []
    assert len(watching.history) >= NUM_PROBES - 2  # gathering the sample takes two batches
    assert all(record.metrics["sharpness"] > 0 for record in watching.history)
    scales = {value for what, value in seen.items() if what.endswith(": precision")}
    assert (len(scales) > 2) == (name == "16-mixed")  # of the GradScaler, which nothing else has


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_compiled_training_is_untouched(name):
    counted = []

    def compiled():
        if counted:
            counted[-1] = graphs()
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        counted.append(0)
        module = training.vision_transformer()
        module.net.compile()
        return module

    try:
        differing, _, watching = training.twice(compiled, options=lambda: precision(name))
        counted[-1] = graphs()
    finally:
        torch.compiler.reset()
    assert differing == []
    assert len(watching.history) >= NUM_PROBES - 2
    alone, watched = counted
    assert alone == watched > 0  # no recompilation


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def recurrent(is_watched: bool) -> tuple[dict[str, str], int]:
    seed_everything(1, verbose=False)
    watching = training.monitor()
    seen = training.fit(training.Recurrent(), [watching] if is_watched else [])
    return seen, len(watching.history)


def test_training_with_the_dropout_of_a_recurrent_network_is_untouched():
    """In a process each: cuDNN has one dropout state a process, so two fits in one differ without any monitor."""
    ((alone, _),), ((watched, num_probes),) = (fresh.run(recurrent, is_watched) for is_watched in (False, True))
    assert training.differences(alone, watched) == []
    assert num_probes >= NUM_PROBES - 2
