"""Which widths may be exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hawada.core.structure.groups import Group
from hawada.core.structure.kept import Widths


@dataclass(frozen=True)
class Rounding:
    """Which widths an accelerator runs well: multiples of `multiple`, and the full width.

    Attributes:
        multiple: 1 allows every width.
    """

    multiple: int = 1

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"gpu.multiple: {self.multiple} is not a positive whole number")

    def widths(self, units: int) -> list[int]:
        """Every allowed width of a group with `units` units, ascending and ending at `units`."""
        return [*range(self.multiple, units, self.multiple), units]

    def round(self, width: float, units: int) -> int:
        """The allowed width nearest to `width`, of two the larger."""
        return min(self.widths(units), key=lambda choice: (abs(choice - width), -choice))


@dataclass(frozen=True)
class ExportPolicy:
    """Which widths may be exported, and how they are read from gates.

    Attributes:
        threshold: a unit counts as kept when its gate is at least this.
        rounding: by group kind; kinds that are not listed are free.
        minimum: by group kind, the smallest width of a group that stays at all; for layers and branches, how many
            groups of that kind must stay. Kinds that are not listed: 1, and 0 for layers and branches.
        uniform: groups of one kind have the same width, as formats with one configuration for all layers need it.
    """

    threshold: float = 0.5
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    minimum: Mapping[str, int] = field(default_factory=dict)
    uniform: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"export.threshold: {self.threshold} is not between 0 and 1")

    def rounding_of(self, group: Group) -> Rounding:
        """The rounding of a group's kind."""
        return self.rounding.get(group.kind, Rounding())

    def widths(self, group: Group) -> list[int]:
        """Every width that a group may have: 0 or 1 for a branch or layer, else the allowed multiples."""
        if group.removes:
            return [0, 1]
        full = group.full_width
        return [w for w in self.rounding_of(group).widths(full) if w >= min(self.minimum.get(group.kind, 1), full)]

    def missing_kinds(self, widths: Mapping[str, int], groups: Sequence[Group]) -> set[str]:
        """Kinds of layers and branches of which too few stay; one inside a removed layer does not count."""
        by_name = {group.name: group for group in groups}

        def stays(group: Group) -> bool:
            parent = by_name.get(group.parent or "")
            return widths[group.name] > 0 and (parent is None or stays(parent))

        kinds = {group.kind for group in groups if group.removes}
        staying = {kind: sum(stays(group) for group in groups if group.kind == kind) for kind in kinds}
        there = {kind: sum(group.kind == kind for group in groups) for kind in kinds}
        return {kind for kind in kinds if staying[kind] < min(self.minimum.get(kind, 0), there[kind])}

    def with_required_branches(self, widths: Mapping[str, int], groups: Sequence[Group], best: Sequence[str]) -> Widths:
        """The widths with as many layers and branches put back as must stay: those inside what stays, and the first of
        `best`, before the others."""
        by_name = {group.name: group for group in groups}
        result = dict(widths)
        inside = [name for name in best if widths.get(by_name[name].parent or "", 1)]
        for name in [*inside, *(name for name in best if name not in inside)]:
            above: str | None = name
            if by_name[name].kind in self.missing_kinds(result, groups):
                while above in by_name:
                    result[above] = result[above] or 1
                    above = by_name[above].parent
        return result

    def shared(self, groups: Sequence[Group]) -> list[tuple[Group, ...]]:
        """The groups that must have the same width, together; alone where they need not.

        Raises:
            ValueError: when the uniform layout is asked for and groups of one kind differ in size.
        """
        if not self.uniform:
            return [(group,) for group in groups]
        kinds: dict[str, list[Group]] = {}
        for group in groups:
            kinds.setdefault(group.name if group.removes else group.kind, []).append(group)
        for kind, members in kinds.items():
            sizes = sorted({member.full_width for member in members})
            if len(sizes) > 1:
                raise ValueError(
                    f"export.layout: uniform needs groups of one kind to be alike, and {kind} groups have "
                    f"{', '.join(map(str, sizes))} units; set export.layout=heterogeneous"
                )
        return [tuple(members) for members in kinds.values()]
