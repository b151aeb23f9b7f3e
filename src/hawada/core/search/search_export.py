"""Which units to keep so that the *measured* latency meets the budget: allocate, slice, measure, correct, repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hawada.core.latency import SEARCH_MARGIN_OF_TOLERANCE, Budget, Proxy
from hawada.core.search.allocation import Allocation
from hawada.core.search.objective import SearchObjective
from hawada.core.structure import ExportPolicy, Group, Keep, Widths, widths_of
from hawada.core.verdict import Comparison, merged

MAX_TOLERANCES_TO_NEIGHBOUR = 2.0  # a model that is as near to the goal is changed, not chosen anew
# Of a measurement of the search in the proxy's fit, where a random calibration model has 1: what the search measures
# lies near the target, which is where the fit must be right. Of 30 problems of benchmarks/simulated_targets.py, 27
# ended on target with it, and 25 with a weight of 1.
SEARCH_SAMPLE_WEIGHT = 3.0
FALLBACK_RATIOS = (0.95, 0.85, 0.7, 0.0)  # fractions of the fastest prediction so far; at last the smallest model


@dataclass(frozen=True)
class Candidate:
    """One sliced model that was measured.

    Attributes:
        level: which of the search's policies it was allocated with; 0 is the finest.
        keep: its kept indices.
        predicted_ratio: what the proxy predicted before the measurement, relative to the teacher.
        measurements: every comparison with the teacher, in order.
        value: the total of its units, see `SearchObjective`.
    """

    level: int
    keep: Keep
    predicted_ratio: float
    measurements: tuple[Comparison, ...]
    value: float

    @property
    def comparison(self) -> Comparison:
        """All measurements as one."""
        return merged(self.measurements, ends="mean")

    @property
    def times(self) -> int:
        """How often it was measured."""
        return len(self.measurements)


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        chosen: the model to export.
        status: `on_target`, `held` (the budget holds, further below than the tolerance) or `infeasible`: then `chosen`
            is the smallest model there is; `undecided` is the same where its measurement does not tell whether it
            holds the budget.
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
        objective: what is kept as much of as the budget allows; it ranks candidates.
        proxy: fitted in milliseconds of a teacher that takes `teacher_ms`; every measurement is added to it.
        policies: sets of allowed widths, the finest first.
        measure: slices and measures a choice against the teacher, interleaved.
        budget: the goal.
        teacher_ms: the teacher's time that the proxy was fitted with.
        start: widths to shrink from (those that the gates ask for), or None for the full model.
        confirmations: how often a model that is on target must be measured again. A machine has phases that outlast
            a measurement, and of many figures the lucky one is the first to look right.
        alternatives: other objectives that propose widths too; of all proposals the best by `objective` is taken.
    """

    groups: Sequence[Group]
    objective: SearchObjective
    proxy: Proxy
    policies: Sequence[ExportPolicy]
    measure: Callable[[Keep], Comparison]
    budget: Budget
    teacher_ms: float
    start: Widths | None = None
    confirmations: int = 0
    alternatives: Sequence[SearchObjective] = ()
    _proposing: list[list[Allocation]] = field(init=False, repr=False, compare=False)  # by level, by objective

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("gpu.multiple: no rounding multiple is given; [1] allows every width")
        self._proposing = [
            [Allocation(self.groups, each, self.proxy, policy) for each in (self.objective, *self.alternatives)]
            for policy in self.policies
        ]

    def choose(self, aim_ratio: float, level: int, start: Widths | None = None) -> Keep:
        """Kept indices that are predicted to take this fraction of the teacher's time, or little less.

        Args:
            aim_ratio: predicted milliseconds over the teacher's.
            level: index of the policy.
            start: widths to shrink or grow from, by the search's objective alone; None means those of the search.
        """
        limit_ms = aim_ratio * self.teacher_ms
        at_least_ms = limit_ms * (1 - SEARCH_MARGIN_OF_TOLERANCE * self.budget.tolerance)
        proposing = self._proposing[level] if start is None else [self.allocation(level)]
        keeps = [each.keep(each.within(limit_ms, at_least_ms, start or self.start)) for each in proposing]
        if all(keep == keeps[0] for keep in keeps):
            return keeps[0]
        return max(keeps, key=self.objective.total)

    def allocation(self, level: int) -> Allocation:
        """The allocation by the search's objective with the policy of this level."""
        return self._proposing[level][0]

    def predicted_ratio(self, keep: Keep) -> float:
        """What the proxy predicts by now, relative to the teacher."""
        return float(self.proxy.predict(widths_of(keep, self.groups))) / self.teacher_ms

    def try_keep(self, keep: Keep, level: int) -> Candidate:
        """Measure a choice and add it to the proxy's fit."""
        predicted = self.predicted_ratio(keep)
        return Candidate(level, keep, predicted, (self._measured(keep),), self.objective.total(keep))

    def confirm(self, candidate: Candidate) -> Candidate:
        """Measure it once more, slice and warm-up included."""
        return replace(candidate, measurements=(*candidate.measurements, self._measured(candidate.keep)))

    def _measured(self, keep: Keep) -> Comparison:
        comparison = self.measure(keep)
        milliseconds = comparison.ratio.median * self.teacher_ms
        self.proxy.add_sample(widths_of(keep, self.groups), milliseconds, weight=SEARCH_SAMPLE_WEIGHT)
        return comparison

    def smallest(self) -> Keep:
        """The least that may stay of the groups that have an importance."""
        return self.allocation(0).smallest()


