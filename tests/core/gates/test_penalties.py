import pytest
import torch

from hawada.core.gates import L1, FloorCeiling, Polarization, StructuredConsistency, combined_penalty
from hawada.core.structure import Group


@pytest.fixture
def family():
    return [
        Group("branch", "branch", 1, ()),
        Group("conv1", "channel", 2, (), parent="branch"),
        Group("conv2", "channel", 2, (), parent="branch"),
        Group("alone", "ffn", 4, ()),
    ]


GATES = {
    "branch": torch.tensor([0.8]),
    "conv1": torch.tensor([0.2, 0.6]),  # mean 0.4
    "conv2": torch.tensor([0.4, 0.8]),  # mean 0.6
    "alone": torch.tensor([0.0, 0.0, 0.0, 0.4]),  # mean 0.1
}


def test_l1_is_the_mean_over_all_units(family):
    assert float(L1(2.0)(GATES, family)) == pytest.approx(2 * 3.2 / 9)


def test_structured_consistency_is_the_variance_of_the_means_within_a_structure(family):
    # 0.8, 0.4 and 0.6 have mean 0.6 and variance 0.08 / 3; `alone` belongs to no structure
    assert float(StructuredConsistency(3.0)(GATES, family)) == pytest.approx(0.08)


def test_structured_consistency_is_averaged_over_structures(family):
    second = [Group("other", "branch", 1, ()), Group("inner", "channel", 1, (), parent="other")]
    gates = GATES | {"other": torch.tensor([0.5]), "inner": torch.tensor([0.5])}
    assert float(StructuredConsistency(3.0)(gates, [*family, *second])) == pytest.approx(0.04)


def test_structured_consistency_without_structures_is_zero(family):
    assert float(StructuredConsistency(3.0)({"alone": GATES["alone"]}, family[3:])) == 0.0


def test_floor_and_ceiling_punish_the_squared_excess(family):
    # means 0.8, 0.4, 0.6, 0.1 against [0.3, 0.7]: excess 0.1, 0, 0, 0.2
    assert float(FloorCeiling(0.3, 0.7, weight=4.0)(GATES, family)) == pytest.approx(0.05)
    assert float(FloorCeiling(0.0, 1.0)(GATES, family)) == 0.0


@pytest.mark.parametrize(("floor", "ceiling"), [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_crossed_floor_and_ceiling_are_refused(floor, ceiling):
    with pytest.raises(
        ValueError, match=r"penalties: floor .* and ceiling .* must satisfy 0 <= floor <= ceiling <= 1; change"
    ):
        FloorCeiling(floor, ceiling)


def test_polarization_is_least_where_gates_are_0_or_1(family):
    # mean |g| is 3.2 / 9; the distances to it are added up below
    values = torch.cat(list(GATES.values()))
    expected = 2.0 * (0.5 * 3.2 / 9 - sum(abs(float(g) - 3.2 / 9) for g in values) / 9)
    assert float(Polarization(2.0, pull=0.5)(GATES, family)) == pytest.approx(expected)
    undecided, decided = {"g": torch.full((4,), 0.5)}, {"g": torch.tensor([0.0, 0.0, 1.0, 1.0])}
    assert float(Polarization(1.0)(decided, [])) == 0.0 < float(Polarization(1.0)(undecided, [])) == 0.5


def test_combined_is_the_sum_and_zero_without_penalties(family):
    assert float(combined_penalty(GATES, family, [])) == 0.0
    total = combined_penalty(GATES, family, [L1(2.0), StructuredConsistency(3.0), FloorCeiling(0.3, 0.7, 4.0)])
    assert float(total) == pytest.approx(2 * 3.2 / 9 + 0.08 + 0.05)


def test_penalties_are_differentiable_in_every_gate(family):
    gates = {name: gate.clone().requires_grad_() for name, gate in GATES.items()}
    combined_penalty(gates, family, [L1(1.0), StructuredConsistency(1.0), FloorCeiling(0.3, 0.7)]).backward()
    assert all(bool((gate.grad != 0).all()) for gate in gates.values())
