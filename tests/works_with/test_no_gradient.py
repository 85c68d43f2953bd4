"""Models that train by a vector that is no gradient: what the self-check says of them, and what is measured then."""

import copy
import fnmatch
import math
import re
import statistics
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Measurement, Needs, SubspaceMonitor, SubspaceProjection, measure_subspace
from lightning_subspace.curvature import CheckError, CheckOutcome, CurvatureConfig
from lightning_subspace.curvature.gradient_field import GradientField
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.custom_functions import KeepsInput
from tests.left_out import without_error_bar
from tests.thorough import covering, usual

K = 2
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(16, 6, generator=GENERATOR)
Y = torch.randint(3, (16,), generator=GENERATOR)
D = torch.arange(16) % 2
BATCH = (X, Y, D)


class Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Net(LightningModule):
    """Named parts, and a loss of them."""

    def __init__(self, loss, **parts):
        super().__init__()
        self.loss = loss
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch, batch_idx):
        x, y, d = batch
        return self.loss(self, x.to(next(self.parameters()).dtype), y, d)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def mlp(*widths):
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:]))


def adversarial():
    def loss(m, x, y, d):
        f = m.features(x)
        return F.cross_entropy(m.head(f), y) + F.cross_entropy(m.domain(Reverse.apply(f)), d)

    return Net(loss, features=nn.Sequential(nn.Linear(6, 5), nn.Tanh()), head=nn.Linear(5, 3), domain=mlp(5, 4, 2))


def self_distilled():
    def loss(m, x, y, d):
        one, other = m.encoder(x), m.encoder(x + 0.3)
        return -F.cosine_similarity(m.predictor(one), other.detach()).mean()

    return Net(loss, encoder=mlp(6, 5, 4), predictor=mlp(4, 5, 4))


def actor_and_critic():
    def loss(m, x, y, d):
        value, reward = m.critic(x)[:, 0], x[:, 0]
        chosen = F.log_softmax(m.actor(x), -1).gather(1, y[:, None])[:, 0]
        return -(chosen * (reward - value).detach()).mean() + F.mse_loss(value, reward)

    return Net(loss, actor=mlp(6, 5, 3), critic=mlp(6, 4, 1))


def vector_quantised():
    def loss(m, x, y, d):
        z = m.encoder(x)
        q = m.codebook(torch.cdist(z, m.codebook.weight).argmin(1))
        decoded = m.decoder(z + (q - z).detach())
        return F.mse_loss(decoded, x) + F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())

    return Net(loss, encoder=mlp(6, 5, 4), codebook=nn.Embedding(6, 4), decoder=mlp(4, 5, 6))


def weighted_by_detached_proposals():
    def loss(m, x, y, d):
        each = F.cross_entropy(m.network(x), y, reduction="none")
        weights = m.proposals(x).sigmoid()[:, 0]
        return (each * weights.detach()).mean() + F.mse_loss(weights, each.detach())

    return Net(loss, network=mlp(6, 5, 3), proposals=nn.Linear(6, 1))


def fake_quantised():
    def loss(m, x, y, d):
        return F.cross_entropy(m.head(torch.fake_quantize_per_tensor_affine(m.body(x).tanh(), 0.1, 0, -128, 127)), y)

    return Net(loss, body=nn.Linear(6, 5), head=nn.Linear(5, 3))


# name -> (model, the parts of which all is the gradient of a function, by pattern)
NO_GRADIENT = {
    "gradient reversal": (adversarial, ["head.*", "domain.*"]),
    "stop-gradient": (self_distilled, ["predictor.*"]),
    "actor and critic": (actor_and_critic, ["actor.*"]),
    "vector quantisation": (vector_quantised, ["decoder.*"]),
    "detached proposals": (weighted_by_detached_proposals, ["network.*"]),
    "fake quantisation": (fake_quantised, ["head.*"]),
}


def built(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def jacobian(module, patterns=("*",)):
    """J of what trains, among some of the parameters, by differences of gradients in float64."""
    module = copy.deepcopy(module).double()
    chosen = [p for n, p in module.named_parameters() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]

    def gradient():
        found = torch.autograd.grad(module.training_step(BATCH, 0), chosen, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(p).view(-1) if g is None else g.reshape(-1) for p, g in zip(chosen, found, strict=True)]
        )

    rows, eps = [], 1e-6
    for parameter in chosen:
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            kept = flat[i].item()
            flat[i] = kept + eps
            plus = gradient()
            flat[i] = kept - eps
            rows.append((plus - gradient()) / (2 * eps))
            flat[i] = kept
    return torch.stack(rows)


def measure(module, **options):
    return measure_subspace(module, [BATCH], k=K, tol=1e-5, **options)


