"""The loss is a function of (parameters, micro-batch), equal to what training descends, and leaves nothing behind."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lightning_subspace import _lightning, measure_subspace
from lightning_subspace.curvature import Hessian
from lightning_subspace.curvature.gradient import pruned_gradient
from lightning_subspace.data.example_count import ExampleCounter
from lightning_subspace.data.given import sample_of_batches
from lightning_subspace.data.micro_batch import MicroBatch
from lightning_subspace.loss import shadow as containment
from lightning_subspace.loss import training_loss
from lightning_subspace.loss.loss_function import LossError, resolve_loss
from lightning_subspace.loss.training_loss import TrainingLoss
from lightning_subspace.parallel.parameters import ParameterSpace
from tests.modules import (
    BATCH,
    CLASSES,
    FEATURES,
    PROJECTS,
    Project,
    counting_tensors,
    differences,
    examples,
    fingerprint,
    random_bytes,
    train,
)
from tests.thorough import covering


def batch_of(index=0, size=BATCH):
    x, y = examples().tensors
    return MicroBatch((x[index * size : (index + 1) * size], y[index * size : (index + 1) * size]), float(size), index)


def evaluate(loss, batch):
    """Value and gradient of one evaluation."""
    evaluation = loss(batch)
    gradients = torch.autograd.grad(evaluation.value, evaluation.leaves, allow_unused=True)
    return evaluation.value.detach(), loss.space.flatten(gradients, like=evaluation.value)


def look(module):
    return {**fingerprint(module, "module", identity=True), **fingerprint(random_bytes(), "random")}


# -- a function -------------------------------------------------------------------------------------------------------


class Evaluator(Callback):
    """Evaluates the loss of two micro-batches in turn, in the middle of training."""

    def __init__(self, mode="train", dtype=torch.float32):
        self.mode, self.dtype = mode, dtype
        self.values, self.changes = [], ["not asked"]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 2:
            return
        before = {**look(pl_module), **fingerprint(batch, "batch", identity=True), "loggers": list(trainer.loggers)}
        batches = [MicroBatch(batch, float(ExampleCounter().count(batch)), index, transferred=True) for index in (0, 1)]
        with TrainingLoss(pl_module, ParameterSpace.of(pl_module), mode=self.mode, dtype=self.dtype) as loss:
            values = [[evaluate(loss, item) for item in batches] for _ in range(3)]
        self.values = values  # now, since attributes of a callback are put back behind the loss
        after = {**look(pl_module), **fingerprint(batch, "batch", identity=True), "loggers": list(trainer.loggers)}
        self.changes = differences(before, after)


def are_equal(values):
    return all(
        torch.equal(a, b)
        for other in values[1:]
        for one in zip(values[0], other, strict=True)
        for a, b in zip(*one, strict=True)
    )


@pytest.mark.parametrize(("name", "way"), covering(list(PROJECTS), [("train", torch.float32), ("eval", torch.float64)]))
def test_evaluations_are_equal_to_the_bit_and_touch_no_object(name, way, tmp_path):
    mode, dtype = way
    evaluator = Evaluator(mode, dtype)
    train(PROJECTS[name], tmp_path, evaluator, steps=3)
    assert are_equal(evaluator.values)
    assert evaluator.changes == []


def test_masks_depend_on_the_micro_batch_and_on_the_seed_alone():
    module = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    space, data = ParameterSpace.of(module), batch_of().data[0]

    def values(seed, indices):
        with TrainingLoss(module, space, lambda m, x, i: m(x).square().mean(), seed=seed) as loss:
            return [loss(MicroBatch(data, 1.0, index)).value.item() for index in indices]

    first = values(0, [0, 1, 2])
    assert len(set(first)) == 3
    assert values(0, [2, 0, 1]) == [first[2], first[0], first[1]]
    assert not set(values(1, [0, 1, 2])) & set(first)


def reset_once(self, reset=containment.Shadow.reset):
    if self._round == 0:
        reset(self)


@pytest.mark.parametrize(
    ("piece", "owner", "replacement", "name"),
    [
        ("reset", containment.Shadow, reset_once, "Attributes"),
        ("copied", training_loss, lambda data, *functions: data, "InPlaceBatch"),
        ("seed_generators", training_loss, lambda seed: None, "Randomness"),
        ("drop_written", containment.Shadow, lambda self: None, "Teacher"),
    ],
)
def test_without_a_piece_evaluations_differ(piece, owner, replacement, name, tmp_path, monkeypatch):
    monkeypatch.setattr(owner, piece, replacement)
    evaluator = Evaluator()
    try:
        train(PROJECTS[name], tmp_path, evaluator, steps=3)
    except IndexError:  # a batch that is consumed in place is empty in the end
        assert name == "InPlaceBatch"
    else:
        assert not are_equal(evaluator.values)


# -- the loss that training descends ----------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(CLASSES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(x + self.embed(x.argmax(dim=1) % CLASSES))


class Last(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x.unsqueeze(-1))[0][:, -1])


class HoldsViews(nn.Module):
    """Uses its weight through views, made once, by another name and in a list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, FEATURES))
        self.transposed, self.rows, self.alias = self.weight.t(), [self.weight[0]], self.weight

    def forward(self, x):
        return torch.tanh(x @ self.transposed) + F.linear(x, self.alias) + self.rows[0].square().sum()


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.SiLU(), nn.Linear(8, CLASSES)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Mish(), nn.Linear(8, CLASSES)),
    "layer-norm": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES)),
    "group-norm": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
    ),
    "lstm": lambda: Last(nn.LSTM(1, 4, batch_first=True)),
    "gru": lambda: Last(nn.GRU(1, 4, batch_first=True)),
    "tied": Tied,
    "views": HoldsViews,
    "weight-norm": lambda: parametrizations.weight_norm(nn.Linear(FEATURES, CLASSES)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(FEATURES, CLASSES)),
    "frozen": lambda: nn.Sequential(nn.Linear(FEATURES, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, CLASSES)),
}


