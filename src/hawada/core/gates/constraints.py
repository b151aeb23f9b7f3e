"""Bounds on how many units gates keep in expectation."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hawada.core.gates.gates import SigmoidGate


@torch.no_grad()
def project_gates_into_constraints(
    gates: Iterable[SigmoidGate], *, minimum: float = 0.0, maximum: float = float("inf")
) -> None:
    """Shift each gate's theta so that the expected number of kept units lies in [minimum, maximum].

    All of a gate's theta move by the same amount, so the order of its units never changes. A bound that a gate's own
    unit count makes impossible is clipped to it.

    Raises:
        ValueError: when minimum exceeds maximum.
    """
    if minimum > maximum:
        raise ValueError(f"minimum {minimum} kept units exceeds maximum {maximum}")
    for gate in gates:
        kept = float(gate.gate.sum())
        # sigmoid never reaches 0 or 1: stay a little inside, or no finite shift exists
        slack = 1e-4 * gate.theta.numel()
        lower = min(minimum, gate.theta.numel() - slack)
        upper = max(maximum, slack)
        if lower <= kept <= upper:
            continue
        bound = lower if kept < lower else upper
        low, high = -100.0 * gate.temperature, 100.0 * gate.temperature
        theta = gate.theta.cpu().double()
        for _ in range(60):  # bisection: the sum is monotone in the shift
            shift = (low + high) / 2
            total = float(gate.expectation(theta + shift).sum())
            low, high = (shift, high) if total < bound else (low, shift)
        gate.theta.add_(high if kept < lower else low)
