import math

import pytest
import torch

from hawada.core.gates import HardConcreteGate, SigmoidGate, Student, parameter_groups, project_gates_into_constraints
from hawada.core.gates.gates import multiply_along


def test_each_unit_scales_its_own_elements():
    gate = torch.tensor([1.0, 0.5, 0.0])
    x = torch.randn(2, 3, 4)
    assert torch.equal(multiply_along(x, gate, 1), x * gate.view(1, 3, 1))
    heads = torch.randn(2, 4, 6)  # three heads of two elements on the last axis
    expected = heads.view(2, 4, 3, 2) * gate.view(3, 1)
    assert torch.equal(multiply_along(heads, gate, -1, per_unit=2), expected.reshape(2, 4, 6))


def test_one_unit_scales_everything():
    x = torch.randn(2, 3)
    assert torch.equal(multiply_along(x, torch.tensor([0.25]), 1), x * 0.25)


def test_an_axis_that_holds_other_units_is_refused():
    with pytest.raises(ValueError, match=r"axis 1 of an activation of shape \(2, 5\) does not hold 6 elements"):
        multiply_along(torch.zeros(2, 5), torch.ones(3), 1, per_unit=2)


def test_the_product_has_the_dtype_of_the_activation():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    assert multiply_along(x, torch.ones(3), 1).dtype == torch.bfloat16


def test_a_gate_multiplies_by_its_value():
    x = torch.randn(2, 3, 4)
    assert torch.allclose(SigmoidGate((3, 1))(x), x * torch.sigmoid(torch.tensor(4.0)))


def test_temperature_sharpens_the_sigmoid():
    gate = SigmoidGate(2, init=1.0, temperature=0.5)
    assert torch.allclose(gate.gate, torch.full((2,), 1 / (1 + math.exp(-2.0))))


def test_a_temperature_comes_down_by_the_same_factor_in_equal_parts_of_training():
    gate = SigmoidGate(1, init=1.0, temperature=0.25, start_temperature=4.0)
    assert torch.allclose(gate.gate, torch.sigmoid(torch.tensor([4.0])))  # before training it is as at the end
    found = []
    for progress in (0.0, 0.5, 1.0):
        gate.anneal(progress)
        found.append(gate.temperature)
    assert found == pytest.approx([4.0, 1.0, 0.25])
    plain = SigmoidGate(1, temperature=0.5)
    plain.anneal(0.0)
    assert plain.temperature == 0.5


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"gate\.temperature: .* is not above 0; 1\.0 is the plain sigmoid"):
        SigmoidGate(2, temperature=temperature)
    with pytest.raises(ValueError, match=r"gate\.start_temperature: .* is not above 0"):
        SigmoidGate(2, start_temperature=temperature)


def test_gate_values_are_float32_even_under_autocast():
    gate = SigmoidGate(3).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert gate.gate.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("minimum", "maximum"), [(12.0, math.inf), (0.0, 3.0), (6.0, 6.5), (16.0, 99.0), (0.0, 0.0)])
def test_projection_keeps_order_and_bounds(temperature, minimum, maximum):
    gate = SigmoidGate(16, temperature=temperature)
    with torch.no_grad():
        gate.theta.normal_(std=3.0, generator=torch.Generator().manual_seed(0))
    order = gate.theta.argsort().tolist()
    project_gates_into_constraints([gate], minimum=minimum, maximum=maximum)
    kept = float(gate.gate.detach().sum())
    assert min(minimum, 16 - 0.01) - 1e-3 <= kept <= max(maximum, 0.01) + 1e-3
    assert gate.theta.argsort().tolist() == order
    assert bool(torch.isfinite(gate.theta).all())


def test_projection_leaves_gates_within_the_bounds_alone():
    gates = [SigmoidGate(4, init=0.0), SigmoidGate(4, init=5.0)]
    project_gates_into_constraints(gates, minimum=1.0, maximum=3.0)
    assert torch.equal(gates[0].theta, torch.zeros(4))
    assert float(gates[1].gate.detach().sum()) == pytest.approx(3.0, abs=1e-4)