def cross_entropy(module, batch, batch_idx):
    with parametrize.cached():
        return F.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_a_plain_backward_to_the_bit(name, dtype):
    torch.manual_seed(0)
    module = NETS[name]().to(dtype)
    if name == "views":  # `to` has made another weight
        module.transposed, module.rows = module.weight.t(), [module.weight[0]]
    space = ParameterSpace.of(module)
    batch = batch_of()
    with TrainingLoss(module, space, cross_entropy, dtype=dtype) as loss:
        value, gradient = evaluate(loss, batch)
    plain = cross_entropy(module, (batch.data[0].to(dtype), batch.data[1]), 0)
    plain.backward()
    assert torch.equal(value, plain.detach())
    assert torch.equal(gradient, space.flatten([p.grad for p in space.tensors(module)]))


def test_without_the_sharing_of_memory_a_view_of_the_weight_has_no_gradient(monkeypatch):
    monkeypatch.setattr(containment, "owners", lambda tensors: {})
    module = HoldsViews()
    with TrainingLoss(module, ParameterSpace.of(module), lambda m, batch, i: m.alias.sum() + m.rows[0].sum()) as loss:
        gradient = pruned_gradient(loss, batch_of())
    assert torch.equal(gradient, torch.ones(loss.space.n))  # without the row a second time


def test_hooks_of_parameters_do_not_reach_the_gradient():
    torch.manual_seed(0)
    module = NETS["mlp"]()
    space, batch = ParameterSpace.of(module), batch_of()
    with TrainingLoss(module, space, cross_entropy) as loss:
        expected = pruned_gradient(loss, batch)
    fired = []
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: (fired.append(1), gradient.zero_())[1])
        parameter.register_post_accumulate_grad_hook(lambda parameter: fired.append(1))
    with TrainingLoss(module, space, cross_entropy) as loss:
        assert torch.equal(pruned_gradient(loss, batch), expected)
    assert fired == []


def test_what_the_step_freezes_has_no_gradient():
    module = NETS["mlp"]()

    def loss_fn(module, batch, batch_idx):
        module[0].requires_grad_(False)
        return cross_entropy(module, batch, batch_idx)

    with TrainingLoss(module, ParameterSpace.of(module), loss_fn) as loss:
        gradients = loss.space.unflatten(pruned_gradient(loss, batch_of()))
    assert [bool(g.any()) for g in gradients] == [False, False, True, True]
    assert all(p.requires_grad for p in module.parameters())


def test_displaced_evaluations():
    module = NETS["mlp"]()
    space = ParameterSpace.of(module)
    offset = 0.1 * torch.randn(space.n, generator=torch.Generator().manual_seed(0))
    with TrainingLoss(module, space, cross_entropy) as loss:
        here = evaluate(loss, batch_of())
        loss.displace(offset)
        there = evaluate(loss, batch_of())
        loss.displace(None)
        again = evaluate(loss, batch_of())
    with torch.no_grad():
        for parameter, piece in zip(space.tensors(module), space.unflatten(offset), strict=True):
            parameter.add_(piece)
    with TrainingLoss(module, space, cross_entropy) as loss:
        moved = evaluate(loss, batch_of())
    assert torch.equal(there[1], moved[1])
    assert torch.equal(here[1], again[1])
    assert not torch.equal(here[1], there[1])


