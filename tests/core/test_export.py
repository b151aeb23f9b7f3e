import copy
import random

import pytest
import torch
from torch import nn

from hawada.core.export import (
    ExportPolicy,
    Rounding,
    keep_element_indices_from_gate,
    keep_from_gates,
    keep_group_indices_from_gate,
    materialize,
    plan_edits,
    smallest_keep,
    top_units,
)
from hawada.core.structure import Cut, GatePoint, Group, Removal, keep_all
from hawada.core.student import GateHook, Student


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("nearest", [8, 8, 16, 16, 20]), ("up", [8, 16, 16, 20, 20]), ("down", [8, 8, 8, 16, 20])],
)
def test_rounding_modes(mode, expected):
    rounding = Rounding(8, mode)
    assert rounding.widths(20) == [8, 16, 20]
    assert [rounding.round(width, 20) for width in (3, 10, 14, 17, 20)] == expected


def test_ties_round_up_and_a_multiple_above_the_group_allows_the_full_width_only():
    assert Rounding(8).round(12, 20) == 16
    assert Rounding(32).widths(20) == [20]
    assert Rounding().widths(3) == [1, 2, 3]


def test_rounding_refuses_nonsense():
    with pytest.raises(ValueError, match=r"gpu\.multiple: 0 is not a positive whole number"):
        Rounding(0)
    with pytest.raises(ValueError, match="rounding mode 'sideways' is not nearest, up or down"):
        Rounding(8, "sideways")


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_policy_refuses_a_threshold_outside_0_and_1(threshold):
    with pytest.raises(ValueError, match=r"export\.threshold: .* is not between 0 and 1"):
        ExportPolicy(threshold)


def test_policy_widths_follow_kind_and_minimum(groups):
    branch, hidden = groups[:2]
    policy = ExportPolicy(rounding={"channel": Rounding(3), "head": Rounding(5)}, minimum=4)
    assert policy.widths(hidden) == [6, 8]
    assert policy.widths(branch) == [0, 1]
    assert ExportPolicy(minimum=99).widths(hidden) == [8]


def test_the_largest_gates_are_kept_sorted_and_ties_go_to_the_lower_index():
    assert top_units(torch.tensor([0.1, 0.9, 0.5, 0.9, 0.5]), 3) == (1, 2, 3)


def test_gates_are_read_by_threshold_rounding_and_minimum(groups):
    gate = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.2, 0.5, 0.0, 0.4])
    hidden = groups[1]
    assert keep_group_indices_from_gate(gate, hidden, ExportPolicy()) == (0, 2, 5)
    assert keep_group_indices_from_gate(gate, hidden, ExportPolicy(0.25)) == (0, 2, 3, 5, 7)
    rounded = ExportPolicy(rounding={"channel": Rounding(4)})
    assert keep_group_indices_from_gate(gate, hidden, rounded) == (0, 2, 5, 7)
    assert keep_group_indices_from_gate(torch.zeros(8), hidden, ExportPolicy(minimum=2)) == (0, 1)


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


def test_a_prefix_gives_one_submodule_sliced(toy, groups):
    keep = keep_all(groups) | {"first.hidden": (1, 4)}
    x = torch.randn(3, 5)
    part = materialize(toy, groups, keep, prefix="first")
    assert torch.equal(part(x), materialize(toy, groups, keep).first(x))
    untouched = materialize(toy, groups, keep, prefix="second")
    assert torch.equal(untouched(x), toy.second(x))
    gone = materialize(toy, groups, keep | {"first.branch": ()}, prefix="first")
    assert torch.equal(gone(x), x)


