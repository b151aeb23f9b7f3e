"""A latency target, and the verdict that a fresh measurement reaches on it."""

from __future__ import annotations

from dataclasses import dataclass

from hawada.core.verdict import Comparison, Interval, Verdict

PREDICTED = {"table": "predicted from a latency table, not measured"}  # why a source proves nothing
SEARCH_MARGIN_OF_TOLERANCE = 0.25  # a search keeps this share of the tolerance clear at either end
# Share of the tolerance by which a model must be above the target to have missed it. On an idle virtual machine the
# ratio of one tiny_vit to its teacher was 0.576 to 0.622 in ten verifications, each interval far narrower than that.
SESSION_MARGIN_OF_TOLERANCE = 0.5


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
        """Whether there is a target."""
        return self.target_ms is not None or self.target_ratio is not None

    def ratio(self, teacher_ms: float) -> float:
        """The target as a fraction of a teacher that takes `teacher_ms`."""
        if self.target_ms is not None:
            return self.target_ms / teacher_ms
        if self.target_ratio is None:
            raise ValueError("budget: no target; set budget.target_ratio or budget.target_ms")
        return self.target_ratio

    def middle(self, teacher_ms: float) -> float:
        """The ratio to aim at: the middle of the tolerated range."""
        return self.ratio(teacher_ms) * (1 - self.tolerance / 2)

    def holds(self, comparison: Comparison, *, margin: bool = False) -> bool:
        """Whether the whole interval of the measurement is at or below the target, if asked with a search's margin."""
        return self._of_target(comparison).high <= 1 - margin * SEARCH_MARGIN_OF_TOLERANCE * self.tolerance

    def misses(self, comparison: Comparison) -> bool:
        """Whether the whole interval of the measurement is above the target."""
        return self._of_target(comparison).low > 1

    def on_target(self, comparison: Comparison) -> bool:
        """Whether a search may stop here: below the target, but not by more than the tolerance.

        Two measurements minutes apart differ by about a percent, so a margin is kept at both ends.
        """
        lowest = 1 - self.tolerance + SEARCH_MARGIN_OF_TOLERANCE * self.tolerance
        return self.holds(comparison, margin=True) and self._of_target(comparison).median >= lowest

    def _misses(self, both: list[Interval]) -> bool:
        """Whether all intervals are above the target by more than one session differs from the next."""
        return all(reached.low > 1 + SESSION_MARGIN_OF_TOLERANCE * self.tolerance for reached in both)

    def _of_target(self, comparison: Comparison) -> Interval:
        """What was measured, as a fraction of the target: milliseconds of the slim model, or paired ratios."""
        measured, target = comparison.ratio, self.target_ratio
        if self.target_ms is not None:
            measured, target = comparison.candidate, self.target_ms
        if target is None:
            raise ValueError("budget: no target; set budget.target_ratio or budget.target_ms")
        return Interval(measured.median / target, measured.low / target, measured.high / target)

    def decided_by_profile(self, teacher: Interval, fastest: Interval) -> tuple[Verdict, str] | None:
        """(verdict, reason) when profiling alone decides, before anything is trained; else None.

        Args:
            teacher: measured milliseconds of the teacher.
            fastest: measured ratio of the smallest model that the gated groups allow.
        """
        if not self.has_target:
            return None
        goal = self.ratio(teacher.median)
        target = f"the target is {goal * teacher.median:.3f} ms"
        if goal >= (1 if self.target_ratio is not None else teacher.high / teacher.median):
            return Verdict.ALREADY_MET, f"the teacher takes {teacher.median:.3f} ms, {target}"
        if goal < fastest.low:
            return Verdict.INFEASIBLE, f"the fastest is {fastest.median * teacher.median:.3f} ms, {target}"
        return None

    def verdict(
        self, comparison: Comparison, every: Comparison | None = None, earlier: Comparison | None = None
    ) -> tuple[Verdict, str]:
        """(verdict, reason) for a fresh measurement of the teacher against the slim model.

        A virtual machine can run at another ratio for a minute while it shows nothing that is different, so what
        another process measured at another time must be on the same side of the target.

        Args:
            comparison: of the rounds that count.
            every: of all rounds, those that were disturbed included; None when that is the same.
            earlier: of a model of the same widths, by another process minutes before; None when there is none.
        """
        if not self.has_target:
            return Verdict.UNVERIFIED, "no target was set"
        if comparison.simulated:
            return Verdict.SIMULATED, "the latency comes from a simulated device"
        if comparison.source != "measured":
            return Verdict.UNVERIFIED, PREDICTED.get(comparison.source, f"comes from {comparison.source}, not measured")
        if comparison.noisy is not None:
            return Verdict.UNVERIFIED, f"noisy: {comparison.noisy}"
        figures = self._figures(comparison)
        both = [self._of_target(known) for known in (comparison, every) if known is not None]
        meets = all(reached.high <= 1 for reached in both)
        if (
            earlier is not None
            and earlier.noisy is None
            and meets != (self._of_target(earlier).median <= 1)
            and (meets or self._misses(both))
        ):
            return (
                Verdict.UNVERIFIED,
                f"two sessions disagree: {figures}, and {self._figures(earlier, short=True)} before",
            )
        if meets:
            return Verdict.MET, figures
        if self._misses(both):
            return Verdict.MISSED, figures
        if all(reached.low > 1 for reached in both):
            reason = "above the target by less than one verification differs from the next"
            return Verdict.UNVERIFIED, f"{reason}: {figures}"
        one_sided = both[0].high <= 1 or both[0].low > 1
        if every is not None and one_sided:
            figures += f", and {self._figures(every, short=True)} with the rounds that were disturbed"
        return Verdict.UNVERIFIED, f"too noisy to tell: {figures}"

    def _figures(self, comparison: Comparison, *, short: bool = False) -> str:
        """The figures that are compared with the target, and unless it is to be short the target."""
        if self.target_ms is not None:
            figures, target = _range(comparison.candidate, "ms"), f"{self.target_ms:.3f} ms"
        else:
            figures, target = f"ratio {_range(comparison.ratio)}", f"{self.target_ratio:.3f}"
        return figures if short else f"{figures} against a target of {target}"


def _range(interval: Interval, unit: str = "") -> str:
    return f"{interval.median:.3f} [{interval.low:.3f}, {interval.high:.3f}] {unit}".rstrip()
