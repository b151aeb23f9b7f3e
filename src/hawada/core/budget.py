"""The latency asked for, and what a fresh measurement says about it."""

from __future__ import annotations

from dataclasses import dataclass

from hawada.core.profiler import Comparison, Interval

# What a finished run may say; only these three are a success.
SUCCESS = ("met", "already_met", "simulated")
MARGIN = 0.25  # share of the tolerance that a search stays below the target


@dataclass(frozen=True)
class Budget:
    """A latency target, absolute or relative to the measured teacher, and how far below it is still on target.

    Attributes:
        target_ms: milliseconds per forward pass, or None.
        target_ratio: fraction of the teacher's time, or None; with neither there is no target.
        tolerance: a result in [target * (1 - tolerance), target] is on target.
    """

    target_ms: float | None
    target_ratio: float | None
    tolerance: float

    @property
    def has_target(self) -> bool:
        """Whether anything was asked for."""
        return self.target_ms is not None or self.target_ratio is not None

    def ratio(self, teacher_ms: float) -> float:
        """The target as a fraction of a teacher that takes `teacher_ms`."""
        if self.target_ms is not None:
            return self.target_ms / teacher_ms
        if self.target_ratio is None:
            raise ValueError("budget: no target; set budget.target_ratio or budget.target_ms")
        return self.target_ratio

    def middle(self, teacher_ms: float) -> float:
        """The ratio to aim at: the middle of the range that `on_target` accepts."""
        return self.ratio(teacher_ms) * (1 - self.tolerance * (1 + MARGIN) / 2)

    def holds(self, comparison: Comparison) -> bool:
        """Whether the whole interval of the measured ratio is at or below the target."""
        return comparison.ratio.high <= self.ratio(comparison.baseline.median)

    def on_target(self, comparison: Comparison) -> bool:
        """Whether a search may stop here: clearly below the target, but not by more than the tolerance.

        Two measurements minutes apart differ by about a percent, so some of the tolerance is kept as a margin.
        """
        goal, ratio = self.ratio(comparison.baseline.median), comparison.ratio
        return ratio.high <= goal * (1 - MARGIN * self.tolerance) and ratio.median >= goal * (1 - self.tolerance)

    def foregone(self, teacher_ms: float, fastest: Interval) -> tuple[str, str] | None:
        """(verdict, reason) when profiling alone decides, before anything is trained; else None.

        Args:
            teacher_ms: measured milliseconds of the teacher.
            fastest: measured ratio of the smallest model that the groups allow.
        """
        if not self.has_target:
            return None
        goal = self.ratio(teacher_ms)
        wanted = f"the target is {goal * teacher_ms:.3f} ms"
        if goal >= 1:
            return "already_met", f"the teacher takes {teacher_ms:.3f} ms, {wanted}"
        if goal < fastest.low:
            return "infeasible", f"the fastest is {fastest.median * teacher_ms:.3f} ms, {wanted}"
        return None

    def verdict(self, comparison: Comparison) -> tuple[str, str]:
        """(verdict, reason) for a fresh measurement of the teacher against the slim model."""
        if not self.has_target:
            return "unverified", "no target was set"
        if comparison.simulated:
            return "simulated", "the latency comes from a simulated device"
        goal, ratio = self.ratio(comparison.baseline.median), comparison.ratio
        said = f"{_range(ratio)} against a target of {goal:.3f}"
        if self.holds(comparison):
            return "met", said
        if ratio.low > goal:
            return "missed", said
        return "unverified", f"too noisy to tell: {said}"


def _range(interval: Interval) -> str:
    return f"ratio {interval.median:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
