import math
from dataclasses import replace

import pytest
import torch

from hawada.core.budget import Budget
from hawada.core.export import ExportPolicy, Rounding
from hawada.core.profiler import Comparison, Interval, Latency
from hawada.core.proxy_cost import LatencyProxy, LatencyTable, SiteTable
from hawada.core.search_export import (
    Allocation,
    BudgetSearch,
    grid_search_latency,
    saliency_from_gates,
    search_export,
)
from hawada.core.structure import Group, Removal, Site, full_widths, widths_of

TEACHER_MS = 9.0


@pytest.fixture
def saliency(groups):
    torch.manual_seed(0)
    return {group.name: (0.2 + 0.8 * torch.rand(group.units)) / group.units for group in groups}


class Stairs:
    """1 ms and 2 ms for every four hidden units begun; a single unit fewer usually saves nothing."""

    def predict(self, widths):
        steps = sum(math.ceil(int(widths[f"{path}.hidden"]) / 4) for path in ("first", "second"))
        return torch.tensor(1.0 + 2.0 * steps, dtype=torch.float64)


def test_saliency_does_not_grow_with_the_group():
    found = saliency_from_gates({"wide": torch.ones(8, requires_grad=True), "branch": torch.tensor([0.5])})
    assert float(found["wide"].sum()) == 1.0 and float(found["branch"].sum()) == 0.5
    assert not found["wide"].requires_grad


@pytest.mark.parametrize("aim", [8.9, 7.0, 5.5, 3.2, 1.5, 1.0])
def test_the_allocation_respects_the_aim(groups, saliency, linear_proxy, aim):
    proxy = linear_proxy()
    allocation = Allocation(groups, saliency, proxy, ExportPolicy())
    widths = allocation.shrink_to(aim)
    predicted = float(proxy.predict(widths))
    assert predicted <= aim
    assert widths_of(allocation.keep(widths)) == widths
    assert aim - predicted < 0.5  # a unit is worth 0.5 ms: nothing more would have fitted


def test_an_aim_above_the_full_model_changes_nothing(groups, saliency, linear_proxy):
    widths = Allocation(groups, saliency, linear_proxy(), ExportPolicy()).shrink_to(TEACHER_MS)
    assert widths == full_widths(groups)


def test_an_impossible_aim_gives_the_smallest_widths(groups, saliency, linear_proxy):
    widths = Allocation(groups, saliency, linear_proxy(overhead=5.0), ExportPolicy()).shrink_to(2.0)
    assert set(widths.values()) == {0}


def test_cheap_units_go_first(groups, saliency, linear_proxy):
    saliency |= {"first.hidden": torch.full((8,), 0.01), "second.hidden": torch.full((8,), 0.1)}
    saliency |= {"first.branch": torch.ones(1), "second.branch": torch.ones(1)}
    widths = Allocation(groups, saliency, linear_proxy(), ExportPolicy()).shrink_to(6.5)
    assert widths == full_widths(groups) | {"first.hidden": 3}


def test_of_two_equal_losses_the_one_that_saves_more_goes_first():
    groups = [Group("slow", "channel", 4, ()), Group("fast", "channel", 4, ())]

    class Proxy:
        def predict(self, widths):
            return torch.tensor(3.0 * widths["slow"] + 1.0 * widths["fast"])

    saliency = {group.name: torch.full((4,), 0.25) for group in groups}
    assert Allocation(groups, saliency, Proxy(), ExportPolicy()).shrink_to(10.0) == {"slow": 2, "fast": 4}


def test_within_a_group_the_least_salient_units_go(groups, linear_proxy):
    saliency = {group.name: torch.ones(group.units) for group in groups}
    saliency["first.hidden"] = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])
    allocation = Allocation(groups, saliency, linear_proxy(), ExportPolicy())
    assert allocation.keep(full_widths(groups) | {"first.hidden": 3})["first.hidden"] == (1, 3, 5)
    assert allocation.worth({"first.hidden": 3}) == pytest.approx(2.4)


@pytest.mark.parametrize("aim", [8.9, 7.0, 5.0])
def test_plateaus_are_stepped_over(groups, saliency, aim):
    saliency |= {"first.branch": torch.tensor([50.0]), "second.branch": torch.tensor([50.0])}
    widths = Allocation(groups, saliency, Stairs(), ExportPolicy()).shrink_to(aim)
    assert float(Stairs().predict(widths)) <= aim
    assert widths["first.hidden"] % 4 == widths["second.hidden"] % 4 == 0  # the edge of a stair, never its middle


