"""From an objective and predicted milliseconds to widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from hawada.core.latency import Proxy
from hawada.core.search.knapsack import Factor, solve
from hawada.core.search.objective import SearchObjective, complete_importance, total_value
from hawada.core.structure import ExportPolicy, Group, Keep, Widths, best_first, full_widths, keep_first, widths_of


class Allocation:
    """The widths of the largest value within a predicted time: an exact choice, but for rounding of sums.

    Under the uniform layout all groups of a kind are one decision. A branch or layer that goes takes all that is left
    inside along. The proxy may learn between calls: its predictions are read anew in each.

    Args:
        groups: every group of the model.
        objective: the value of widths, and which units stay; a group without an importance keeps all its units while
            its parent stays.
        proxy: predicts milliseconds, as a sum of terms.
        policy: allowed widths.
    """

    def __init__(self, groups: Sequence[Group], objective: SearchObjective, proxy: Proxy, policy: ExportPolicy) -> None:
        self.groups = {group.name: group for group in groups}
        self.objective, self.policy, self.proxy = objective, policy, proxy
        self._importance = complete_importance(groups, objective.importance)
        self._order = {name: best_first(values) for name, values in self._importance.items()}
        self.blocks = {members[0].name: [member.name for member in members] for members in policy.shared(groups)}
        self.allowed = {
            name: policy.widths(self.groups[name])
            if all(member in objective.importance for member in members)
            else [self.groups[name].full_width]
            for name, members in self.blocks.items()
        }
        self._block_of = {member: name for name, members in self.blocks.items() for member in members}

    def value(self, widths: Mapping[str, int]) -> float:
        """The sum of what the groups add to the objective."""
        return total_value(self.objective, list(self.groups.values()), widths)

    def keep(self, widths: Mapping[str, int]) -> Keep:
        """The most important units of every group in these numbers."""
        return keep_first(list(self.groups.values()), widths, self._order)

    def smallest(self) -> Keep:
        """The least that may stay."""
        widths = {member: self.allowed[name][0] for name, members in self.blocks.items() for member in members}
        branches = [name for name, group in self.groups.items() if group.removes]
        branches.sort(key=lambda name: -float(self._importance[name]))
        widths = self.policy.with_required_branches(widths, list(self.groups.values()), branches)
        return self.keep(widths)

    def within(self, limit_ms: float, at_least_ms: float = 0.0, start: Mapping[str, int] | None = None) -> Widths:
        """The best widths predicted to take at most `limit_ms`, and if there are such, at least `at_least_ms`.

        Args:
            limit_ms: predicted milliseconds not to exceed; where nothing is as fast, the smallest widths are returned.
            at_least_ms: predicted milliseconds below which widths are only taken when none between the two exist.
            start: widths to shrink from, or where they are fast enough already, to grow from; None means free choice.
        """
        groups = list(self.groups.values())
        full = full_widths(groups)
        if start is None and at_least_ms <= self._predict(full) <= limit_ms:
            return full
        allowed = {name: list(range(len(widths))) for name, widths in self.allowed.items()}
        if start is not None:
            shrink = self._predict(start) > limit_ms
            for name, members in self.blocks.items():
                bound = max(start[member] for member in members)
                allowed[name] = [
                    index
                    for index, width in enumerate(self.allowed[name])
                    if (width <= bound if shrink else width >= bound)
                ] or [0 if shrink else len(self.allowed[name]) - 1]
        domains = {name: len(widths) for name, widths in self.allowed.items()}
        for must_stay in (set(), self._must_stay()):
            within = {name: [len(self.allowed[name]) - 1] if name in must_stay else allowed[name] for name in allowed}
            found = solve(domains, self._factors(), limit_ms, at_least_ms, within)
            if found is None:
                break
            widths = {
                member: self.allowed[name][found.picks[name]]
                for name, members in self.blocks.items()
                for member in members
            }
            if not self.policy.missing_kinds(widths, groups):
                return self._alive(widths)
        return widths_of(self.smallest(), groups)

    def _must_stay(self) -> set[str]:
        """The layers and branches that stay where as few as allowed do."""
        smallest = self.smallest()
        return {name for name, group in self.groups.items() if group.removes and smallest[name]}

    def _factors(self) -> list[Factor]:
        """Predicted milliseconds and values as tables over the options of blocks."""
        factors = []
        for term in self.proxy.terms():
            names = list(dict.fromkeys(self._block_of[name] for name in term.groups))
            axes = [names.index(self._block_of[name]) for name in term.groups]
            options = [np.asarray(self.allowed[name], dtype=np.float64) for name in names]
            grid = np.meshgrid(*options, indexing="ij")
            cost = np.broadcast_to(
                np.asarray(term.milliseconds(*[grid[axis] for axis in axes]), dtype=np.float64),
                [len(option) for option in options],
            )
            factors.append(Factor(tuple(names), cost, np.zeros(cost.shape)))
        return factors + self._value_factors

    @cached_property
    def _value_factors(self) -> list[Factor]:
        """The values of all groups; unlike predictions they stay as they are."""
        return [self._value_factor(group) for group in self.groups.values()]

    def _value_factor(self, group: Group) -> Factor:
        """A group's value, by its own width and those it lies inside; nothing once one of these is gone."""
        lineage = [group]
        while lineage[-1].parent in self.groups:
            lineage.append(self.groups[lineage[-1].parent or ""])
        names = list(dict.fromkeys(self._block_of[member.name] for member in lineage))
        shape = [len(self.allowed[name]) for name in names]
        value = np.zeros(shape)
        for index in np.ndindex(*shape):
            chosen = dict(zip(names, index, strict=True))
            widths = {m.name: self.allowed[block][chosen[block]] for m in lineage for block in [self._block_of[m.name]]}
            if all(widths[member.name] for member in lineage[1:]):
                value[index] = self.objective.value(group, widths)
        return Factor(tuple(names), np.zeros(shape), value)

    def _alive(self, widths: Widths) -> Widths:
        """Widths with 0 for everything inside what is removed."""
        return widths_of(self.keep(widths), list(self.groups.values()))

    def _predict(self, widths: Mapping[str, int]) -> float:
        return float(self.proxy.predict(widths))
