import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from hawada.adapters import GroupFilter, Shape, attach_adapters, group_table, select_groups
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.gates import SigmoidGate
from hawada.core.structure import GatePoint, Group


def names(groups):
    return {group.name for group in groups}


@pytest.fixture
def declared(tiny):
    adapter, model = tiny
    return adapter.groups(model), model


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_attach_then_detach_is_bit_identical(tiny):
    adapter, model = tiny
    inputs = adapter.example_inputs(Shape(2))
    expected, state = model(*inputs), copy.deepcopy(model.state_dict())
    student = attach_adapters(model, adapter_cls=adapter)
    assert not torch.equal(student(*inputs), expected)
    student.detach()
    assert count_hooks(model) == 0
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(model(*inputs), expected)


def test_gates_at_one_reproduce_the_teacher(tiny):
    adapter, model = tiny
    inputs = adapter.example_inputs(Shape(2))
    expected = model(*inputs)
    with attach_adapters(model, adapter_cls=adapter, gate=lambda units: SigmoidGate(units, init=50.0)) as student:
        assert torch.equal(student(*inputs), expected)


def test_an_adapter_class_without_arguments_will_do():
    with torch.device("meta"):
        model = ResNetAdapter().skeleton()
    assert len(attach_adapters(model, adapter_cls=ResNetAdapter).groups) == 16


def test_groups_are_chosen_by_name_and_kind(declared):
    groups, model = declared
    assert names(select_groups(groups, model, None)) == names(groups)
    assert names(select_groups(groups, model, GroupFilter("layer1.*", "channel"))) == {
        "layer1.0.conv1",
        "layer1.1.conv1",
    }
    chosen = select_groups(groups, model, GroupFilter(["layer3.*", "*.1.branch"]))
    assert names(chosen) == {"layer3.0.branch", "layer3.0.conv1", "layer1.1.branch", "layer2.1.branch"}
    assert len(select_groups(groups, model, GroupFilter(kind=["channel", "branch"]))) == len(groups)


def test_groups_are_chosen_by_the_gated_module_or_what_contains_it(declared):
    groups, model = declared
    assert names(select_groups(groups, model, GroupFilter(module_type=BasicBlock))) == names(groups)
    convolutions = select_groups(groups, model, GroupFilter(module_type=nn.Conv2d))
    assert {group.kind for group in convolutions} == {"channel"}  # a branch is gated at its last norm
    inputs_of_the_head = Group("head", "stream", 512, (GatePoint("fc", side="input"),))
    assert select_groups([*groups, inputs_of_the_head], model, GroupFilter(module_type=nn.Linear)) == [
        inputs_of_the_head
    ]


def test_a_function_can_be_the_filter(declared):
    groups, model = declared
    assert names(select_groups(groups, model, lambda group, _: group.units > 256)) == {"layer4.0.conv1"}


def test_a_group_whose_parent_does_not_pass_loses_it(tiny):
    adapter, model = tiny
    inputs = adapter.example_inputs(Shape(2))
    expected = model(*inputs)
    with attach_adapters(model, adapter_cls=adapter, filter_fn=GroupFilter(kind="channel")) as student:
        assert {group.parent for group in student.groups} == {None}
        with student.hard_gated({group.name: range(group.units) for group in student.groups}):
            assert torch.equal(student(*inputs), expected)


def test_a_filter_that_matches_nothing_lists_what_is_there(tiny):
    adapter, model = tiny
    message = (
        r"groups: the filter matches none of layer1\.0\.branch \(branch\), .*; change groups\.name or groups\.kind"
    )
    with pytest.raises(ValueError, match=message):
        attach_adapters(model, adapter_cls=adapter, filter_fn=GroupFilter("layer9.*"))
    assert count_hooks(model) == 0


def test_a_long_list_is_cut_short():
    with torch.device("meta"):
        model = ResNetAdapter("resnet50").skeleton()
    groups = ResNetAdapter("resnet50").groups(model)
    with pytest.raises(ValueError, match=r"and 36 more; change groups\.name"):
        select_groups(groups, model, GroupFilter(kind="head"))


def test_a_model_that_does_not_fit_stays_without_gates():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear is no ResNet of torchvision's"):
        attach_adapters(model, adapter_cls=ResNetAdapter)
    assert count_hooks(model) == 0


def test_the_table_shows_effective_gates(tiny):
    adapter, model = tiny
    student = attach_adapters(model, adapter_cls=adapter)
    with torch.no_grad():
        student.gate_of("layer1.0.branch").theta.fill_(-50.0)
        student.gate_of("layer1.1.conv1").theta[:60] = -50.0
    rows = {row["group"]: row for row in group_table(student)}
    assert len(rows) == len(student.groups)
    assert rows["layer1.0.conv1"]["open"] == 0 and rows["layer1.0.conv1"]["max"] < 1e-6
    assert rows["layer1.1.conv1"]["open"] == 4 and rows["layer1.1.conv1"]["units"] == 64
    assert rows["layer1.1.conv1"]["min"] < rows["layer1.1.conv1"]["mean"] < rows["layer1.1.conv1"]["max"]
    assert rows["layer1.1.conv1"]["parent"] == "layer1.1.branch" and rows["layer1.1.branch"]["parent"] == ""
    assert rows["layer1.1.branch"]["gated_at"] == "layer1.1.bn2"
