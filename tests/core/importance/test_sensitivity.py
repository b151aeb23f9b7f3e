import copy

import pytest
import torch

from hawada.core.distill import Distillation, KDConfig
from hawada.core.finetune import recalibrate_batchnorm
from hawada.core.gates import Student
from hawada.core.importance import OutputDivergence, Sensitivity, measure_sensitivity
from hawada.core.search import Allocation, SensitivityObjective
from hawada.core.structure import ExportPolicy, Rounding, full_widths, keep_all

DISTILLATION = Distillation(KDConfig(temperature=1.0))


def no_measurement(keep):
    raise AssertionError("widths are allocated by the sensitivity of groups, not by measuring whole choices")


@pytest.fixture
def measured(toy, groups, inputs):
    """The second branch adds nothing; units of the first matter the more, the higher their index."""
    with torch.no_grad():
        toy.second.down.weight.zero_()
        toy.second.down.bias.zero_()
        toy.first.down.weight *= torch.linspace(0.0, 4.0, 8)
    recalibrate_batchnorm(toy, [(inputs,)])
    student = Student(copy.deepcopy(toy), groups)
    importance = {group.name: torch.arange(group.units).float() for group in groups}
    before = copy.deepcopy(student.model.state_dict())
    done = []
    policy = ExportPolicy(rounding={"channel": Rounding(2)})
    divergence = OutputDivergence(student, toy, refit_on=[], compare_on=[(inputs,)], distillation=DISTILLATION)
    sensitivity = measure_sensitivity(divergence, groups, policy, importance, on_group=done.append)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.model.state_dict().items())
    assert done == [group.name for group in groups]
    return sensitivity, importance, policy


def test_what_adds_nothing_costs_nothing_and_less_never_costs_less(measured):
    costs = measured[0].costs
    assert costs["second.branch"][0] == pytest.approx(0, abs=1e-5) and costs["first.branch"][0] > 0.05
    assert all(cost == pytest.approx(0, abs=1e-5) for cost in costs["second.hidden"].values())
    first = [costs["first.hidden"][width] for width in sorted(costs["first.hidden"])]
    assert first == sorted(first, reverse=True) and first[-1] == 0 < first[0]


def test_a_refit_makes_pruning_cheaper(toy, groups, inputs, measured):
    student, importance = Student(copy.deepcopy(toy), groups), measured[1]
    divergence = OutputDivergence(student, toy, refit_on=[(inputs,)], compare_on=[(inputs,)], distillation=DISTILLATION)
    refitted = measure_sensitivity(divergence, groups, measured[2], importance)
    assert refitted.costs["first.hidden"][2] < 0.9 * measured[0].costs["first.hidden"][2]


def test_the_divergence_of_a_width_is_interpolated(groups, measured):
    sensitivity, by_name = measured[0], {group.name: group for group in groups}
    branch, hidden = by_name["first.branch"], by_name["first.hidden"]
    costs = sensitivity.costs
    assert sensitivity.divergence(branch, 1) == 0 and sensitivity.divergence(branch, 0) == costs["first.branch"][0]
    assert sensitivity.divergence(hidden, 8) == 0 and sensitivity.divergence(hidden, 2) == costs["first.hidden"][2]
    low, high = sorted((costs["first.hidden"][2], costs["first.hidden"][4]))
    assert low <= sensitivity.divergence(hidden, 3) <= high
    assert set(sensitivity.as_dict()["first.branch"]) == {"0", "1"}


def test_an_allocation_by_sensitivity_removes_what_adds_nothing(groups, linear_proxy, measured):
    sensitivity, importance, policy = measured
    proxy = linear_proxy()
    allocation = Allocation(groups, SensitivityObjective(importance, sensitivity, no_measurement), proxy, policy)
    half = allocation.within(0.56 * float(proxy.predict(full_widths(groups))))  # one branch in full, and the overhead
    assert (half["first.hidden"], half["second.branch"]) == (8, 0)
    assert allocation.value(half) == pytest.approx(0, abs=1e-5)
    without = half | {"first.branch": 0, "first.hidden": 2}  # nothing inside a branch that is gone counts
    assert allocation.value(without) == pytest.approx(-sensitivity.costs["first.branch"][0], abs=1e-5)


def test_groups_that_must_be_alike_share_a_figure(toy, groups, inputs):
    student = Student(copy.deepcopy(toy), groups)
    importance = {group.name: torch.arange(group.units).float() for group in groups}
    policy = ExportPolicy(rounding={"channel": Rounding(4)}, uniform=True)
    divergence = OutputDivergence(student, toy, refit_on=[], compare_on=[(inputs,)], distillation=DISTILLATION)
    costs = measure_sensitivity(divergence, groups, policy, importance).costs
    assert costs["first.hidden"] == costs["second.hidden"] and costs["first.hidden"][4] > 0
    assert costs["first.branch"] != costs["second.branch"]


def test_removing_a_layer_costs_its_own_divergence_and_not_its_branches_too(layers):
    """Removing a layer costs its own divergence, whatever was measured for what is inside it."""
    costs = {group.name: {group.full_width: 0.0} for group in layers}
    costs["layers.0"][0], costs["layers.0.ffn"][2] = 0.25, 0.5
    allocation = Allocation(layers, SensitivityObjective({}, Sensitivity(costs), no_measurement), None, ExportPolicy())
    full = full_widths(layers)
    assert allocation.value(full) == 0
    assert allocation.value(full | {"layers.0": 0}) == -0.25
    assert allocation.value(full | {"layers.0": 0, "layers.0.ffn": 2}) == -0.25
    assert allocation.value(full | {"layers.0.ffn": 2}) == -0.5


def test_what_groups_cost_together_is_shared_out_among_them(toy, groups, inputs):
    """Their figures add up to what was measured with both pruned, so that nothing is counted twice."""
    student = Student(copy.deepcopy(toy), groups)
    importance = {group.name: torch.arange(group.units).float() for group in groups}
    policy = ExportPolicy(rounding={"channel": Rounding(4)}, uniform=True)
    divergence = OutputDivergence(student, toy, refit_on=[], compare_on=[(inputs,)], distillation=DISTILLATION)
    costs = measure_sensitivity(divergence, groups, policy, importance).costs
    together = divergence(keep_all(groups) | {"first.hidden": (4, 5, 6, 7), "second.hidden": (4, 5, 6, 7)})
    assert together > 0
    assert costs["first.hidden"][4] + costs["second.hidden"][4] == pytest.approx(together, rel=1e-12)


def test_a_group_is_never_better_with_fewer_units(toy, groups):
    """Measured divergences waver, and may even fall below the full model's; the cost of a width does not."""
    divergences = {8: 0.0, 6: 0.5, 4: 0.2, 2: 0.7}

    class Wavering:
        student = Student(toy, groups[:2])

        def __call__(self, keep):
            return divergences[len(keep["first.hidden"])] if keep["first.branch"] else -0.1

    importance = {group.name: torch.arange(group.units).float() for group in groups}
    policy = ExportPolicy(rounding={"channel": Rounding(2)})
    costs = measure_sensitivity(Wavering(), groups, policy, importance).costs
    assert costs == {"first.branch": {0: 0.0, 1: 0.0}, "first.hidden": {8: 0.0, 6: 0.5, 4: 0.5, 2: 0.7}}


def test_a_choice_as_a_whole_has_the_value_that_is_measured_for_it(groups, measured):
    objective = SensitivityObjective(measured[1], measured[0], lambda keep: 0.25 * len(keep["first.hidden"]))
    assert objective.total(keep_all(groups)) == -2.0
