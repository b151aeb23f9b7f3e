"""How far pruning could go: the smallest models that are allowed, half of the widths, and a target between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hawada.core.structure import ExportPolicy, Group, Keep, full_widths, keep_first

MAX_FASTEST_TO_HALF = (
    0.97  # Where the fastest model takes more of the time of half of the widths, no target fits between.
)


def extreme_keep(groups: Sequence[Group], policy: ExportPolicy, *, width: bool, depth: bool) -> Keep:
    """Keep the least that is allowed when only widths, only layers and branches, or both may shrink."""
    widths = {
        group.name: policy.widths(group)[0] if (depth if group.removes else width) else group.full_width
        for group in groups
    }
    branches = [group.name for group in groups if group.removes]
    return keep_first(groups, policy.with_required_branches(widths, groups, branches))


def half_keep(groups: Sequence[Group], policy: ExportPolicy) -> Keep:
    """Keep half of the units of every group, rounded as allowed, and all layers and branches.

    Units inside other units are removed with these and are not halved once more.
    """
    by_name = {group.name: group for group in groups}
    widths = full_widths(groups)
    for group in groups:
        parent = by_name.get(group.parent or "")
        if not group.removes and (parent is None or parent.removes):
            half = policy.rounding_of(group).round(group.full_width / 2, group.full_width)
            widths[group.name] = max(half, policy.widths(group)[0])
    return keep_first(groups, widths)


def removed_fraction(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> float:
    """Return the share of the units that are removed; layers and branches are not counted."""
    units = [group for group in groups if not group.removes]
    return 1 - sum(len(keep[group.name]) for group in units) / max(1, sum(group.units for group in units))


def sensible_ratios(fastest: float, half: float) -> tuple[float, float] | None:
    """Return the range from the fastest ratio that is possible to that of half of the units, or None if it is empty."""
    return (fastest, min(half, 1.0)) if 0 < fastest < MAX_FASTEST_TO_HALF * min(half, 1.0) else None
