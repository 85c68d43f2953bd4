"""One rank fails, anywhere: all ranks skip that probe together, and training goes on as it would have.

No process waits for another longer than `faults.SECONDS`, and weights, buffers, the optimizer's state and the random
generators are on every rank, after every batch, bit for bit those of a run without the monitor. What is not promised: a
fault inside of a collective of the user's own, such as `self.all_gather` or a SyncBatchNorm in the training step, where
the other ranks wait for as long as the process group lets them; and what is no `Exception`, such as an interrupt.

Many fits share their processes, see `check`, and many faults a fit, see `in_one_run`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import lightning_subspace.report.figures  # noqa: F401  # takes a while, so before the processes are forked
from lightning_subspace import Trace
from tests.thorough import IS_THOROUGH, covering, how_many, usual
from tests.works_with.faults import (
    ERRORS,
    MEASURED,
    Case,
    Deciding,
    Fault,
    Fit,
    Solving,
    Stubborn,
    Text,
    project_updates,
    run_cases,
    weigh,
)

STEPS = [1, 2]
DIFFERENT = "the ranks have come to different places"
FAILED = "the probe at step {} failed and is left out"
OF_ITS_STEP = "the numbers of the step from {} are left out"


def check(
    cases: Sequence[Case], steps: Sequence[int] = (2,), told: str | None = FAILED, ranks: int = 2
) -> dict[str, list[Fit]]:
    """Run cases, compare what they came to with what it has to be, and return it.

    Args:
        cases: the fits.
        steps: of the probes that are taken nevertheless, where step 1 alone has a fault; see `in_one_run`.
        told: of the one warning of a fault, before its cause, with braces for the step; None: there is none.
        ranks: the number of processes.
    """
    wrong, found = {}, run_cases(cases, ranks)
    for (name, fits), case in zip(found.items(), cases, strict=True):
        differing = [*problems(case, fits, steps_of(case, steps), told)]
        if differing:
            wrong[name] = differing
    assert not wrong, "\n".join(f"{name}: {'; '.join(texts)}" for name, texts in wrong.items())
    return found


def steps_of(case: Case, steps: Sequence[int]) -> list[int]:
    """Steps of the records, where those of a run with a fault at step 1 alone are given."""
    last = len(case.faults)
    at_faults = range(1, last + 1) if 1 in steps else ()
    return [*(step for step in steps if step < 1), *at_faults, *(step + last - 1 for step in steps if step > 1)]


def problems(case: Case, fits: list[Fit], steps: list[int], told: str | None):
    """Sentences on what is not as it has to be."""
    warnings = [] if told is None else [[told.format(fault.step or 1), *cause(fault)] for fault in case.faults]
    for rank, fit in enumerate(fits):
        if fit.changed:
            yield f"training on rank {rank} is another: {fit.changed}"
        if fit.error is not None:
            yield f"rank {rank} raised {fit.error}"
        if fit.steps != steps:
            yield f"the records on rank {rank} are of the steps {fit.steps}"
        for what in ("rows", "verified", "num_probes", "overlaps"):
            if getattr(fit, what) != getattr(fits[0], what):
                yield f"{what} on rank {rank}: {getattr(fit, what)}, and on rank 0: {getattr(fits[0], what)}"
        if fit.num_probes != len(steps):
            yield f"num_probes is {fit.num_probes}"
        if steps and case.faults[0].kind != "nan" and fit.verified != [True] * len(steps):
            yield f"verified are the probes {fit.verified}"
        if steps and fit.rows and "gradient_fraction" not in fit.rows[-1]:
            yield f"the last record on rank {rank} is {fit.rows[-1]}"
        if len(fit.told) != (len(warnings) if rank == 0 else 0):
            yield f"rank {rank} has told {fit.told}"
        for text, parts in zip(fit.told, warnings, strict=False):
            if not all(part in text for part in parts):
                yield f"rank {rank} has told {text}, which lacks some of {parts}"
        for fault in case.faults:
            if has_not_happened(fault, fit, rank):
                yield f"nothing has happened on rank {rank}: {fault.name}"


def has_not_happened(fault: Fault, fit: Fit, rank: int) -> bool:
    return fault.place != "nothing" and fault.rank in (rank, None) and fault in fit.left


def cause(fault: Fault) -> list[str]:
    """Parts of the warning."""
    if fault.place == "copy" and fault.kind == "exception":  # what a batch holds, as its user is told
        return [f"rank {fault.rank}: SampleError: batch: expected data that", "InjectedError: at copy"]
    if fault.kind == "different":
        return [DIFFERENT]
    if fault.kind in ERRORS:
        return [f"rank {fault.rank or 0}: {ERRORS[fault.kind].__name__}: ", f"at {fault.place}"]
    return [f"rank {fault.rank}: LossError: the loss of "] if fault.place.endswith("forward") else []


def cases(*places: str, kinds: Sequence[str] = ("exception",), ranks: Sequence[int | None] = (0, 1), **options):
    """Cases of each place, each kind and each rank; under `thorough` all that these can make."""
    step, operation = options.pop("step", 1), options.pop("operation", 0)
    chosen = covering(places, kinds, ranks)
    faults = [Fault(place, rank, kind, step, operation) for place, kind, rank in chosen]
    return [Case([fault], **options) for fault in faults]


def in_one_run(cases: Sequence[Case]) -> Case:
    """The faults of cases that are alike otherwise: of one probe after the other, from step 1 on.

    None of these probes gives a space to start from, if each fails.
    """
    faults = [replace(case.faults[0], step=step) for step, case in enumerate(cases, 1)]
    last = len(faults) + 1
    first = cases[0].monitor.get("every_n_steps", [1])[0]
    monitor = {**cases[0].monitor, "every_n_steps": [*range(first, last + 1)]}
    assert all(replace(case, faults=cases[0].faults) == cases[0] for case in cases), "they are not alike"
    return replace(cases[0], faults=faults, monitor=monitor, max_steps=last)


def in_few_runs(cases: Sequence[Case]) -> list[Case]:
    """The same, in several runs: what happens once in a run, or is told once for two faults, is in one each."""
    runs: list[list[Case]] = []
    for case in cases:
        fault = case.faults[0]
        others = ([other.faults[0] for other in run] for run in runs)
        free = [not any(clash(fault, other) for other in faults) for faults in others]
        if True in free:
            runs[free.index(True)].append(case)
        else:
            runs.append([case])
    return [in_one_run(run) for run in runs]


def clash(one: Fault, other: Fault) -> bool:
    is_told_alike = one.kind == other.kind == "nan" and one.rank == other.rank
    return one.place == other.place or is_told_alike


def again(cases: Sequence[Case]) -> None:
    """The probe is taken again with fewer graphs kept, on all ranks: where memory runs out on one, and any are kept."""
    steps = usual([1], thorough=[2])
    found = [replace(case, monitor={**case.monitor, "every_n_steps": steps}) for case in cases]
    check(found, steps=steps, told=None)


FROM_THE_START = {"every_n_steps": [0, 1, 2]}

# -- the sample -------------------------------------------------------------------------------------------------------


def test_reading_the_sample():
    everything = {"step": None, "monitor": {"sample": "all", "weight": weigh}}
    found = [
        *cases("item", "collate", **everything),
        *cases("item", kinds=["value"], ranks=[1], **everything),  # no mistake in the arguments
        *usual([], thorough=cases("item", kinds=["memory"], ranks=[0], **everything)),
        *cases("weight", "begin", kinds=["memory"], **everything),
    ]
    check(found, steps=[], told="nothing is measured, training goes on")


def test_copying_the_current_batch():
    found = cases("copy", kinds=["exception", "memory"], step=None, monitor={"sample": "current"})
    check(found, told="the batch could not be copied, so nothing is measured")


def test_gathering_from_a_stream():
    sizes = {"sample": 8, "gradient_sample": 8, "every_n_steps": 1}
    found = [
        *cases("copy", step=None, ranks=usual([0], thorough=[1]), project="stream", monitor=sizes),
        *cases(
            "weight",
            kinds=usual(["memory"], thorough=["exception"]),
            ranks=usual([1], thorough=[0]),
            step=None,
            monitor={**sizes, "weight": weigh},
        ),
    ]
    check(found, steps=[1, 2], told="a batch of training is left out of the sample, training goes on")


# -- the probe --------------------------------------------------------------------------------------------------------


def test_what_comes_before_the_eigensolver():
    places = ("second evaluation forward", "adapt space", "theta", "build forward")
    failing = [
        *cases(*places, *usual([], thorough=["enter", "extra forward"])),
        *cases(*usual(["extra forward"], thorough=["build forward"]), kinds=["nan"], ranks=usual([1], thorough=[0])),
    ]
    check(in_few_runs(failing))
    backward = usual(["build backward"], thorough=["extra backward"])
    again(cases(*backward, kinds=["device memory"], ranks=usual([1], thorough=[0])))


def test_the_self_check_asks_the_first_rank_and_takes_what_it_can():
    check(cases("self-check forward", "self-check backward"), steps=[1, 2], told=None)


def test_whether_the_loss_is_random():
    """A loss whose randomness is not known is measured at the next probe, with several draws."""
    around, build, extra = ("behind randomness", "randomness"), "randomness build forward", "randomness extra forward"
    failing = [
        *cases(around[0], ranks=usual([0], thorough=[1])),
        *cases(build, ranks=usual([1], thorough=[0])),
        *usual([], thorough=cases(around[1], extra)),
        *cases(*usual([extra], thorough=[build]), kinds=["nan"], ranks=usual([1], thorough=[0])),
    ]
    check(in_few_runs(failing))
    for case in usual([], thorough=cases(build, extra, kinds=["memory"])):  # as in evaluations of other parts
        again([case])


def test_which_batches_have_a_loss():
    places = ("screening forward", "behind screening", *usual([], thorough=["screening"]))
    check([in_one_run(cases(*places, project="skipping"))])
    spoiled = cases(places[0], kinds=["nan"], ranks=[1], project="skipping")
    check(spoiled, steps=[1, 2], told=None)  # a loss that is no number is a loss; what follows it is evaluated again


def test_why_a_self_check_has_failed():
    """The first rank's diagnosis counts. What it cannot evaluate is not known; another failure leaves the probe out."""
    within, around = ("diagnosis forward", "diagnosis backward"), ("diagnosis", "behind diagnosis")
    found = [
        *cases(*within, project="wrong", monitor={"every_n_steps": [1]}),
        *usual([], thorough=cases(*around, project="wrong")),  # as failures elsewhere in a probe
    ]
    for case, (name, fits) in zip(found, run_cases(found, 2).items(), strict=True):
        (fault,) = case.faults
        is_left_out = fault.place in around
        for fit in fits:
            assert (fit.changed, fit.error, fit.steps) == ([], None, [2] if is_left_out else [1]), name
            assert (fit.rows, fit.verified, fit.num_probes) == (fits[0].rows, fits[0].verified, len(fit.steps)), name
            assert all(row["solver/check_error"] > 0.1 for row in fit.rows), name
        assert fault not in fits[fault.rank].left, name
        *before, diagnosed = fits[0].told
        assert ("custom autograd.Function that is differentiable once" in diagnosed, fits[1].told) == (True, []), name
        is_unknown = "Either a backward pass is wrong" in diagnosed
        assert is_unknown == (not is_left_out and fault.rank == 0), name
        assert [
            f"{FAILED.format(1)}, training goes on. rank {fault.rank}: InjectedError: at {fault.place}" in text
            for text in before
        ] == [True] * is_left_out, name