def test_graphs_of_a_loss_that_clamps_its_weights_stay_right():
    """The copies that one evaluation writes to are not those of another's graph."""
    torch.manual_seed(0)

    def clamping(module, batch, batch_idx):
        for parameter in module.parameters():
            parameter.data.clamp_(-0.1, 0.1)
        return cross_entropy(module, batch, batch_idx)

    module, batches = NETS["mlp"](), [batch_of(0), batch_of(1)]
    space = ParameterSpace.of(module)
    direction = torch.ones(space.n)
    with TrainingLoss(module, space, clamping) as loss:
        product = Hessian(loss, batches).matvec(direction)
    for parameter in module.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    with TrainingLoss(module, space, cross_entropy) as loss:
        assert torch.equal(product, Hessian(loss, batches).matvec(direction))


def test_a_write_at_some_batches_only_is_refused():
    module = NETS["mlp"]()

    def sometimes(module, batch, batch_idx):
        if batch_idx == 1:
            module[0].weight.data.mul_(0.5)
        return cross_entropy(module, batch, batch_idx)

    before = look(module)
    with (
        pytest.raises(RuntimeError, match="writes to a parameter at some batches and not at others"),
        TrainingLoss(module, ParameterSpace.of(module), sometimes) as loss,
    ):
        Hessian(loss, [batch_of(0), batch_of(1)])
    assert differences(before, look(module)) == []


def test_modes():
    module = nn.Sequential(nn.Linear(FEATURES, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    module[2].eval()
    seen = []

    def loss_fn(module, batch, batch_idx):
        seen.append([m.training for m in module.modules()])
        return module(batch).sum()

    def run(mode):
        before = [m.training for m in module.modules()]
        with TrainingLoss(module, ParameterSpace.of(module), loss_fn, mode=mode) as loss:
            loss(MicroBatch(batch_of().data[0], 1.0, 0))
        assert [m.training for m in module.modules()] == before

    run("train")
    run("eval")
    module.eval()
    run("train")
    assert seen == [[True, True, True, False], [False] * 4, [True] * 4]


def test_global_settings_are_put_back():
    module = NETS["mlp"]()
    before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    seen = []

    def wide(*args):
        seen.append((torch.get_default_dtype(), torch.zeros(1).dtype))
        return cross_entropy(*args)

    with torch.no_grad(), TrainingLoss(module, ParameterSpace.of(module), wide, dtype=torch.float64) as loss:
        assert loss(batch_of()).value.requires_grad
        assert torch.get_default_dtype() == before[0]  # a mode is in the way of every call: only where it is needed
        with loss.default_type():
            assert torch.zeros(1).dtype == torch.float64
    assert seen == [(torch.float64, torch.float64)]
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def evaluate_once(module, space):
    with TrainingLoss(module, space, cross_entropy) as loss:
        return loss(batch_of())


def test_autocast_and_inference_mode_are_set_aside():
    module = NETS["mlp"]()
    space = ParameterSpace.of(module)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        evaluation = evaluate_once(module, space)
    assert evaluation.value.dtype == torch.float32
    assert evaluation.value.requires_grad


def test_compiled_code_is_not_compiled_again():
    """The module's dicts and originals are the same objects, so the guards of a compiled step still hold."""
    torch.manual_seed(0)
    module = NETS["mlp"]()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of itself on first use
        compiled = torch.compile(module, backend=backend)
        x = batch_of().data[0]
        expected = compiled(x)
        count = len(compilations)
        with TrainingLoss(compiled, ParameterSpace.of(compiled), cross_entropy) as loss:
            pruned_gradient(loss, batch_of())
        assert torch.equal(compiled(x), expected)
    assert len(compilations) == count == 1


# -- errors -----------------------------------------------------------------------------------------------------------


def returning(result):
    class Returns(Project):
        def training_step(self, batch, batch_idx):
            self.count = getattr(self, "count", 0) + 1
            loss = super().training_step(batch, batch_idx)
            return result(loss)

    return Returns()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: None, "the loss of Returns: expected .*, got none for this batch"),
        (lambda loss: {}, "the loss of Returns: expected .*, got none"),
        (lambda loss: {"losses": loss}, "expected a tensor or {'loss': ...}"),
        (lambda loss: {"loss": None}, "got none"),
        (lambda loss: loss.expand(3), r"expected a scalar tensor, got \(3,\); average it over the batch"),
        (lambda loss: 1.5, "expected a scalar tensor, got float"),
        (lambda loss: [loss], "expected a scalar tensor, got list"),
        (lambda loss: loss * float("nan"), "the loss of Returns is nan on the fixed sample"),
        (lambda loss: loss / 0, "the loss of Returns is inf"),
        (lambda loss: loss.detach(), "does not depend on the parameters .* was it detached?"),
    ],
)
def test_what_a_training_step_may_not_return(result, message):
    module = returning(result)
    before = look(module)
    with pytest.raises(LossError, match=message), TrainingLoss(module, ParameterSpace.of(module)) as loss:
        loss(batch_of())
    assert differences(before, look(module)) == []


