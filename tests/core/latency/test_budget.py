from dataclasses import replace

import pytest

from hawada.core.latency import Budget
from hawada.core.verdict import Comparison, Interval, Latency, Verdict


def measured(median, half=0.0, *, teacher_ms=10.0, source="measured", noisy=None):
    """A comparison whose ratio is median +- half."""
    teacher = Latency(teacher_ms, teacher_ms, teacher_ms, p95=teacher_ms, samples=9)
    low, high = (median - half) * teacher_ms, (median + half) * teacher_ms
    slim = Latency(median * teacher_ms, low, high, p95=high, samples=9)
    return Comparison(teacher, slim, Interval(median, median - half, median + half), source, noisy=noisy)


def test_a_target_in_milliseconds_is_relative_to_the_teacher():
    assert Budget(5.0, None, 0.05).ratio(10.0) == 0.5
    assert Budget(None, 0.4, 0.05).ratio(10.0) == 0.4
    assert Budget(None, 0.4, 0.05).has_target and Budget(5.0, None, 0.05).has_target


def test_without_a_target_there_is_no_ratio():
    assert not Budget(None, None, 0.05).has_target
    with pytest.raises(ValueError, match=r"budget: no target; set budget\.target_ratio or budget\.target_ms"):
        Budget(None, None, 0.05).ratio(10.0)


@pytest.mark.parametrize("budget", [Budget(None, 0.5, 0.1), Budget(5.0, None, 0.1)])
def test_a_search_stops_only_clearly_below_the_target_and_within_the_tolerance(budget):
    assert budget.on_target(measured(budget.middle(10.0), 0.001))
    assert budget.on_target(measured(0.464))
    assert not budget.on_target(measured(0.449))  # more than the tolerance below
    assert not budget.on_target(measured(0.461))  # tolerated, but inside the margin
    assert not budget.on_target(measured(0.4999))  # holds, but inside the margin
    assert not budget.on_target(measured(0.48, 0.03))  # the interval reaches above
    assert budget.holds(measured(0.4999)) and not budget.holds(measured(0.48, 0.03))


@pytest.mark.parametrize(
    ("comparison", "verdict", "reason"),
    [
        (measured(0.48, 0.01), "met", "ratio 0.480 [0.470, 0.490] against a target of 0.500"),
        (measured(0.2), "met", "against a target of 0.500"),
        (measured(0.56, 0.01), "missed", "ratio 0.560 [0.550, 0.570] against a target of 0.500"),
        (measured(0.49, 0.02), "unverified", "too noisy to tell: ratio 0.490 [0.470, 0.510]"),
        (measured(0.51, 0.02), "unverified", "too noisy to tell"),
        (measured(0.1, source="simulated"), "simulated", "the latency comes from a simulated device"),
        (measured(0.1, source="table"), "unverified", "predicted from a latency table, not measured"),
        (measured(0.1, noisy="the GPU was hot"), "unverified", "noisy: the GPU was hot"),
        (measured(0.9, noisy="the GPU was hot"), "unverified", "noisy: the GPU was hot"),
        (measured(float("nan")), "unverified", "too noisy to tell"),
    ],
)
def test_only_a_whole_interval_below_the_target_meets_it(comparison, verdict, reason):
    found, why = Budget(None, 0.5, 0.05).verdict(comparison)
    assert found == verdict and reason in why
    assert Verdict(found).is_success == (verdict in ("met", "simulated"))


def test_a_target_in_milliseconds_is_compared_in_milliseconds():
    """The paired ratio may look better than the milliseconds of the day; those are what was asked for."""
    budget = Budget(5.0, None, 0.05)
    assert budget.verdict(measured(0.48, 0.01))[0] == "met"
    slower_day = replace(measured(0.48, 0.01, teacher_ms=11.0), ratio=Interval(0.40, 0.39, 0.41))
    found, why = budget.verdict(slower_day)
    assert found == "missed" and why == "5.280 [5.170, 5.390] ms against a target of 5.000 ms"


@pytest.mark.parametrize(
    ("counted", "every", "verdict", "reason"),
    [
        (0.48, 0.49, "met", "ratio 0.480 [0.470, 0.490] against a target of 0.500"),
        (0.54, 0.53, "missed", "ratio 0.540 [0.530, 0.550] against a target of 0.500"),
        (0.54, 0.52, "unverified", "above the target by less than one verification differs from the next: ratio 0.540"),
        (
            0.48,
            0.53,
            "unverified",
            "ratio 0.480 [0.470, 0.490] against a target of 0.500, and ratio 0.530 [0.520, 0.540]",
        ),
        (0.53, 0.48, "unverified", "and ratio 0.480 [0.470, 0.490] with the rounds that were disturbed"),
        (0.48, 0.495, "unverified", "too noisy to tell: ratio 0.480"),
        (0.495, 0.48, "unverified", "too noisy to tell: ratio 0.495 [0.485, 0.505] against a target of 0.500"),
    ],
)
@pytest.mark.parametrize("budget", [Budget(None, 0.5, 0.05), Budget(5.0, None, 0.05)])
def test_the_rounds_that_count_and_all_rounds_must_agree(budget, counted, every, verdict, reason):
    found, why = budget.verdict(measured(counted, 0.01), measured(every, 0.01))
    assert found == verdict
    assert budget.target_ms is not None or reason in why


@pytest.mark.parametrize("budget", [Budget(None, 0.5, 0.05), Budget(5.0, None, 0.05)])
@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (0.48, 0.49, "met"),
        (0.48, 0.51, "unverified"),
        (0.54, 0.51, "missed"),
        (0.54, 0.49, "unverified"),
        (0.495, 0.48, "unverified"),
    ],
)
def test_no_verdict_rests_on_one_session_that_another_contradicts(budget, now, before, verdict):
    found, why = budget.verdict(measured(now, 0.01), earlier=measured(before))
    assert found == verdict
    contradicted = (now < 0.5) != (before < 0.5)
    assert why.startswith("two sessions disagree") == contradicted


def test_without_a_target_nothing_is_met():
    assert Budget(None, None, 0.05).verdict(measured(0.1)) == ("unverified", "no target was set")


def test_profiling_alone_can_decide():
    teacher, fastest = Interval(10.0, 9.9, 10.1), Interval(0.3, 0.29, 0.31)
    found, why = Budget(12.0, None, 0.05).decided_by_profile(teacher, fastest)
    assert found == "already_met" and why == "the teacher takes 10.000 ms, the target is 12.000 ms"
    found, why = Budget(None, 0.28, 0.05).decided_by_profile(teacher, fastest)
    assert found == "infeasible" and why == "the fastest is 3.000 ms, the target is 2.800 ms"
    assert Budget(None, 0.295, 0.05).decided_by_profile(teacher, fastest) is None  # within the interval: undecided
    assert Budget(None, 0.5, 0.05).decided_by_profile(teacher, fastest) is None
    assert Budget(10.05, None, 0.05).decided_by_profile(teacher, fastest) is None  # the teacher may well take longer
    assert Budget(None, None, 0.05).decided_by_profile(teacher, fastest) is None
