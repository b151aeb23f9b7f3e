from dataclasses import replace

import pytest

from hawada.core.structure import (
    Cut,
    GatePoint,
    Group,
    Removal,
    check_groups,
    full_widths,
    keep_all,
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


def test_a_sound_declaration_passes(groups, toy):
    check_groups(groups, toy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "first.branch"}, "two groups share a name; group names must be unique"),
        ({"units": 0}, "first.hidden: 0 units; a group needs at least one"),
        (
            {"parent": "nobody"},
            "first.hidden: parent 'nobody' is not a group among whose units 8 can be shared out",
        ),
        (
            {"parent": "second.hidden", "units": 12},
            "first.hidden: parent 'second.hidden' is not a group among whose units 12 can be shared out",
        ),
        ({"removes": (Removal("first"),)}, "first.hidden: removes modules but has 8 units; only a group of one may"),
        ({"gated_at": (GatePoint("third.down"),)}, "first.hidden: the model has no module 'third.down'"),
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


def test_a_removal_of_an_unknown_module_is_refused(groups, toy):
    groups[0] = replace(groups[0], removes=(Removal("third"),))
    with pytest.raises(ValueError, match=r"first\.branch: the model has no module 'third'"):
        check_groups(groups, toy)
