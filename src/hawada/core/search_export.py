"""Which units to keep so that the *measured* latency meets the budget: allocate, slice, measure, correct, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hawada.core.allocation import Allocation
from hawada.core.budget import MARGIN, Budget
from hawada.core.export import ExportPolicy
from hawada.core.profiler import Comparison
from hawada.core.proxy_cost import Proxy
from hawada.core.structure import Group, Keep, Widths, widths_of

STEPS_DOWN = (0.95, 0.85, 0.7, 0.0)  # fractions of the fastest prediction so far; at last the smallest model


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
        """Kept indices that are predicted to take this fraction of the teacher's time, or little less."""
        allocation, limit_ms = self._allocation(level), aim_ratio * self.teacher_ms
        wanted_ms = limit_ms * (1 - MARGIN * self.budget.tolerance)
        return allocation.keep(allocation.within(limit_ms, wanted_ms, self.start))

    def try_keep(self, keep: Keep, level: int) -> Candidate:
        """Measure a choice and add it to the proxy's fit."""
        widths = widths_of(keep, self.groups)
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
    if not any(budget.holds(candidate.comparison) for candidate in tried) and not _step_down(search, tried):
        return SearchResult(tried[-1], "infeasible", tried)
    holding = [candidate for candidate in tried if budget.holds(candidate.comparison)]
    on_target = [candidate for candidate in holding if budget.on_target(candidate.comparison)]
    if on_target:
        return SearchResult(max(on_target, key=lambda candidate: candidate.worth), "on_target", tried)
    return SearchResult(max(holding, key=lambda candidate: candidate.comparison.ratio.median), "held", tried)


def _step_down(search: BudgetSearch, tried: list[Candidate]) -> bool:
    """Try ever smaller models, at last the smallest there is, until one holds the budget; whether one does."""
    lowest = min(float(search.proxy.predict(widths_of(candidate.keep, search.groups))) for candidate in tried)
    for share in STEPS_DOWN:
        keep = search.choose(share * lowest / search.teacher_ms, 0) if share else search.smallest()
        if all(candidate.keep != keep for candidate in tried) or not share:
            tried.append(search.try_keep(keep, 0))
            if search.budget.holds(tried[-1].comparison):
                return True
    return False


def _next_aim(search: BudgetSearch, tried: Sequence[Candidate]) -> float:
    """The predicted ratio to ask for next, from how the refitted proxy sees what was measured.

    Between a candidate that was too fast and one that was too slow, interpolate; on one side only, scale by the
    nearest candidate's error. The wider the intervals are, the further below the target the aim must lie.
    """
    budget, middle_ratio = search.budget, search.budget.middle(search.teacher_ms)
    spread = float(np.median([c.comparison.ratio.high / c.comparison.ratio.median - 1 for c in tried]))
    highest = budget.ratio(search.teacher_ms) * (1 - MARGIN * budget.tolerance) / (1 + spread)
    goal = min(middle_ratio, highest)
    points = []  # (predicted by the present fit, measured)
    for candidate in tried:
        middle = search.budget.middle(candidate.comparison.baseline.median)
        predicted = float(search.proxy.predict(widths_of(candidate.keep, search.groups))) / search.teacher_ms
        points.append((predicted, candidate.comparison.ratio.median * middle_ratio / middle))
    fast = max((point for point in points if point[1] <= goal), key=lambda point: point[1], default=None)
    slow = min((point for point in points if point[1] > goal), key=lambda point: point[1], default=None)
    if fast and slow and fast[0] < slow[0]:
        share = (goal - fast[1]) / (slow[1] - fast[1])
        return fast[0] + min(max(share, 0.1), 0.9) * (slow[0] - fast[0])
    nearest = min(points, key=lambda point: abs(point[1] - goal))
    return goal * nearest[0] / nearest[1]
