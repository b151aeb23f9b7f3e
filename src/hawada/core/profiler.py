"""Measured milliseconds: one clock per kind of device, and interleaved rounds with a bootstrap interval."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

TINY_MS = 1e-9  # an identity takes no time on a simulated device; ratios to it must not divide by zero
Inputs = tuple[Tensor, ...]
Samples = NDArray[np.float64]


class Clock(Protocol):
    """How a model's time is taken on one kind of device."""

    simulated: bool

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        """Warm up and return a sampler: each call runs the model and returns milliseconds per forward pass."""
        ...


class DeviceClock:
    """The clock of the device that the inputs are on: CUDA events on a GPU, `perf_counter` elsewhere.

    A sample repeats the forward pass until it lasts at least `min_sample_ms`, so short calls are timed in blocks.
    Warm-up ends when three medians in a row agree within `agreement`.

    Args:
        min_sample_ms: shortest block that is timed.
        agreement: relative spread of three warm-up medians that counts as stable.
        warm_up_s: the longest warm-up in seconds.
    """

    simulated = False

    def __init__(self, min_sample_ms: float = 2.0, agreement: float = 0.05, warm_up_s: float = 2.0) -> None:
        self.min_sample_ms, self.agreement, self.warm_up_s = min_sample_ms, agreement, warm_up_s

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        device = inputs[0].device
        time_block = _time_cuda_block if device.type == "cuda" else _time_wall_block
        time_block(model, inputs, 1)  # the first call allocates
        single_ms = min(time_block(model, inputs, 1) for _ in range(2))
        calls = max(1, int(np.ceil(self.min_sample_ms / max(single_ms, 1e-4))))
        medians: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < self.warm_up_s:
            medians.append(float(np.median([time_block(model, inputs, calls) for _ in range(3)])))
            last = medians[-3:]
            if len(last) == 3 and max(last) <= min(last) * (1 + self.agreement):
                break
        return lambda: time_block(model, inputs, calls) / calls


def _time_wall_block(model: nn.Module, inputs: Inputs, calls: int) -> float:
    """Milliseconds of `calls` forward passes by the wall clock."""
    synchronize = torch.mps.synchronize if inputs[0].device.type == "mps" else None
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(calls):
            model(*inputs)
        if synchronize is not None:
            synchronize()
        return (time.perf_counter() - start) * 1e3


def _time_cuda_block(model: nn.Module, inputs: Inputs, calls: int) -> float:
    """Milliseconds of `calls` forward passes between two CUDA events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode(), torch.cuda.device(inputs[0].device):
        start.record()
        for _ in range(calls):
            model(*inputs)
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end))


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
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Latency(Interval):
    """Milliseconds per forward pass: median with interval, 95th percentile, and how many samples."""

    p95: float
    samples: int


@dataclass(frozen=True)
class Rounds:
    """How long interleaved measuring goes on.

    Attributes:
        precision: stop when every ratio's relative half-width is at most this.
        min_rounds: fewest rounds; the precision is looked at then, and whenever their number has doubled.
        max_rounds: most rounds.
        max_seconds: no further round begins after this once there are `min_rounds`.
    """

    precision: float = 0.01
    min_rounds: int = 10
    max_rounds: int = 80
    max_seconds: float = 20.0


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


def sample_rounds(samplers: Sequence[Callable[[], float]], rounds: Rounds, seed: int = 0, baseline: int = 0) -> Samples:
    """Take one sample of each in every round, in a fresh random order; returns milliseconds, (rounds, samplers).

    A clock that drifts by tens of percent moves all samples of a round together, so ratios within a round hold.
    """
    order = np.random.default_rng(seed)
    rows: list[list[float]] = []
    checkpoint = rounds.min_rounds
    start = time.perf_counter()
    while len(rows) < rounds.max_rounds:
        row = [0.0] * len(samplers)
        for index in order.permutation(len(samplers)):
            row[index] = samplers[index]()
        rows.append(row)
        late = time.perf_counter() - start > rounds.max_seconds
        if len(rows) != checkpoint and not (late and len(rows) >= rounds.min_rounds):
            continue
        checkpoint *= 2  # looked at rarely: stopping at the first narrow interval would make intervals too narrow
        table = np.asarray(rows)
        ratios = table / np.maximum(table[:, [baseline]], TINY_MS)
        others = [index for index in range(len(samplers)) if index != baseline] or [baseline]
        checked = table if others == [baseline] else ratios
        widths = [bootstrap_median(checked[:, index], resamples=200).half_width for index in others]
        if late or max(widths) <= rounds.precision:
            break
    return np.asarray(rows)


@dataclass(frozen=True)
class Comparison:
    """Interleaved measurement of a candidate against a baseline."""

    baseline: Latency
    candidate: Latency
    ratio: Interval
    simulated: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(
    baseline: nn.Module, candidate: nn.Module, inputs: Inputs, clock: Clock, *, rounds: Rounds, seed: int = 0
) -> Comparison:
    """Measure two models in interleaved rounds; the ratio is the median of candidate / baseline within rounds.

    Args:
        baseline: usually the teacher, in eval mode on the inputs' device.
        candidate: usually the slim model, likewise.
        inputs: what both are called with.
        clock: takes the time.
        rounds: when to stop.
        seed: of the order within rounds.
    """
    samplers = [clock.prepare(model, inputs) for model in (baseline, candidate)]
    samples = sample_rounds(samplers, rounds, seed)
    return Comparison(
        summarize(samples[:, 0]),
        summarize(samples[:, 1]),
        bootstrap_median(samples[:, 1] / samples[:, 0]),
        clock.simulated,
    )


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
    models: Mapping[str, nn.Module], inputs: Mapping[str, Inputs], clock: Clock, rounds: Rounds, seed: int = 0
) -> dict[str, float]:
    """Milliseconds of many modules measured together; the first is the baseline to which the others are tied."""
    names = list(models)
    if not names:
        return {}
    samples = sample_rounds([clock.prepare(models[name], inputs[name]) for name in names], rounds, seed)
    ratios = np.median(samples / np.maximum(samples[:, [0]], TINY_MS), axis=0)
    baseline = max(float(np.median(samples[:, 0])), TINY_MS)
    return {name: float(ratio) * baseline for name, ratio in zip(names, ratios, strict=True)}