def test_the_eigensolver():
    places = ("matvec 1 backward", "matvec 10 backward", "matvec after a restart backward")
    more = usual([], thorough=["progress", places[0], "random vector 0"])
    check(in_few_runs(cases("forecast", *places[1:], "random vector 1", *more)))  # it is told in the first probe
    again(
        [
            *usual([], thorough=cases(*places[1:], kinds=["memory"])),
            *cases("an operation of restart", kinds=["device memory"], ranks=usual([1], thorough=[0]), operation=2),
        ]
    )


def test_the_start_from_an_earlier_space():
    places = ("warm start", "SubspaceOverlap", *usual([], thorough=["random vector 1000"]))
    failing = cases(*places, monitor=FROM_THE_START)
    check([in_one_run(failing)], steps=[0, 2])


def test_products_that_are_no_numbers():
    """On one rank: all withhold what follows from them."""
    places = usual(["matvec 10 backward"], thorough=["matvec 1 backward"])
    found = cases(*places, kinds=["nan"], ranks=usual([1], thorough=[0]))
    check(found, steps=[1, 2], told="at step 1, eigenvalues, fractions and overlaps are left out")


def test_forward_differences():
    options = {"monitor": {"curvature": "finite-difference", "k": 3, "ncv": 6}, "project": "smooth"}
    places = ("build forward", "matvec after a restart backward", *usual([], thorough=["matvec 10 backward"]))
    check([in_one_run(cases(*places, **options))])


