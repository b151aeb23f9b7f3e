import random
from dataclasses import replace

import pytest

from hawada.core.structure import (
    Cut,
    GatePoint,
    Group,
    Norm,
    Removal,
    check_groups,
    completed,
    full_widths,
    keep_all,
    keep_first,
    widths_of,
    without_orphans,
)


def branch(name, parent=None):
    return Group(name, "branch", 1, (), removes=(Removal(name),), parent=parent)


def test_elements_of_a_plain_cut_are_the_units():
    assert Cut("w", 0).elements([3, 0]).tolist() == [0, 3]


def test_elements_with_heads_and_a_fused_projection():
    # four heads of two elements; q, k and v begin at 0, 8 and 16
    cut = Cut("qkv", 0, per_unit=2, offsets=(0, 8, 16))
    assert cut.elements([3, 1]).tolist() == [2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]


def test_elements_of_all_units_are_distinct_and_skip_what_no_unit_owns():
    cut = Cut("w", 0, per_unit=3, offsets=(1, 20))
    assert cut.elements(range(4)).tolist() == [*range(1, 13), *range(20, 32)]


def test_widths_count_the_kept_units(groups):
    keep = keep_all(groups)
    assert widths_of(keep, groups) == full_widths(groups)
    assert widths_of(keep | {"first.hidden": (1, 5)}, groups) == full_widths(groups) | {"first.hidden": 2}


def test_removed_parents_empty_children_and_grandchildren():
    groups = [branch("layer"), branch("attention", "layer"), Group("heads", "head", 4, (), parent="attention")]
    assert without_orphans({"layer": (), "attention": (0,), "heads": (0, 1)}, groups) == {
        "layer": (),
        "attention": (),
        "heads": (),
    }


def test_kept_units_come_back_sorted_and_living_parents_empty_nothing():
    groups = [branch("b"), Group("c", "channel", 8, (), parent="b")]
    assert without_orphans({"b": [0], "c": [7, 2, 4]}, groups) == {"b": (0,), "c": (2, 4, 7)}


def attention():
    """An attention of four KV heads with three query heads each; of the eight others, two belong to each KV head."""
    return [
        branch("attention"),
        Group("kv", "kv", 4, (), parent="attention"),
        Group("query", "query", 12, (), parent="kv", equal_per_parent=3),
        Group("free", "channel", 8, (), parent="kv"),
    ]


def any_keep(groups, draw):
    return {group.name: draw.sample(range(group.units), draw.randint(0, group.units)) for group in groups}


def test_units_go_with_the_unit_that_holds_them():
    keep = keep_all(attention()) | {"kv": (0, 3)}
    assert without_orphans(keep, attention()) == {
        "attention": (0,),
        "kv": (0, 3),
        "query": (0, 1, 2, 9, 10, 11),
        "free": (0, 1, 6, 7),
    }
    assert without_orphans(keep | {"attention": ()}, attention()) == dict.fromkeys(keep, ())


