"""Runs that are known by hand, written without torch, with TensorBoard's own writer."""

import math

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_subspace.tensorboard_tab.schema import tag_of, to_json
from lightning_subspace.tensorboard_tab.summary import summary_of

K = 4
START = 1e9  # wall time of step 0
WITHHELD, UNCONVERGED, FAILED = 300, 600, 800  # steps of probes that left something out
REASON = "fractions and overlaps are left out: eigenvalue 4 is so close to the next one that the space is undetermined"
HELD = 64


GROUPS = [
    "net.0.weight",
    "net.0.bias",
    "net.2.weight",
    "net.2.bias",
    "a.module.with.a.rather.long.name.of.its.own.weight",
]
SIZES = [0.6, 0.05, 0.3, 0.02, 0.03]  # of them, parts of all parameters
TOO_SMALL = 400  # step of a probe whose sample is too small for the noise
UPHILL = 500  # step whose gain is not positive


def step_taken(step, scale=1.0):
    """Numbers of the step from a probe: the edge ratio is 0.5 + step / 1,000."""
    ratio = 0.5 + step / 1000
    gain = 0.1 * scale * math.exp(-step / 300) * (-1 if step == UPHILL else 1)
    found = {"step/gain": gain, "step/change": (ratio - 1) * gain, "step/curvature": scale * ratio}
    found |= {"step/edge_ratio": ratio} if gain > 0 else {}
    return found | {"step/norm": 0.2, "step/relative_norm": 0.01, "step/cosine_previous": 0.8 - step / 600}


def noise(step, scale=1.0):
    """The noise scale is 100 + step, with error bars of a third and a half."""
    value = scale * (100.0 + step)
    known = {"noise/variance": 5.0 * scale, "noise/gradient_square": 0.1}
    if step == TOO_SMALL:
        return known | {"noise/scale_low": 123.0}
    if step % 500 == 0:  # outside and inside are looked for at some probes
        known |= {"noise/variance_bulk": 4.0, "noise/variance_top": 1.0}
        known |= {"noise/scale_bulk": 8 * value, "noise/scale_top": value / 3}
    return known | {"noise/scale": value, "noise/scale_low": value / 1.5, "noise/scale_high": 1.5 * value}


def layers(step):
    """The part of the first group in the top eigenvectors falls from 0.9, and that of the last one rises."""
    first = 0.9 * math.exp(-step / 500)
    part = [first, 0.01, 0.05, 0.02, 0.92 - first]
    gradient, update = [0.2, 0.1, 0.4, 0.1, 0.2], [0.6, 0.05, 0.3, 0.02, 0.03]
    sharpness = [round(3.0 * first, 3), None, 0.4, 0.012, round(3.0 * (0.92 - first), 3)]
    found = {"groups": GROUPS, "participation": part, "gradient": gradient, "update": update, "null": SIZES}
    return found | {"block_sharpness": sharpness}


def probes(steps, scale=1.0, k=K, *, header=True, complete=False, density=False, rich=False):
    """Eigenvalue i of k is scale (k - i) exp(-step / 10,000), and the share of the gradient step / 1,000, at most 1."""
    held = []
    for number, step in enumerate(steps):
        if step == FAILED and not complete:
            yield {"step": step, "failed": "RuntimeError: no second derivative"}
            continue
        fine = complete or step not in (WITHHELD, UNCONVERGED)
        probe = {"step": step, "outcome": "CONVERGED", "trusted": fine, "verified": number % 5 != 1, "lr": 0.1}
        decay = scale * math.exp(-step / 10_000)
        metrics = {
            "solver/matvecs": 20.0,
            "solver/seconds": 0.5,
            "solver/overhead": 0.1,
            "gradient_norm": 1.0,
            "training_loss": 2.0 * math.exp(-step / 500),
        }
        if step == UNCONVERGED and not complete:
            probe |= {"outcome": "MAX_MATVECS", "reason": "20 products did not suffice"}
        else:
            probe["eigenvalues"] = [decay * (k - i) for i in range(k)]
            probe["residuals"] = [1e-3 * decay] * k
            probe["threshold"] = 20.0
            metrics |= {
                "sharpness": decay * k,
                "sharpness_over_threshold": decay * k / 20.0,
                "solver/subspace_error": 0.01,
            }
            if number % 2:
                probe["next"] = 0.5 * decay
        if not fine and step == WITHHELD:
            probe["reason"] = REASON
        if fine:
            share = min(step / 1000, 1.0)
            metrics |= {"gradient_fraction": share, "update_fraction": 0.5}
            if number % 5 == 0:
                metrics |= {
                    "gradient_fraction_low": max(share - 0.05, 0.0),
                    "gradient_fraction_high": min(share + 0.03, 1.0),
                }
            if held:
                values = [math.exp(-abs(math.log1p(step) - math.log1p(other)) / 2) for other in held]
                probe |= {"overlaps": [list(held), values], "overlap_error": 0.004}
            held.append(step)
            if len(held) > HELD:
                _thin(held)
        if rich:
            metrics |= step_taken(step, scale) | noise(step, scale)
            probe["layers"] = layers(step)
        if density:
            nodes = [-0.2 * scale + 0.05 * i * k * scale for i in range(25)]
            probe["density"] = [nodes, [math.exp(-((node / decay) ** 2)) + 1e-6 for node in nodes]]
        if number == 0 and header:
            probe["run"] = {"k": k, "n": 1930, "sample": 512, "share": 0.25, "optimizer": "SGD", "curvature": "hessian"}
        yield {**probe, "metrics": metrics}


def write(folder, steps, scale=1.0, *, name="subspace", writer=None, start=START, **options):
    """Write a run, and return its writer."""
    writer = EventFileWriter(str(folder)) if writer is None else writer
    for probe in probes(steps, scale, **options):
        summary = summary_of(to_json(probe), tag_of(name))
        writer.add_event(Event(wall_time=start + probe["step"], step=probe["step"], summary=summary))
    writer.flush()
    return writer


def _thin(held):
    """Drop the one nearest to its neighbours on the scale of log(step)."""
    places = [math.log1p(step) for step in held]
    held.pop(min(range(1, len(held) - 1), key=lambda i: places[i + 1] - places[i - 1]))