def test_central_differences():
    options = {"monitor": {"curvature": "finite-difference", "k": 3, "ncv": 6}, "project": "kinked"}
    failing = [
        *cases("matvec 10 backward", ranks=usual([1], thorough=[0]), **options),
        *usual([], thorough=cases("matvec 1 backward", **options)),
        *cases("extra forward", ranks=[0], **options),
        *cases("matvec 10 forward", kinds=["nan"], ranks=[1], **options),
        *cases(
            "an operation of matvec 3",
            kinds=["device memory"],
            ranks=usual([0], thorough=[1]),
            operation=2,
            **options,
        ),
    ]
    check([in_one_run(failing)])


@pytest.mark.thorough  # these differences fail in an eigensolve above, products of a measurement below
def test_a_trace_by_central_differences():
    options = {"monitor": {"curvature": "finite-difference", "k": 3, "ncv": 6, "dtype": "float64"}, "project": "kinked"}
    places = ("Trace matvec 3 forward", "Trace matvec 2 backward")
    check([in_one_run(cases(*places, measurements=lambda: [Trace(2)], **options))])


FEW_MEASURED = ["GapIndex", "SubspaceOverlap"]


def test_the_measurements():
    half, passed = "Reliability matvec 3 backward", "Reliability forward"
    known = usual(FEW_MEASURED, thorough=[name for name in MEASURED if name not in FEW_MEASURED])
    check([in_one_run(cases(*known, "GradientCurvature matvec 1 backward", half, passed))])


