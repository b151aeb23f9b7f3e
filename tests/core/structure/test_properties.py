"""Properties of groups, cuts and kept indices that hold for any network and any choice of units."""

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

from hawada.core.gates import Student
from hawada.core.structure import (
    Cut,
    GatePoint,
    Group,
    Keep,
    Removal,
    check_groups,
    full_widths,
    keep_all,
    keep_first,
    materialize,
    plan_edits,
    sliced_tensors,
    widths_of,
    without_orphans,
)

# Derandomised, so that a test that passes once passes always; a busy machine must not fail it either.
EXAMPLES = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


@dataclass(frozen=True)
class Network:
    """A small network, what may be removed from it, and something to call it with."""

    model: nn.Module
    groups: list[Group]
    inputs: Tensor


class Residual(nn.Module):
    """A branch of two layers beside the identity."""

    def __init__(self, up: nn.Module, norm: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = up, norm, down

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


def layer_of(convolution: bool, inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1) if convolution else nn.Linear(inputs, outputs)


def norm_of(convolution: bool, units: int) -> nn.Module:
    norm = (nn.BatchNorm2d if convolution else nn.BatchNorm1d)(units)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def cuts_between(first: str, norm: str, second: str, per_unit: int, convolution: bool) -> tuple[Cut, ...]:
    """The axes that units between two layers lie on, `per_unit` features each, with a norm behind the first layer."""
    out, into = ("out_channels", "in_channels") if convolution else ("out_features", "in_features")
    return (
        Cut(f"{first}.weight", 0, per_unit, follows=out),
        Cut(f"{first}.bias", 0, per_unit),
        *(Cut(f"{norm}.{name}", 0, per_unit) for name in ("weight", "bias", "running_mean")),
        Cut(f"{norm}.running_var", 0, per_unit, follows="num_features"),
        Cut(f"{second}.weight", 1, per_unit, follows=into),
    )


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A row of layers of fully connected neurons or of convolutions; each may hold a residual branch with inner units.

    Between two layers lie units of one or more features, and sometimes each of them holds equally many
    smaller units, as a KV head holds query heads.
    """
    convolution = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    model, groups, features = nn.Sequential(), [], 3
    for index in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            path, hidden = f"branch{index}", draw(st.integers(1, 6))
            up, down = layer_of(convolution, features, hidden), layer_of(convolution, hidden, features)
            model.add_module(path, Residual(up, norm_of(convolution, hidden), down))
            groups.append(Group(path, "branch", 1, (GatePoint(f"{path}.down"),), removes=(Removal(path),)))
            cuts = cuts_between(f"{path}.up", f"{path}.norm", f"{path}.down", 1, convolution)
            point = GatePoint(f"{path}.down", "input")
            groups.append(Group(f"{path}.inner", "channel", hidden, (point,), cuts, parent=path))
        units, share, size = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
        first, norm, second = f"first{index}", f"norm{index}", f"second{index}"
        wide, after = units * share * size, draw(st.integers(2, 4))
        model.add_module(first, layer_of(convolution, features, wide))
        model.add_module(norm, norm_of(convolution, wide))
        model.add_module(f"relu{index}", nn.ReLU())
        model.add_module(second, layer_of(convolution, wide, after))
        for name, count, each in ((f"outer{index}", units, share * size), (f"inner{index}", units * share, size)):
            cuts = cuts_between(first, norm, second, each, convolution)
            point = GatePoint(second, "input", per_unit=each)
            holder = None if name.startswith("outer") else f"outer{index}"
            equal = None if holder is None else share
            groups.append(Group(name, "unit", count, (point,), cuts, parent=holder, equal_per_parent=equal))
        features = after
    inputs = torch.randn(2, 3, 5, 5) if convolution else torch.randn(4, 3)
    return Network(model.eval(), draw(st.permutations(groups)), inputs)


@st.composite
def kept_in(draw: st.DrawFn, groups: list[Group]) -> Keep:
    """Random units of random widths that may be exported: branches may go, other groups keep at least one unit."""
    widths = {group.name: draw(st.integers(0 if group.removes else 1, group.full_width)) for group in groups}
    order = {group.name: draw(st.permutations(range(group.units))) for group in groups}
    return keep_first(groups, widths, order)


@st.composite
def declarations(draw: st.DrawFn) -> list[Group]:
    """Groups inside groups, up to four deep, without a model; some hold equally many units for each of the parent's."""
    groups: list[Group] = []
    for index in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from([None, *groups]))
        share = draw(st.integers(1, 3))
        units = share * (1 if parent is None else parent.units)
        if units > 40:
            continue
        equal = share if parent is not None and draw(st.booleans()) else None
        name = None if parent is None else parent.name
        groups.append(Group(f"group{index}", "unit", units, (), parent=name, equal_per_parent=equal))
    return draw(st.permutations(groups))


