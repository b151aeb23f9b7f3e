"""What a search for widths keeps as much of as it can: the importance of units, or a measured sensitivity to widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from hawada.core.importance import Sensitivity
from hawada.core.structure import Group, Keep, best_first, keep_first, widths_of


class SearchObjective(Protocol):
    """What a search maximises. The value of widths is a sum over groups, so that the best of them can be computed."""

    @property
    def importance(self) -> Mapping[str, Tensor]:
        """By group, (units,): of a group that is pruned, the units with the largest importance stay.

        A group without an entry keeps all its units while its parent stays.
        """

    def value(self, group: Group, widths: Mapping[str, int]) -> float:
        """What one group adds while everything that it lies inside stays.

        Args:
            group: the group; `widths` has its width and those of all groups that it lies inside.
            widths: by group.
        """

    def total(self, keep: Keep) -> float:
        """The value of a choice of units as a whole, by which candidates are ranked."""


class ImportanceObjective:
    """The importance that the units which stay retain, summed over groups.

    The value of a group grows with the root of the share of its importance that is retained: the fewer units are left,
    the more the next one costs. Importances that hardly differ would otherwise empty one kind of group before they
    touch another.

    Args:
        groups: every group of the model.
        importance: see `SearchObjective`; a group without an entry has an importance of 1 in all.
    """

    def __init__(self, groups: Sequence[Group], importance: Mapping[str, Tensor]) -> None:
        self.importance = importance
        self._groups = {group.name: group for group in groups}
        self._complete = complete_importance(groups, importance)
        self._order = {name: best_first(values) for name, values in self._complete.items()}
        self._values: dict[tuple[str, tuple[int, ...]], float] = {}

    def value(self, group: Group, widths: Mapping[str, int]) -> float:
        """The importance of the group's best units, of those whose parent's unit stays."""
        parent = self._groups.get(group.parent or "")
        within = [] if parent is None or parent.units == 1 else [replace(parent, parent=None, equal_per_parent=None)]
        key = group.name, (widths[group.name], *(widths[above.name] for above in within))
        if key not in self._values:
            importance = self._complete[group.name]
            kept = keep_first([*within, group], widths, self._order)[group.name]
            total = float(importance.double().sum())
            retained = float(importance[list(kept)].double().sum())
            self._values[key] = math.sqrt(retained * total)
        return self._values[key]

    def total(self, keep: Keep) -> float:
        """The sum of the groups' values."""
        groups = list(self._groups.values())
        return total_value(self, groups, widths_of(keep, groups))


class SensitivityObjective:
    """Minus the output divergence: of one group's width as it was measured alone, of a whole choice as it is together.

    What groups cost together is not the sum of what each costs alone; the sum proposes widths, the whole ranks them.

    Args:
        importance: see `SearchObjective`.
        sensitivity: the output divergence by group and width.
        divergence: measures the output divergence of a choice of units.
    """

    def __init__(
        self, importance: Mapping[str, Tensor], sensitivity: Sensitivity, divergence: Callable[[Keep], float]
    ) -> None:
        self.importance, self.sensitivity, self.divergence = importance, sensitivity, divergence

    def value(self, group: Group, widths: Mapping[str, int]) -> float:
        """Minus the divergence of the group's width."""
        return -self.sensitivity.divergence(group, widths[group.name])

    def total(self, keep: Keep) -> float:
        """Minus the divergence of the whole choice."""
        return -self.divergence(keep)


def complete_importance(groups: Sequence[Group], importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An importance for every group, in float32 on the CPU: 1 in all, shared equally, where none is given."""
    return {
        group.name: importance.get(group.name, torch.full((group.units,), 1 / group.units)).detach().float().cpu()
        for group in groups
    }


def total_value(objective: SearchObjective, groups: Sequence[Group], widths: Mapping[str, int]) -> float:
    """The sum of the groups' values; what lies inside something that is removed adds nothing."""
    inside = reachable(groups, widths)
    return sum(objective.value(group, widths) for group in groups if group.name in inside)


def reachable(groups: Sequence[Group], widths: Mapping[str, int]) -> set[str]:
    """Names of the groups that do not lie inside anything that is removed, whatever their own widths are."""
    by_name = {group.name: group for group in groups}

    def stays(group: Group) -> bool:
        parent = by_name.get(group.parent or "")
        return parent is None or (widths[parent.name] > 0 and stays(parent))

    return {group.name for group in groups if stays(group)}