def test_what_is_kept_of_a_probe():
    check([in_one_run(cases("sketch", "probe record", *usual([], thorough=["compare sketches", "complete"])))])
    places = ("complete", *usual([], thorough=["compare sketches", "sketch", "probe record"]))
    again(cases(*places, kinds=["memory"], ranks=usual([0], thorough=[1])))


def test_a_measurement_of_the_users():
    check(
        [
            in_one_run(cases("measure between", "measure behind", *usual([], thorough=["measure before"]))),
            *cases("text", kinds=["nan"], measurements=lambda: [Text()], ranks=[0]),
        ]
    )
    for case in usual([], thorough=cases("measure between", kinds=["device memory"], ranks=[1])):
        again([case])  # as behind the eigensolve, above


def test_an_operator_of_the_users():
    places = [f"own product {place}" for place in usual(["1 before", "3 behind"], thorough=["3 before"])]
    check([in_one_run(cases(*places, measurements=lambda: [Solving()]))])


def test_numbers_of_the_users_that_are_none():
    """A nan on the first rank is withheld on all of them; that of another rank is none of the record."""
    ranks = usual([1], thorough=[0])
    solved = cases("own product 3 behind", kinds=["nan"], ranks=ranks, measurements=lambda: [Solving()])
    check([in_one_run(cases("measure behind", kinds=["nan"])), in_one_run(solved)], [1, 2], None)


