import math

import pytest
import torch

from hawada.core.allocation import Allocation, saliency_from_gates
from hawada.core.export import ExportPolicy, Rounding
from hawada.core.structure import Group, Removal, full_widths, widths_of

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
    assert widths_of(allocation.keep(widths), groups) == widths
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
    widths = full_widths(groups) | {"first.hidden": 3}
    assert allocation.keep(widths)["first.hidden"] == (1, 3, 5)
    assert allocation.worth(widths) == pytest.approx(2.4 + 8 + 1 + 1)


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