def test_a_removed_branch_takes_its_channels_along(groups, saliency, linear_proxy):
    saliency |= {"first.branch": torch.tensor([1e-6]), "first.hidden": torch.full((8,), 1e-6)}
    allocation = Allocation(groups, saliency, linear_proxy(), ExportPolicy())
    widths = allocation.shrink_to(5.0)
    assert widths == full_widths(groups) | {"first.branch": 0, "first.hidden": 0}
    keep = allocation.keep(widths)
    assert keep["first.branch"] == keep["first.hidden"] == ()


def nested():
    return [
        Group("layer", "layer", 1, (), removes=(Removal("layer"),)),
        Group("branch", "branch", 1, (), removes=(Removal("branch"),), parent="layer"),
        Group("heads", "head", 4, (), parent="branch"),
        Group("other", "channel", 4, ()),
    ]


class NestedProxy:
    def predict(self, widths):
        inside = widths["branch"] * (1.0 + widths["heads"])
        return torch.tensor(widths["layer"] * (1.0 + inside) + 2.0 * widths["other"])


def test_a_removed_layer_takes_everything_inside_along():
    saliency = {group.name: torch.full((group.units,), 0.001) for group in nested()} | {"other": torch.ones(4)}
    allocation = Allocation(nested(), saliency, NestedProxy(), ExportPolicy())
    assert allocation.shrink_to(8.0) == {"layer": 0, "branch": 0, "heads": 0, "other": 4}


def test_what_was_removed_too_eagerly_comes_back_while_it_fits(groups, saliency, linear_proxy):
    allocation = Allocation(groups, saliency, linear_proxy(), ExportPolicy())
    nothing = dict.fromkeys(full_widths(groups), 0)
    assert allocation.shrink_to(TEACHER_MS, nothing) == full_widths(groups)
    grown = allocation.shrink_to(5.2, nothing)
    assert float(linear_proxy().predict(grown)) == 5.0
    assert all(grown[f"{path}.hidden"] == 0 or grown[f"{path}.branch"] == 1 for path in ("first", "second"))


def test_groups_without_saliency_keep_all_units(groups, saliency, linear_proxy):
    del saliency["second.hidden"], saliency["second.branch"]
    widths = Allocation(groups, saliency, linear_proxy(), ExportPolicy()).shrink_to(1.0)
    assert widths == {"first.branch": 0, "first.hidden": 0, "second.branch": 1, "second.hidden": 8}


@pytest.mark.parametrize("first", [8, 7])
def test_only_allowed_widths_are_chosen_wherever_it_starts(groups, saliency, linear_proxy, first):
    policy = ExportPolicy(rounding={"channel": Rounding(4)})
    allocation = Allocation(groups, saliency, linear_proxy(), policy)
    for aim in (8.7, 8.5, 7.0, 4.0, 2.9):
        widths = allocation.shrink_to(aim, full_widths(groups) | {"first.hidden": first})
        assert {widths["first.hidden"], widths["second.hidden"]} <= {0, 4, 8}


def fake_measure(groups, linear_proxy, calls, *, offset, scale, noise=0.002):
    """A device that is slower than the proxy believes by an offset and a scale; the teacher is measured with it."""

    def device_ms(widths):
        return offset + scale * float(linear_proxy().predict(widths))

    teacher_ms = device_ms(full_widths(groups))

    def measure(keep):
        calls.append(keep)
        ms = device_ms(widths_of(keep))
        ratio = ms / teacher_ms
        teacher = Latency(teacher_ms, teacher_ms, teacher_ms, p95=teacher_ms, samples=9)
        interval = Interval(ratio, ratio * (1 - noise), ratio * (1 + noise))
        return Comparison(teacher, Latency(ms, ms, ms, p95=ms, samples=9), interval, False)

    return measure, teacher_ms


def wide_groups(units=64):
    return [
        group
        for path in ("first", "second")
        for group in (
            Group(f"{path}.branch", "branch", 1, (), removes=(Removal(path),)),
            Group(f"{path}.hidden", "channel", units, (), parent=f"{path}.branch"),
        )
    ]


def make_search(groups, linear_proxy, calls, budget, *, offset=0.0, scale=1.0, policies=None):
    """The proxy that the search refines begins with the table alone: no overhead, scale 1."""
    units = groups[1].units
    sites = [Site(path, (f"{path}.branch", f"{path}.hidden"), path) for path in ("first", "second")]
    table = LatencyTable(
        [
            SiteTable(site, ((0, 1), (1, units)), torch.tensor([[0.0, 0.0], [0.5, 0.5 * units]]).numpy())
            for site in sites
        ]
    )
    torch.manual_seed(0)
    saliency = {group.name: torch.rand(group.units) / group.units for group in groups}
    saliency |= {"first.branch": torch.ones(1), "second.branch": torch.ones(1)}
    measure, teacher_ms = fake_measure(groups, linear_proxy, calls, offset=offset, scale=scale)
    return BudgetSearch(
        groups, saliency, LatencyProxy(table), policies or [ExportPolicy()], measure, budget, teacher_ms
    )