def test_a_measurement_that_hears_of_no_exception():
    check([in_one_run(cases("stubborn measure", ranks=usual([1], thorough=[0]), measurements=lambda: [Stubborn()]))])


def test_a_batch_that_cannot_be_sent_to_the_others():
    found = Case([Fault("nothing", 0)], {"sample": "current"}, project="unpicklable")
    (fits,) = run_cases([found], 2).values()
    for rank, fit in enumerate(fits):
        assert (fit.changed, fit.steps, len(fit.told)) == ([], [], rank == 0)
    assert f"{FAILED.format(1)}, training goes on. rank 0: " in fits[0].told[0]
    assert "pickle" in fits[0].told[0]


# -- shards -----------------------------------------------------------------------------------------------------------

SHARDED: dict[str, Any] = {"project": "sharded", "kinds": ["device memory"]}


def test_whole_parameters_of_shards():
    """Memory that runs out between two parameters: the others are gathering the next one."""
    options = {"monitor": {"k": 3, "ncv": 6}, **SHARDED}
    failing = [
        *cases("an operation of self-check gather", operation=2, ranks=[1], **options),
        *cases("an operation of gather", ranks=usual([0], thorough=[1]), operation=2, **options),
    ]
    check([in_one_run(failing)])
    distinct = {"monitor": {"k": 2, "ncv": 5}, **SHARDED}  # at step 2 the third eigenvalue is one of several
    places = usual(["matvec 3 backward"], thorough=["measure between", "matvec 1 backward"])
    again(cases(*places, ranks=[0], **distinct))


def test_differences_on_shards():
    """Memory that runs out before a training step: the others are in FSDP's first all-gather."""
    options = {"monitor": {"curvature": "finite-difference", "k": 3, "ncv": 6}, **SHARDED}
    # Over two epochs: before the first probe of one the sample's losses are held against those before.
    failing = [
        *cases("an operation of enter", ranks=usual([0], thorough=[1]), operation=1, **options),
        *cases("an operation of matvec 3", operation=3, ranks=[1], **options),
        *cases("matvec 10", *usual([], thorough=["matvec 1"]), ranks=[0], **options),
    ]
    check([in_one_run(failing), *usual([], thorough=cases("measure between", ranks=[0], **options))])


# -- the step from the probe's point ----------------------------------------------------------------------------------


def test_what_the_step_tells():
    more = usual([], thorough=["UpdateFraction", "after_step before"])
    behind = in_one_run(cases("after_step behind", "close tensors", *more))
    found = [
        *cases("see gradient tensors", step=None, kinds=["memory"], ranks=usual([1], thorough=[0])),
        *usual([], thorough=cases("see gradient tensors", step=None)),
        behind,
        # such measurements fail in the probe itself above
        *usual([], thorough=[in_one_run(cases("stubborn after_step", measurements=lambda: [Stubborn()]))]),
        *usual([], thorough=cases("text after step", kinds=["nan"], ranks=[1], measurements=lambda: [Text()])),
    ]
    for fit in check(found, steps=[1, 2], told=OF_ITS_STEP)[behind.name]:
        assert all("update_fraction" not in row and "gradient_fraction" in row for row in fit.rows)


def test_a_rank_without_a_gradient():
    check(cases("nothing", ranks=[1], project="hidden gradient"), steps=[1, 2], told=None)


