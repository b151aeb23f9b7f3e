import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hawada.core.importance import importance_from_gates
from hawada.core.latency import random_keep
from hawada.core.latency.proxy import Term
from hawada.core.search import Allocation, ImportanceObjective
from hawada.core.structure import ExportPolicy, Group, Removal, Rounding, full_widths, widths_of

TEACHER_MS = 9.0


@pytest.fixture
def importance(groups):
    torch.manual_seed(0)
    return {group.name: (0.2 + 0.8 * torch.rand(group.units)) / group.units for group in groups}


def allocate(groups, importance, proxy, policy):
    return Allocation(groups, ImportanceObjective(groups, importance), proxy, policy)


class SumOfTerms:
    """A proxy made of (groups, milliseconds of their widths)."""

    def __init__(self, *terms):
        self._terms = [Term(groups, milliseconds) for groups, milliseconds in terms]

    def terms(self):
        return self._terms

    def predict(self, widths):
        parts = [term.milliseconds(*(np.asarray(float(widths[name])) for name in term.groups)) for term in self._terms]
        return torch.tensor(float(sum(parts)), dtype=torch.float64)


def stairs():
    """1 ms and 2 ms for every four hidden units begun; a single unit fewer usually saves nothing."""
    hidden = [((f"{path}.hidden",), lambda width: 2.0 * np.ceil(width / 4)) for path in ("first", "second")]
    return SumOfTerms(((), lambda: 1.0), *hidden)


def test_importance_of_gates_does_not_grow_with_the_group():
    found = importance_from_gates({"wide": torch.ones(8, requires_grad=True), "branch": torch.tensor([0.5])})
    assert float(found["wide"].sum()) == 1.0 and float(found["branch"].sum()) == 0.5
    assert not found["wide"].requires_grad


@pytest.mark.parametrize("aim", [8.9, 7.0, 5.5, 3.2, 1.5, 1.0])
def test_the_allocation_respects_the_aim(groups, importance, linear_proxy, aim):
    proxy = linear_proxy()
    allocation = allocate(groups, importance, proxy, ExportPolicy())
    widths = allocation.within(aim)
    predicted = float(proxy.predict(widths))
    assert predicted <= aim
    assert widths_of(allocation.keep(widths), groups) == widths
    assert aim - predicted < 0.5  # a unit takes 0.5 ms: nothing more would have fitted


def test_an_aim_above_the_full_model_changes_nothing(groups, importance, linear_proxy):
    widths = allocate(groups, importance, linear_proxy(), ExportPolicy()).within(TEACHER_MS)
    assert widths == full_widths(groups)


def test_an_impossible_aim_gives_the_smallest_widths(groups, importance, linear_proxy):
    widths = allocate(groups, importance, linear_proxy(overhead=5.0), ExportPolicy()).within(2.0)
    assert set(widths.values()) == {0}


def test_cheap_units_go_first(groups, importance, linear_proxy):
    importance |= {"first.hidden": torch.full((8,), 0.01), "second.hidden": torch.full((8,), 0.1)}
    importance |= {"first.branch": torch.ones(1), "second.branch": torch.ones(1)}
    widths = allocate(groups, importance, linear_proxy(), ExportPolicy()).within(6.5)
    assert widths == full_widths(groups) | {"first.hidden": 3}


def test_of_two_equal_losses_the_one_that_saves_more_goes_first():
    groups = [Group("slow", "channel", 4, ()), Group("fast", "channel", 4, ())]
    proxy = SumOfTerms((("slow",), lambda width: 3.0 * width), (("fast",), lambda width: 1.0 * width))
    importance = {group.name: torch.full((4,), 0.25) for group in groups}
    assert allocate(groups, importance, proxy, ExportPolicy()).within(10.0) == {"slow": 2, "fast": 4}


def test_within_a_group_the_least_important_units_go(groups, linear_proxy):
    importance = {group.name: torch.ones(group.units) for group in groups}
    importance["first.hidden"] = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])
    allocation = allocate(groups, importance, linear_proxy(), ExportPolicy())
    widths = full_widths(groups) | {"first.hidden": 3}
    assert allocation.keep(widths)["first.hidden"] == (1, 3, 5)
    assert allocation.value(widths) == pytest.approx(math.sqrt(2.4 * 4.0) + 8 + 1 + 1)


