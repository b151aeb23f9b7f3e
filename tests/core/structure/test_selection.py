import copy
import random
from dataclasses import replace

import pytest
import torch

from hawada.core.gates import GateHook, Student
from hawada.core.structure import (
    Cut,
    ExportPolicy,
    Group,
    Removal,
    Rounding,
    best_first,
    keep_all,
    keep_element_indices_from_gate,
    keep_from_gates,
    keep_group_indices_from_gate,
    materialize,
    smallest_keep,
    widths_of,
)


def test_widths_are_rounded_to_the_nearest_multiple_or_the_full_width():
    rounding = Rounding(8)
    assert rounding.widths(20) == [8, 16, 20]
    assert [rounding.round(width, 20) for width in (3, 10, 14, 17, 20)] == [8, 8, 16, 16, 20]


def test_ties_round_up_and_a_multiple_above_the_group_allows_the_full_width_only():
    assert Rounding(8).round(12, 20) == 16
    assert Rounding(32).widths(20) == [20]
    assert Rounding().widths(3) == [1, 2, 3]


def test_rounding_refuses_nonsense():
    with pytest.raises(ValueError, match=r"gpu\.multiple: 0 is not a positive whole number"):
        Rounding(0)


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_policy_refuses_a_threshold_outside_0_and_1(threshold):
    with pytest.raises(ValueError, match=r"export\.threshold: .* is not between 0 and 1"):
        ExportPolicy(threshold)


def test_policy_widths_follow_kind_and_minimum(groups):
    branch, hidden = groups[:2]
    policy = ExportPolicy(rounding={"channel": Rounding(3), "head": Rounding(5)}, minimum={"channel": 4})
    assert policy.widths(hidden) == [6, 8]
    assert policy.widths(branch) == [0, 1]
    assert ExportPolicy(minimum={"channel": 99}).widths(hidden) == [8]


def test_the_largest_gates_come_first_and_ties_go_to_the_lower_index():
    assert best_first(torch.tensor([0.1, 0.9, 0.5, 0.9, 0.5])) == [1, 3, 2, 4, 0]


def test_gates_are_read_by_threshold_rounding_and_minimum(groups):
    gate = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.2, 0.5, 0.0, 0.4])
    hidden = groups[1]
    assert keep_group_indices_from_gate(gate, hidden, ExportPolicy()) == (0, 2, 5)
    assert keep_group_indices_from_gate(gate, hidden, ExportPolicy(0.25)) == (0, 2, 3, 5, 7)
    rounded = ExportPolicy(rounding={"channel": Rounding(4)})
    assert keep_group_indices_from_gate(gate, hidden, rounded) == (0, 2, 5, 7)
    assert keep_group_indices_from_gate(torch.zeros(8), hidden, ExportPolicy(minimum={"channel": 2})) == (0, 1)


def test_units_shared_equally_are_read_from_gates_for_each_parent():
    gate = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.0, 0.8, 0.7, 0.6])
    query = Group("query", "query", 8, (), equal_per_parent=4)
    assert keep_group_indices_from_gate(gate, query, ExportPolicy()) == (0, 3, 5, 6)  # four gates: two for each
    assert keep_group_indices_from_gate(gate, query, ExportPolicy(0.65)) == (0, 3, 5, 6)  # three: 1.5 for each
    assert ExportPolicy().widths(query) == [1, 2, 3, 4]


def test_elements_follow_the_kept_units():
    group = Group("heads", "head", 3, ())
    cut = Cut("qkv", 0, per_unit=2, offsets=(0, 6))
    kept = keep_element_indices_from_gate(torch.tensor([0.9, 0.1, 0.9]), group, cut, ExportPolicy())
    assert kept.tolist() == [0, 1, 4, 5, 6, 7, 10, 11]


def test_a_closed_branch_empties_its_channels(groups):
    gates = {group.name: torch.ones(group.units) for group in groups} | {"first.branch": torch.tensor([0.49])}
    keep = keep_from_gates(gates, groups, ExportPolicy())
    assert keep == keep_all(groups) | {"first.branch": (), "first.hidden": ()}


