import copy

import pytest
import torch
from torch import nn

from hawada.core.gates import Student
from hawada.core.structure import Cut, GatePoint, Group, Removal, keep_all, materialize, plan_edits


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
    block = materialize(model, [group], {"branch": ()}, "block")
    assert list(dict(block.named_children())) == ["a", "c"] and torch.equal(block(inputs), slim(inputs))
    assert torch.equal(materialize(model, [group], {"branch": ()}, "block.a")(inputs), model.block.a(inputs))
    assert isinstance(materialize(model, [group], {"branch": ()}, "block.b"), nn.Identity)
    assert set(slim.state_dict()) == {"block.a.weight", "block.a.bias"}


def test_what_lies_inside_a_removed_module_goes_with_it(inputs):
    model = nn.Sequential()
    model.add_module("layer", nn.Sequential())
    model.layer.add_module("branch", nn.Linear(6, 6))
    removals = {name: (Removal(path),) for name, path in (("layer", "layer"), ("branch", "layer.branch"))}
    layer = Group("layer", "layer", 1, (), removes=removals["layer"])
    branch = Group("branch", "branch", 1, (), removes=removals["branch"], parent="layer")
    for groups in ([layer, branch], [branch, layer]):
        for keep in ({"layer": (), "branch": ()}, {"layer": (), "branch": (0,)}):
            assert plan_edits(model, groups, keep).replaced == {"layer": ()}
            assert torch.equal(materialize(model, groups, keep)(inputs), inputs)
            assert torch.equal(materialize(model, groups, keep, prefix="layer.branch")(inputs), inputs)


def test_a_convolution_with_groups_loses_a_channel_of_each():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2))
    cuts = (
        Cut("0.weight", 0, offsets=(0, 4), follows="out_channels"),
        Cut("0.bias", 0, offsets=(0, 4)),
        Cut("1.weight", 1, follows="in_channels", times=2),
    )
    group = Group("inner", "grouped", 4, (GatePoint("1", "input", offsets=(0, 4)),), cuts)
    slim, x = materialize(model, [group], {"inner": (1, 3)}), torch.randn(2, 3, 5, 5)
    assert (slim[0].out_channels, slim[1].in_channels, slim[1].weight.shape[1]) == (4, 4, 2)
    with torch.no_grad(), Student(model, [group]).hard_gated({"inner": (1, 3)}) as student:
        assert torch.allclose(student(x), slim(x), atol=1e-6)


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