def test_projection_refuses_crossed_bounds():
    with pytest.raises(ValueError, match=r"minimum 3 kept units exceeds maximum 2; choose a minimum up to"):
        project_gates_into_constraints([SigmoidGate(4)], minimum=3, maximum=2)


def test_parameter_groups_take_every_parameter_once(toy, groups):
    student = Student(toy, groups)
    found = parameter_groups(student)
    assert {id(theta) for theta in found["gates"]} == {id(gate.theta) for gate in student.gates}
    assert all(parameter.dim() > 1 for parameter in found["weights"])
    assert {id(p) for p in found["weights"]} >= {id(toy.stem.weight), id(toy.first.up.weight)}
    assert {id(p) for p in found["norms_and_biases"]} >= {id(toy.stem.bias), id(toy.first.norm.weight)}
    everything = [id(parameter) for parameters in found.values() for parameter in parameters]
    assert sorted(everything) == sorted(id(parameter) for parameter in student.parameters())


def test_a_theta_with_two_axes_is_still_a_gate():
    gate = SigmoidGate((2, 3))
    assert parameter_groups(gate) == {"gates": [gate.theta], "weights": [], "norms_and_biases": []}


def test_units_that_share_an_axis_with_others_are_multiplied_where_they_lie():
    x = torch.ones(2, 8, 3)
    gated = multiply_along(x, torch.tensor([0.5, 2.0]), dim=1, offsets=(1, 5))
    assert gated[0, :, 0].tolist() == [1.0, 0.5, 2.0, 1.0, 1.0, 0.5, 2.0, 1.0]
    alone = multiply_along(x, torch.tensor([0.5]), dim=1, per_unit=2, offsets=(6,))
    assert alone[1, :, 2].tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"axis 1 of an activation of shape \(2, 8, 3\) does not hold 9 elements"):
        multiply_along(x, torch.tensor([0.5, 2.0]), dim=1, offsets=(7,))


def test_a_hard_concrete_gate_is_the_probability_that_its_draws_are_not_zero():
    torch.manual_seed(0)
    gate = HardConcreteGate(5)
    with torch.no_grad():
        gate.theta.copy_(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]))
    draws = []
    for _ in range(20_000):
        gate.redraw()
        draws.append(gate.factor.detach())
    drawn = torch.stack(draws)
    torch.testing.assert_close((drawn > 0).float().mean(0), gate.gate.detach(), atol=0.012, rtol=0)
    assert (drawn == 0).any(0).all() and (drawn == 1).any(0).all()  # draws reach both ends
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1


def test_a_hard_concrete_gate_draws_only_in_training_and_once_for_a_forward_pass():
    gate = HardConcreteGate(64)
    gate.redraw()
    assert torch.equal(gate.factor, gate.factor) and len(gate.factor.unique()) > 1
    gate.eval()
    gate.redraw()
    assert len(gate.factor.unique()) == 1
    gate.hard = torch.zeros(64)
    assert not gate.factor.any() and not gate.gate.any()


def test_a_hard_concrete_gate_learns_from_its_draws(toy, groups, inputs):
    torch.manual_seed(0)
    student = Student(toy, groups, lambda units: HardConcreteGate(units, init=0.0))
    student.model.eval()
    draws = [student(inputs) for _ in range(20)]
    assert not torch.equal(draws[0], draws[1])
    torch.stack(draws).square().mean().backward()
    assert all(gate.theta.grad is not None and bool(gate.theta.grad.any()) for gate in student.gates)


def test_a_hard_concrete_gate_can_be_projected():
    gate = HardConcreteGate(10, init=-2.0)
    project_gates_into_constraints([gate], minimum=6.0)
    assert float(gate.gate.detach().sum()) == pytest.approx(6.0, abs=1e-3)


def test_a_draw_must_reach_both_ends():
    with pytest.raises(ValueError, match=r"low 0\.1 must be below 0 and high 1\.1 above 1"):
        HardConcreteGate(3, low=0.1)