@pytest.mark.parametrize("result", [lambda loss: loss, lambda loss: {"loss": loss}, lambda loss: loss.reshape(1, 1)])
def test_what_it_may(result):
    module = returning(result)
    with TrainingLoss(module, ParameterSpace.of(module)) as loss:
        assert loss(batch_of()).value.shape == ()


class OneArgument(Project):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class AnyArguments(Project):
    def training_step(self, *args):
        return super().training_step(*args)


class ThreeArguments(Project):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return super().training_step(batch, batch_idx)


class OneAndOptions(Project):
    """Lightning counts positional arguments, and gives the number of the batch to the second one."""

    def training_step(self, batch, *, scale=1.0, **options):
        return scale * super().training_step(batch, 0)


class DataloaderIter(Project):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter), 0)


class Bare(LightningModule):
    training_step = None

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 1)


@pytest.mark.parametrize("make", [OneArgument, OneAndOptions, AnyArguments, ThreeArguments])
def test_signatures(make):
    module = make()
    resolve_loss(module, None)
    with TrainingLoss(module, ParameterSpace.of(module)) as loss:
        value = loss(batch_of()).value
    assert torch.equal(
        value, module.training_step(batch_of().data, *([] if make in (OneArgument, OneAndOptions) else [0]))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (DataloaderIter, "DataloaderIter.training_step takes a dataloader_iter.* pass loss_fn="),
        (Bare, "Bare has no training_step; pass loss_fn="),
        (lambda: nn.Linear(1, 1), "Linear has no training_step; pass loss_fn="),
    ],
)
def test_modules_without_a_loss(make, message):
    module = make()
    with pytest.raises(TypeError, match=message):
        TrainingLoss(module, ParameterSpace.of(module))
    with pytest.raises(TypeError, match=message):
        resolve_loss(module, None)
    resolve_loss(module, cross_entropy)


def test_an_error_of_the_step_is_its_own_and_nothing_is_changed():
    class Fails(Project):
        def training_step(self, batch, batch_idx):
            self.net[0].weight.data.zero_()
            self.new = torch.rand(3)
            raise KeyError("the user's")

    module = Fails()
    before = look(module)
    with pytest.raises(KeyError, match="the user's"), TrainingLoss(module, ParameterSpace.of(module)) as loss:
        loss(batch_of())
    assert differences(before, look(module)) == []


def test_a_closed_loss_cannot_be_evaluated():
    module = NETS["mlp"]()
    loss = TrainingLoss(module, ParameterSpace.of(module), cross_entropy)
    with pytest.raises(RuntimeError, match="is a context manager"):
        loss(batch_of())
    with loss:
        loss(batch_of())
    with pytest.raises(RuntimeError, match="is a context manager"):
        loss(batch_of())


# -- Lightning --------------------------------------------------------------------------------------------------------


def test_a_lightning_module_without_a_trainer_logs_into_the_void(capsys):
    module = PROJECTS["Metrics"]()
    with TrainingLoss(module, ParameterSpace.of(module)) as loss:
        loss(batch_of())
        module.print("nothing")
    assert capsys.readouterr().out == ""
    assert "log" not in vars(module)


def test_a_silent_logger_answers_and_swallows():
    class Logger:
        name, version, experiment = "name", 3, object()

        def log_metrics(self, metrics):
            raise AssertionError

    silent = _lightning.Silent(Logger())
    assert isinstance(silent, Logger)
    assert (silent.name, silent.version) == ("name", 3)
    assert silent.log_metrics({}) is None
    silent.name = silent["key"] = "other"
    silent.experiment["metric"].append(1)
    assert silent.name == "name"
    with pytest.raises(AttributeError):
        _ = silent.no_such_thing


# -- nothing stays ----------------------------------------------------------------------------------------------------


def test_six_probes_leave_no_tensor_behind():
    torch.manual_seed(0)
    module = PROJECTS["Randomness"]()
    sample = [batch_of(0).data, batch_of(1).data]
    counts = []
    with counting_tensors() as count:
        for _ in range(6):
            measure_subspace(module, sample, k=2)
            counts.append(count())
    assert len(set(counts)) == 1


def test_failed_probes_leave_no_tensor_behind():
    module, batches = NETS["mlp"](), sample_of_batches([batch_of(0).data]).hessian
    space = ParameterSpace.of(module)

    def fails(module, batch, batch_idx):
        cross_entropy(module, batch, batch_idx)
        raise ValueError("on purpose")

    counts = []
    with counting_tensors() as count:
        for _ in range(4):
            with pytest.raises(ValueError, match="on purpose"), TrainingLoss(module, space, fails) as loss:
                Hessian(loss, batches)
            counts.append(count())
    assert len(set(counts)) == 1
