"""Which units to keep so that the *measured* latency meets the budget: allocate, slice, measure, correct, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawada.core.budget import Budget
from hawada.core.export import ExportPolicy, top_units
from hawada.core.profiler import Comparison
from hawada.core.proxy_cost import Proxy
from hawada.core.structure import Group, Keep, Widths, full_widths, widths_of, without_orphans


def saliency_from_gates(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effective gates, each divided by its group's unit count: a wide group is not worth more for being wide."""
    return {name: gate.detach() / gate.numel() for name, gate in gates.items()}


class Allocation:
    """Greedy choice of widths: the least saliency lost per predicted millisecond saved, one move after another.

    A move takes a group to *any* smaller allowed width, not only the next one, so plateaus of the latency are stepped
    over; removing a branch costs its own gate and all that is left inside.

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
        self.saliency = {
            group.name: saliency.get(group.name, torch.full((group.units,), 1 / group.units)) for group in groups
        }
        self.proxy = proxy
        self.allowed = {g.name: policy.widths(g) if g.name in saliency else [g.units] for g in groups}
        self.children = {name: [child.name for child in groups if child.parent == name] for name in self.groups}
        self._worth: dict[str, list[float]] = {}  # saliency of the best k units, for k = 0..units
        for name in self.groups:
            ordered = self.saliency[name].detach().float().cpu().sort(descending=True).values.double()
            self._worth[name] = [0.0, *ordered.cumsum(0).tolist()]

    def worth(self, widths: Mapping[str, int]) -> float:
        """Saliency that the given widths retain."""
        return sum(self._worth[name][width] for name, width in widths.items())

    def keep(self, widths: Mapping[str, int]) -> Keep:
        """The most salient units of every group in these numbers."""
        chosen = {name: top_units(self.saliency[name], width) for name, width in widths.items()}
        return without_orphans(chosen, list(self.groups.values()))

    def smallest(self) -> Keep:
        """The least that may stay."""
        return self.keep({name: allowed[0] for name, allowed in self.allowed.items()})

    def shrink_to(self, aim_ms: float, start: Mapping[str, int] | None = None) -> Widths:
        """Widths predicted to take at most `aim_ms`, or the smallest there are; then grown while they still do.

        Args:
            aim_ms: predicted milliseconds not to exceed.
            start: widths to begin with, moved to the nearest allowed ones; None means full.
        """
        widths = full_widths(list(self.groups.values()))
        if start is not None:
            nearest = {n: min(allowed, key=lambda w: abs(w - start[n])) for n, allowed in self.allowed.items()}
            widths = widths_of(self.keep(nearest))
        predicted = self._predict(widths)
        moves: dict[str, list[tuple[float, float, Widths]]] = {}  # group -> (saliency lost, ms saved, widths changed)
        while predicted > aim_ms:
            for name in self.groups:
                if name not in moves:
                    moves[name] = self._moves(name, widths, predicted)
            best = min(
                (move for options in moves.values() for move in options),
                key=lambda m: (m[0] / m[1], m[0]),
                default=None,
            )
            if best is None:
                break
            enough = [move for options in moves.values() for move in options if predicted - move[1] <= aim_ms]
            if enough:  # the last move: the cheapest that suffices
                best = min(enough, key=lambda m: (m[0], m[1]))
            widths.update(best[2])
            predicted = self._predict(widths)
            for name in best[2]:  # only moves within the structure that changed look different now
                root = self._root(name)
                for related in (root, *self._descendants(root)):
                    moves.pop(related, None)
        return self._grow(widths, aim_ms)

    def _grow(self, widths: Widths, aim_ms: float) -> Widths:
        """Give back what still fits, the most saliency per millisecond first: wider groups, or removed branches."""
        while True:
            predicted = self._predict(widths)
            best: tuple[float, Widths] | None = None
            for name in self.groups:
                for change in self._enlargements(name, widths):
                    extra = self._predict(widths | change) - predicted
                    if predicted + extra <= aim_ms:
                        gain = sum(
                            self._worth[other][new] - self._worth[other][widths[other]] for other, new in change.items()
                        )
                        rate = gain / max(extra, 1e-9)
                        if best is None or rate > best[0]:
                            best = (rate, change)
            if best is None:
                return widths
            widths = widths | best[1]

    def _enlargements(self, name: str, widths: Widths) -> list[Widths]:
        """Ways to make one group larger: the next width, or for a removed branch itself with all its groups narrow."""
        parent = self.groups[name].parent
        larger = [width for width in self.allowed[name] if width > widths[name]]
        if not larger or (parent is not None and widths[parent] == 0):
            return []
        if not self.groups[name].removes:
            return [{name: larger[0]}]
        inside = self._descendants(name)
        return [{name: 1} | {child: 1 if self.groups[child].removes else self.allowed[child][0] for child in inside}]

    def _moves(self, name: str, widths: Widths, predicted: float) -> list[tuple[float, float, Widths]]:
        """Every way to make one group smaller that saves time."""
        moves = []
        for width in self.allowed[name]:
            if width >= widths[name]:
                break
            change: Widths = {name: width}
            if self.groups[name].removes and width == 0:
                change |= dict.fromkeys(self._descendants(name), 0)
            lost = sum(self._worth[other][widths[other]] - self._worth[other][new] for other, new in change.items())
            saved = predicted - self._predict(widths | change)
            if saved > 0:
                moves.append((lost, saved, change))
        return moves

    def _predict(self, widths: Mapping[str, int]) -> float:
        return float(self.proxy.predict(widths))

    def _root(self, name: str) -> str:
        parent = self.groups[name].parent
        return name if parent is None else self._root(parent)

    def _descendants(self, name: str) -> list[str]:
        return [d for child in self.children[name] for d in (child, *self._descendants(child))]


@dataclass(frozen=True)
class Candidate:
    """One sliced model that was measured.

    Attributes:
        level: which of the search's policies it was allocated with; 0 is the finest.
        keep: its kept indices.
        predicted_ratio: what the proxy said before the measurement, relative to the teacher.
        comparison: what was measured.
        worth: saliency retained.
    """

    level: int
    keep: Keep
    predicted_ratio: float
    comparison: Comparison
    worth: float


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        chosen: the model to export.
        status: `on_target`, `held` (the budget holds, further below than the tolerance) or `infeasible`: then `chosen`
            is the smallest model there is.
        candidates: all that were measured, in order.
    """

    chosen: Candidate
    status: str
    candidates: list[Candidate]


