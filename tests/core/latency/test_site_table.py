import copy
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from hawada.adapters import Shape
from hawada.adapters.torchvision import ResNetAdapter
from hawada.core.latency import LatencyProxy, LatencyTable, Rounds, SimulatedClock, build_table, fidelity, random_keep
from hawada.core.latency.site_table import SiteCall, monotone
from hawada.core.structure import (
    Cut,
    ExportPolicy,
    GatePoint,
    Group,
    Rounding,
    Site,
    full_widths,
    materialize,
    widths_of,
)

QUICK = Rounds(precision=0.5, min_rounds=3, max_rounds=3)


@pytest.fixture(scope="module")
def resnet():
    """The tiny network, its declaration and a simulated table of it."""
    adapter = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32)
    model = adapter.skeleton()
    groups, sites, inputs = adapter.groups(model), adapter.sites(model), adapter.example_inputs(Shape(8))
    policy = ExportPolicy(rounding={"channel": Rounding(8)})
    table = build_table(
        model, groups, sites, [(1, model, inputs)], SimulatedClock(), policy=policy, points=5, rounds=QUICK
    )
    return model, groups, inputs, policy, table


def test_tables_round_trip_through_json(hand_table):
    table = hand_table
    copied = LatencyTable.from_dict(json.loads(json.dumps(table.as_dict())))
    assert copied.as_dict() == table.as_dict()
    assert [entry.site for entry in copied.sites] == [entry.site for entry in table.sites]
    assert [entry.grid for entry in copied.sites] == [entry.grid for entry in table.sites]
    widths = {"wide": 7, "branch": 1, "inner": 3}
    assert float(LatencyProxy(copied).predict(widths)) == float(LatencyProxy(table).predict(widths))


def test_the_table_predicts_unseen_sliced_models(resnet):
    model, groups, inputs, policy, table = resnet
    random, proxy, clock = np.random.default_rng(0), LatencyProxy(table), SimulatedClock()
    predicted, measured = [], []
    for index in range(14):
        keep = random_keep(groups, policy, random)
        ms = clock.prepare(materialize(model, groups, keep), inputs)()
        if index < 6:
            proxy.add_sample(widths_of(keep, groups), ms)
        else:
            predicted.append(float(proxy.predict(widths_of(keep, groups))))
            measured.append(ms)
    found = fidelity(predicted, measured)
    assert found["mape"] < 0.05
    assert found["kendall_tau"] > 0.85


def test_grids_hold_allowed_widths_with_both_ends(resnet):
    _, groups, _, policy, table = resnet
    allowed = {group.name: policy.widths(group) for group in groups}
    for entry in table.sites:
        for name, points in zip(entry.site.groups, entry.grid, strict=True):
            assert set(points) <= set(allowed[name])
            assert (points[0], points[-1]) == (allowed[name][0], allowed[name][-1])
            assert len(points) <= 5


def test_a_removed_branch_costs_the_same_whatever_was_inside(resnet):
    table = resnet[-1]
    for entry in table.sites:
        assert len(set(entry.ms[0].tolist())) == 1
        assert entry.ms[0, 0] < entry.ms[1, -1]


def test_identical_sites_are_timed_once_and_no_hook_stays(resnet):
    model, groups, inputs, policy, _ = resnet

    class Counting(SimulatedClock):
        prepared = 0

        def prepare(self, model, inputs):
            self.prepared += 1
            return super().prepare(model, inputs)

    sites = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32).sites(model)
    clock, state = Counting(), copy.deepcopy(model.state_dict())
    table = build_table(model, groups, sites[:2], [(1, model, inputs)], clock, policy=policy, points=3, rounds=QUICK)
    assert clock.prepared == 3  # three widths for two blocks of one shape; where a branch is gone nothing runs
    assert table.sites[0].ms.tolist() == table.sites[1].ms.tolist()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_the_proxy_never_falls_when_a_width_grows_however_noisy_the_clock(resnet):
    model, groups, inputs, policy, _ = resnet
    sites = ResNetAdapter(arch="basic", layers=[2, 2, 1, 1], num_classes=10, image_size=32).sites(model)
    clock = SimulatedClock(noise=0.5, seed=1)
    table = build_table(model, groups, sites, [(1, model, inputs)], clock, policy=policy, points=5, rounds=QUICK)
    proxy, random = LatencyProxy(table), np.random.default_rng(2)
    for _ in range(100):
        narrow = {group.name: float(random.uniform(0, group.units)) for group in groups}
        wide = {name: float(random.uniform(width, full_widths(groups)[name])) for name, width in narrow.items()}
        assert float(proxy.predict(narrow)) <= float(proxy.predict(wide)) + 1e-9


