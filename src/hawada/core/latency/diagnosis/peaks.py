"""What a device does at best: the cost of a launch, its bandwidths, and its arithmetic peak."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hawada.core.latency.clock import Clock
from hawada.core.latency.operators import Operator, list_operators
from hawada.core.latency.profiler import TINY_MS
from hawada.core.structure import Inputs

CHAINED_OPERATORS = 128  # The launches of so many operators are timed together.
TRANSFER_BYTES = (1 << 20, 1 << 23, 1 << 26, 1 << 28)  # sizes of the tensors that bandwidth is measured on
MATRIX_SIZES = (512, 1024, 2048, 4096, 8192)  # sides of the matrices whose product gives the arithmetic peak
MAX_PRODUCT_MS = 60.0  # A larger product is not tried where it would take longer than this.
MIN_SAMPLES, MAX_SAMPLES = 7, 60  # of each peak
MAX_SAMPLING_SECONDS = 0.7  # After so long, no more than the minimum of samples is taken of a peak.
HIDDEN_BELOW_LAUNCHES = 1.5  # A transfer that takes less than so many launches may be hidden behind its own launch.
MIN_SHARE_BEYOND_LAUNCH = 0.05  # of a call's time


@dataclass(frozen=True)
class Peaks:
    """What a device does at best.

    Attributes:
        launch_ms: the time of one operator that computes next to nothing.
        transfers: pairs of bytes moved and milliseconds taken beyond the launch, ascending; caches make small
            transfers faster.
        flops_per_ms: the rate of arithmetic in products of large matrices, in the dtype that is timed.
    """

    launch_ms: float
    transfers: tuple[tuple[int, float], ...]
    flops_per_ms: float

    def transfer_ms(self, count: int) -> float:
        """Return the milliseconds it takes to move so many bytes, at the bandwidth of transfers of that size."""
        sizes = [math.log(size) for size, _ in self.transfers]
        rates = [size / ms for size, ms in self.transfers]
        return count / float(np.interp(math.log(max(count, 1)), sizes, rates))

    def best_of(self, other: Peaks) -> Peaks:
        """Take the better of two measurements in each respect; what else ran on the device can only have slowed it."""
        best = dict(self.transfers)
        for size, ms in other.transfers:
            best[size] = min(ms, best.get(size, ms))
        flops_per_ms = max(self.flops_per_ms, other.flops_per_ms)
        return Peaks(min(self.launch_ms, other.launch_ms), tuple(sorted(best.items())), flops_per_ms)


class _Chain(nn.Sequential):
    """Tiny operators that run one after another, each called by a module of its own as in a model."""

    def __init__(self, length: int) -> None:
        super().__init__(*(nn.ReLU() for _ in range(length)))


class _Scale(nn.Module):
    """Reads and writes a tensor once, in place, because a new result would cost page faults on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(1.0)


class _Product(nn.Module):
    """Multiplies two matrices."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y


def measure_peaks(clock: Clock, device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure launch cost, bandwidths and arithmetic peak, each as the best of a few samples.

    Args:
        clock: the clock that also times the model.
        device: the device that is measured; for a simulated clock nothing is allocated on it.
        dtype: the type of the numbers that are multiplied.
    """
    place = torch.device("meta") if clock.simulated else device

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, device=place, dtype=dtype)

    launch_ms = _best_ms(clock, _Chain(CHAINED_OPERATORS), (zeros(1),)) / CHAINED_OPERATORS
    transfers: list[tuple[int, float]] = []
    for size in TRANSFER_BYTES:
        x = (zeros(size, dtype=torch.uint8).view(torch.float32),)
        whole_ms = _best_ms(clock, _Scale(), x)
        if whole_ms > HIDDEN_BELOW_LAUNCHES * launch_ms or size == TRANSFER_BYTES[-1]:
            transfers.append((_total(_Scale(), x).bytes, _beyond(launch_ms, whole_ms)))
    transfers = _at_least_larger_bandwidths(transfers)
    best = 0.0
    for size in MATRIX_SIZES:
        pair = (zeros(size, size), zeros(size, size))
        whole_ms = _best_ms(clock, _Product(), pair)
        best = max(best, _total(_Product(), pair).flops / _beyond(launch_ms, whole_ms))
        if 8 * whole_ms > MAX_PRODUCT_MS and size > MATRIX_SIZES[0] and not clock.simulated:
            break  # the next matrices have twice the side, so their product takes eight times as long
    return Peaks(launch_ms, tuple(transfers), best)


def _best_ms(clock: Clock, model: nn.Module, inputs: Inputs) -> float:
    """The shortest of a few samples in milliseconds, and never zero."""
    sampler = clock.prepare(model, inputs)
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < MIN_SAMPLES or (
        len(samples) < MAX_SAMPLES and time.perf_counter() - start < MAX_SAMPLING_SECONDS
    ):
        samples.append(sampler())
        if clock.simulated and len(samples) == MIN_SAMPLES:
            break
    return max(min((ms for ms in samples if math.isfinite(ms)), default=TINY_MS), TINY_MS)


def _beyond(launch_ms: float, whole_ms: float) -> float:
    """Milliseconds that a call takes besides its launch; where noise hides them, a small share of the call."""
    return max(whole_ms - launch_ms, MIN_SHARE_BEYOND_LAUNCH * whole_ms)


def _at_least_larger_bandwidths(transfers: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Give each transfer at least the bandwidth of every larger one; a lower one was measured while disturbed."""
    result: list[tuple[int, float]] = []
    rate = 0.0
    for size, ms in reversed(transfers):
        rate = max(rate, size / ms)
        result.insert(0, (size, size / rate))
    return result


def _total(model: nn.Module, inputs: Inputs) -> Operator:
    """The arithmetic and the bytes of all operators of a model, as if they were one."""
    operators = list_operators(model, inputs)
    return Operator(sum(operator.flops for operator in operators), sum(operator.bytes for operator in operators))