def test_the_smallest_model_has_no_branches_or_the_smallest_widths(groups):
    assert set(smallest_keep(groups, ExportPolicy()).values()) == {()}
    alone = Group("alone", "channel", 8, ())
    assert smallest_keep([alone], ExportPolicy(rounding={"channel": Rounding(3)})) == {"alone": (0, 1, 2)}


def random_units(groups, seed):
    draw = random.Random(seed)
    return {
        group.name: tuple(draw.sample(range(group.units), draw.randint(0 if group.removes else 1, group.units)))
        for group in groups
    }


def test_hard_gated_equals_sliced(toy, groups, inputs):
    student = Student(toy, groups)
    removed = 0
    for seed in range(20):
        keep = random_units(groups, seed)
        removed += not keep["first.branch"]
        with torch.no_grad(), student.hard_gated(keep):
            gated = student(inputs)
        sliced = materialize(student.model, groups, keep)(inputs).detach()
        assert float((gated - sliced).abs().max()) <= 1e-5 * float(gated.abs().max())
    assert 0 < removed < 20


def test_keeping_everything_reproduces_the_teacher(toy, groups, inputs):
    assert torch.equal(materialize(toy, groups, keep_all(groups))(inputs), toy(inputs))


def test_materialize_leaves_no_hooks_no_gates_and_its_input_alone(toy, groups, inputs):
    names, student = list(toy.state_dict()), Student(toy, groups)
    gated, state = student(inputs), copy.deepcopy(toy.state_dict())
    slim = materialize(toy, groups, keep_all(groups) | {"first.hidden": (1, 2), "second.hidden": (0,)})
    hooks = [hook for m in slim.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(isinstance(hook, GateHook) for hook in hooks) and not hooks
    assert list(slim.state_dict()) == names
    assert slim.first.up.out_features == slim.first.norm.num_features == slim.first.down.in_features == 2
    assert [type(module) for module in slim.modules()] == [type(module) for module in toy.modules()]
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.zero_()
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in state.items())
    assert torch.equal(student(inputs), gated)


def test_mode_and_requires_grad_are_kept(toy, groups):
    toy.first.up.weight.requires_grad_(False)
    slim = materialize(toy.train(), groups, keep_all(groups) | {"first.hidden": (3,)})
    assert slim.training and not slim.first.up.weight.requires_grad and slim.first.down.weight.requires_grad


KINDS = ("kv", "query", "ffn")


def of_kind(groups, kind):
    return [group for group in groups if group.kind == kind]


def random_gates(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.units, generator=generator) for group in groups}


def test_the_uniform_layout_ties_groups_of_a_kind_and_leaves_layers_alone(layers):
    together = [[group.name for group in members] for members in ExportPolicy(uniform=True).shared(layers)]
    assert sorted(together) == sorted(
        [[f"layers.{index}"] for index in range(4)]
        + [[f"layers.{index}.{kind}" for index in range(4)] for kind in KINDS]
    )
    assert ExportPolicy().shared(layers) == [(group,) for group in layers]


def test_the_uniform_layout_wants_groups_of_a_kind_to_be_alike(layers):
    layers[-1] = replace(layers[-1], units=10)
    message = (
        r"export\.layout: uniform needs groups of one kind to be alike, and ffn groups have 8, 10 units; "
        r"set export\.layout=heterogeneous"
    )
    with pytest.raises(ValueError, match=message):
        ExportPolicy(uniform=True).shared(layers)
    assert len(ExportPolicy().shared(layers)) == len(layers)


