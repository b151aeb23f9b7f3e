import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from hawada.core.gates import SigmoidGate
from hawada.core.structure import GatePoint, Group, keep_all
from hawada.core.student import Student


def set_gates(student, theta):
    with torch.no_grad():
        for gate in student.gates:
            gate.theta.fill_(theta)


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_gates_at_one_reproduce_the_teacher(toy, groups, inputs):
    expected = toy(inputs)
    student = Student(toy, groups)
    set_gates(student, 50.0)
    assert torch.equal(student(inputs), expected)


def test_open_but_trainable_gates_are_near_the_teacher_and_not_equal(toy, groups, inputs):
    expected = toy(inputs)
    logits = Student(toy, groups)(inputs)
    assert not torch.equal(logits, expected)
    assert float((logits - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_attach_then_detach_is_bit_identical(toy, groups, inputs):
    expected, state = toy(inputs), copy.deepcopy(toy.state_dict())
    student = Student(toy, groups)
    assert list(toy.state_dict()) == list(state)
    set_gates(student, -1.0)
    student(inputs)
    restored = student.detach()
    assert restored is toy
    assert count_hooks(toy) == 0
    assert list(toy.state_dict()) == list(state)
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(toy(inputs), expected)


def test_a_with_block_detaches_even_after_an_error(toy, groups, inputs):
    expected = toy(inputs)
    with pytest.raises(RuntimeError, match="stop"), Student(toy, groups) as student:
        set_gates(student, -50.0)
        raise RuntimeError("stop")
    assert torch.equal(toy(inputs), expected)


def test_foreign_hooks_survive_detach(toy, groups, inputs):
    calls = []
    toy.first.down.register_forward_hook(lambda *_: calls.append(1))
    Student(toy, groups).detach()
    toy(inputs)
    assert calls == [1]


def test_a_deepcopied_student_has_gates_and_hooks_of_its_own(toy, groups, inputs):
    student = Student(toy, groups)
    before = student(inputs)
    clone = copy.deepcopy(student)
    assert torch.equal(clone(inputs), before)
    set_gates(clone, -50.0)
    assert torch.equal(student(inputs), before)
    closed = clone(inputs)
    assert not torch.allclose(closed, before)
    set_gates(student, 50.0)
    assert torch.equal(clone(inputs), closed)


def test_detaching_a_copy_leaves_the_original_gated(toy, groups, inputs):
    student = Student(toy, groups)
    gated = student(inputs)
    clone = copy.deepcopy(student)
    assert count_hooks(clone.detach()) == 0
    assert torch.equal(student(inputs), gated)
    assert torch.equal(clone.model(inputs), student.detach()(inputs))


def test_gradients_of_a_copy_reach_its_own_gates_only(toy, groups, inputs):
    student = Student(toy, groups)
    clone = copy.deepcopy(student)
    clone(inputs).square().mean().backward()
    assert all(gate.theta.grad is not None for gate in clone.gates)
    assert all(gate.theta.grad is None for gate in student.gates)


def test_bf16_autocast(toy, groups, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        expected = toy(inputs)
        student = Student(toy, groups)
        logits = student(inputs)
    assert logits.dtype == expected.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(
        bool(torch.isfinite(gate.theta.grad).all()) and gate.theta.dtype == torch.float32 for gate in student.gates
    )
    set_gates(student, 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(student(inputs), expected)


def test_effective_gates_multiply_by_the_parent_and_own_gates_do_not(toy, groups):
    student = Student(toy, groups)
    with torch.no_grad():
        student.gate_of("first.branch").theta.fill_(0.0)
    effective, own = student.effective_gates(), student.own_gates()
    assert torch.allclose(effective["first.hidden"], 0.5 * own["first.hidden"])
    assert torch.equal(effective["second.branch"], own["second.branch"])
    assert float(student.soft_widths()["first.hidden"]) == pytest.approx(float(own["first.hidden"].sum()))


def test_a_parent_that_is_left_out_counts_as_kept(toy, groups, inputs):
    student = Student(toy, [groups[1]])
    assert torch.equal(student.effective_gates()["first.hidden"], student.own_gates()["first.hidden"])


def test_hard_gates_are_exactly_zero_or_one_and_end_with_the_block(toy, groups):
    student = Student(toy, groups)
    with student.hard_gated(keep_all(groups) | {"first.hidden": (0, 7), "second.branch": ()}):
        assert student.own_gates()["first.hidden"].tolist() == [1.0, 0, 0, 0, 0, 0, 0, 1.0]
        assert student.own_gates()["second.hidden"].tolist() == [0.0] * 8
    assert float(student.own_gates()["second.hidden"].detach().min()) > 0.9


def test_a_gate_of_zero_silences_its_unit(toy, groups, inputs):
    with Student(toy, groups).hard_gated(keep_all(groups) | {"first.branch": (), "second.branch": ()}) as student:
        assert torch.allclose(student(inputs), toy.head(toy.stem(inputs)))


def test_hooks_gate_the_first_of_several_outputs():
    model = nn.Sequential()
    model.add_module("rnn", nn.GRU(3, 4, batch_first=True))
    student = Student(model, [Group("hidden", "channel", 4, (GatePoint("rnn", dim=-1),))])
    x = torch.randn(2, 5, 3)
    full, state = model.rnn.forward(x)
    with student.hard_gated({"hidden": (1,)}):
        output, gated_state = student(x)
    assert torch.equal(output, full * torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(gated_state, state)


def failing_factory(units):
    if units > 1:
        raise RuntimeError("no such gate")
    return SigmoidGate(units)


@pytest.mark.parametrize(
    ("change", "factory", "error", "message"),
    [
        (
            {"gated_at": (GatePoint("first.down", side="inside"),)},
            SigmoidGate,
            ValueError,
            "second.hidden: side 'inside' of first.down is not input or output",
        ),
        ({"gated_at": (GatePoint("third"),)}, SigmoidGate, ValueError, "the model has no module 'third'"),
        ({}, failing_factory, RuntimeError, "no such gate"),
    ],
)
def test_a_half_attached_model_is_impossible(toy, groups, change, factory, error, message):
    groups[-1] = replace(groups[-1], **change)
    with pytest.raises(error, match=message):
        Student(toy, groups, factory)
    assert count_hooks(toy) == 0
