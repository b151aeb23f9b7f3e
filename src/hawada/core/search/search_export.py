"""Which units to keep so that the *measured* latency meets the budget: allocate, slice, measure, correct, repeat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from hawada.core.latency import MARGIN, Budget, Comparison, Proxy, averaged
from hawada.core.search.allocation import Allocation, Worths
from hawada.core.structure import ExportPolicy, Group, Keep, Widths, widths_of

CLOSE = 2.0  # tolerances from the goal: a model as near as that is changed, not chosen anew
# Of a measurement of the search in the proxy's fit, where a random calibration model has 1: what the search measures
# lies near the target, which is where the fit must be right. Of 30 problems of benchmarks/simulated_targets.py, 27
# ended on target with it, and 25 with a weight of 1.
SEARCH_SAMPLE_WEIGHT = 3.0
STEPS_DOWN = (0.95, 0.85, 0.7, 0.0)  # fractions of the fastest prediction so far; at last the smallest model


@dataclass(frozen=True)
class Candidate:
    """One sliced model that was measured.

    Attributes:
        level: which of the search's policies it was allocated with; 0 is the finest.
        keep: its kept indices.
        predicted_ratio: what the proxy said before the measurement, relative to the teacher.
        comparison: what was measured; the average, where it was measured more than once.
        worth: of its widths, see `Allocation`, or minus the loss where that is known.
        times: how often it was measured.
    """

    level: int
    keep: Keep
    predicted_ratio: float
    comparison: Comparison
    worth: float
    times: int = 1


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
        confirmations: how often a model that is on target must be measured again. A machine has moods that outlast a
            measurement, and of many figures the lucky one is the first to look right.
        worths: see `Allocation`.
        loss: of a choice of units as a whole, smaller is better. Where it is given, it ranks candidates, and what
            `worths` leads to competes with what `gates` lead to: what groups cost together is not the sum.
        gates: another saliency, for that; None for the same.
    """

    groups: Sequence[Group]
    saliency: Mapping[str, Tensor]
    proxy: Proxy
    policies: Sequence[ExportPolicy]
    measure: Callable[[Keep], Comparison]
    budget: Budget
    teacher_ms: float
    start: Widths | None = None
    confirmations: int = 0
    worths: Worths | None = None
    loss: Callable[[Keep], float] | None = None
    gates: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.policies:
            raise ValueError("gpu.multiple: no rounding multiple is given; [1] allows every width")

    def choose(self, aim_ratio: float, level: int, start: Widths | None = None) -> Keep:
        """Kept indices that are predicted to take this fraction of the teacher's time, or little less.

        Args:
            aim_ratio: predicted milliseconds over the teacher's.
            level: index of the policy.
            start: widths to shrink or grow from; None means those of the search.
        """
        limit_ms = aim_ratio * self.teacher_ms
        wanted_ms = limit_ms * (1 - MARGIN * self.budget.tolerance)
        allocations = [self._allocation(level)]
        if self.loss is not None and start is None:
            by_gates = replace(self, saliency=self.gates or self.saliency, worths=None)
            allocations.append(by_gates._allocation(level))
        keeps = [each.keep(each.within(limit_ms, wanted_ms, start or self.start)) for each in allocations]
        if self.loss is None or all(keep == keeps[0] for keep in keeps):
            return keeps[0]
        losses = [self.loss(keep) for keep in keeps]
        return keeps[losses.index(min(losses))]

    def predicted_ratio(self, keep: Keep) -> float:
        """What the proxy says by now, relative to the teacher."""
        return float(self.proxy.predict(widths_of(keep, self.groups))) / self.teacher_ms

    def try_keep(self, keep: Keep, level: int) -> Candidate:
        """Measure a choice and add it to the proxy's fit."""
        predicted = self.predicted_ratio(keep)
        comparison = self._measured(keep)
        worth = self._allocation(level).worth(widths_of(keep, self.groups)) if self.loss is None else -self.loss(keep)
        return Candidate(level, keep, predicted, comparison, worth)

    def confirm(self, candidate: Candidate) -> Candidate:
        """Measure it once more, slice and warm-up included, and average."""
        known, times = candidate.comparison, candidate.times
        both = averaged(known, self._measured(candidate.keep), share=1 / (times + 1))
        return replace(candidate, comparison=both, times=times + 1)

    def _measured(self, keep: Keep) -> Comparison:
        comparison = self.measure(keep)
        milliseconds = comparison.ratio.median * self.teacher_ms
        self.proxy.add_sample(widths_of(keep, self.groups), milliseconds, weight=SEARCH_SAMPLE_WEIGHT)
        return comparison

    def smallest(self) -> Keep:
        """The least that may stay of the groups that have a saliency."""
        return self._allocation(0).smallest()

    def _allocation(self, level: int) -> Allocation:
        return Allocation(self.groups, self.saliency, self.proxy, self.policies[level], self.worths)


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
    measured too fast and too slow, until one is on target and stays there when it is measured again. Once one is
    close, the next are its neighbours, which the proxy misjudges as it did that one. Where a policy's widths are too
    coarse to come closer, the next finer one takes over. When nothing holds the budget, the smallest model is measured
    before giving up.

    Args:
        search: the problem.
        max_measurements: the most measurements in all, those of ever smaller models before giving up not counted.

    Returns:
        The candidate on target that retains the most saliency, else the slowest that holds the budget, else the
        fastest.
    """
    budget = search.budget
    tried = grid_search_latency(search)
    level = tried[0].level
    while sum(candidate.times for candidate in tried) < max_measurements:
        hits = [index for index, candidate in enumerate(tried) if budget.on_target(candidate.comparison)]
        if hits:
            best = max(hits, key=lambda index: tried[index].worth)
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
        return SearchResult(tried[-1], "infeasible", tried)
    holding = [candidate for candidate in tried if budget.holds(candidate.comparison)]
    on_target = [candidate for candidate in holding if budget.on_target(candidate.comparison)]
    if on_target:
        confirmed = [candidate for candidate in on_target if candidate.times > search.confirmations]
        return SearchResult(max(confirmed or on_target, key=lambda candidate: candidate.worth), "on_target", tried)
    return SearchResult(max(holding, key=lambda candidate: candidate.comparison.ratio.median), "held", tried)


def _step_down(search: BudgetSearch, tried: list[Candidate]) -> bool:
    """Try ever smaller models, at last the smallest there is, until one holds the budget; whether one does."""
    lowest = min(search.predicted_ratio(candidate.keep) for candidate in tried)
    for share in STEPS_DOWN:
        keep = search.choose(share * lowest, 0) if share else search.smallest()
        if all(candidate.keep != keep for candidate in tried) or not share:
            tried.append(search.try_keep(keep, 0))
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
    if abs(measured / goal - 1) <= CLOSE * search.budget.tolerance:
        aims.append((goal * predicted / measured, widths_of(tried[nearest].keep, search.groups)))
    aims.append((_next_aim(points, goal), None))
    for aim, start in aims:
        # A choice stays below its aim; where that leads to a known model, the upper end of what is accepted may not.
        for share in (1.0, 1.0 + MARGIN * search.budget.tolerance):
            keep = search.choose(aim * share, level, start)
            if all(candidate.keep != keep for candidate in tried):
                return keep
    return None


def _goal(search: BudgetSearch, tried: Sequence[Candidate]) -> float:
    """The ratio to come close to: the wider the intervals are, the further below the target it must lie."""
    budget = search.budget
    spread = float(np.median([c.comparison.ratio.high / c.comparison.ratio.median - 1 for c in tried]))
    highest = budget.ratio(search.teacher_ms) * (1 - MARGIN * budget.tolerance) / (1 + spread)
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