# -- what becomes of a record -----------------------------------------------------------------------------------------


def test_a_logger():
    places = usual(["scalars"], thorough=["histogram", "figure"])
    found = run_cases(cases(*places, ranks=[0], project="logged"), 2)
    for place, fits in zip(places, found.values(), strict=True):
        for rank, fit in enumerate(fits):
            assert (fit.changed, fit.error, fit.steps, len(fit.told)) == ([], None, [1, 2], rank == 0)
        assert fits[0].left == []
        assert f"CometLogger raised InjectedError: at {place}" in fits[0].told[0]


def test_a_checkpoint():
    options = {"step": None, "project": "saved"}
    check(cases("state", ranks=[0], **options), [1, 2], "a checkpoint was written without what was measured")
    for other in usual([], thorough=cases("state", ranks=[1], **options)):  # which is not what is written
        check([other], [1, 2], None)


def test_a_run_that_goes_on():
    options = {"resumes": True, "max_steps": how_many(2, thorough=3), "monitor": {"every_n_steps": 1}}
    found = cases("restore", ranks=usual([1], thorough=[0]), step=None, **options)
    check(
        found,
        steps=range(1, options["max_steps"] + 1),
        told="the state in the checkpoint is not used, history and overlaps start anew",
    )


# -- what ranks decide ------------------------------------------------------------------------------------------------


def test_a_schedule_of_the_users():
    found = cases("should_measure", step=None, ranks=usual([1], thorough=[0]), callback=Deciding)
    check(found, told="should_measure(1) failed")


def test_answers_of_the_ranks_that_differ():
    """The first rank's counts."""
    different = {"kinds": ["different"], "step": None, "callback": Deciding, "monitor": {"every_n_steps": [2]}}
    check(cases("should_measure", ranks=[0], **different), [1, 2], None)
    check(cases("should_measure", ranks=[1], **different), [2], None)


def test_ranks_that_go_different_ways():
    """None has failed, but they do not belong together any more: told, and no hang."""
    solved = {"measurements": lambda: [Solving()]}
    check(
        [
            *cases("measure more", kinds=["different"], ranks=usual([0], thorough=[1])),
            *usual([], thorough=cases("own product 2 more", kinds=["different"], **solved)),
        ]
    )
    behind = cases("after_step behind", kinds=["different"], ranks=usual([1], thorough=[0]))
    check(behind, steps=[1, 2], told=OF_ITS_STEP)


# -- what is raised ---------------------------------------------------------------------------------------------------


def test_on_failure_raise_raises_on_every_rank():
    options = {"monitor": {"on_failure": "raise"}}
    one, other = usual([0], thorough=[1]), usual([1], thorough=[0])
    within = ("extra forward", "measure between", "after_step before")
    found = [
        *cases(*within, *usual([], thorough=["build forward", "matvec 3 backward"]), **options),
        *cases("begin", "see gradient tensors", step=None, **options),
        *usual([], thorough=cases("item", step=None, monitor={"on_failure": "raise", "sample": "all"})),
        *cases("copy", step=None, ranks=other, monitor={"on_failure": "raise", "sample": "current"}),
        *cases("should_measure", step=None, ranks=one, callback=Deciding, **options),
        *usual([], thorough=cases("own product 2 before", measurements=lambda: [Solving()], **options)),
    ]
    wrong = {}
    for (name, fits), case in zip(run_cases(found, 2).items(), found, strict=True):
        (fault,) = case.faults
        raised, heard = fits[fault.rank].error, fits[1 - fault.rank].error
        kind = "SampleError" if fault.place == "copy" else "InjectedError"
        is_right = str(raised).startswith(f"{kind}: ") and f"at {fault.place}" in str(raised)
        if not is_right or not str(heard).startswith(f"PeerError: rank {fault.rank}: {kind}: "):
            wrong[name] = raised, heard
    assert not wrong


