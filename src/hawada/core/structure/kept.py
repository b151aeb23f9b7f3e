"""Which units stay: kept indices and widths of every group, and how one follows from the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hawada.core.structure.groups import Group

# For each group, the sorted indices of the units that stay; a group that lies inside a removed parent keeps ().
Keep = dict[str, tuple[int, ...]]

# For each group, how many units stay; where units belong to a parent's in equal numbers, how many for each of those.
Widths = dict[str, int]


def keep_all(groups: Sequence[Group]) -> Keep:
    """Every unit of every group: exporting it reproduces the teacher."""
    return {group.name: tuple(range(group.units)) for group in groups}


def widths_of(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Widths:
    """The width of every group.

    Raises:
        ValueError: when units that must be equally many for each of the parent's are not.
    """
    widths: Widths = {}
    for group in groups:
        kept = keep[group.name]
        if group.equal_per_parent is None:
            widths[group.name] = len(kept)
            continue
        parents = [unit // group.equal_per_parent for unit in kept]
        counts = {parents.count(parent) for parent in set(parents)}
        staying = keep.get(group.parent or "", parents)
        if len(counts) > 1 or (parents and set(parents) != set(staying)):
            raise ValueError(
                f"{group.name}: {len(kept)} units cannot be shared equally among the units of {group.parent}; "
                "keep the same number for each"
            )
        widths[group.name] = next(iter(counts), 0)
    return widths


def full_widths(groups: Sequence[Group]) -> Widths:
    """The unpruned widths."""
    return {group.name: group.full_width for group in groups}


def keep_first(
    groups: Sequence[Group], widths: Mapping[str, int], order: Mapping[str, Sequence[int]] | None = None
) -> Keep:
    """The first units in these numbers; where a parent's units hold equally many, the first of each that stays.

    Args:
        groups: parents among them, in any order.
        widths: of every group.
        order: by group, all its units, the one to be kept first in front; groups without an entry go by index.
    """
    by_name = {group.name: group for group in groups}
    keep: Keep = {}

    def choose(group: Group) -> tuple[int, ...]:
        if group.name in keep:
            return keep[group.name]
        candidates: Iterable[int] = (order or {}).get(group.name, range(group.units))
        parent = by_name.get(group.parent or "")
        if parent is not None:
            staying, share = set(choose(parent)), group.units // parent.units
            candidates = [unit for unit in candidates if unit // share in staying]
        width = widths[group.name]
        if group.equal_per_parent is None:
            chosen = list(candidates)[:width]
        else:
            families: dict[int, list[int]] = {}
            for unit in candidates:
                families.setdefault(unit // group.equal_per_parent, []).append(unit)
            chosen = [unit for family in families.values() for unit in family[:width]]
        keep[group.name] = tuple(sorted(chosen))
        return keep[group.name]

    return {group.name: choose(group) for group in groups}


def without_orphans(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Keep:
    """Sort every entry and drop the units whose parent unit (or that one's parent) is gone."""
    by_name = {group.name: group for group in groups}
    result: Keep = {}

    def alive(group: Group) -> tuple[int, ...]:  # a parent that is not among the groups counts as kept
        if group.name not in result:
            kept: Iterable[int] = keep[group.name]
            parent = by_name.get(group.parent or "")
            if parent is not None:
                staying, share = set(alive(parent)), group.units // parent.units
                kept = [unit for unit in kept if unit // share in staying]
            result[group.name] = tuple(sorted(kept))
        return result[group.name]

    return {group.name: alive(group) for group in groups}


def completed(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Keep:
    """Kept indices of every group from those of some: groups without an entry stay whole, units without parent go."""
    return without_orphans({**keep_all(groups), **keep}, groups)