def test_a_table_over_several_widths_is_monotone_in_each():
    adapter = ResNetAdapter(arch="bottleneck", layers=[1, 1, 1, 1], num_classes=10, image_size=32)
    model = adapter.skeleton()
    table = build_table(
        model,
        adapter.groups(model),
        adapter.sites(model)[:1],
        [(1, model, adapter.example_inputs(Shape(1)))],
        SimulatedClock(noise=0.5),
        policy=ExportPolicy(rounding={"channel": Rounding(16)}),
        points=4,
        rounds=QUICK,
    )
    ms = table.sites[0].ms
    assert ms.shape == (2, 3, 3)
    assert all((np.diff(ms, axis=axis) >= 0).all() for axis in range(3))


@pytest.mark.parametrize("shape", [(9,), (5, 4), (2, 5, 3), (2, 3, 2, 3)])
def test_noisy_times_are_made_monotone_in_each_width_at_once(shape):
    random = np.random.default_rng(0)
    for _ in range(100):
        ms = monotone(random.random(shape))
        assert all((np.diff(ms, axis=axis) >= -1e-12).all() for axis in range(len(shape)))
    assert monotone(ms).tolist() == ms.tolist()  # what is monotone stays as it is


def toy_table(toy, groups, sites, *calls):
    return build_table(toy, groups, sites, calls, SimulatedClock(), policy=ExportPolicy(), points=3, rounds=QUICK)


def test_a_site_that_is_gone_takes_no_time(toy, groups, sites, inputs):
    table = toy_table(toy, groups, sites, (1, toy, (inputs,)))
    for entry in table.sites:
        assert entry.ms[0].tolist() == [0.0, 0.0, 0.0] and float(entry.ms[1].min()) > 0
    proxy = LatencyProxy(table)
    assert float(proxy.predict(dict.fromkeys(full_widths(groups), 0))) == 0.0


def test_the_sites_that_are_timed_are_those_that_the_caller_slices(toy, groups, sites, inputs):
    asked = []

    def slice_site(model, groups, keep, path):
        asked.append((path, keep["first.hidden"]))
        return nn.Identity() if len(keep["first.hidden"]) < 8 else materialize(model, groups, keep, path)

    table = build_table(
        *(toy, groups, sites[:1], [(1, toy, (inputs,))], SimulatedClock()),
        policy=ExportPolicy(),
        points=2,
        rounds=QUICK,
        slice_site=slice_site,
    )
    assert list(dict.fromkeys(asked)) == [("first", tuple(range(8))), ("first", (0,)), ("first", ())]
    assert table.sites[0].ms[1].tolist() == [0.0, table.sites[0].ms[1, 1]] and table.sites[0].ms[1, 1] > 0


def test_calls_count_as_often_as_they_happen(toy, groups, sites, inputs):
    one, many = (toy_table(toy, groups, sites, (1, toy, (x,))) for x in (inputs[:2], inputs.repeat(500, 1)))
    both = toy_table(toy, groups, sites, (1, toy, (inputs[:2],)), (2.5, toy, (inputs.repeat(500, 1),)))
    for entry, first, second in zip(both.sites, one.sites, many.sites, strict=True):
        assert float(second.ms[1, -1]) > 2 * float(first.ms[1, -1])
        assert np.allclose(entry.ms, first.ms + 2.5 * second.ms)


def test_a_site_is_called_with_as_much_as_it_still_reads(inputs):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    cuts = (Cut("0.weight", 0, follows="out_features"), Cut("0.bias", 0), Cut("1.weight", 1, follows="in_features"))
    width = Group("width", "channel", 8, (GatePoint("0", dim=-1),), cuts)
    table = toy_table(model, [width], [Site("1", ("width",), "site", reads="width")], (1, model, (inputs,)))
    (entry,) = table.sites
    for units, ms in zip(entry.grid[0], entry.ms, strict=True):
        assert ms == pytest.approx(SimulatedClock().prepare(nn.Linear(units, 3), (torch.zeros(16, units),))())


