"""Which resource bounds a model: the launching of operators, the moving of data, or arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hawada.core.latency.diagnosis.peaks import Peaks
from hawada.core.latency.operators import Operator
from hawada.core.latency.profiler import TINY_MS

MAX_SHARE = 1.1  # A resource cannot need more of the measured time; where it seems to, a peak was measured too low.


@dataclass(frozen=True)
class Bottleneck:
    """What bounds a model, and the least time that each of the three resources needs for it.

    Attributes:
        kind: the resource that needs the largest share of the measured time: `launch`, `memory` or `compute`.
        launch_ms: the number of operators times the cost of a launch.
        memory_ms: the time that moving the bytes takes at the device's bandwidth.
        compute_ms: the time that the arithmetic takes at the device's peak.
        measured_ms: the measured time of the model.
        operators: the number of operators, views left out.
        flops: the floating-point operations of all of them.
        bytes: the bytes that all of them move.
    """

    kind: str
    launch_ms: float
    memory_ms: float
    compute_ms: float
    measured_ms: float
    operators: int
    flops: int
    bytes: int

    @property
    def impossible(self) -> bool:
        """Whether some resource would need clearly more than the measured time, so its peak was measured too low."""
        return max(self.shares.values()) > MAX_SHARE

    @property
    def shares(self) -> dict[str, float]:
        """Each lower bound as a fraction of the measured time; above 1 where a peak was measured too low."""
        bounds = {"launch": self.launch_ms, "memory": self.memory_ms, "compute": self.compute_ms}
        return {kind: ms / max(self.measured_ms, TINY_MS) for kind, ms in bounds.items()}


def find_bottleneck(operators: Sequence[Operator], peaks: Peaks, measured_ms: float) -> Bottleneck:
    """Compare the least time for launches, memory traffic and arithmetic with the time that the model takes.

    Williams et al., Roofline, 2009, with the launch cost as a third roof.
    """
    flops = sum(operator.flops for operator in operators)
    bounds = {
        "launch": len(operators) * peaks.launch_ms,
        "memory": sum(peaks.transfer_ms(operator.bytes) for operator in operators),
        "compute": flops / peaks.flops_per_ms if peaks.flops_per_ms > 0 else 0.0,
    }
    bounds = {kind: ms if math.isfinite(ms) else 0.0 for kind, ms in bounds.items()}
    return Bottleneck(
        kind=max(bounds, key=lambda kind: bounds[kind]),
        launch_ms=bounds["launch"],
        memory_ms=bounds["memory"],
        compute_ms=bounds["compute"],
        measured_ms=measured_ms,
        operators=len(operators),
        flops=flops,
        bytes=sum(operator.bytes for operator in operators),
    )