@pytest.mark.parametrize("seed", range(10))
def test_only_units_whose_parent_goes_are_taken_out_of_what_is_kept(seed):
    groups, draw = attention(), random.Random(seed)
    before = any_keep(groups, draw)
    keep = without_orphans(before, draw.sample(groups, len(groups)))
    for group, parent in zip(groups[1:], ("attention", "kv", "kv"), strict=True):
        share = group.units // next(other.units for other in groups if other.name == parent)
        assert keep[group.name] == tuple(u for u in sorted(before[group.name]) if u // share in keep[parent])
    assert without_orphans(keep, groups) == keep


def test_the_width_of_equally_shared_units_is_that_of_each_parent():
    groups = attention()
    assert full_widths(groups) == {"attention": 1, "kv": 4, "query": 3, "free": 8}
    keep = {"attention": (0,), "kv": (0, 3), "query": (0, 2, 9, 10), "free": (6,)}
    assert widths_of(keep, groups) == {"attention": 1, "kv": 2, "query": 2, "free": 1}
    assert widths_of(dict.fromkeys(keep, ()), groups) == dict.fromkeys(keep, 0)
    assert widths_of({"query": (3, 4, 9, 11)}, groups[2:3]) == {"query": 2}  # without its parent among the groups


@pytest.mark.parametrize("kept", [(0, 1, 9), (0, 1, 2), (0, 3, 9)])
def test_units_that_are_not_shared_equally_have_no_width(kept):
    """Two of one KV head and one of another; all of one; one of a KV head that is gone."""
    keep = keep_all(attention()) | {"kv": (0, 3), "query": kept}
    message = f"query: {len(kept)} units cannot be shared equally among the units of kv; keep the same number for each"
    with pytest.raises(ValueError, match=message):
        widths_of(keep, attention())


def test_the_first_units_are_chosen_within_parents_that_stay():
    widths = {"attention": 1, "kv": 2, "query": 1, "free": 3}
    assert keep_first(attention(), widths) == {"attention": (0,), "kv": (0, 1), "query": (0, 3), "free": (0, 1, 2)}
    order = {"kv": [3, 1, 0, 2], "query": [0, 10, 11, 9, 5, 4, 3, 1, 2, 6, 7, 8], "free": [7, 0, 1, 3, 2, 6, 4, 5]}
    keep = keep_first(attention(), widths, order)
    assert keep == {"attention": (0,), "kv": (1, 3), "query": (5, 10), "free": (2, 3, 7)}
    assert keep_first(attention(), widths | {"attention": 0}, order) == dict.fromkeys(keep, ())


@pytest.mark.parametrize("seed", range(10))
def test_the_first_units_have_the_widths_that_were_asked_for(seed):
    draw = random.Random(seed)
    groups = attention()[:3]
    widths = {"attention": 1, "kv": draw.randint(1, 4), "query": draw.randint(1, 3)}
    order = {group.name: draw.sample(range(group.units), group.units) for group in groups}
    keep = keep_first(draw.sample(groups, 3), widths, order)
    assert widths_of(keep, groups) == widths
    assert without_orphans(keep, groups) == keep
    assert set(keep["kv"]) == set(order["kv"][: widths["kv"]])
    for head in keep["kv"]:
        best = [unit for unit in order["query"] if unit // 3 == head][: widths["query"]]
        assert {unit for unit in keep["query"] if unit // 3 == head} == set(best)


def test_a_choice_is_completed_by_what_it_does_not_mention():
    keep = completed({"kv": [3, 1]}, attention())
    assert keep == {"attention": (0,), "kv": (1, 3), "query": (3, 4, 5, 9, 10, 11), "free": (2, 3, 6, 7)}
    assert completed({}, attention()) == keep_all(attention())
    assert completed({"attention": ()}, attention()) == dict.fromkeys(keep, ())


def test_a_sound_declaration_passes(groups, toy):
    check_groups(groups, toy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "first.branch"}, "two groups share a name; group names must be unique"),
        ({"units": 0}, "first.hidden: 0 units; a group needs at least one"),
        (
            {"parent": "nobody"},
            "first.hidden: parent 'nobody' is not a group whose units can share out 8",
        ),
        (
            {"parent": "second.hidden", "units": 12},
            "first.hidden: parent 'second.hidden' is not a group whose units can share out 12",
        ),
        ({"removes": (Removal("first"),)}, "first.hidden: removes modules but has 8 units; only a group of one may"),
        ({"gated_at": (GatePoint("third.down"),)}, "first.hidden: the model has no module 'third.down'"),
        ({"norms": (Norm("first.knorm", "rms", 1e-6),)}, "first.hidden: the model has no module 'first.knorm'"),
        ({"attributes": ("first.attention.heads",)}, "first.hidden: the model has no module 'first.attention'"),
        ({"equal_per_parent": 4}, "first.hidden: 8 units are not 4 for each of the parent's"),
        ({"equal_per_parent": 3, "parent": None}, "first.hidden: 8 units are not 3 for each of the parent's"),
        ({"cuts": (Cut("first.up.wait", 0),)}, "first.hidden: the model has no parameter or buffer 'first.up.wait'"),
        ({"cuts": (Cut("first.up.weight", 1),)}, "first.hidden: first.up.weight has 5 elements on axis 1, not 8"),
        (
            {"cuts": (Cut("first.up.bias", 0, per_unit=2, offsets=(1,)),)},
            "first.hidden: first.up.bias has 8 elements on axis 0, not 17",
        ),
    ],
)
def test_an_unsound_declaration_is_refused(groups, toy, change, message):
    groups[1] = replace(groups[1], **change)
    with pytest.raises(ValueError, match=message):
        check_groups(groups, toy)


@pytest.mark.parametrize("above", ["first.hidden", "first.branch"])
def test_parents_in_a_circle_are_refused(groups, toy, above):
    groups[0] = replace(groups[0], parent=above)
    with pytest.raises(ValueError, match=r"first\.branch: its parents form a circle; a parent must lie further out"):
        check_groups(groups, toy)


def test_a_group_may_hold_several_units_that_hold_others(groups, toy):
    groups[1] = replace(groups[1], equal_per_parent=8)
    groups.append(Group("inner", "channel", 16, (), parent="first.hidden", equal_per_parent=2))
    check_groups(groups, toy)


def test_a_removal_of_an_unknown_module_is_refused(groups, toy):
    groups[0] = replace(groups[0], removes=(Removal("third"),))
    with pytest.raises(ValueError, match=r"first\.branch: the model has no module 'third'"):
        check_groups(groups, toy)