@st.composite
def any_units(draw: st.DrawFn, groups: list[Group]) -> dict[str, list[int]]:
    """Any units of each group in any order, their parents' notwithstanding."""
    units = {group.name: st.sampled_from(range(group.units)) for group in groups}
    return {name: draw(st.lists(choice, unique=True)) for name, choice in units.items()}


# Networks


@EXAMPLES
@given(st.data())
def test_what_is_sliced_computes_what_is_hard_gated(data):
    network = data.draw(networks())
    check_groups(network.groups, network.model)
    keep = data.draw(kept_in(network.groups))
    with torch.no_grad(), Student(network.model, network.groups).hard_gated(keep) as student:
        gated = student(network.inputs)
        sliced = materialize(student.model, network.groups, keep)(network.inputs)
    assert torch.allclose(sliced, gated, rtol=1e-5, atol=1e-5 * float(gated.abs().max().clamp(min=1.0)))


@EXAMPLES
@given(networks())
def test_keeping_all_is_the_model_itself(network):
    keep = keep_all(network.groups)
    edits = plan_edits(network.model, network.groups, keep)
    assert (edits.removed, edits.attributes, edits.replaced) == ({}, {}, {})
    slim = materialize(network.model, network.groups, keep)
    state, copied = network.model.state_dict(), slim.state_dict()
    assert repr(slim) == repr(network.model) and list(copied) == list(state)
    assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())
    assert not {tensor.data_ptr() for tensor in copied.values()} & {tensor.data_ptr() for tensor in state.values()}
    assert torch.equal(slim(network.inputs), network.model(network.inputs))


