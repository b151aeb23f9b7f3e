"""From saliency and predicted milliseconds to widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hawada.core.export import ExportPolicy, best_first
from hawada.core.proxy_cost import Proxy
from hawada.core.structure import Group, Keep, Widths, full_widths, keep_first, widths_of

SLACK = 0.02  # share of the time that may stay unused before widths are exchanged for it


def saliency_from_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effective gates, each divided by its group's unit count: a wide group is not worth more for being wide."""
    return {name: gate.detach() / gate.numel() for name, gate in gates.items()}


class Allocation:
    """Greedy choice of widths: the least saliency lost per predicted millisecond saved, one move after another.

    A move takes a group (under the uniform layout, all groups of its kind together) to *any* smaller allowed width, not
    only the next one, so plateaus of the latency are stepped over; removing a branch or layer costs its own gate and
    all that is left inside.

    Args:
        groups: every group of the model.
        saliency: per group (units,), larger is more worth keeping; see `saliency_from_gates`. A group without an entry
            keeps all its units while its parent stays, and counts 1 in all.
        proxy: predicts milliseconds.
        policy: allowed widths.
    """

    def __init__(
        self, groups: Sequence[Group], saliency: Mapping[str, Tensor], proxy: Proxy, policy: ExportPolicy
    ) -> None:
        self.groups = {group.name: group for group in groups}
        self.policy, self.proxy = policy, proxy
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
        self.children = {name: [child.name for child in groups if child.parent == name] for name in self.groups}
        self._related = self._relations()

    def worth(self, widths: Mapping[str, int]) -> float:
        """Saliency that the given widths retain."""
        return sum(self._worth(name, widths) for name in self.groups)

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

    def shrink_to(self, aim_ms: float, start: Mapping[str, int] | None = None) -> Widths:
        """Widths predicted to take at most `aim_ms`, or the smallest there are; then grown while they still do.

        Args:
            aim_ms: predicted milliseconds not to exceed.
            start: widths to begin with, moved to the nearest allowed ones; None means full.
        """
        widths = full_widths(list(self.groups.values()))
        if start is not None:
            for name, members in self.blocks.items():
                for member in members:
                    widths[member] = min(self.allowed[name], key=lambda width: abs(width - start[member]))
            widths = self._alive(widths)
        return self._exchange(self._grow(self._shrink(widths, aim_ms), aim_ms), aim_ms)

    def _exchange(self, widths: Widths, aim_ms: float) -> Widths:
        """Where coarse widths left much of the time unused: one block a step wider, the others narrower for it."""
        while self._predict(widths) < (1 - SLACK) * aim_ms:
            worth, better = self.worth(widths), None
            for name in self.blocks:
                change = self._enlargement(name, widths)
                if change is None:
                    continue
                other = self._grow(self._shrink(widths | change, aim_ms, locked=name), aim_ms)
                if self._predict(other) <= aim_ms and self.worth(other) > worth * (1 + 1e-9):
                    worth, better = self.worth(other), other
            if better is None:
                break
            widths = better
        return widths

    def _shrink(self, widths: Widths, aim_ms: float, locked: str | None = None) -> Widths:
        """One move after another until the prediction is at most `aim_ms`, or none is left."""
        widths = dict(widths)
        predicted = self._predict(widths)
        moves: dict[str, list[tuple[float, float, Widths]]] = {}  # block -> (saliency lost, ms saved, widths changed)
        while predicted > aim_ms:
            for name in self.blocks:
                if name not in moves and name != locked:
                    moves[name] = self._moves(name, widths, predicted)
            best = min(
                (move for options in moves.values() for move in options if self._still_possible(move[2], widths)),
                key=lambda m: (m[0] / m[1], m[0]),
                default=None,
            )
            if best is None:
                break
            enough = [
                move
                for options in moves.values()
                for move in options
                if predicted - move[1] <= aim_ms and self._still_possible(move[2], widths)
            ]
            if enough:  # the last move: the cheapest that suffices
                best = min(enough, key=lambda m: (m[0], m[1]))
            widths.update(best[2])
            predicted = self._predict(widths)
            for name in best[2]:  # only moves of what is coupled with a change look different now
                for related in self._related[name]:
                    moves.pop(related, None)
        return widths

    def _grow(self, widths: Widths, aim_ms: float) -> Widths:
        """Give back what still fits, the most saliency per millisecond first: wider groups, or removed branches."""
        while True:
            predicted, worth = self._predict(widths), self.worth(widths)
            best: tuple[float, Widths] | None = None
            for name in self.blocks:
                change = self._enlargement(name, widths)
                if change is None:
                    continue
                extra = self._predict(widths | change) - predicted
                if predicted + extra <= aim_ms:
                    rate = (self.worth(widths | change) - worth) / max(extra, 1e-9)
                    if best is None or rate > best[0]:
                        best = (rate, change)
            if best is None:
                return widths
            widths = widths | best[1]

    def _enlargement(self, name: str, widths: Widths) -> Widths | None:
        """How a block grows by one step: to the next width, or a removed branch with all its groups narrow."""
        if self.groups[name].removes:
            parent = self.groups[name].parent
            if widths[name] or self.allowed[name] == [0] or (parent is not None and not widths[parent]):
                return None
            return {name: 1} | {child: self._width_when_restored(child, widths) for child in self._descendants(name)}
        staying = [member for member in self.blocks[name] if widths[member]]
        larger = [width for width in self.allowed[name] if staying and width > widths[staying[0]]]
        return dict.fromkeys(staying, larger[0]) if larger else None

    def _width_when_restored(self, name: str, widths: Widths) -> int:
        """The width of a group inside a branch that comes back: that of its kind if it is shared, else the smallest."""
        if self.groups[name].removes:
            return 1
        block = next(block for block, members in self.blocks.items() if name in members)
        return max((widths[member] for member in self.blocks[block]), default=0) or self.allowed[block][0]

    def _moves(self, name: str, widths: Widths, predicted: float) -> list[tuple[float, float, Widths]]:
        """Every way to make one block smaller that saves time."""
        staying = [member for member in self.blocks[name] if widths[member]]
        moves = []
        for width in self.allowed[name] if staying else []:
            if width >= widths[staying[0]]:
                break
            change: Widths = dict.fromkeys(staying, width)
            if self.groups[name].removes:
                change |= dict.fromkeys(self._descendants(name), 0)
            after = widths | change
            touched = {other for member in change for other in (member, *self._descendants(member))}
            lost = sum(self._worth(other, widths) - self._worth(other, after) for other in touched)
            saved = predicted - self._predict(after)
            if saved > 0:
                moves.append((lost, saved, change))
        return moves

    def _still_possible(self, change: Widths, widths: Widths) -> bool:
        """Whether enough layers and branches of every kind stay when one goes."""
        width = next(iter(change.values()))
        return width > 0 or not self.policy.lacking(widths | change, list(self.groups.values()))

    def _worth(self, name: str, widths: Mapping[str, int]) -> float:
        """What one group retains: that of its best units, of those whose parent's unit stays.

        It grows with the root of the share of saliency that is kept: the fewer units are left, the dearer is the next.
        Gates that hardly differ would otherwise empty one kind of group before touching another.
        """
        group = self.groups[name]
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

    def _relations(self) -> dict[str, list[str]]:
        """For each group, the blocks whose moves change when it does: those in its structure or cutting its tensors."""
        by_tensor: dict[str, set[str]] = {}
        for group in self.groups.values():
            for cut in group.cuts:
                by_tensor.setdefault(cut.tensor, set()).add(group.name)
        coupled: dict[str, set[str]] = {}
        for name, group in self.groups.items():
            root = self._root(name)
            coupled[name] = {root, *self._descendants(root)}.union(*(by_tensor[cut.tensor] for cut in group.cuts))
        block_of = {member: block for block, members in self.blocks.items() for member in members}
        return {name: sorted({block_of[other] for other in others}) for name, others in coupled.items()}

    def _root(self, name: str) -> str:
        parent = self.groups[name].parent
        return name if parent is None else self._root(parent)

    def _descendants(self, name: str) -> list[str]:
        return [d for child in self.children[name] for d in (child, *self._descendants(child))]