def test_a_removed_module_leaves_the_named_children_in_a_row(inputs):
    model = nn.Sequential()
    model.add_module("block", nn.Sequential())
    for name, module in (("a", nn.Linear(6, 6)), ("b", nn.Linear(6, 6)), ("c", nn.Tanh())):
        model.block.add_module(name, module)
    group = Group("branch", "branch", 1, (), removes=(Removal("block", ("a", "c")),))
    slim = materialize(model, [group], {"branch": ()})
    assert torch.equal(slim(inputs), torch.tanh(model.block.a(inputs)))
    assert set(slim.state_dict()) == {"block.a.weight", "block.a.bias"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("declared", [("embedding", "head"), ("embedding",), ("head",)])
def test_tied_tensors_are_cut_once_and_stay_tied(declared):
    follows = {"embedding": "embedding_dim", "head": "in_features"}
    cuts = tuple(Cut(f"{name}.weight", 1, follows=follows[name]) for name in declared)
    group = Group("stream", "stream", 6, (GatePoint("embedding", dim=-1),), cuts=cuts)
    student = Student(Tied(), [group])
    keep, tokens = {"stream": (0, 2, 5)}, torch.arange(10)
    slim = materialize(student.model, [group], keep)
    assert slim.head.weight is slim.embedding.weight
    assert slim.head.weight.shape == (10, 3)
    assert all(getattr(getattr(slim, name), follows[name]) == 3 for name in declared)
    with student.hard_gated(keep):
        assert torch.allclose(slim(tokens), student(tokens), atol=1e-6)


class Attention(nn.Module):
    """Heads of two elements; q, k and v in one projection, behind one element that belongs to no head."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 1 + 3 * 4 * 2)
        self.out = nn.Linear(8, 6)

    def forward(self, x):
        extra, fused = self.qkv(x).split([1, self.qkv.out_features - 1], dim=-1)
        q, k, v = fused.unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)  # (N, T, 3, H, 2) -> 3 x (N, H, T, 2)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2)) + extra


def test_heads_of_a_fused_projection_are_cut_in_every_run():
    torch.manual_seed(0)
    fused = {"per_unit": 2, "offsets": (1, 9, 17)}
    cuts = (
        Cut("qkv.weight", 0, **fused, follows="out_features"),
        Cut("qkv.bias", 0, **fused),
        Cut("out.weight", 1, per_unit=2, follows="in_features"),
    )
    group = Group("heads", "head", 4, (GatePoint("out", side="input", dim=-1, per_unit=2),), cuts=cuts)
    student, x = Student(Attention(), [group]), torch.randn(2, 5, 6)
    for kept in [(0,), (3,), (1, 2), (0, 2, 3)]:
        slim = materialize(student.model, [group], {"heads": kept})
        assert (slim.qkv.out_features, slim.out.in_features) == (1 + 6 * len(kept), 2 * len(kept))
        with student.hard_gated({"heads": kept}):
            assert torch.allclose(slim(x), student(x), atol=1e-6)


def test_two_groups_may_cut_the_two_axes_of_one_tensor():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3)), torch.randn(2, 4)
    groups = [
        Group(
            f"width{i}",
            "channel",
            5 + i,
            (GatePoint(f"{i}", dim=-1),),
            cuts=(Cut(f"{i}.weight", 0), Cut(f"{i}.bias", 0), Cut(f"{i + 1}.weight", 1)),
        )
        for i in (0, 1)
    ]
    keep = {"width0": (1, 4), "width1": (0, 2, 5)}
    slim = materialize(model, groups, keep)
    assert [tuple(layer.weight.shape) for layer in slim] == [(2, 4), (3, 2), (3, 3)]
    with Student(model, groups).hard_gated(keep) as student:
        assert torch.allclose(slim(x), student(x), atol=1e-6)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 8), r"first\.hidden: kept indices must be distinct and within 0\.\.7"),
        ((-1, 0), r"first\.hidden: kept indices must be distinct and within 0\.\.7"),
        ((2, 2), r"first\.hidden: kept indices must be distinct and within 0\.\.7"),
        ((), r"first\.hidden: all 8 units would go; keep at least one"),
    ],
)
def test_an_impossible_choice_is_refused_and_nothing_changes(toy, groups, kept, message):
    state = copy.deepcopy(toy.state_dict())
    keep = keep_all(groups) | {"first.hidden": kept, "second.hidden": (0,)}
    for function in (plan_edits, materialize):
        with pytest.raises(ValueError, match=message):
            function(toy, groups, keep)
    assert all(torch.equal(toy.state_dict()[name], tensor) for name, tensor in state.items())
    assert toy.second.up.out_features == 8


def test_groups_that_do_not_fit_are_refused(toy, groups):
    with pytest.raises(ValueError, match=r"first\.branch: the model has no module 'first\.down'"):
        materialize(nn.Linear(1, 1), groups, keep_all(groups))
