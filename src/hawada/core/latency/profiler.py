"""Measured milliseconds: interleaved rounds with a bootstrap interval, and what makes them unfit for a verdict."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hawada.core.latency.clock import Clock, DeviceClock, source_of
from hawada.core.latency.monitor import Conditions, Monitor
from hawada.core.structure import Inputs
from hawada.core.verdict import Comparison, Interval, Latency

TINY_MS = 1e-9  # an identity takes no time on a simulated device; ratios to it must not divide by zero
Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Rounds:
    """How long interleaved measuring goes on.

    Attributes:
        precision: stop when every ratio's relative half-width is at most this.
        min_rounds: fewest rounds; the precision is looked at then, and whenever their number has doubled.
        max_rounds: most rounds.
        max_seconds: no further round begins after this once there are `min_rounds`; waiting does not count.
        patience_s: the longest that is waited for the device to be as it should, see `Monitor.settle`.
    """

    precision: float = 0.01
    min_rounds: int = 10
    max_rounds: int = 80
    max_seconds: float = 20.0
    patience_s: float = 30.0


def bootstrap_median(samples: Samples, resamples: int = 1000) -> Interval:
    """Median of `samples`, (n,), and its 95 % percentile-bootstrap interval; the same samples give the same interval.

    Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    draws = np.random.default_rng(0).integers(0, len(samples), size=(resamples, len(samples)))
    low, high = np.percentile(np.median(samples[draws], axis=1), [2.5, 97.5])
    return Interval(float(np.median(samples)), float(low), float(high))


def summarize(samples: Samples) -> Latency:
    """Latency statistics of samples in milliseconds, (n,)."""
    interval = bootstrap_median(samples)
    return Latency(interval.median, interval.low, interval.high, float(np.percentile(samples, 95)), len(samples))


class MeasurementError(RuntimeError):
    """Nothing usable was measured."""


@dataclass(frozen=True)
class Sampled:
    """Interleaved samples and what happened while they were taken.

    Attributes:
        rows: milliseconds of every round whose timings are sound, in order, (rounds, samplers).
        counts: which of them the monitor did not object to, (rounds,).
        needed: the fewest rounds that must count.
        notes: what is told about them.
        discarded: how many rounds do not count and why, or None when all do.
        broken: why no verdict may rest on any of them, or None.
    """

    rows: Samples
    counts: NDArray[np.bool_]
    needed: int
    notes: tuple[str, ...] = ()
    discarded: str | None = None
    broken: str | None = None

    @property
    def samples(self) -> Samples:
        """The rounds that count; all of them where too few count."""
        return self.rows[self.counts] if self.counts.sum() >= self.needed else self.rows

    @property
    def noisy(self) -> str | None:
        """Why no verdict may rest on `samples` alone, or None."""
        few = self.discarded if self.counts.sum() < self.needed else None
        return "; ".join(filter(None, (self.broken, few))) or None


def measure_rounds(
    samplers: Sequence[Callable[[], float]],
    rounds: Rounds,
    *,
    seed: int = 0,
    baseline: int = 0,
    monitor: Monitor | None = None,
    zero_ok: bool = False,
) -> Sampled:
    """Take one sample of each in every round, in a fresh random order.

    A clock that drifts by tens of percent moves all samples of a round together, so ratios within a round hold. Rounds
    that the monitor objects to are discarded and replaced, up to as many again as were asked for.

    Args:
        samplers: each returns milliseconds.
        rounds: when to stop.
        seed: of the order within rounds.
        baseline: the sampler that ratios are taken to.
        monitor: watches the device.
        zero_ok: whether a sample of 0 is one, as it is on a simulated device.

    Raises:
        MeasurementError: when not one round can be used.
    """
    order = np.random.default_rng(seed)
    tally = _Tally(min(rounds.min_rounds, rounds.max_rounds), zero_ok)
    checkpoint = rounds.min_rounds
    if monitor is not None:
        monitor.start()
    start, waited = time.perf_counter(), 0.0
    while tally.attempts < 2 * rounds.max_rounds:
        if monitor is not None:
            waited += monitor.settle(rounds.patience_s - waited)
        row = [0.0] * len(samplers)
        for index in order.permutation(len(samplers)):
            row[index] = samplers[index]()
        tally.add(row, monitor.check() if monitor is not None else None)
        late = time.perf_counter() - start - waited > rounds.max_seconds
        if len(tally.kept) == rounds.max_rounds or (late and tally.enough):
            break
        if len(tally.kept) == checkpoint:
            checkpoint *= 2  # looked at rarely: stopping at the first narrow interval would make intervals too narrow
            if _widest(np.asarray(tally.kept), baseline) <= rounds.precision:
                break
    return tally.concluded(monitor.finish() if monitor is not None else Conditions())


class _Tally:
    """The rounds so far: those that count, and why others do not."""

    def __init__(self, needed: int, zero_ok: bool) -> None:
        self.needed, self.zero_ok = needed, zero_ok
        self.rows: list[list[float]] = []
        self.kept: list[list[float]] = []
        self.counts: list[bool] = []
        self.why: Counter[str] = Counter()
        self.unsound = 0

    @property
    def attempts(self) -> int:
        """Rounds taken."""
        return len(self.rows) + self.unsound

    @property
    def enough(self) -> bool:
        """Whether the time limit may end it."""
        return len(self.kept) >= self.needed or self.attempts >= 2 * self.needed

    def add(self, row: list[float], objection: str | None) -> None:
        """Sort one round."""
        if not all(math.isfinite(ms) and (ms > 0 or (self.zero_ok and ms == 0)) for ms in row):
            self.unsound += 1
            return
        self.rows.append(row)
        self.counts.append(objection is None)
        if objection is not None:
            self.why[objection] += 1
        else:
            self.kept.append(row)

    def concluded(self, seen: Conditions) -> Sampled:
        """The samples, with what was wrong with them."""
        attempts, lost = self.attempts, self.why.total()
        notes = tuple(f"{count} of {attempts} rounds discarded: {reason}" for reason, count in self.why.items())
        broken = [seen.noisy] if seen.noisy else []
        if self.unsound:
            broken.append(f"{self.unsound} of {attempts} rounds had a timing that was not finite or not positive")
        if not self.rows:
            raise MeasurementError("; ".join(broken))
        discarded = f"{lost} of {attempts} rounds discarded ({self.why.most_common(1)[0][0]})" if lost else None
        return Sampled(
            np.asarray(self.rows),
            np.asarray(self.counts),
            self.needed,
            notes + seen.notes,
            discarded,
            "; ".join(broken) or None,
        )