def advised(text):
    """The calls that a message advises: patterns, and other arguments."""
    calls = re.findall(r"params=(\[.*?\])( with curvature='finite-difference')?", text)
    return [(eval(patterns), {"curvature": "finite-difference"} if other else {}) for patterns, other in calls]


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_the_message_names_the_cause_first_and_a_way_out_that_is_right(name):
    make, expected = NO_GRADIENT[name]
    module = built(make)
    with pytest.warns(UserWarning, match="is not the gradient of a function") as said:
        record = measure(module)
    (text,) = [str(s.message) for s in said if "second derivative" in str(s.message)]
    assert text.startswith("What trains this model is not the gradient of a function")
    assert "on_check_fail='finite-difference'" not in text
    assert record.metrics["solver/check_error"] > 0.01
    ways_out = advised(text)
    assert ways_out[0] == (expected, {})
    for patterns, options in ways_out:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            part = measure(module, params=patterns, **options)
        dense = jacobian(module, patterns)
        assert (dense - dense.T).norm() < 1e-6 * dense.norm()
        values = torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0)[:K]
        torch.testing.assert_close(part.subspace.eigenvalues.double()[:K], values, rtol=1e-3, atol=1e-5)
        assert "solver/check_error" not in part.metrics


@pytest.mark.parametrize("name", usual(["detached proposals"], thorough=["gradient reversal", "actor and critic"]))
def test_the_asymmetry_is_that_of_the_dense_derivative(name):
    module = built(NO_GRADIENT[name][0])
    dense, space = jacobian(module), ParameterSpace.of(module)
    loss, batch = TrainingLoss(module, space, dtype=torch.float64), sample_of_batches([BATCH]).hessian[0]
    # Each is an estimate from 15 entries or so.
    found = [GradientField.of(loss, batch, seed=seed).asymmetry for seed in range(15)]
    truth = float((dense - dense.T).norm() / (2 * dense.norm()))
    assert truth / 1.5 < statistics.median(found) < 1.5 * truth


REFUSED = ["gradient reversal", "detached proposals"]  # of all, where not all are run


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    covering(
        usual(REFUSED, thorough=[name for name in NO_GRADIENT if name not in REFUSED]),
        [{"on_check_fail": "finite-difference"}, {"curvature": "finite-difference"}],
        ["float32", "float64"],
    ),
)
def test_finite_differences_of_it_are_refused(name, options, dtype):
    with pytest.raises(CheckError, match=r"is not the gradient of a function.*[Nn]othing is measured"):
        measure(built(NO_GRADIENT[name][0]), dtype=dtype, **options)


def test_no_part_of_it_is_one():
    def loss(m, x, y, d):
        f = m.body(x)
        return F.cross_entropy(f * f.detach().roll(1, dims=-1), y)

    with pytest.warns(UserWarning, match="No part of the model was found where it is one; pass loss_fn="):
        measure(built(lambda: Net(loss, body=nn.Linear(6, 3))))


def test_patterns_stay_within_params():
    module = built(adversarial)
    with pytest.warns(UserWarning, match="is not the gradient") as said:
        measure(module, params=["*.weight"])
    patterns, _ = advised(str(said[0].message))[0]
    assert set(patterns) == {"head.weight", "domain.0.weight", "domain.2.weight"}


def test_the_gauss_newton_matrix_of_a_reversed_gradient_is_refused():
    def loss(m, x, y, d):
        return F.cross_entropy(m.domain(m.middle(m.features(x))), d)

    def make(middle):
        return built(lambda: Net(loss, features=mlp(6, 5, 5), middle=middle, domain=mlp(5, 4, 2)))

    class Reversal(nn.Module):
        def forward(self, x):
            return Reverse.apply(x)

    assert measure(make(nn.Identity()), curvature="ggn").subspace.converged
    with pytest.raises(CheckError, match=r"^What trains this model is not the gradient.*Nothing is measured\."):
        measure(make(Reversal()), curvature="ggn")


def test_a_wrong_backward_pass_is_told_from_it():
    def loss(m, x, y, d):
        return F.cross_entropy(m.head(KeepsInput.apply(m.body(x))), y)

    module = built(lambda: Net(loss, body=nn.Linear(6, 5), head=nn.Linear(5, 3)))
    with pytest.warns(UserWarning, match="is the gradient of a function.*on_check_fail='finite-difference'"):
        record = measure(module)
    dense = jacobian(module)
    values = torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0)[:K]
    assert not torch.allclose(record.subspace.eigenvalues.double()[:K], values, rtol=1e-2)
    with pytest.warns(UserWarning, match="is the gradient of a function"):
        record = measure(module, on_check_fail="finite-difference")
    torch.testing.assert_close(record.subspace.eigenvalues.double()[:K], values, rtol=1e-3, atol=1e-5)