@EXAMPLES
@given(st.data())
def test_a_module_sliced_alone_is_the_one_of_the_slim_model(data):
    network = data.draw(networks())
    keep = data.draw(kept_in(network.groups))
    slim = materialize(network.model, network.groups, keep)
    path = data.draw(st.sampled_from([name for name, _ in network.model.named_children()]))
    alone = materialize(network.model, network.groups, keep, path)
    whole = slim.get_submodule(path)
    assert repr(alone) == repr(whole) and list(alone.state_dict()) == list(whole.state_dict())
    assert all(torch.equal(alone.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


@EXAMPLES
@given(st.data())
def test_planned_shapes_are_those_of_the_slices_and_of_the_slim_model(data):
    network = data.draw(networks())
    keep = data.draw(kept_in(network.groups))
    edits = plan_edits(network.model, network.groups, keep)
    sliced = sliced_tensors(network.model, edits)
    state, slim = network.model.state_dict(), materialize(network.model, network.groups, keep).state_dict()
    assert {name: edits.shape(name, state[name]) for name in sliced} == {
        name: tuple(tensor.shape) for name, tensor in sliced.items()
    }
    assert {name: tuple(tensor.shape) for name, tensor in slim.items()} == {
        name: tuple(tensor.shape) for name, tensor in sliced.items()
    }
    assert set(state) - set(slim) == {name for name in state if edits.removes(name)}


@EXAMPLES
@given(st.data())
def test_slicing_twice_is_slicing_once(data):
    """What is left of what is left: the second declaration is read off the first slim model's widths."""
    network = data.draw(networks())
    groups = [group for group in network.groups if group.name.startswith("inner") or group.name.endswith(".inner")]
    groups = [Group(group.name, group.kind, group.units, group.gated_at, group.cuts) for group in groups]
    first = {group.name: data.draw(st.sets(st.integers(0, group.units - 1), min_size=1)) for group in groups}
    once = {name: tuple(sorted(units)) for name, units in first.items()}
    fewer = [Group(group.name, group.kind, len(once[group.name]), group.gated_at, group.cuts) for group in groups]
    second = {group.name: data.draw(st.sets(st.integers(0, group.units - 1), min_size=1)) for group in fewer}
    twice = materialize(materialize(network.model, groups, once), fewer, {n: tuple(u) for n, u in second.items()})
    both = {name: tuple(once[name][unit] for unit in sorted(second[name])) for name in once}
    direct = materialize(network.model, groups, both)
    assert repr(twice) == repr(direct)
    assert all(torch.equal(twice.state_dict()[name], tensor) for name, tensor in direct.state_dict().items())


# Cuts


@EXAMPLES
@given(
    units=st.integers(1, 8),
    per_unit=st.integers(1, 4),
    gaps=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_units_share_out_the_elements_of_their_runs(units, per_unit, gaps, data):
    """Every element of a run belongs to one unit, no other element to any, and a unit has equally many in each run."""
    run = units * per_unit
    offsets = tuple(sum(gaps[: index + 1]) + index * run for index in range(len(gaps)))
    cut = Cut("weight", 0, per_unit, data.draw(st.permutations(offsets)))
    owned = [cut.elements([unit]).tolist() for unit in range(units)]
    assert all(elements == sorted(set(elements)) and len(elements) == per_unit * len(gaps) for elements in owned)
    flat = sorted(element for elements in owned for element in elements)
    assert flat == [offset + position for offset in offsets for position in range(run)]
    some = data.draw(st.lists(st.integers(0, units - 1), unique=True))
    assert cut.elements(some).tolist() == sorted(element for unit in some for element in owned[unit])


# Kept indices


@EXAMPLES
@given(st.data())
def test_what_stays_is_sorted_in_range_and_inside_what_stays(data):
    groups = data.draw(declarations())
    given_units = data.draw(any_units(groups))
    keep = without_orphans(given_units, groups)
    by_name = {group.name: group for group in groups}
    assert list(keep) == [group.name for group in groups]
    for group in groups:
        kept = keep[group.name]
        assert list(kept) == sorted(set(kept)) and set(kept) <= set(given_units[group.name])
        parent = by_name.get(group.parent or "")
        inside = set(given_units[group.name])
        if parent is not None:
            inside = {unit for unit in inside if unit // (group.units // parent.units) in keep[parent.name]}
        assert set(kept) == inside
    assert without_orphans(keep, groups) == keep


@EXAMPLES
@given(st.data())
def test_the_first_units_have_the_widths_that_were_asked_for(data):
    groups = data.draw(declarations())
    by_name = {group.name: group for group in groups}
    widths = {group.name: data.draw(st.integers(0, group.full_width)) for group in groups}
    order = {group.name: data.draw(st.permutations(range(group.units))) for group in groups}
    keep = keep_first(groups, widths, order)
    assert without_orphans(keep, groups) == keep
    found = widths_of(keep, groups)
    for group in groups:
        units = range(group.units)
        parent = by_name.get(group.parent or "")
        if parent is not None:
            units = [unit for unit in units if unit // (group.units // parent.units) in keep[parent.name]]
        each = group.equal_per_parent
        families = [[*units]] if each is None else [[u for u in units if u // each == k] for k in range(group.units)]
        best = [sorted(family, key=order[group.name].index)[: widths[group.name]] for family in families]
        assert keep[group.name] == tuple(sorted(unit for family in best for unit in family))
        if each is None:
            assert found[group.name] == min(widths[group.name], len(units))
        else:
            assert found[group.name] == (widths[group.name] if units else 0)
    assert keep_first(groups, found, order) == keep


@EXAMPLES
@given(declarations())
def test_all_units_have_the_full_widths(groups):
    keep = keep_all(groups)
    assert widths_of(keep, groups) == full_widths(groups)
    assert without_orphans(keep, groups) == keep == keep_first(groups, full_widths(groups))
