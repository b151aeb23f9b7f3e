import copy
import threading

import pytest
import torch
from torch import nn

from hawada.core.finetune import recalibrate_batchnorm
from hawada.core.gates import Student
from hawada.core.reconstruction import batch_statistics, input_rows, output_rows, reconstruct, visits
from hawada.core.reconstruction.rows import MAX_ROWS_PER_IMAGE
from hawada.core.structure import Cut, GatePoint, Group, keep_all, materialize


class Narrowing(nn.Module):
    """Two convolutions without norms; the options of the second can be chosen."""

    def __init__(self, **options):
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.consumer = nn.Conv2d(8, 6, 3, **options)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.consumer(torch.relu(self.wide(x)))).mean((2, 3)))


WIDE = Group(
    "wide",
    "channel",
    8,
    (GatePoint("consumer", side="input"),),
    cuts=(
        Cut("wide.weight", 0, follows="out_channels"),
        Cut("wide.bias", 0),
        Cut("consumer.weight", 1, follows="in_channels"),
    ),
)


@pytest.fixture
def batches():
    images = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return [(part,) for part in images.split(16)]


def narrowing(**options):
    torch.manual_seed(0)
    return Narrowing(**options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": (0, 2), "stride": 2},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_removed_units_that_others_duplicate_leave_no_error(options, batches):
    teacher = narrowing(**options)
    with torch.no_grad():  # the second half of the units is twice the first
        teacher.wide.weight[4:], teacher.wide.bias[4:] = 2 * teacher.wide.weight[:4], 2 * teacher.wide.bias[:4]
    student, keep = Student(copy.deepcopy(teacher), [WIDE]), {"wide": (0, 1, 2, 3)}
    plain = materialize(student.model, [WIDE], keep)
    assert reconstruct(student, teacher, keep, batches) == ["consumer"]
    slim = materialize(student.model, [WIDE], keep)
    x = batches[0][0]
    with torch.no_grad():
        targets = teacher(x)
        off, before = (slim(x) - targets).abs().max(), (plain(x) - targets).abs().max()
        with student.hard_gated(keep):
            gated = student(x)
    assert off < 0.05 * before
    torch.testing.assert_close(gated, slim(x).detach(), atol=1e-6, rtol=1e-5)


def test_a_linear_layer_is_refitted_with_its_bias(toy, groups):
    groups = groups[:2]
    for block in (toy.first, toy.second):
        block.norm = nn.Identity()
    groups = [
        groups[0],
        Group(
            "first.hidden", "channel", 8, groups[1].gated_at, (Cut("first.up.weight", 0), Cut("first.down.weight", 1))
        ),
    ]
    student, kept = Student(copy.deepcopy(toy), groups), [0, 2, 3, 6, 7]
    keep = {"first.branch": (0,), "first.hidden": tuple(kept)}
    x = torch.randn(4096, 6, generator=torch.Generator().manual_seed(2))
    reconstruct(student, toy, keep, [(part,) for part in x.split(1024)])
    with torch.no_grad():
        hidden = torch.relu(toy.first.up(toy.stem(x)))
        targets = toy.first.down(hidden)
        rows = torch.cat([hidden[:, kept], torch.ones(len(x), 1)], dim=1)
        best = rows @ torch.linalg.lstsq(rows, targets).solution
        own = hidden[:, kept] @ student.model.first.down.weight[:, kept].T + student.model.first.down.bias
    least = (best - targets).square().mean()
    assert (own - targets).square().mean() < 1.02 * least
    assert (
        least
        < 0.7 * (hidden[:, kept] @ toy.first.down.weight[:, kept].T + toy.first.down.bias - targets).square().mean()
    )


def test_a_layer_corrects_the_errors_of_those_before_it(toy, groups):
    inputs = torch.randn(2048, 6, generator=torch.Generator().manual_seed(1))
    recalibrate_batchnorm(toy, [(inputs,)])
    student = Student(copy.deepcopy(toy), groups)
    keep = keep_all(groups) | {"first.hidden": (0, 1), "second.hidden": (0, 1, 2, 3)}
    assert reconstruct(student, toy, keep, [(inputs,)]) == ["first.down", "second.down"]
    alone = Student(copy.deepcopy(toy), groups)
    reconstruct(alone, toy, keep_all(groups) | {"second.hidden": keep["second.hidden"]}, [(inputs,)])
    torch.testing.assert_close(alone.model.first.down.weight, toy.first.down.weight, rtol=0, atol=0)
    # now both layers are refitted, but neither of them on the outputs of the other
    alone.model.first.load_state_dict(student.model.first.state_dict())

    def error(refitted):
        with refitted.hard_gated(keep), batch_statistics(refitted), torch.no_grad():
            found = []
            targets = toy.second.down(torch.relu(toy.second.norm(toy.second.up(toy.first(toy.stem(inputs))))))
            handle = refitted.model.second.down.register_forward_hook(lambda module, args, output: found.append(output))
            refitted(inputs)
            handle.remove()
        return float((found[0] - targets).square().mean())

    assert error(student) < error(alone)


def test_batches_side_by_side_or_from_the_start_give_the_same_weights(toy, groups, monkeypatch):
    inputs = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    keep = keep_all(groups) | {"first.hidden": (0, 1), "second.hidden": (0, 1, 2, 3)}
    passes, weights = [], []
    for threads in (visits.MAX_WAITING_THREADS, 0):
        monkeypatch.setattr(visits, "MAX_WAITING_THREADS", threads)
        student, calls = Student(copy.deepcopy(toy), groups), []
        student.model.stem.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        before = threading.active_count()
        assert reconstruct(student, toy, keep, [(part,) for part in inputs.split(32)]) == ["first.down", "second.down"]
        assert threading.active_count() == before
        passes.append(len(calls))
        weights.append(student.model.state_dict())
    assert passes == [2 + 3, 1 + 2 * 3]  # one pass finds the order of the layers, one the bytes of their outputs
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert not torch.equal(weights[0]["second.down.weight"], toy.second.down.weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{"padding": 1, "stride": (2, 1)}, {"padding": "same", "dilation": (1, 2)}, {"padding_mode": "circular"}]
)
def test_input_rows_times_the_weights_are_the_output_rows(options, layout):
    torch.manual_seed(0)
    module = nn.Conv2d(5, 4, 3, **options)
    x = torch.randn(6, 5, 20, 28).contiguous(memory_format=layout)[1:]
    with torch.no_grad():
        outputs = module(x)
        rows = input_rows(module, x) @ module.weight.flatten(1).T + module.bias
    assert outputs[0, 0].numel() > MAX_ROWS_PER_IMAGE and rows.shape == (5 * MAX_ROWS_PER_IMAGE, 4)
    torch.testing.assert_close(rows, output_rows(module, outputs))