def multiples(*values):
    return [ExportPolicy(rounding={"channel": Rounding(value)}) for value in values]


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (20.0, 1.0), (0.0, 3.0), (30.0, 0.4), (5.0, 2.0)])
@pytest.mark.parametrize("in_ms", [False, True])
def test_the_search_ends_on_target_whatever_the_proxy_believed(linear_proxy, offset, scale, in_ms):
    groups, calls = wide_groups(), []
    full = offset + scale * float(linear_proxy().predict(full_widths(groups)))
    target = 0.75
    budget = Budget(target * full, None, 0.05) if in_ms else Budget(None, target, 0.05)
    search = make_search(groups, linear_proxy, calls, budget, offset=offset, scale=scale)
    result = search_export(search, max_measurements=10)
    assert result.status == "on_target"
    assert target * 0.95 <= result.chosen.comparison.ratio.median <= target
    assert len(calls) == len(result.candidates) <= 6
    assert calls[-1] == result.candidates[-1].keep and result.chosen in result.candidates
    assert len(search.proxy.samples) == len(calls)


def test_an_infeasible_budget_gives_the_fastest_and_says_so(linear_proxy):
    groups, calls = wide_groups(), []
    search = make_search(groups, linear_proxy, calls, Budget(None, 0.3, 0.05), offset=60.0)
    result = search_export(search, max_measurements=10)
    assert result.status == "infeasible"
    assert result.chosen.comparison.ratio.median == min(c.comparison.ratio.median for c in result.candidates)
    assert set(widths_of(result.chosen.keep).values()) == {0}
    assert len(calls) <= 5  # it does not measure the same model over and over


def test_widths_too_coarse_for_the_tolerance_give_the_slowest_that_holds(linear_proxy):
    groups, calls = wide_groups(), []
    policies = [ExportPolicy(rounding={"channel": Rounding(32)})]
    search = make_search(groups, linear_proxy, calls, Budget(None, 0.62, 0.01), offset=1.0, policies=policies)
    result = search_export(search, max_measurements=10)
    assert result.status == "held"
    assert len(calls) < 10
    holding = [c.comparison.ratio.median for c in result.candidates if search.budget.holds(c.comparison)]
    assert result.chosen.comparison.ratio.median == max(holding)


def test_no_more_models_are_measured_than_allowed(linear_proxy):
    calls = []
    search = make_search(wide_groups(), linear_proxy, calls, Budget(None, 0.5, 1e-6), offset=7.0)
    result = search_export(search, max_measurements=3)
    assert len(calls) == len(result.candidates) <= 4  # the smallest may come on top
    assert result.status == "held"


def test_the_grid_measures_every_multiple_and_ranks_by_what_is_retained(linear_proxy):
    calls = []
    search = make_search(wide_groups(), linear_proxy, calls, Budget(None, 0.6, 0.05), policies=multiples(1, 4, 32))
    candidates = grid_search_latency(search)
    assert sorted(candidate.level for candidate in candidates) == [0, 1, 2] and len(calls) == 3
    holds = [search.budget.holds(candidate.comparison) for candidate in candidates]
    assert holds == sorted(holds, reverse=True) and holds[0]
    worth = [candidate.worth for candidate, held in zip(candidates, holds, strict=True) if held]
    assert worth == sorted(worth, reverse=True)
    for candidate in candidates:
        widths = widths_of(candidate.keep)
        assert all(widths[f"{path}.hidden"] % (1, 4, 32)[candidate.level] == 0 for path in ("first", "second"))


def test_when_nothing_holds_the_fastest_comes_first(linear_proxy):
    policies = multiples(1, 32)
    search = make_search(wide_groups(), linear_proxy, [], Budget(None, 0.3, 0.05), offset=60.0, policies=policies)
    ratios = [candidate.comparison.ratio.median for candidate in grid_search_latency(search)]
    assert ratios == sorted(ratios)


def test_the_grid_wants_a_multiple(linear_proxy):
    search = make_search(wide_groups(), linear_proxy, [], Budget(None, 0.5, 0.05))
    with pytest.raises(ValueError, match=r"gpu\.multiple: no rounding multiple is given; \[1\] allows every width"):
        replace(search, policies=[])


def test_a_policy_too_coarse_gives_way_to_a_finer_one(linear_proxy):
    """Multiples of 32 alone cannot come within 1 % of this target; the search must not stop there."""
    policies = multiples(1, 32)
    search = make_search(wide_groups(), linear_proxy, [], Budget(None, 0.62, 0.02), offset=1.0, policies=policies)
    assert search_export(search, max_measurements=10).status == "on_target"