@dataclass
class BudgetSearch:
    """Everything that stays the same while candidates are tried.

    Attributes:
        groups: every group of the model.
        saliency: per group, (units,); groups without an entry stay whole.
        proxy: fitted in milliseconds of a teacher that takes `teacher_ms`; every measurement is added to it.
        policies: sets of allowed widths, the finest first.
        measure: slices and measures a choice against the teacher, interleaved.
        budget: the goal.
        teacher_ms: the teacher's time that the proxy was fitted with.
        start: widths to shrink from (those that the gates ask for), or None for the full model.
    """

    groups: Sequence[Group]
    saliency: Mapping[str, Tensor]
    proxy: Proxy
    policies: Sequence[ExportPolicy]
    measure: Callable[[Keep], Comparison]
    budget: Budget
    teacher_ms: float
    start: Widths | None = None

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("gpu.multiple: no rounding multiple is given; [1] allows every width")

    def choose(self, aim_ratio: float, level: int) -> Keep:
        """Kept indices that are predicted to take at most this fraction of the teacher's time."""
        allocation = self._allocation(level)
        return allocation.keep(allocation.shrink_to(aim_ratio * self.teacher_ms, self.start))

    def try_keep(self, keep: Keep, level: int) -> Candidate:
        """Measure a choice and add it to the proxy's fit."""
        widths = widths_of(keep)
        predicted = float(self.proxy.predict(widths)) / self.teacher_ms
        comparison = self.measure(keep)
        self.proxy.add_sample(widths, comparison.ratio.median * self.teacher_ms, weight=3.0)
        return Candidate(level, keep, predicted, comparison, self._allocation(level).worth(widths))

    def smallest(self) -> Keep:
        """The least that may stay of the groups that have a saliency."""
        return self._allocation(0).smallest()

    def _allocation(self, level: int) -> Allocation:
        return Allocation(self.groups, self.saliency, self.proxy, self.policies[level])