def test_a_sample_that_cannot_be_is_refused_on_every_rank():
    found = cases("weight", kinds=["nan"], step=None, monitor={"weight": weigh, "sample": "all"})
    for name, fits in run_cases(found, 2).items():
        for fit in fits:
            assert str(fit.error).startswith("MisconfigurationException: SubspaceMonitor: "), name
            assert "weight: expected a positive finite number" in str(fit.error), name


# -- a projection -----------------------------------------------------------------------------------------------------


def test_a_projection_without_its_space():
    """The ranks go on together: with the last good space or without one, and with equal parameters."""
    samples = {"copy": "current", "item": "all", "build forward": 8}
    found = [
        (Fault(place, rank, "value" if place == "item" else "exception", step=None), {"sample": sample})
        for (place, sample), rank in covering(usual([*samples.items()], thorough=[("adapt space", 8)]), [0, 1])
    ]
    for (fault, _), fits in zip(found, project_updates(found, 2), strict=True):
        (error, told, theta), (other_error, nothing, other_theta) = fits
        assert (error, other_error, nothing, len(told)) == (None, None, [], 1), fault.name
        assert all(part in told[0] for part in ["left as it is, training goes on", *cause(fault)]), told
        assert torch.equal(theta, other_theta), fault.name


# -- more ranks, and everywhere ---------------------------------------------------------------------------------------


def test_three_ranks():
    """What ranks agree on is the same for any number: here the third fails, alone or with all."""
    failing = [
        *cases("extra forward", "measure between", ranks=usual([2, None], thorough=[0, 1])),
        *usual([], thorough=cases("matvec 3 backward", ranks=[2])),
        *usual([], thorough=cases("build forward", kinds=["nan"], ranks=[2])),
    ]
    solved = cases("own product 2 before", ranks=[1], measurements=lambda: [Solving()])
    check([*in_few_runs(failing), *usual([], thorough=solved)], ranks=3)
    behind = cases("after_step before", ranks=[1])
    for found in usual([], thorough=[behind]):
        check(found, [1, 2], OF_ITS_STEP, ranks=3)
    copied = cases("copy", ranks=[2], step=None, monitor={"sample": "current"})
    for found in usual([], thorough=[copied]):
        check(found, told="could not be copied", ranks=3)


def test_memory_that_runs_out_anywhere():
    """In one run every other probe fails for want of memory: at some operation of it that takes any, on some rank.

    The first of them are taken again with fewer graphs kept, until none are.
    """
    (fits,) = run_cases([Case([Fault("an operation of probe", None, step=2, operation=10**9)])], 2).values()
    count = fits[0].num_operations
    assert count > 200
    first, parts, last = (8, 12, 7) if IS_THOROUGH else (1, 2, 1)  # how many at the ends, and in between
    chosen = [
        *range(1, first + 1),
        *range(first + 1, count - last, count // parts),
        *range(count - last + 1, count + 1),
    ]
    faults = [
        Fault("an operation of probe", i % 2, "device memory", step=2 * i + 1, operation=operation)
        for i, operation in enumerate(chosen)
    ]
    steps = 2 * len(faults)
    case = Case(faults, {"every_n_steps": 1}, max_steps=steps)
    (fits,) = run_cases([case], 2).values()
    failed = {fault.step for fault in faults if fault not in fits[fault.rank].left}
    assert len(failed) > 0.6 * len(faults)  # not every probe has that many
    for fit in fits:
        assert (fit.changed, fit.error) == ([], None)
        again = failed & set(fit.steps)
        assert 1 <= len(again) <= 4
        assert fit.steps == [step for step in range(steps + 1) if step not in failed - again]
        assert fit.steps == fits[0].steps
        assert (fit.rows, fit.verified, fit.num_probes) == (fits[0].rows, fits[0].verified, len(fit.steps))
        assert fit.overlaps == fits[0].overlaps
