"""A clock that computes times analytically instead of measuring them, for rehearsals and deterministic tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from hawada.core.latency.operators import list_operators
from hawada.core.structure import Inputs


class SimulatedClock:
    """Sums the roofline time of every operator: its launch cost + max(compute, memory traffic).

    Channels are rounded up to a tile, so the device has the stairs of a real one. Williams et al., Roofline, 2009.
    Nothing is executed: shapes are propagated on the meta device.

    Args:
        tflops: the arithmetic peak in 1e12 operations per second.
        gbps: the memory bandwidth in 1e9 bytes per second.
        launch_us: the fixed cost of one operator in microseconds.
        tile: the number of channels that are processed together; others are rounded up to a multiple of it.
        noise: the relative standard deviation of a sample; with 0 the times repeat exactly.
        seed: the seed of the noise.
    """

    simulated = True

    def __init__(
        self,
        tflops: float = 0.2,
        gbps: float = 20.0,
        launch_us: float = 5.0,
        tile: int = 8,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.tflops, self.gbps, self.launch_us, self.tile = tflops, gbps, launch_us, tile
        self.noise = noise
        self._random = np.random.default_rng(seed)

    def prepare(self, model: nn.Module, inputs: Inputs) -> Callable[[], float]:
        """Compute the model's time once; the returned function gives it in milliseconds, with fresh noise each time."""
        milliseconds = 0.0
        for operator in list_operators(model, inputs, tile=self.tile):
            compute_ms = operator.flops / (self.tflops * 1e9)
            memory_ms = operator.bytes / (self.gbps * 1e6)
            milliseconds += self.launch_us * 1e-3 + max(compute_ms, memory_ms)
        return lambda: milliseconds * float(max(0.1, 1 + self.noise * self._random.standard_normal()))
