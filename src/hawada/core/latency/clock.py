"""Clocks: how one sample of a model's time is taken on one kind of device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hawada.core.latency.runtimes import prepare_call
from hawada.core.structure import Inputs


class Clock(Protocol):
    """How a model's time is taken on one kind of device.

    A clock that is neither a device nor a simulation of one tells what it is in an attribute `source`.
    """

    simulated: bool

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        """Warm up and return a sampler: each call runs the model and returns milliseconds per forward pass."""
        ...


def source_of(clock: Clock) -> str:
    """Where a clock's milliseconds come from: `measured`, `simulated`, or the clock's own `source`, such as `table`."""
    return getattr(clock, "source", "simulated" if clock.simulated else "measured")


@dataclass(frozen=True)
class Sampling:
    """How a device is warmed up and how long a sample of it lasts.

    Attributes:
        min_sample_ms: a forward pass that takes less is timed in blocks that take as long.
        agreement: relative spread of three warm-up medians in a row that counts as stable.
        warm_up_s: the longest warm-up in seconds.
        window_ms: least time that a warm-up median is taken over.
    """

    min_sample_ms: float
    agreement: float
    warm_up_s: float
    window_ms: float


# A model that takes less than this is called once, untimed, before each sample: other models ran since its last one and
# left it cold caches, which would weigh the more, the fewer calls a sample is made of.
WARMED_MS = 10.0

CUDA = Sampling(min_sample_ms=1.0, agreement=0.01, warm_up_s=60.0, window_ms=50.0)
ELSEWHERE = Sampling(min_sample_ms=2.0, agreement=0.05, warm_up_s=2.0, window_ms=0.0)


class DeviceClock:
    """The clock of the device that the inputs are on: CUDA events on a GPU, `perf_counter` elsewhere.

    A sample of a fast model begins with a call that is not timed, so that all are as warm as in steady use. Warm-up
    ends when three medians in a row agree. A device that has not settled within its longest warm-up is given no more
    than `ELSEWHERE`'s for the next models: its instability shows in the rounds.

    Args:
        min_sample_ms: shortest block that is timed; None for this and the others: as the device's kind demands.
        agreement: relative spread of three warm-up medians that counts as stable.
        warm_up_s: the longest warm-up in seconds.
        runtime: how models are run, see `hawada.core.latency.runtimes`.
    """

    simulated = False

    def __init__(
        self,
        min_sample_ms: float | None = None,
        agreement: float | None = None,
        warm_up_s: float | None = None,
        runtime: str = "eager",
    ) -> None:
        chosen = {"min_sample_ms": min_sample_ms, "agreement": agreement, "warm_up_s": warm_up_s}
        self.chosen = {name: value for name, value in chosen.items() if value is not None}
        self.runtime = runtime
        self._unstable = False

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        device = inputs[0].device
        sampling = replace(CUDA if device.type == "cuda" else ELSEWHERE, **self.chosen)
        time_block = partial(
            _time_cuda_block if device.type == "cuda" else _time_wall_block,
            prepare_call(model, inputs, self.runtime),
            device,
        )
        time_block(1)  # the first call allocates
        single_ms = max(min(time_block(1) for _ in range(2)), 1e-4)
        calls = max(1, math.ceil(sampling.min_sample_ms / single_ms))
        blocks = max(3, math.ceil(sampling.window_ms / (calls * single_ms)))
        longest_s = min(sampling.warm_up_s, ELSEWHERE.warm_up_s) if self._unstable else sampling.warm_up_s
        medians: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < longest_s:
            medians.append(float(np.median([time_block(calls) for _ in range(blocks)])))
            last = medians[-3:]
            if len(last) == 3 and max(last) <= min(last) * (1 + sampling.agreement):
                break
        else:
            self._unstable = True
        warm = single_ms < WARMED_MS

        def sample() -> float:
            if warm:
                time_block(1)
            return time_block(calls) / calls

        return sample


def _time_wall_block(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Milliseconds of `calls` forward passes by the wall clock."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - start) * 1e3


def _time_cuda_block(call: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Milliseconds of `calls` forward passes between two CUDA events on the current stream."""
    with torch.cuda.device(device):
        # torch does not annotate its events
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end))