def joining(sizes):
    """Linear layers side by side whose outputs are joined, twice each unit, before another one reads them."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(6, size) for size in sizes])
            self.last = nn.Linear(2 * sum(sizes), 3)

        def forward(self, x):
            joined = torch.cat([part(x) for part in self.parts], -1)
            return self.last(joined.repeat_interleave(2, -1))

    return Joined()


def test_a_site_that_reads_several_groups_gets_what_is_left_of_each(inputs):
    model, groups, start = joining((5, 4, 2)), [], 0
    for index, size in enumerate((5, 4)):  # the last part keeps its units
        cuts = (
            Cut(f"parts.{index}.weight", 0, follows="out_features"),
            Cut(f"parts.{index}.bias", 0),
            Cut("last.weight", 1, per_unit=2, offsets=(start,), follows="in_features"),
        )
        point = GatePoint("last", "input", -1, per_unit=2, offsets=(start,))
        groups.append(Group(f"part{index}", "channel", size, (point,), cuts))
        start += 2 * size
    site = Site("last", ("part0", "part1"), "site", reads=("part0", "part1"), reads_per_unit=2)
    table = toy_table(model, groups, [site], (1, model, (inputs,)))
    (entry,) = table.sites
    for (row, first), (column, second) in itertools.product(enumerate(entry.grid[0]), enumerate(entry.grid[1])):
        width = 2 * (first + second + 2)
        expected = SimulatedClock().prepare(nn.Linear(width, 3), (torch.zeros(16, width),))()
        assert entry.ms[row, column] == pytest.approx(expected)
    copied = LatencyTable.from_dict(json.loads(json.dumps(table.as_dict())))
    assert copied.sites[0].site == site


class Memory:
    """What is neither tensor nor number, as a cache is: it counts how often it was used."""

    def __init__(self):
        self.used = 0


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x, *, memory, factor, negative=False):
        memory.used += 1
        return self.linear(x) * (-factor if negative else factor) * memory.used


class Whole(nn.Module):
    """Calls its site with keyword arguments, among them a tensor, a flag and a memory."""

    def __init__(self):
        super().__init__()
        self.site, self.head, self.memory = Scaled(), nn.Linear(8, 3), Memory()

    def forward(self, x):
        return self.head(self.site(x, memory=self.memory, factor=x.mean(), negative=True))


SCALED = Group(
    "hidden",
    "channel",
    8,
    (GatePoint("site"),),
    (
        Cut("site.linear.weight", 0, follows="out_features"),
        Cut("site.linear.bias", 0),
        Cut("head.weight", 1, follows="in_features"),
    ),
)


def scaled_arguments(inputs):
    return (inputs,), {"memory": Memory(), "factor": torch.tensor(0.5), "negative": True}


def test_a_site_is_called_on_its_tensors_alone_and_given_the_rest(inputs):
    site, arguments = Scaled(), scaled_arguments(inputs)
    call, tensors = SiteCall(site, arguments), SiteCall.inputs(arguments)
    assert [x.shape for x in tensors] == [(16, 6), ()]
    assert torch.equal(call(*tensors), site.linear(inputs) * -0.5)
    doubled = call(2 * tensors[0], tensors[1])  # the second use of this call's own memory
    assert torch.equal(doubled, site.linear(2 * inputs) * -0.5 * 2)


def test_no_two_calls_share_what_they_remember(inputs):
    arguments = scaled_arguments(inputs)
    first = SiteCall(Scaled(), arguments)
    first(*SiteCall.inputs(arguments))
    second, copied = SiteCall(Scaled(), arguments), copy.deepcopy(first)
    for call in (second, copied, copied):
        call(*SiteCall.inputs(arguments))
    memories = [next(other for other in call.others if isinstance(other, Memory)) for call in (first, second, copied)]
    assert [memory.used for memory in memories] == [1, 1, 3]
    assert arguments[1]["memory"].used == 0


def test_a_table_of_a_site_with_keyword_arguments_leaves_their_owner_alone(inputs):
    model = Whole()
    sites = [Site("site", ("hidden",), "site")]
    table = toy_table(model, [SCALED], sites, (1, model, (inputs,)))
    assert model.memory.used == 1  # when the arguments were captured
    ms = table.sites[0].ms
    assert ms.shape == (3,) and (np.diff(ms) > 0).all()


def test_a_simulated_clock_times_a_call_as_the_module(inputs):
    linear = nn.Linear(6, 8)
    plain = SimulatedClock().prepare(linear, (inputs,))()
    for arguments in (((inputs,), {}), ((), {"input": inputs})):
        assert SimulatedClock().prepare(SiteCall(linear, arguments), SiteCall.inputs(arguments))() == plain
    arguments = scaled_arguments(inputs)
    call = SiteCall(Scaled(), arguments)
    assert SimulatedClock().prepare(call, SiteCall.inputs(arguments))() > plain
    assert next(other for other in call.others if isinstance(other, Memory)).used == 0