def grid_search_latency(search: BudgetSearch) -> list[Candidate]:
    """One candidate per policy, each aimed at the middle of the budget and measured; the best comes first.

    The best has the largest value among those that hold the budget; when none holds it, it is the fastest.
    """
    aim = search.budget.middle(search.teacher_ms)
    candidates: list[Candidate] = []
    for level in range(len(search.policies)):
        keep = search.choose(aim, level)
        if all(candidate.keep != keep for candidate in candidates):
            candidates.append(search.try_keep(keep, level))

    def rank(candidate: Candidate) -> tuple[bool, float]:
        holds = search.budget.holds(candidate.comparison)
        return (not holds, -candidate.value if holds else candidate.comparison.ratio.median)

    return sorted(candidates, key=rank)


def search_export(search: BudgetSearch, max_measurements: int = 10) -> SearchResult:
    """Find the model that measurably meets the budget.

    The first measurements choose among the policies; the later ones correct the aim inside the bracket of what was
    measured too fast and too slow, until one is on target and stays there when it is measured again. Once one is
    close, the next are its neighbours, which the proxy misjudges as it did that one. Where a policy's widths are too
    coarse to come closer, the next finer one takes over. When nothing holds the budget, the smallest model is measured
    before giving up.

    Args:
        search: the problem.
        max_measurements: the most measurements in all, those of ever smaller models before giving up not counted.

    Returns:
        The candidate on target with the largest value, else the slowest that holds the budget, with a margin where
        there is one, else the fastest.
    """
    budget = search.budget
    tried = grid_search_latency(search)
    level = tried[0].level
    while sum(candidate.times for candidate in tried) < max_measurements:
        hits = [index for index, candidate in enumerate(tried) if budget.on_target(candidate.comparison)]
        if hits:
            best = max(hits, key=lambda index: tried[index].value)
            if tried[best].times > search.confirmations:
                break
            tried[best] = search.confirm(tried[best])
            continue
        fresh = _next_choice(search, tried, level)
        if fresh is not None:
            tried.append(search.try_keep(fresh, level))
        elif level > 0:
            level -= 1
        else:
            break
    if not any(budget.holds(candidate.comparison) for candidate in tried) and not _step_down(search, tried):
        smallest = tried[-1].comparison
        clear = budget.misses(smallest) and smallest.noisy is None
        return SearchResult(tried[-1], "infeasible" if clear else "undecided", tried)
    holding = [candidate for candidate in tried if budget.holds(candidate.comparison)]
    on_target = [candidate for candidate in holding if budget.on_target(candidate.comparison)]
    if on_target:
        confirmed = [candidate for candidate in on_target if candidate.times > search.confirmations]
        return SearchResult(max(confirmed or on_target, key=lambda candidate: candidate.value), "on_target", tried)
    with_margin = [candidate for candidate in holding if budget.holds(candidate.comparison, margin=True)]
    return SearchResult(
        max(with_margin or holding, key=lambda candidate: candidate.comparison.ratio.median), "held", tried
    )


