"""What a run ends in, and the figures that it rests on. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean, median
from typing import Any, Literal


class Verdict(StrEnum):
    """What a run found out about its latency target."""

    MET = "met"
    MISSED = "missed"
    UNVERIFIED = "unverified"
    INFEASIBLE = "infeasible"
    ALREADY_MET = "already_met"
    SIMULATED = "simulated"

    @property
    def is_success(self) -> bool:
        """Whether a finished run ended as it should."""
        return self in (Verdict.MET, Verdict.ALREADY_MET, Verdict.SIMULATED)

    @property
    def may_be_published(self) -> bool:
        """Whether a model with this verdict may leave the machine: not when it is known to be too slow."""
        return self.is_success or self is Verdict.UNVERIFIED


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval relative to the median; 0 for what takes no time."""
        return (self.high - self.low) / 2 / self.median if self.median > 0 else 0.0

    def as_dict(self) -> dict[str, float]:
        """The fields by name, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Latency(Interval):
    """Milliseconds per forward pass: median with interval, 95th percentile, and how many samples."""

    p95: float
    samples: int


@dataclass(frozen=True)
class Comparison:
    """Interleaved measurement of a candidate against a baseline.

    Attributes:
        baseline: usually the teacher's latency.
        candidate: usually the slim model's.
        ratio: the ratio of candidate to baseline within rounds.
        source: `measured`, `simulated` or `table`; a verdict needs what was measured.
        notes: what else was seen meanwhile.
        noisy: why no verdict may rest on the figures, or None.
    """

    baseline: Latency
    candidate: Latency
    ratio: Interval
    source: str = "measured"
    notes: tuple[str, ...] = ()
    noisy: str | None = None

    @property
    def simulated(self) -> bool:
        """Whether no device was timed but a simulation of one."""
        return self.source == "simulated"

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return {
            "baseline": self.baseline.as_dict(),
            "candidate": self.candidate.as_dict(),
            "ratio": self.ratio.as_dict(),
            "source": self.source,
            "notes": list(self.notes),
            "noisy": self.noisy,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Comparison:
        """The inverse of `as_dict`."""
        return cls(
            Latency(**record["baseline"]),
            Latency(**record["candidate"]),
            Interval(**record["ratio"]),
            record["source"],
            tuple(record["notes"]),
            record["noisy"],
        )


Ends = Literal["mean", "widest"]


def merged(comparisons: Sequence[Comparison], *, ends: Ends) -> Comparison:
    """Several measurements of the same pair of models as one; each median is the median of the medians.

    Args:
        comparisons: the measurements, at least one; notes are united, and the first reason not to trust them stays.
        ends: `mean` averages the ends of the intervals, for a search that measures a model again; `widest` takes the
            lowest and the highest, for repeats whose offsets an interval within one of them does not show.
    """
    return Comparison(
        _merged_latency([comparison.baseline for comparison in comparisons], ends),
        _merged_latency([comparison.candidate for comparison in comparisons], ends),
        _merged_interval([comparison.ratio for comparison in comparisons], ends),
        comparisons[0].source,
        tuple(dict.fromkeys(note for comparison in comparisons for note in comparison.notes)),
        next((comparison.noisy for comparison in comparisons if comparison.noisy is not None), None),
    )


def _merged_interval(parts: Sequence[Interval], ends: Ends) -> Interval:
    lows, highs = [part.low for part in parts], [part.high for part in parts]
    low, high = (min(lows), max(highs)) if ends == "widest" else (fmean(lows), fmean(highs))
    return Interval(median(part.median for part in parts), low, high)


def _merged_latency(parts: Sequence[Latency], ends: Ends) -> Latency:
    whole = _merged_interval(parts, ends)
    p95, samples = max(part.p95 for part in parts), sum(part.samples for part in parts)
    return Latency(whole.median, whole.low, whole.high, p95, samples)