@pytest.mark.parametrize("aim", [8.9, 7.0, 5.0])
def test_plateaus_are_stepped_over(groups, importance, aim):
    importance |= {"first.branch": torch.tensor([50.0]), "second.branch": torch.tensor([50.0])}
    widths = allocate(groups, importance, stairs(), ExportPolicy()).within(aim)
    assert float(stairs().predict(widths)) <= aim
    assert widths["first.hidden"] % 4 == widths["second.hidden"] % 4 == 0  # the edge of a stair, never its middle


def test_a_removed_branch_takes_its_channels_along(groups, importance, linear_proxy):
    importance |= {"first.branch": torch.tensor([1e-6]), "first.hidden": torch.full((8,), 1e-6)}
    allocation = allocate(groups, importance, linear_proxy(), ExportPolicy())
    widths = allocation.within(5.0)
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


def nested_proxy():
    inside = (("layer", "branch", "heads"), lambda layer, branch, heads: layer * (1.0 + branch * (1.0 + heads)))
    return SumOfTerms(inside, (("other",), lambda width: 2.0 * width))


def test_a_removed_layer_takes_everything_inside_along():
    importance = {group.name: torch.full((group.units,), 0.001) for group in nested()} | {"other": torch.ones(4)}
    allocation = allocate(nested(), importance, nested_proxy(), ExportPolicy())
    assert allocation.within(8.0) == {"layer": 0, "branch": 0, "heads": 0, "other": 4}


def test_what_was_removed_too_eagerly_comes_back_while_it_fits(groups, importance, linear_proxy):
    allocation = allocate(groups, importance, linear_proxy(), ExportPolicy())
    nothing = dict.fromkeys(full_widths(groups), 0)
    assert allocation.within(TEACHER_MS, start=nothing) == full_widths(groups)
    grown = allocation.within(5.2, start=nothing)
    assert float(linear_proxy().predict(grown)) == 5.0
    assert all(grown[f"{path}.hidden"] == 0 or grown[f"{path}.branch"] == 1 for path in ("first", "second"))


def test_groups_without_importance_keep_all_units(groups, importance, linear_proxy):
    del importance["second.hidden"], importance["second.branch"]
    widths = allocate(groups, importance, linear_proxy(), ExportPolicy()).within(1.0)
    assert widths == {"first.branch": 0, "first.hidden": 0, "second.branch": 1, "second.hidden": 8}


@pytest.mark.parametrize("first", [8, 7])
def test_only_allowed_widths_are_chosen_wherever_it_starts(groups, importance, linear_proxy, first):
    policy = ExportPolicy(rounding={"channel": Rounding(4)})
    allocation = allocate(groups, importance, linear_proxy(), policy)
    for aim in (8.7, 8.5, 7.0, 4.0, 2.9):
        widths = allocation.within(aim, start=full_widths(groups) | {"first.hidden": first})
        assert {widths["first.hidden"], widths["second.hidden"]} <= {0, 4, 8}


def layers_proxy():
    """1 ms, and 7 for each full layer: 1 itself, 2 for its heads and 4 for its neurons."""
    terms = []
    for path in (f"layers.{index}" for index in range(4)):
        heads = (path, f"{path}.kv", f"{path}.query"), lambda layer, kv, query: layer * (1.0 + 0.25 * kv * query)
        terms += [heads, ((path, f"{path}.ffn"), lambda layer, ffn: layer * 0.5 * ffn)]
    return SumOfTerms(((), lambda: 1.0), *terms)


@pytest.fixture
def layers_importance(layers):
    generator = torch.Generator().manual_seed(0)
    return {group.name: (0.2 + 0.8 * torch.rand(group.units, generator=generator)) / group.units for group in layers}


UNIFORM = ExportPolicy(uniform=True, minimum={"layer": 2})


@pytest.mark.parametrize("policy", [UNIFORM, ExportPolicy(minimum={"layer": 2})])
@pytest.mark.parametrize("aim", [28.5, 24.0, 17.0, 11.0, 6.0])
def test_shared_widths_respect_the_aim_and_enough_layers_stay(layers, layers_importance, policy, aim):
    allocation = allocate(layers, layers_importance, layers_proxy(), policy)
    widths = allocation.within(aim)
    assert float(layers_proxy().predict(widths)) <= aim
    assert widths_of(allocation.keep(widths), layers) == widths
    assert sum(widths[f"layers.{index}"] for index in range(4)) >= 2


