"""Shadow: copies inside, the very same objects afterwards; tensors stay shared, parameters stay leaves."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_subspace.loss.shadow import Shadow
from tests.modules import PROJECTS, Holder, counting_tensors, differences, fingerprint


def look(module):
    return fingerprint(module, "module", identity=True)


@pytest.mark.parametrize("name", PROJECTS)
def test_every_object_is_itself_and_every_address_the_same_after_a_shadow(name):
    module = PROJECTS[name]()
    before = look(module)
    shadow = Shadow(module, torch.float64)
    for _ in range(2):
        shadow.reset()
        assert all(a is not b for a, b in zip(module.parameters(), PROJECTS[name]().parameters(), strict=True))
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.add_(1)
    shadow.close()
    assert differences(before, look(module)) == []


def test_shared_tensors_are_shared_among_the_copies():
    module = Holder()
    module.again, module.inside = module.linear.weight, [module.linear.weight, module.linear]
    module.state = torch.zeros(4)
    module.same_state, module.part = [module.state], module.state[1:3]
    shadow = Shadow(module, torch.float64)
    shadow.reset()
    assert module.again is module.linear.weight is module.inside[0]
    assert module.same_state[0] is module.state
    module.part.add_(1)
    assert module.state.tolist() == [0, 1, 1, 0]
    assert module.state.dtype == torch.float64
    shadow.close()
    assert module.state.tolist() == [0, 0, 0, 0]


def test_a_view_of_a_parameter_is_a_view_of_its_copy():
    module = Holder()
    module.row, module.raw, module.transposed = (
        module.linear.weight[1],
        module.linear.weight.data,
        module.linear.weight.t(),
    )
    shadow = Shadow(module)
    shadow.reset()
    (gradient,) = torch.autograd.grad(module.row.sum() + module.transposed[0, 0], module.linear.weight)
    assert gradient.tolist() == [[1, 0], [1, 1]]
    assert not module.raw.requires_grad
    assert module.raw.data_ptr() == module.linear.weight.data_ptr()
    shadow.close()


def test_a_view_of_something_larger_that_is_not_in_the_module_copies_the_view_alone():
    module = Holder(part=torch.zeros(1_000_000)[3:5])
    shadow = Shadow(module)
    shadow.reset()
    assert module.part.untyped_storage().nbytes() == 8
    shadow.close()


def test_copies_of_parameters_keep_class_and_attributes():
    class Special(nn.Parameter):
        pass

    module = Holder()
    module.linear.weight = Special(torch.zeros(2, 2))
    module.linear.weight.tag, module.linear.weight.history, module.linear.weight.ema = 1, [], torch.zeros(2)
    before = look(module)
    shadow = Shadow(module)
    for _ in range(2):
        shadow.reset()
        weight = module.linear.weight
        assert type(weight) is Special
        assert (weight.tag, weight.history, weight.ema.tolist(), weight.grad) == (1, [], [0, 0], None)
        weight.tag = 2
        weight.history.append(1)
        weight.ema.add_(1)
        weight.sum().backward()
    shadow.close()
    assert differences(before, look(module)) == []


def test_copies_of_parameters_stay_until_they_are_written_to():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    shadow.reset()
    weight, bias = module.weight, module.bias
    weight.data.clamp_(-0.1, 0.1)
    shadow.drop_written()
    shadow.reset()
    assert module.weight is not weight
    assert module.bias is bias
    shadow.close()


def test_a_write_that_would_spoil_an_earlier_graph_is_refused():
    module = nn.Linear(2, 2)
    shadow = Shadow(module)
    shadow.reset()
    shadow.drop_written()
    shadow.reset()
    module.weight.data.mul_(0.5)
    with pytest.raises(RuntimeError, match="writes to a parameter at some batches and not at others"):
        shadow.drop_written()
    shadow.close()


def test_displaced_copies_are_made_anew_and_are_no_writes():
    module = nn.Linear(2, 2)
    offsets = {}
    shadow = Shadow(module, displacement=lambda p: offsets.get(id(p)))
    weight = module.weight
    for size in (0.0, 1.0, 2.0, 0.0):
        offsets = {id(weight): torch.full((2, 2), size)} if size else {}
        shadow.reset()
        assert torch.equal(module.weight.detach(), weight.detach() + size)
        shadow.drop_written()
    shadow.close()
    assert module.weight is weight


def test_floating_point_state_is_widened_and_nothing_else():
    module = Holder(state=torch.zeros(1), count=torch.zeros(1, dtype=torch.long)).bfloat16()
    shadow = Shadow(module, torch.float32)
    shadow.reset()
    assert module.linear.weight.dtype == torch.float32
    assert (module.state.dtype, module.count.dtype) == (torch.float32, torch.long)
    shadow.close()
    assert module.linear.weight.dtype == torch.bfloat16


def test_extra_roots_are_put_back_without_copies_of_their_tensors():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    before = look(optimizer)
    shadow = Shadow(nn.Linear(2, 2), extra_roots=[optimizer])
    for _ in range(2):
        shadow.reset()
        assert optimizer.param_groups[0]["lr"] == 0.1
        optimizer.param_groups[0]["lr"] *= 2
        optimizer.note = "new"
    shadow.close()
    assert differences(before, look(optimizer)) == []


@functools.cache
def cached_table():
    return torch.ones(()) / 3


class UsesTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self):
        return self.weight * cached_table()


def test_a_cache_filled_by_a_probe_is_emptied_and_one_left_alone_is_not():
    cached_table.cache_clear()
    module = UsesTable()
    shadow = Shadow(module)
    shadow.reset()
    module()
    shadow.close()
    assert cached_table.cache_info().currsize == 0
    table = cached_table()
    shadow = Shadow(module)
    shadow.reset()
    module()
    shadow.close()
    assert cached_table() is table


def test_parametrizations_and_flattened_weights_follow_the_copies():
    lstm = nn.LSTM(2, 3, num_layers=2)
    ortho = parametrizations.orthogonal(nn.Linear(3, 3))
    module = nn.ModuleList([lstm, ortho])
    before = look(module)
    shadow = Shadow(module, torch.float64)
    shadow.reset()
    out = ortho(lstm(torch.ones(1, 1, 2, dtype=torch.float64))[0]).sum()
    gradients = torch.autograd.grad(out, list(module.parameters()))
    assert all(g.dtype == torch.float64 and g.isfinite().all() for g in gradients)
    shadow.close()
    assert differences(before, look(module)) == []


def test_a_shadow_leaves_nothing_behind():
    module = PROJECTS["Everything"]()
    counts = []
    with counting_tensors() as count:
        for _ in range(4):
            shadow = Shadow(module)
            shadow.reset()
            shadow.reset()
            shadow.close()
            del shadow
            counts.append(count())
    assert counts == [0] * 4