def _widest(samples: Samples, baseline: int) -> float:
    """The largest relative half-width of the ratios to the baseline; of the times where there is nothing else."""
    ratios = samples / np.maximum(samples[:, [baseline]], TINY_MS)
    others = [index for index in range(samples.shape[1]) if index != baseline]
    checked = ratios[:, others] if others else samples
    return max(bootstrap_median(column, resamples=200).half_width for column in checked.T)


def sample_rounds(
    samplers: Sequence[Callable[[], float]],
    rounds: Rounds,
    seed: int = 0,
    baseline: int = 0,
    monitor: Monitor | None = None,
    zero_ok: bool = False,
) -> Samples:
    """The samples of `measure_rounds` alone: milliseconds, (rounds, samplers)."""
    return measure_rounds(samplers, rounds, seed=seed, baseline=baseline, monitor=monitor, zero_ok=zero_ok).samples


def compare(
    baseline: nn.Module,
    candidate: nn.Module,
    inputs: Inputs,
    clock: Clock,
    *,
    rounds: Rounds,
    seed: int = 0,
    monitor: Monitor | None = None,
) -> Comparison:
    """Measure two models in interleaved rounds; the ratio is the median of candidate / baseline within rounds.

    Args:
        baseline: usually the teacher, in eval mode on the inputs' device.
        candidate: usually the slim model, likewise.
        inputs: what both are called with.
        clock: takes the time.
        rounds: when to stop.
        seed: of the order within rounds.
        monitor: watches the device meanwhile.

    Raises:
        MeasurementError: when not one round can be used.
    """
    sampled = measure_together((baseline, candidate), inputs, clock, rounds=rounds, seed=seed, monitor=monitor)
    return comparison_of(sampled.samples, source_of(clock), notes=sampled.notes, noisy=sampled.noisy)


def measure_together(
    models: Sequence[nn.Module],
    inputs: Inputs,
    clock: Clock,
    *,
    rounds: Rounds,
    seed: int = 0,
    monitor: Monitor | None = None,
) -> Sampled:
    """Measure several models in the same interleaved rounds; the first is the baseline. Arguments as of `compare`.

    Raises:
        MeasurementError: when not one round can be used.
    """
    samplers = [clock.prepare(model, inputs) for model in models]
    return measure_rounds(samplers, rounds, seed=seed, monitor=monitor, zero_ok=source_of(clock) != "measured")


def comparison_of(samples: Samples, source: str, *, notes: Sequence[str] = (), noisy: str | None = None) -> Comparison:
    """The comparison that samples of a baseline and a candidate make, (rounds, 2)."""
    baseline, candidate = samples.T
    ratio = bootstrap_median(candidate / np.maximum(baseline, TINY_MS))
    teacher, slim = summarize(baseline), summarize(candidate)
    return Comparison(teacher, slim, ratio, source, tuple(notes), noisy)


def widened(known: Comparison, share: float) -> Comparison:
    """The same with intervals that reach further by a share of their ends."""

    def reach(known: Latency) -> Latency:
        return replace(known, low=known.low / (1 + share), high=known.high * (1 + share))

    ratio = Interval(known.ratio.median, known.ratio.low / (1 + share), known.ratio.high * (1 + share))
    return replace(known, baseline=reach(known.baseline), candidate=reach(known.candidate), ratio=ratio)


def measure_latency_ms(
    model: nn.Module,
    batch_shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    clock: Clock | None = None,
    rounds: Rounds | None = None,
) -> Latency:
    """Milliseconds per forward pass of a model, alone, on random inputs.

    Args:
        model: moved to `device` and `dtype`, in eval mode while it is measured.
        batch_shape: shape of the one input, e.g. (64, 3, 224, 224).
        device: where to measure.
        dtype: of weights and inputs.
        clock: None means the device's own.
        rounds: when to stop.
    """
    inputs = (torch.randn(*batch_shape, device=device, dtype=dtype),)
    training = model.training
    model = model.to(device=device, dtype=dtype).eval()
    sampler = (clock or DeviceClock()).prepare(model, inputs)
    samples = sample_rounds([sampler], rounds or Rounds())
    model.train(training)
    return summarize(samples[:, 0])


def relative_medians(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Inputs],
    clock: Clock,
    rounds: Rounds,
    seed: int = 0,
    monitor: Monitor | None = None,
) -> dict[str, float]:
    """Milliseconds of many modules measured together; the first is the baseline to which the others are tied."""
    names = list(models)
    if not names:
        return {}
    samplers = [clock.prepare(models[name], inputs[name]) for name in names]
    samples = sample_rounds(samplers, rounds, seed, monitor=monitor, zero_ok=source_of(clock) != "measured")
    ratios = np.median(samples / np.maximum(samples[:, [0]], TINY_MS), axis=0)
    baseline = max(float(np.median(samples[:, 0])), TINY_MS)
    return {name: float(ratio) * baseline for name, ratio in zip(names, ratios, strict=True)}
