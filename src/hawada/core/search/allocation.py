"""From saliency and predicted milliseconds to widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawada.core.latency import Proxy
from hawada.core.search.knapsack import Factor, solve
from hawada.core.structure import ExportPolicy, Group, Keep, Widths, best_first, full_widths, keep_first, widths_of

Worths = Callable[[Group, int], float]


def saliency_from_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effective gates, each divided by its group's unit count: a wide group is not worth more for being wide."""
    return {name: gate.detach() / gate.numel() for name, gate in gates.items()}


class Allocation:
    """The widths that retain the most saliency within a predicted time: an exact choice, but for rounding of sums.

    Under the uniform layout all groups of a kind are one decision. A branch or layer that goes takes all that is left
    inside along.

    Args:
        groups: every group of the model.
        saliency: per group (units,), larger is more worth keeping; see `saliency_from_gates`. A group without an entry
            keeps all its units while its parent stays, and counts 1 in all.
        proxy: predicts milliseconds, as a sum of terms.
        policy: allowed widths.
        worths: what it is worth to keep so many units of a group, while its parent stays; None reads it from the
            saliency.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        saliency: Mapping[str, Tensor],
        proxy: Proxy,
        policy: ExportPolicy,
        worths: Worths | None = None,
    ) -> None:
        self.groups = {group.name: group for group in groups}
        self.policy, self.proxy, self.worths = policy, proxy, worths
        self.saliency = {
            group.name: saliency.get(group.name, torch.full((group.units,), 1 / group.units)).detach().float().cpu()
            for group in groups
        }
        self._order = {name: best_first(values) for name, values in self.saliency.items()}
        self._worths: dict[tuple[Any, ...], float] = {}
        self.blocks = {members[0].name: [member.name for member in members] for members in policy.shared(groups)}
        self.allowed = {
            name: policy.widths(self.groups[name])
            if all(member in saliency for member in members)
            else [self.groups[name].full_width]
            for name, members in self.blocks.items()
        }
        self._block_of = {member: name for name, members in self.blocks.items() for member in members}

    def worth(self, widths: Mapping[str, int]) -> float:
        """What the given widths are worth in all."""
        return sum(self._worth(name, widths) for name in self.groups if self._stays(name, widths))

    def _stays(self, name: str, widths: Mapping[str, int]) -> bool:
        """Whether nothing that a group lies inside is gone."""
        parent = self.groups.get(self.groups[name].parent or "")
        return parent is None or (widths[parent.name] > 0 and self._stays(parent.name, widths))

    def keep(self, widths: Mapping[str, int]) -> Keep:
        """The most salient units of every group in these numbers."""
        return keep_first(list(self.groups.values()), widths, self._order)

    def smallest(self) -> Keep:
        """The least that may stay."""
        widths = {member: self.allowed[name][0] for name, members in self.blocks.items() for member in members}
        branches = [name for name, group in self.groups.items() if group.removes]
        branches.sort(key=lambda name: -float(self.saliency[name]))
        widths = self.policy.restored(widths, list(self.groups.values()), branches)
        return self.keep(widths)

    def within(self, limit_ms: float, wanted_ms: float = 0.0, start: Mapping[str, int] | None = None) -> Widths:
        """The best widths predicted to take at most `limit_ms`, and if there are such, at least `wanted_ms`.

        Args:
            limit_ms: predicted milliseconds not to exceed; where nothing is as fast, the smallest widths are returned.
            wanted_ms: see there.
            start: widths to shrink from, or where they are fast enough already, to grow from; None means free choice.
        """
        groups = list(self.groups.values())
        full = full_widths(groups)
        if start is None and wanted_ms <= self._predict(full) <= limit_ms:
            return full
        allowed = {name: list(range(len(widths))) for name, widths in self.allowed.items()}
        if start is not None:
            shrink = self._predict(start) > limit_ms
            for name, members in self.blocks.items():
                wanted = max(start[member] for member in members)
                allowed[name] = [
                    index
                    for index, width in enumerate(self.allowed[name])
                    if (width <= wanted if shrink else width >= wanted)
                ] or [0 if shrink else len(self.allowed[name]) - 1]
        domains = {name: len(widths) for name, widths in self.allowed.items()}
        for must_stay in (set(), self._must_stay()):
            within = {name: [len(self.allowed[name]) - 1] if name in must_stay else allowed[name] for name in allowed}
            found = solve(domains, self._factors(), limit_ms, wanted_ms, within)
            if found is None:
                break
            widths = {
                member: self.allowed[name][found.picks[name]]
                for name, members in self.blocks.items()
                for member in members
            }
            if not self.policy.lacking(widths, groups):
                return self._alive(widths)
        return widths_of(self.smallest(), groups)

    def _must_stay(self) -> set[str]:
        """The layers and branches that stay where as few as allowed do."""
        smallest = self.smallest()
        return {name for name, group in self.groups.items() if group.removes and smallest[name]}

    def _factors(self) -> list[Factor]:
        """Predicted milliseconds and saliency as tables over the options of blocks."""
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
        for group in self.groups.values():
            factors.append(self._value_factor(group))
        return factors

    def _value_factor(self, group: Group) -> Factor:
        """What a group retains, by its own width and those it lies inside; nothing once one of these is gone."""
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
                value[index] = self._worth(group.name, widths)
        return Factor(tuple(names), np.zeros(shape), value)

    def _worth(self, name: str, widths: Mapping[str, int]) -> float:
        """What one group retains: that of its best units, of those whose parent's unit stays, or what was measured.

        By saliency it grows with the root of the share that is kept: the fewer units are left, the dearer is the next.
        Gates that hardly differ would otherwise empty one kind of group before touching another.
        """
        group = self.groups[name]
        if self.worths is not None:
            return self.worths(group, widths[name])
        parent = self.groups.get(group.parent or "")
        within = [] if parent is None or parent.units == 1 else [replace(parent, parent=None, equal_per_parent=None)]
        key = (name, widths[name], *(widths[above.name] for above in within))
        if key not in self._worths:
            kept = keep_first([*within, group], widths, self._order)[name]
            total = float(self.saliency[name].double().sum())
            retained = float(self.saliency[name][list(kept)].double().sum())
            self._worths[key] = math.sqrt(retained * total)
        return self._worths[key]

    def _alive(self, widths: Widths) -> Widths:
        """Widths with 0 for everything inside what is removed."""
        return widths_of(self.keep(widths), list(self.groups.values()))

    def _predict(self, widths: Mapping[str, int]) -> float:
        return float(self.proxy.predict(widths))
