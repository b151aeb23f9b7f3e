"""The importances that a user can choose: each ranks the units of a group, and what it is given is not changed."""

import copy

import pytest
import torch

from hawada.core.gates import Student
from hawada.core.importance import CalibrationData, importance_from_gates, rank_units
from hawada.core.importance.fisher import FisherImportance
from hawada.core.importance.gates import Gates
from hawada.core.importance.magnitude import Magnitude
from hawada.core.importance.obs import ObsImportance


@pytest.fixture
def student(toy, groups):
    student = Student(copy.deepcopy(toy), groups).eval()
    with torch.no_grad():
        for seed, gate in enumerate(student.gates):
            gate.theta.copy_(torch.randn(gate.theta.shape, generator=torch.Generator().manual_seed(seed)))
    return student


def ranked(importance, student, toy, groups, inputs):
    return rank_units(importance, student, toy, groups=groups, calibration=CalibrationData([(inputs,)]))


def test_gates_are_the_effective_ones_each_by_the_size_of_its_group(student, toy, groups, inputs):
    found = ranked(Gates(), student, toy, groups, inputs)
    expected = importance_from_gates(student.effective_gates())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_magnitude_is_the_norm_of_all_weights_that_go_with_a_unit(student, toy, groups, inputs):
    found = ranked(Magnitude(), student, toy, groups, inputs)
    assert set(found) == {"first.hidden", "second.hidden"}  # a branch has no axis to cut
    block = toy.first
    squares = block.up.weight.square().sum(1) + block.up.bias.square() + block.down.weight.square().sum(0)
    squares = squares + block.norm.weight.square() + block.norm.bias.square()
    assert torch.allclose(found["first.hidden"].float(), squares.sqrt())


def test_obs_ranks_the_groups_that_one_layer_reads(student, toy, groups, inputs):
    found = ranked(ObsImportance(), student, toy, groups, inputs)
    assert set(found) == {"first.hidden", "second.hidden"}
    assert sorted(found["first.hidden"].tolist()) == list(range(1, 9))


def test_a_unit_that_nothing_depends_on_has_no_fisher_information(student, toy, groups, inputs):
    with torch.no_grad():
        toy.second.down.weight[:, 4] = 0  # three units pass the ReLU, this one among them
    student = Student(copy.deepcopy(toy), groups).eval()
    found = ranked(FisherImportance(), student, toy, groups, inputs)
    assert set(found) == {group.name for group in groups}
    assert found["second.hidden"][4] == 0 and int((found["second.hidden"] > 0).sum()) == 2


@pytest.mark.parametrize("importance", [Gates(), Magnitude(), ObsImportance(), FisherImportance()])
def test_ranking_changes_neither_model(importance, student, toy, groups, inputs):
    before = {name: tensor.clone() for name, tensor in [*toy.state_dict().items(), *student.state_dict().items()]}
    ranked(importance, student, toy, groups, inputs)
    after = dict([*toy.state_dict().items(), *student.state_dict().items()])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(gate.hard is None for gate in student.gates)


@pytest.mark.parametrize("scores", [torch.ones(3), torch.full((8,), torch.nan)])
def test_scores_that_are_not_one_finite_number_a_unit_are_refused(scores, student, toy, groups, inputs):
    class Mine:
        def rank(self, student, model, *, groups, calibration):
            return {"first.hidden": scores}

    with pytest.raises(
        ValueError, match=r"^export\.importance: Mine gives first\.hidden scores of shape .* for 8 units"
    ):
        ranked(Mine(), student, toy, groups, inputs)