@pytest.mark.parametrize("seed", range(5))
def test_uniform_widths_are_equal_and_the_indices_of_each_layer_its_own(layers, seed):
    gates = random_gates(layers, seed) | {f"layers.{index}": torch.ones(1) for index in range(4)}
    keep = keep_from_gates(gates, layers, ExportPolicy(uniform=True))
    widths = widths_of(keep, layers)
    for kind in KINDS:
        members = of_kind(layers, kind)
        assert len({widths[group.name] for group in members}) == 1
        counts = [float((gates[group.name] >= 0.5).sum()) * group.full_width / group.units for group in members]
        assert abs(widths[members[0].name] - sum(counts) / 4) < 1.0  # each count is rounded, then their mean
    for index in range(4):
        for kind in ("kv", "ffn"):
            name = f"layers.{index}.{kind}"
            assert keep[name] == tuple(sorted(best_first(gates[name])[: widths[name]]))
        name = f"layers.{index}.query"
        heads = gates[name].view(4, 2)
        best = {2 * kv + unit for kv in keep[f"layers.{index}.kv"] for unit in best_first(heads[kv])[: widths[name]]}
        assert set(keep[name]) == best
    assert len({keep[group.name] for group in of_kind(layers, "ffn")}) > 1


def test_a_uniform_width_is_the_mean_of_what_gates_ask_for_rounded_and_at_least_the_minimum(layers):
    gates = {group.name: torch.ones(group.units) for group in layers}
    for group, count in zip(of_kind(layers, "ffn"), (1, 1, 2, 6), strict=True):
        gates[group.name] = (torch.arange(8) < count).float()

    def width(**options):
        widths = widths_of(keep_from_gates(gates, layers, ExportPolicy(uniform=True, **options)), layers)
        (found,) = {widths[group.name] for group in of_kind(layers, "ffn")}
        return found

    assert width() == 3  # 2.5, and ties go up
    assert width(rounding={"ffn": Rounding(4)}) == 4
    assert width(rounding={"ffn": Rounding(2)}) == 2
    assert width(minimum={"ffn": 6}) == 6
    assert width(minimum={"ffn": 7}, rounding={"ffn": Rounding(4)}) == 8


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("gates", "minimum", "staying"),
    [
        ((0.1, 0.4, 0.2, 0.3), 2, {1, 3}),
        ((0.1, 0.9, 0.2, 0.3), 2, {1, 3}),
        ((0.1, 0.9, 0.8, 0.7), 2, {1, 2, 3}),
        ((0.1, 0.4, 0.2, 0.3), 9, {0, 1, 2, 3}),
        ((0.1, 0.4, 0.2, 0.3), 0, set()),
    ],
)
def test_enough_layers_stay_those_with_the_largest_gates(layers, uniform, gates, minimum, staying):
    values = {group.name: torch.ones(group.units) for group in layers}
    values |= {f"layers.{index}": torch.tensor([gate]) for index, gate in enumerate(gates)}
    keep = keep_from_gates(values, layers, ExportPolicy(minimum={"layer": minimum}, uniform=uniform))
    assert {index for index in range(4) if keep[f"layers.{index}"]} == staying
    assert {index for index in range(4) if keep[f"layers.{index}.query"]} == staying


@pytest.mark.parametrize("uniform", [False, True])
def test_the_smallest_model_keeps_the_minimum_of_every_kind(layers, uniform):
    policy = ExportPolicy(minimum={"layer": 2, "kv": 3, "ffn": 3}, rounding={"ffn": Rounding(2)}, uniform=uniform)
    keep = smallest_keep(layers, policy)
    widths = widths_of(keep, layers)
    assert sum(widths[f"layers.{index}"] for index in range(4)) == 2
    for index in range(4):
        stays = widths[f"layers.{index}"]
        assert [widths[f"layers.{index}.{kind}"] for kind in KINDS] == ([3, 1, 4] if stays else [0, 0, 0])
    assert len(keep["layers.0.query"]) in (0, 3)


def branches(layer):
    return [
        Group(layer, "layer", 1, (), removes=(Removal(layer),)),
        Group(f"{layer}.attention", "attention", 1, (), removes=(Removal(f"{layer}.attention"),), parent=layer),
    ]


def test_enough_branches_stay_in_layers_that_stay():
    gates = {"a": 0.1, "a.attention": 0.9, "b": 0.9, "b.attention": 0.2}
    keep = keep_from_gates(
        {name: torch.tensor([gate]) for name, gate in gates.items()},
        [*branches("a"), *branches("b")],
        ExportPolicy(minimum={"layer": 1, "attention": 1}),
    )
    assert keep["b"] and keep["b.attention"]
