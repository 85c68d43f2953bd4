"""Models whose second derivatives are wrong or missing: what the self-check says, and what is measured then."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import SubspaceMonitor, SubspaceProjection, measure_subspace
from lightning_subspace.curvature import CheckError, CheckOutcome
from lightning_subspace.curvature import selection as choice
from lightning_subspace.curvature.self_check import LARGEST_ERROR
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.loss_function import LossError
from lightning_subspace.parallel.ranks import Ranks
from lightning_subspace.probe.run import ProbeRun
from lightning_subspace.probe.settings import ProbeSettings
from tests.custom_functions import KeepsInput, OnceDifferentiable
from tests.left_out import without_error_bar
from tests.oracles import dense_hessian, dense_hessian_by_differences, top_eigenspace
from tests.processes import run
from tests.thorough import covering, usual

K = 3
INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(6, (12, 5), generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(3, (12,), generator=torch.Generator().manual_seed(2))
# Of the loss with dropout as many draws are taken as these allow: by the defaults hundreds.
SIZES = {"sample": len(INPUTS), "gradient_sample": 2 * len(INPUTS)}


class Net(LightningModule):
    """Something between two layers."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.middle = middle

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.middle(self.first(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class Bags(Net):
    def __init__(self):
        super().__init__(nn.Tanh())
        self.first = nn.EmbeddingBag(6, 4)


class Ctc(Net):
    """Log-probabilities of a sequence of five frames."""

    def __init__(self):
        super().__init__(nn.Tanh())
        self.frames = nn.Linear(4, 5 * 4)

    def training_step(self, batch, batch_idx):
        frames = self.frames(self.middle(self.first(batch[0]))).view(-1, 5, 4).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((len(batch[1]),), 5), torch.ones(len(batch[1]), dtype=torch.long)
        return F.ctc_loss(frames, batch[1][:, None] + 1, *lengths) + 0.01 * self.head.weight.square().sum()


# name -> (module, inputs)
WRONG = {
    "once-differentiable": lambda: Net(Apply(OnceDifferentiable.apply)),
    "tensors-on-ctx": lambda: Net(Apply(KeepsInput.apply)),
}
MISSING = {
    "embedding-bag": (Bags, TOKENS),
    "ctc-loss": (Ctc, INPUTS),
}


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def objective(inputs):
    return lambda net: net.training_step((inputs.double() if inputs.is_floating_point() else inputs, LABELS), 0)


def reference(module, inputs):
    """The top eigenvalues, by differences of gradients."""
    dense = dense_hessian_by_differences(module.double(), objective(inputs))
    module.float()
    return top_eigenspace(0.5 * (dense + dense.T), K)[0]


def measure(module, inputs, **options):
    return measure_subspace(module, [(inputs, LABELS)], k=K, tol=1e-5, **options)


def is_right(record, expected):
    values = record.subspace.eigenvalues
    return len(values) >= K and torch.allclose(values[:K].double(), expected, rtol=0, atol=1e-5 * float(expected[0]))


@pytest.mark.parametrize("name", WRONG)
def test_warn_says_by_how_much_and_goes_on(name):
    module = built(WRONG[name])
    with pytest.warns(UserWarning, match=r"differs from differences of gradients by [\d.]+% in ") as said:
        measure(module, INPUTS)
    assert len(said) == 1


@pytest.mark.parametrize("name", WRONG)
def test_raise_raises(name):
    with pytest.raises(CheckError, match=r"by [\d.]+% in .*on_check_fail='finite-difference'"):
        measure(built(WRONG[name]), INPUTS, on_check_fail="raise")


@pytest.mark.parametrize(("name", "spelling"), covering(list(WRONG), ["finite-difference", "finite_difference"]))
def test_finite_difference_measures_what_is_right(name, spelling):
    module = built(WRONG[name])
    expected = reference(module, INPUTS)
    with pytest.warns(UserWarning, match=r"finite differences of float64 gradients instead") as said:
        record = measure(module, INPUTS, on_check_fail=spelling)
    assert len(said) == 1
    assert is_right(record, expected)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            wrong = is_right(measure(module, INPUTS), expected)
        except RuntimeError:  # the solver's own refusal
            wrong = False
    assert not wrong


@pytest.mark.parametrize(("name", "policy"), covering(list(MISSING), ["warn", "raise", "finite-difference"]))
def test_what_torch_cannot_derive_falls_back_by_itself(name, policy):
    make, inputs = MISSING[name]
    module = built(make)
    expected = reference(module, inputs)
    with pytest.warns(UserWarning, match=r"no second derivative in torch.*finite differences of float64") as said:
        record = measure(module, inputs, on_check_fail=policy)
    assert len(said) == 1
    assert is_right(record, expected)


def test_a_checkpoint_that_is_not_reentrant_is_exact():
    module = built(lambda: Net(Checkpointed(use_reentrant=False))).eval()
    expected, _ = top_eigenspace(dense_hessian(module.double(), objective(INPUTS)), K)
    record = measure(module.float(), INPUTS, mode="eval", on_check_fail="raise")
    assert is_right(record, expected)


@pytest.mark.parametrize("policy", ["warn", "finite-difference"])
def test_a_reentrant_checkpoint_is_detected_and_measured_by_differences(policy):
    module = built(lambda: Net(Checkpointed(use_reentrant=True)))
    with pytest.warns(UserWarning, match=r"use_reentrant.*finite differences of float64") as said:
        record = measure(module, INPUTS, mode="eval", on_check_fail=policy)
    assert len(said) == 1
    module.middle.use_reentrant = False
    assert is_right(record, measure(module, INPUTS, mode="eval").subspace.eigenvalues[:K].double())


def test_a_reentrant_checkpoint_is_refused_on_request():
    with pytest.raises(CheckError, match="use_reentrant"):
        measure(built(lambda: Net(Checkpointed(use_reentrant=True))), INPUTS, on_check_fail="raise")


@pytest.mark.parametrize("name", ["curvature", "on_check_fail"])
def test_a_word_that_is_not_a_choice(name):
    with pytest.raises(ValueError, match=f"{name}: expected one of .*'finite-difference'.*, got 'exact'"):
        measure(built(WRONG["tensors-on-ctx"]), INPUTS, **{name: "exact"})


# In the course of a training


class Probing(Callback):
    """A tracker's probes after every second batch."""

    def __init__(self, inputs, **options):
        self.sample = sample_of_batches([(inputs, LABELS)])
        self.settings = ProbeSettings(k=K, **SIZES, **options)

    def on_train_start(self, trainer, pl_module):
        self.tracker = ProbeRun(self.settings, pl_module)
        self.tracker.check(pl_module, self.sample)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 0:
            self.tracker.close(self.tracker.measure(pl_module, self.sample, trainer.global_step))


def trained(make, inputs, *callbacks):
    module = built(make)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, DataLoader(TensorDataset(inputs, LABELS), batch_size=3))
    return [parameter.detach() for parameter in module.parameters()]


# name -> (module, inputs, plan, outcome, what is measured with)
RUNS = {
    "right": (lambda: Net(nn.Tanh()), INPUTS, {}, CheckOutcome.PASSED, "hessian"),
    "wrong, warn": (WRONG["once-differentiable"], INPUTS, {}, CheckOutcome.FAILED, "hessian"),
    "wrong, differences": (
        WRONG["tensors-on-ctx"], INPUTS, {"on_check_fail": "finite-difference"}, CheckOutcome.FAILED,
        "finite-difference",
    ),
    "missing": (*MISSING["embedding-bag"], {}, CheckOutcome.UNAVAILABLE, "finite-difference"),
    "missing, native": (*MISSING["ctc-loss"], {"dtype": "native"}, CheckOutcome.UNAVAILABLE, "finite-difference"),
    "reentrant": (
        lambda: Net(Checkpointed(use_reentrant=True)), INPUTS, {}, CheckOutcome.FAILED, "finite-difference",
    ),
    "asked for": (
        WRONG["tensors-on-ctx"], INPUTS, {"curvature": "finite-difference"}, CheckOutcome.PASSED, "finite-difference",
    ),
}  # fmt: skip


# Of those that are left out, what a monitor says and measures is below.
@pytest.mark.parametrize(
    "name",
    usual(
        ["right", "missing, native", "reentrant"],
        thorough=["wrong, warn", "wrong, differences", "missing", "asked for"],
    ),
)
def test_a_run_goes_on_with_what_the_check_chose_and_trains_the_same(name):
    make, inputs, options, outcome, curvature = RUNS[name]
    probing = Probing(inputs, **options)
    with_probes = trained(make, inputs, probing)
    assert all(torch.equal(a, b) for a, b in zip(with_probes, trained(make, inputs), strict=True))
    tracker = probing.tracker
    assert tracker.self_check.outcome is outcome
    assert tracker._choice.curvature == curvature
    assert (tracker.notice is None) == (outcome in (CheckOutcome.PASSED, CheckOutcome.SKIPPED))
    assert [record.step for record in tracker.history] == [1, 3]
    if name != "wrong, warn":
        assert all(record.subspace.converged for record in tracker.history)


def test_a_run_stops_on_request():
    probing = Probing(INPUTS, on_check_fail="raise")
    with pytest.raises(CheckError):
        trained(WRONG["once-differentiable"], INPUTS, probing)
    assert probing.tracker.self_check.error > LARGEST_ERROR


# Of "reentrant" it is the message that is said once to `measure_subspace`, above.
@pytest.mark.parametrize(
    "name",
    usual(
        ["wrong, warn", "wrong, differences", "missing", "asked for"],
        thorough=["right", "missing, native", "reentrant"],
    ),
)
def test_the_monitor_says_once_what_it_is_measured_with(name):
    make, inputs, options, outcome, curvature = RUNS[name]
    monitor = SubspaceMonitor(k=1, every_n_steps=4, max_overhead=None, **SIZES, **options)
    with warnings.catch_warnings(record=True) as said, without_error_bar():
        warnings.simplefilter("always")
        with_monitor = trained(make, inputs, monitor)
    said = [str(warning.message) for warning in said if "second derivative" in str(warning.message)]
    assert len(said) == (outcome in (CheckOutcome.FAILED, CheckOutcome.UNAVAILABLE))
    assert all(torch.equal(a, b) for a, b in zip(with_monitor, trained(make, inputs), strict=True))
    if name != "wrong, warn":
        assert [record.step for record in monitor.history] == [0, 4]
        assert all(record.subspace.converged for record in monitor.history)
    assert all(("finite differences of float64" in text) == (curvature != "hessian") for text in said)


def test_the_monitor_stops_the_run_on_request():
    with pytest.raises(CheckError):
        trained(WRONG["once-differentiable"], INPUTS, SubspaceMonitor(k=K, on_check_fail="raise"))


# -- a loss that is no function ---------------------------------------------------------------------------------------


def test_a_loss_that_is_another_at_every_evaluation_is_refused():
    values = iter(range(1, 1000))

    def loss_fn(module, batch, batch_idx):
        return next(values) * module(batch).square().mean()

    with pytest.raises(LossError, match="loss: expected one value from two evaluations of a batch, got"):
        measure_subspace(nn.Linear(3, 1), [torch.ones(4, 3)], k=1, loss_fn=loss_fn)


# -- a curvature that differences cannot give -------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch):
    """Counts self-checks of the Gauss-Newton matrix."""
    row, made = choice.OPERATORS["ggn"], []

    def counted(*args, **options):
        made.append(args)
        return row.check(*args, **options)

    monkeypatch.setitem(choice.OPERATORS, "ggn", replace(row, check=counted))
    return made


UNDERIVABLE = {"missing": MISSING["embedding-bag"], "wrong": (WRONG["once-differentiable"], INPUTS)}


@pytest.mark.parametrize(("name", "policy"), covering(list(UNDERIVABLE), ["warn", "finite-difference"]))
def test_where_a_gauss_newton_matrix_cannot_be_had_the_step_and_the_noise_are_measured(name, policy, checks):
    """As they are without second derivatives from the start."""
    make, inputs = UNDERIVABLE[name]
    settings = {"k": K, "every_n_steps": 1, "max_overhead": None, "on_failure": "raise"}
    monitor = SubspaceMonitor(curvature="ggn", on_check_fail=policy, **settings)
    with pytest.warns(UserWarning, match=r"left out; those of the step.*another matrix.*curvature='hessian'") as said:
        with_monitor = trained(make, inputs, monitor)
    assert len([s for s in said if "SubspaceMonitor" in str(s.message)]) == 1
    assert all(torch.equal(a, b) for a, b in zip(with_monitor, trained(make, inputs), strict=True))
    assert len(checks) == 1
    without = SubspaceMonitor(curvature="none", **settings | {"k": 0})
    trained(make, inputs, without)
    assert len(monitor.history) == len(without.history) >= 3
    for record, other in zip(monitor.history, without.history, strict=True):
        assert record.subspace is None
        assert ("step/curvature" in record.metrics) == (record is not monitor.history[-1])
        found, expected = ({k: v for k, v in one.metrics.items() if "solver/" not in k} for one in (record, other))
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", UNDERIVABLE)
def test_a_gauss_newton_matrix_that_cannot_be_had_stops_training_on_request(name):
    make, inputs = UNDERIVABLE[name]
    with pytest.raises(CheckError, match="curvature='hessian'"):
        trained(make, inputs, SubspaceMonitor(k=K, curvature="ggn", on_check_fail="raise"))
    with pytest.raises(CheckError, match="curvature='hessian'"):
        measure(built(make), inputs, curvature="ggn")


@pytest.mark.parametrize("keep", ["top", "bulk"])
def test_a_projection_without_a_space_leaves_steps_as_they_are(keep, checks):
    make, inputs = UNDERIVABLE["missing"]
    projection = SubspaceProjection(keep, k=K, curvature="ggn", refresh_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"training goes on.*curvature='hessian'"):
        with_projection = trained(make, inputs, projection)
    assert all(torch.equal(a, b) for a, b in zip(with_projection, trained(make, inputs), strict=True))
    assert len(checks) == 1
    with pytest.raises(CheckError, match="curvature='hessian'"):
        trained(make, inputs, SubspaceProjection(keep, k=K, curvature="ggn", on_check_fail="raise"))


def refused_on_ranks():
    ranks, (make, inputs) = Ranks(dist.group.WORLD), UNDERIVABLE["missing"]
    module, sample = built(make), sample_of_batches([(inputs, LABELS)] * 2, ranks=ranks)
    tracker, said = ProbeRun(ProbeSettings(k=K, curvature="ggn", defaults=False), module, ranks), []
    for attempt in (lambda: tracker.check(module, sample), lambda: tracker.measure(module, sample, 0)):
        try:
            attempt()
        except CheckError as error:
            said.append(str(error))
    return said


def test_all_ranks_refuse_it_with_the_same_words():
    (first, second), others = run(refused_on_ranks, 2)
    assert first == second
    assert [first, second] == others


class FirstCheckpointed(nn.Module):
    """A reentrant checkpoint around the first parameters: torch.autograd.grad finds a way to the last ones alone."""

    def __init__(self, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.use_reentrant = nn.Linear(4, 5), nn.Linear(5, 3), use_reentrant

    def forward(self, x):
        inner = checkpoint(lambda x: torch.tanh(self.first(x)), x.requires_grad_(), use_reentrant=self.use_reentrant)
        return self.last(inner)


def test_a_reentrant_checkpoint_around_the_first_parameters_goes_by_differences():
    def loss(module, batch, batch_idx):
        return F.cross_entropy(module(batch[0].clone()), batch[1])

    exact = measure_subspace(FirstCheckpointed(False), [(INPUTS, LABELS)], k=K, loss_fn=loss)
    with pytest.warns(UserWarning, match="measured with finite differences of float64 gradients instead"):
        found = measure_subspace(FirstCheckpointed(True), [(INPUTS, LABELS)], k=K, loss_fn=loss)
    torch.testing.assert_close(found.subspace.eigenvalues, exact.subspace.eigenvalues, rtol=1e-3, atol=1e-5)
    assert found.metrics["gradient_norm"] == pytest.approx(exact.metrics["gradient_norm"], rel=1e-5)


def test_an_original_inside_of_a_reentrant_checkpoint_is_refused():
    net = FirstCheckpointed(False)
    kept = net.last.weight

    def loss(module, batch, batch_idx):
        more = checkpoint(
            lambda x: (kept * x.sum()).square().sum(), batch[0].clone().requires_grad_(), use_reentrant=True
        )
        return F.cross_entropy(module(batch[0].clone()), batch[1]) + more

    with pytest.raises(LossError, match=r"the original of 'last\.weight' from elsewhere"):
        measure_subspace(net, [(INPUTS, LABELS)], k=K, loss_fn=loss)
    assert kept.grad is None


def test_a_loss_of_two_values_is_evaluated_at_one_probe_only():
    class Counting:
        calls = 0

    def loss(module, batch, batch_idx):
        Counting.calls += 1
        return module.first(batch[0]).square().mean() * (1 + Counting.calls)

    net = FirstCheckpointed(False)
    for expected in (2, 2, 2):
        with pytest.raises(LossError, match="expected one value from two evaluations"):
            measure_subspace(net, [(INPUTS, LABELS)], k=K, loss_fn=loss)
        assert Counting.calls <= expected + 1  # eight examples may be tried first