@pytest.mark.parametrize("aim", [28.5, 24.0, 17.0, 11.0, 6.0])
def test_groups_of_a_kind_move_together_and_keep_units_of_their_own(layers, layers_importance, aim):
    allocation = allocate(layers, layers_importance, layers_proxy(), UNIFORM)
    widths = allocation.within(aim)
    staying = [f"layers.{index}" for index in range(4) if widths[f"layers.{index}"]]
    for kind in ("kv", "query", "ffn"):
        assert len({widths[f"{path}.{kind}"] for path in staying}) == 1
    keep = allocation.keep(widths)
    narrow = 0 < widths[f"{staying[0]}.ffn"] < 8
    assert not narrow or len({keep[f"{path}.ffn"] for path in staying}) > 1


def test_an_impossible_aim_leaves_the_fewest_layers_at_their_smallest(layers, layers_importance):
    policy = ExportPolicy(uniform=True, minimum={"layer": 2, "kv": 2, "ffn": 3})
    allocation = allocate(layers, layers_importance, layers_proxy(), policy)
    widths = allocation.within(1.0)
    assert sum(widths[f"layers.{index}"] for index in range(4)) == 2
    assert sorted(widths.values()) == sorted([1, 2, 1, 3] * 2 + [0] * 8)
    smallest = widths_of(allocation.smallest(), layers)
    assert sorted(smallest.values()) == sorted(widths.values())


def test_layers_without_importance_count_among_those_that_stay(layers, layers_importance):
    for name in ("layers.0", "layers.1"):
        del layers_importance[name]
    widths = allocate(layers, layers_importance, layers_proxy(), ExportPolicy(minimum={"layer": 2})).within(1.0)
    assert [widths[f"layers.{index}"] for index in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("removed", [0, 3])
def test_a_layer_that_comes_back_has_the_widths_of_its_kind(layers, layers_importance, removed):
    layers_importance |= {f"layers.{index}": torch.tensor([10.0]) for index in range(4)}
    allocation = allocate(layers, layers_importance, layers_proxy(), UNIFORM)
    shape = {"kv": 2, "query": 2, "ffn": 4}
    start = full_widths(layers) | {f"layers.{i}.{kind}": width for i in range(4) for kind, width in shape.items()}
    aim = float(layers_proxy().predict(start))
    gone = start | {f"layers.{removed}": 0} | {f"layers.{removed}.{kind}": 0 for kind in shape}
    assert allocation.within(aim, start=gone) == start


def test_a_layer_that_comes_back_alone_is_as_narrow_as_allowed(layers, layers_importance):
    layers_importance |= {f"layers.{index}": torch.tensor([10.0]) for index in range(4)}
    policy = ExportPolicy(minimum={"ffn": 3})
    nothing = dict.fromkeys(full_widths(layers), 0)
    widths = allocate(layers, layers_importance, layers_proxy(), policy).within(1 + 4 * 2.75, start=nothing)
    assert widths == full_widths(layers) | {
        f"layers.{i}.{kind}": width for i in range(4) for kind, width in {"kv": 1, "query": 1, "ffn": 3}.items()
    }


def test_every_head_that_stays_keeps_its_own_best_queries(layers, layers_importance):
    layers_importance["layers.0.query"] = torch.tensor([0.9, 0.1, 0.2, 0.3, 0.0, 0.8, 0.7, 0.6])
    layers_importance["layers.0.kv"] = torch.tensor([0.1, 0.3, 0.2, 0.4])
    allocation = allocate(layers, layers_importance, layers_proxy(), ExportPolicy())
    keep = allocation.keep(full_widths(layers) | {"layers.0.kv": 3, "layers.0.query": 1})
    assert keep["layers.0.kv"] == (1, 2, 3)
    assert keep["layers.0.query"] == (3, 5, 6)


@pytest.mark.parametrize("uniform", [False, True])
def test_the_value_grows_with_the_root_of_the_importance_that_is_kept(layers, layers_importance, uniform):
    """Of heads that go, the queries' share goes too, however important they were."""
    allocation = allocate(layers, layers_importance, layers_proxy(), ExportPolicy(uniform=uniform))
    for seed in range(20):
        widths = widths_of(random_keep(layers, ExportPolicy(uniform=uniform), np.random.default_rng(seed)), layers)
        kept = sum(
            math.sqrt(float(layers_importance[name][list(units)].sum() * layers_importance[name].sum()))
            for name, units in allocation.keep(widths).items()
        )
        assert allocation.value(widths) == pytest.approx(kept, rel=1e-5)


def test_enough_branches_stay_when_a_layer_takes_its_own_along():
    groups = [
        group
        for layer in ("a", "b")
        for group in (
            Group(layer, "layer", 1, (), removes=(Removal(layer),)),
            Group(f"{layer}.attention", "attention", 1, (), removes=(Removal(f"{layer}.attention"),), parent=layer),
        )
    ]

    proxy = SumOfTerms(
        *(((layer, f"{layer}.attention"), lambda layer, attention: layer * (1.0 + attention)) for layer in ("a", "b"))
    )
    importance = {"a": 0.1, "a.attention": 0.1, "b": 0.9, "b.attention": 0.01}
    policy = ExportPolicy(minimum={"layer": 1, "attention": 1})
    allocation = allocate(groups, {name: torch.tensor([v]) for name, v in importance.items()}, proxy, policy)
    widths = allocation.within(1.0)
    assert widths["a.attention"] + widths["b.attention"] >= 1


@st.composite
def declared(draw):
    """Layers that can go, with heads and neurons inside, beside channels that every layer reads; half milliseconds."""
    groups, terms = [Group("stream", "stream", draw(st.integers(1, 4)), ())], []
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for path in [f"layers.{index}" for index in range(draw(st.integers(1, 3)))]:
        kinds = {"kv": draw(st.integers(1, 4)), "ffn": draw(st.integers(1, 5))}
        groups.append(Group(path, "layer", 1, (), removes=(Removal(path),)))
        groups += [Group(f"{path}.{kind}", kind, units, (), parent=path) for kind, units in kinds.items()]
        for kind, units in kinds.items():
            steps = random.integers(1, 5, (groups[0].units + 1, units + 1)).cumsum(0).cumsum(1) / 2

            def milliseconds(stream, layer, width, steps=steps):
                return np.asarray(layer) * steps[np.asarray(stream, int), np.asarray(width, int)]

            terms.append((("stream", path, f"{path}.{kind}"), milliseconds))
    importance = {group.name: torch.tensor(random.random(group.units) + 0.01) for group in groups}
    return groups, terms, importance, draw(st.floats(0.05, 1.0))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problem=declared())