def grid_search_latency(search: BudgetSearch) -> list[Candidate]:
    """One candidate per policy, each aimed at the middle of the budget and measured; the best comes first.

    The best retains the most saliency among those that hold the budget; when none holds it, the fastest.
    """
    aim = search.budget.middle(search.teacher_ms)
    candidates: list[Candidate] = []
    for level in range(len(search.policies)):
        keep = search.choose(aim, level)
        if all(candidate.keep != keep for candidate in candidates):
            candidates.append(search.try_keep(keep, level))

    def rank(candidate: Candidate) -> tuple[bool, float]:
        holds = search.budget.holds(candidate.comparison)
        return (not holds, -candidate.worth if holds else candidate.comparison.ratio.median)

    return sorted(candidates, key=rank)


def search_export(search: BudgetSearch, max_measurements: int = 10) -> SearchResult:
    """Find the model that measurably meets the budget.

    The first measurements choose among the policies; the later ones correct the aim inside the bracket of what was
    measured too fast and too slow, until one is on target. Where a policy's widths are too coarse to come closer, the
    next finer one takes over. When nothing holds the budget, the smallest model is measured before giving up.

    Args:
        search: the problem.
        max_measurements: the most models to slice and measure in all, the smallest not counted.

    Returns:
        The candidate on target that retains the most saliency, else the slowest that holds the budget, else the
        fastest.
    """
    budget = search.budget
    tried = grid_search_latency(search)
    level = tried[0].level
    while len(tried) < max_measurements and not any(budget.on_target(candidate.comparison) for candidate in tried):
        aim = _next_aim(search, tried)
        seen = [candidate.keep for candidate in tried]
        # A choice stays below its aim; where that leads to a known model, the upper end of what is accepted may not.
        choices = [search.choose(aim * share, level) for share in (1.0, 1.0 + 0.25 * budget.tolerance)]
        fresh = [keep for keep in choices if keep not in seen]
        if fresh:
            tried.append(search.try_keep(fresh[0], level))
        elif level > 0:
            level -= 1
        else:
            break
    holding = [candidate for candidate in tried if budget.holds(candidate.comparison)]
    if not holding:
        tried.append(search.try_keep(search.smallest(), 0))
        if not budget.holds(tried[-1].comparison):
            return SearchResult(tried[-1], "infeasible", tried)
        holding = tried[-1:]
    on_target = [candidate for candidate in holding if budget.on_target(candidate.comparison)]
    if on_target:
        return SearchResult(max(on_target, key=lambda candidate: candidate.worth), "on_target", tried)
    return SearchResult(max(holding, key=lambda candidate: candidate.comparison.ratio.median), "held", tried)


def _next_aim(search: BudgetSearch, tried: Sequence[Candidate]) -> float:
    """The predicted ratio to ask for next, from how the refitted proxy sees what was measured.

    Between a candidate that was too fast and one that was too slow, interpolate; on one side only, scale by the
    nearest candidate's error.
    """
    goal = search.budget.middle(search.teacher_ms)
    points = []  # (predicted by the present fit, measured)
    for candidate in tried:
        middle = search.budget.middle(candidate.comparison.baseline.median)
        predicted = float(search.proxy.predict(widths_of(candidate.keep))) / search.teacher_ms
        points.append((predicted, candidate.comparison.ratio.median * goal / middle))
    fast = max((point for point in points if point[1] <= goal), key=lambda point: point[1], default=None)
    slow = min((point for point in points if point[1] > goal), key=lambda point: point[1], default=None)
    if fast and slow and fast[0] < slow[0]:
        share = (goal - fast[1]) / (slow[1] - fast[1])
        return fast[0] + min(max(share, 0.1), 0.9) * (slow[0] - fast[0])
    nearest = min(points, key=lambda point: abs(point[1] - goal))
    return goal * nearest[0] / nearest[1]
