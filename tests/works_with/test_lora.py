"""Adapters of peft on a Llama of transformers: the Hessian of the factors alone, and what their two scales do to it."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_subspace import Layers, measure_subspace
from tests.oracles import dense_gradient, dense_hessian
from tests.thorough import usual
from tests.works_with.same_run import compare

peft = pytest.importorskip("peft", reason="needs peft: pip install lightning-subspace[examples]")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install lightning-subspace[examples]"
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:SubspaceMonitor. at step"),  # two eigenvalues may lie close together
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    ),  # peft's, of transformers
]

VOCABULARY, LENGTH = 7, 5
# Relative. The norms of transformers compute in float32 in a float64 network, too.
ROUNDING = 200 * torch.finfo(torch.float32).eps
DIGITS = TensorDataset(torch.randint(VOCABULARY, (24, LENGTH), generator=torch.Generator().manual_seed(0)))


class Adapted(LightningModule):
    """A frozen Llama of random weights, with trainable factors of rank 2 at two of its matrices."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        # With transformers' own range of .02 hardly anything depends on the input.
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **sizes)
        adapter = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
        self.model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)

    def training_step(self, batch, batch_idx):
        (digits,) = batch
        logits = self.model(input_ids=digits[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), digits[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def scaled(module, c):
    """The same network: c B and A / c."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.mul_(c if "lora_B" in name else 1 / c)
    return module


def objective(module):
    return module.training_step(DIGITS.tensors, 0)


def of(module, factor):  # (n,) of booleans
    """The coordinates of all A or all B."""
    return torch.cat(
        [
            torch.full((parameter.numel(),), f"lora_{factor}" in name)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
    )


@pytest.fixture(scope="module")
def start():
    return Adapted().double()


@pytest.fixture(scope="module")
def moved(start):
    """At factors that are both no zeros."""
    module = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


@pytest.mark.parametrize("dropout", usual([0.1], thorough=[0.0]))
def test_adapters_train_as_before_and_are_measured_alone(dropout, tmp_path):
    found = compare(
        tmp_path,
        lambda: Adapted(dropout),
        lambda: DataLoader(DIGITS, batch_size=6, shuffle=True),
        monitor={"every_n_steps": 4},
    )
    assert found.differing == []
    assert found.steps == [0, 4, 8]
    assert all("sharpness" in record.metrics for record in found.monitor.history)


def measured(module, **arguments):
    return measure_subspace(module, [DIGITS.tensors], k=4, tol=1e-6, dtype="float64", **arguments)


@pytest.mark.parametrize("where", ["start", "moved"])
def test_the_hessian_is_that_of_the_factors(where, request):
    module = request.getfixturevalue(where)
    hessian, gradient = dense_hessian(module, objective), dense_gradient(module, objective)
    values, vectors = torch.linalg.eigh(hessian)
    record = measured(module, measurements=[Layers(groups={"A": "*lora_A*", "B": "*lora_B*"})])
    assert record.subspace.eigenvectors.shape == (4, 64)  # of two matrices 8 x 8, rank 2
    assert torch.allclose(record.subspace.eigenvalues, values.flip(0)[:4], rtol=ROUNDING)
    inside = (vectors[:, -4:].T @ gradient).square().sum() / gradient.square().sum()
    assert record.metrics["gradient_fraction"] == pytest.approx(inside.item(), rel=ROUNDING)
    share = gradient[of(module, "A")].square().sum() / gradient.square().sum()
    assert record.metrics["layers/gradient/A"] == pytest.approx(share.item(), abs=ROUNDING)


def test_at_the_start_nothing_depends_on_a(start):
    """B = 0: the gradient and the Hessian's block of A are zero, and only the block of A and B couples the two."""
    hessian, a = dense_hessian(start, objective), of(start, "A")
    assert dense_gradient(start, objective)[a].count_nonzero() == 0
    assert hessian[a][:, a].count_nonzero() == 0
    assert hessian[a][:, ~a].abs().max() > 1e-3 * hessian.abs().max()
    # So the Hessian is not positive: [[0, C'], [C, D]] has a negative eigenvalue for every C but 0.
    lowest = measured(start, which="SA").subspace.eigenvalues
    assert lowest.min() < -1e-3 * hessian.abs().max()


@pytest.fixture(scope="module")
def before(moved):
    return measured(moved)


@pytest.mark.parametrize("c", usual([3.0], thorough=[0.5]))
def test_other_scales_of_the_factors_are_the_same_network_and_another_hessian(moved, before, c):
    """With D = diag(1/c at A, c at B) it is D^-1 H D^-1."""
    other = scaled(moved, c)
    assert objective(other).item() == pytest.approx(objective(moved).item(), rel=ROUNDING)
    inverse = torch.where(of(moved, "A"), c, 1 / c).double()
    expected = torch.linalg.eigvalsh(inverse[:, None] * dense_hessian(moved, objective) * inverse).flip(0)[:4]
    record = measured(other)
    assert torch.allclose(record.subspace.eigenvalues, expected, rtol=ROUNDING)
    assert record.metrics["sharpness"] != pytest.approx(before.metrics["sharpness"], rel=0.1)


def test_the_gradient_has_no_part_along_the_scale(moved):
    """d/dc (c B, A / c) is t = (B, -A): g.t = 0, and as the loss is constant along the curve, t.Ht = -g.(B, A)."""
    theta = torch.cat([p.detach().reshape(-1) for p in moved.parameters() if p.requires_grad])
    t = torch.where(of(moved, "A"), -theta, theta)
    gradient, hessian = dense_gradient(moved, objective), dense_hessian(moved, objective)
    assert abs(gradient @ t) < ROUNDING * gradient.norm() * t.norm()
    assert float(t @ hessian @ t) == pytest.approx(-float(gradient @ theta), rel=ROUNDING)