# -- what is left out, marked, or unchecked ----------------------------------------------------------------------------


class WithoutProducts(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        return {"value": probe.operator.value(None)}


class WithProducts(Measurement):
    needs = Needs.NOTHING

    def measure(self, probe):
        return {"along_itself": probe.dot(probe.gradient, probe.operator.matvec(probe.gradient))}


@pytest.mark.parametrize("curvature", ["hessian", "finite-difference", "ggn"])
def test_omit_leaves_out_what_rests_on_second_derivatives(curvature):
    def loss(m, x, y, d):
        return F.cross_entropy(m.domain(Reverse.apply(m.features(x))), d)

    module = built(lambda: Net(loss, features=mlp(6, 5, 5), domain=mlp(5, 4, 2)))
    with pytest.warns(UserWarning, match="Numbers that rest on second derivatives are left out") as said:
        record = measure(
            module, curvature=curvature, on_check_fail="omit", measurements=[WithoutProducts(), WithProducts()]
        )
    assert len(said) == 1
    assert record.subspace is None
    assert set(record.metrics) == {"gradient_norm", "sample_loss", "value"}
    gradients = torch.autograd.grad(value := module.training_step(BATCH, 0), list(module.parameters()))
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert record.metrics["gradient_norm"] == pytest.approx(expected, rel=1e-4)
    assert record.metrics["value"] == pytest.approx(value.item(), rel=1e-5)
    assert record.metrics["sample_loss"] == pytest.approx(value.item(), rel=1e-5)


def trained(make, *callbacks):
    module = built(make)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(callbacks),
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(*BATCH), batch_size=8))
    return [parameter.detach() for parameter in module.parameters()], trainer


def test_a_monitor_marks_or_omits_and_trains_the_same():
    alone, _ = trained(adversarial)
    for policy, mark in (("warn", True), ("omit", False)):
        monitor = SubspaceMonitor(k=1, every_n_steps=4, max_overhead=None, on_check_fail=policy)
        with pytest.warns(UserWarning, match="is not the gradient of a function") as said, without_error_bar():
            watched, trainer = trained(adversarial, monitor)
        assert len([s for s in said if "not the gradient" in str(s.message)]) == 1
        assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
        assert [record.step for record in monitor.history] == [0, 4]
        for record in monitor.history:
            assert ("solver/check_error" in record.metrics) == mark
            assert ("sharpness" in record.metrics) == mark
            assert "gradient_norm" in record.metrics
        assert ("subspace/solver/check_error" in trainer.callback_metrics) == mark  # a default key
    projection = SubspaceProjection("top", k=K, refresh_every_n_steps=1, on_check_fail="omit")
    with pytest.warns(UserWarning, match="left out"):
        projected, _ = trained(adversarial, projection)
    assert all(torch.equal(a, b) for a, b in zip(alone, projected, strict=True))


def float32_alone():
    def loss(m, x, y, d):
        if x.dtype != torch.float32:
            raise NotImplementedError("expected float32")
        return F.cross_entropy(m.network(x), y)

    return Net(loss, network=mlp(6, 5, 3))


@pytest.mark.parametrize("policy", ["warn", "finite-difference", "omit"])
def test_a_check_that_could_not_be_made_says_so_once(policy):
    module = built(float32_alone)
    with pytest.warns(UserWarning, match="could not be checked") as said:
        record = measure(module, on_check_fail=policy)
    assert len(said) == 1
    text = str(said[0].message)
    assert "expected float32" in text
    assert "in float32 H v agrees with differences of gradients within" in text
    assert record.metrics["solver/unchecked"] == 1.0


def test_a_check_that_could_not_be_made_raises_on_request():
    with pytest.raises(CheckError, match=r"could not be checked.*on_check_fail='warn'"):
        measure(built(float32_alone), on_check_fail="raise")


def test_a_fault_that_only_float32_can_show():
    def loss(m, x, y, d):
        if x.dtype != torch.float32:
            raise NotImplementedError("expected float32")
        return F.cross_entropy(m.head(KeepsInput.apply(m.body(x))), y)

    module = built(lambda: Net(loss, body=nn.Linear(6, 5), head=nn.Linear(5, 3)))
    check = CurvatureConfig().check(module, sample_of_batches([BATCH]))
    assert check.outcome is CheckOutcome.FAILED
    assert "differences of float32 gradients" in check.reason
    assert not check.is_gradient  # it could not be tried,
    assert not check.is_no_gradient
    with pytest.warns(UserWarning, match="second derivatives") as said:
        measure(module)
    assert "on_check_fail='finite-difference'" not in str(said[0].message)  # so it is not advised