def test_the_value_of_the_widths_is_that_of_a_mixed_integer_program(oracle, problem):
    """The value is written down once more: a layer's own share, and what is inside only while the layer stays."""
    groups, terms, importance, share = problem
    proxy, by_name = SumOfTerms(*terms), {group.name: group for group in groups}
    widths_of_option = {g.name: [0, 1] if g.removes else list(range(1, g.units + 1)) for g in groups}
    domains = {name: len(widths) for name, widths in widths_of_option.items()}
    factors = []
    for names, milliseconds in terms:
        grid = np.meshgrid(*[np.array(widths_of_option[name], float) for name in names], indexing="ij")
        costs = milliseconds(*grid)
        factors.append((names, costs, np.zeros(costs.shape)))
    for name, group in by_name.items():
        best = np.sort(importance[name].float().double().numpy())[::-1]
        values = np.array([math.sqrt(best[:width].sum() * best.sum()) for width in widths_of_option[name]])
        names = (name,) if group.parent is None else (group.parent, name)
        values = values if group.parent is None else np.stack([np.zeros(len(values)), values])
        factors.append((names, np.zeros(values.shape), values))
    full_ms = float(proxy.predict(full_widths(groups)))
    limit = math.floor(2 * share * full_ms) / 2 + 0.25
    picks = oracle(domains, factors, limit)
    best = sum(float(values[tuple(picks[name] for name in names)]) for names, _, values in factors)
    allocation = allocate(groups, importance, proxy, ExportPolicy())
    widths = allocation.within(limit)
    assert float(proxy.predict(widths)) <= limit
    assert allocation.value(widths) == pytest.approx(best, rel=1e-9)