def test_consumers_removed_with_their_branch_are_not_refitted(toy, groups, inputs):
    student = Student(copy.deepcopy(toy), groups)
    keep = keep_all(groups) | {"first.branch": (), "first.hidden": (), "second.hidden": (1, 2)}
    assert reconstruct(student, toy, keep, [(inputs,)]) == ["second.down"]


def test_layers_that_share_their_weights_are_not_refitted(toy, groups, inputs):
    toy.second.down.weight = toy.first.down.weight
    student = Student(copy.deepcopy(toy), groups)
    keep = keep_all(groups) | {"first.hidden": (0, 1)}
    assert reconstruct(student, toy, keep, [(inputs,)]) == []
    assert torch.equal(student.model.first.down.weight, toy.first.down.weight)


def test_batch_norms_are_unchanged_after_the_block(toy, inputs):
    before = copy.deepcopy(toy.state_dict())
    with batch_statistics(toy), torch.no_grad():
        changed = toy(inputs)
        shifted = toy(inputs + 100.0)
    assert not torch.allclose(changed, toy(inputs))
    assert not torch.allclose(shifted, changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.state_dict().items())
    assert not toy.first.norm.training and toy.first.norm.track_running_stats


class Plain(nn.Module):
    """Two linear layers, the second without a bias; on request it is called twice."""

    def __init__(self, times=1):
        super().__init__()
        self.up, self.down, self.times = nn.Linear(6, 12), nn.Linear(12, 6, bias=False), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.down(torch.relu(self.up(x)))
        return x


HIDDEN = Group(
    "hidden",
    "ffn",
    12,
    (GatePoint("down", side="input", dim=-1),),
    cuts=(
        Cut("up.weight", 0, follows="out_features"),
        Cut("up.bias", 0),
        Cut("down.weight", 1, follows="in_features"),
    ),
)


def test_a_layer_without_bias_is_refitted_about_zero():
    torch.manual_seed(0)
    teacher, kept = Plain().eval(), list(range(7))
    x = torch.randn(4096, 6, generator=torch.Generator().manual_seed(2)) + 1.0
    student = Student(copy.deepcopy(teacher), [HIDDEN])
    reconstruct(student, teacher, {"hidden": tuple(kept)}, [(part,) for part in x.split(1024)])
    fresh = torch.randn(4096, 6, generator=torch.Generator().manual_seed(3)) + 1.0
    with torch.no_grad():
        targets, hidden = teacher(fresh), torch.relu(teacher.up(fresh))[:, kept]
        least = (hidden @ torch.linalg.lstsq(hidden, targets).solution - targets).square().mean()
        reached = (materialize(student.model, [HIDDEN], {"hidden": kept})(fresh) - targets).square().mean()
        before = (materialize(teacher, [HIDDEN], {"hidden": kept})(fresh) - targets).square().mean()
    assert reached < 1.05 * least < 0.4 * before


def test_a_layer_that_is_called_twice_is_not_refitted():
    torch.manual_seed(0)
    teacher = Plain(times=2).eval()
    student = Student(copy.deepcopy(teacher), [HIDDEN])
    assert reconstruct(student, teacher, {"hidden": (0, 1, 2)}, [(torch.randn(32, 6),)]) == []
    assert torch.equal(student.model.down.weight, teacher.down.weight)


def test_the_fewer_rows_there_are_the_less_weights_change():
    """The same 16 samples once and a hundred times have the same covariance; the weights trust the many rows more."""
    torch.manual_seed(0)
    teacher, keep = Plain().eval(), {"hidden": tuple(range(8))}
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    old, changes, errors = teacher.down.weight[:, :8], [], []
    for times in (1, 3, 10, 100):
        student = Student(copy.deepcopy(teacher), [HIDDEN])
        reconstruct(student, teacher, keep, [(x.repeat(times, 1),)])
        slim = materialize(student.model, [HIDDEN], keep)
        with torch.no_grad():
            changes.append(float((slim.down.weight - old).norm()))
            errors.append(float((slim(x) - teacher(x)).square().mean()))
    assert changes == sorted(changes) and errors == sorted(errors, reverse=True)
    assert changes[0] < 0.7 * changes[-1]