def _step_down(search: BudgetSearch, tried: list[Candidate]) -> bool:
    """Try ever smaller models, at last the smallest there is, until one holds the budget; whether one does."""
    lowest = min(search.predicted_ratio(candidate.keep) for candidate in tried)
    for share in FALLBACK_RATIOS:
        keep = search.choose(share * lowest, 0) if share else search.smallest()
        if all(candidate.keep != keep for candidate in tried) or not share:
            tried.append(search.try_keep(keep, 0))
            for _ in range(search.confirmations):  # a smallest model that straddles the target is measured again
                if not share and not search.budget.misses(tried[-1].comparison):
                    tried[-1] = search.confirm(tried[-1])
            if search.budget.holds(tried[-1].comparison):
                return True
    return False


def _next_choice(search: BudgetSearch, tried: Sequence[Candidate], level: int) -> Keep | None:
    """A model that was not measured yet and should come closer to the goal; None where the policy has none."""
    goal = _goal(search, tried)
    points = [(search.predicted_ratio(candidate.keep), _measured(search, candidate)) for candidate in tried]
    nearest = min(range(len(tried)), key=lambda index: abs(points[index][1] - goal))
    predicted, measured = points[nearest]
    aims: list[tuple[float, Widths | None]] = []
    if abs(measured / goal - 1) <= MAX_TOLERANCES_TO_NEIGHBOUR * search.budget.tolerance:
        aims.append((goal * predicted / measured, widths_of(tried[nearest].keep, search.groups)))
    aims.append((_next_aim(points, goal), None))
    for aim, start in aims:
        # A choice stays below its aim; where that leads to a known model, the upper end of what is accepted may not.
        for share in (1.0, 1.0 + SEARCH_MARGIN_OF_TOLERANCE * search.budget.tolerance):
            keep = search.choose(aim * share, level, start)
            if all(candidate.keep != keep for candidate in tried):
                return keep
    return None


def _goal(search: BudgetSearch, tried: Sequence[Candidate]) -> float:
    """The ratio to come close to: the wider the intervals are, the further below the target it must lie."""
    budget = search.budget
    spread = float(np.median([c.comparison.ratio.high / c.comparison.ratio.median - 1 for c in tried]))
    highest = budget.ratio(search.teacher_ms) * (1 - SEARCH_MARGIN_OF_TOLERANCE * budget.tolerance) / (1 + spread)
    return min(budget.middle(search.teacher_ms), highest)


def _measured(search: BudgetSearch, candidate: Candidate) -> float:
    """The measured ratio, or where milliseconds are asked for, what it is in terms of the first teacher's time."""
    then = search.budget.middle(candidate.comparison.baseline.median)
    return candidate.comparison.ratio.median * search.budget.middle(search.teacher_ms) / then


def _next_aim(points: Sequence[tuple[float, float]], goal: float) -> float:
    """The predicted ratio to ask for next, from how the refitted proxy sees what was measured.

    Between a candidate that was too fast and one that was too slow, interpolate; on one side only, scale by the
    nearest candidate's error.

    Args:
        points: (predicted by the present fit, measured) ratios.
        goal: the ratio to reach.
    """
    fast = max((point for point in points if point[1] <= goal), key=lambda point: point[1], default=None)
    slow = min((point for point in points if point[1] > goal), key=lambda point: point[1], default=None)
    if fast and slow and fast[0] < slow[0]:
        share = (goal - fast[1]) / (slow[1] - fast[1])
        return fast[0] + min(max(share, 0.1), 0.9) * (slow[0] - fast[0])
    nearest = min(points, key=lambda point: abs(point[1] - goal))
    return goal * nearest[0] / nearest[1]
