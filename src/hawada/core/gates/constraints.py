"""Bounds on the number of units that gates keep in expectation."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hawada.core.gates.gates import SigmoidGate


@torch.no_grad()
def project_gates_into_constraints(
    gates: Iterable[SigmoidGate], *, minimum: float = 0.0, maximum: float = float("inf")
) -> None:
    """Shift each gate's theta so that the expected number of kept units lies in [minimum, maximum].

    The theta of all units of a gate move by the same amount, so their order never changes. A bound that a gate cannot
    reach with its number of units is replaced by the nearest one that it can.

    Args:
        gates: the gates, whose theta change in place.
        minimum: the fewest units that each gate keeps.
        maximum: the most units that each gate keeps.

    Raises:
        ValueError: when minimum exceeds maximum.
    """
    if minimum > maximum:
        raise ValueError(f"minimum {minimum} kept units exceeds maximum {maximum}; choose a minimum up to the maximum")
    for gate in gates:
        kept = float(gate.gate.sum())
        # a sigmoid never reaches 0 or 1, so bounds stay a little inside, or no finite shift would exist
        slack = 1e-4 * gate.theta.numel()
        lower = min(minimum, gate.theta.numel() - slack)
        upper = max(maximum, slack)
        if lower <= kept <= upper:
            continue
        bound = lower if kept < lower else upper
        low, high = -100.0 * gate.temperature, 100.0 * gate.temperature
        theta = gate.theta.cpu().double()
        for _ in range(60):  # bisection works because the sum rises with the shift
            shift = (low + high) / 2
            total = float(gate.expectation(theta + shift).sum())
            low, high = (shift, high) if total < bound else (low, shift)
        gate.theta.add_(high if kept < lower else low)
