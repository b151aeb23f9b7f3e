"""Penalties on gates. Each sees gate values and the group declaration, never weights or activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hawada.core.structure import Group

Gates = Mapping[str, Tensor]
Penalty = Callable[[Gates, Sequence[Group]], Tensor]


class L1:
    """weight * mean over all units of |g|: fewer units, wherever they are."""

    def __init__(self, weight: float = 0.0) -> None:
        self.weight = weight

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        return self.weight * torch.cat([gate.reshape(-1) for gate in gates.values()]).abs().mean()


class StructuredConsistency:
    """weight * mean squared distance between a group's mean gate and that of the structure it belongs to.

    Groups under one parent are coupled: they are of use only together. The structure's mean is taken over the parent
    and its groups, so a branch tends to live or go as a whole. Groups without parent or children add nothing.
    """

    def __init__(self, weight: float = 0.0) -> None:
        self.weight = weight

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        families: dict[str, list[str]] = {}
        for group in groups:
            if group.parent is not None and group.parent in gates and group.name in gates:
                families.setdefault(group.parent, [group.parent]).append(group.name)
        if not families:
            return next(iter(gates.values())).new_zeros(())
        spreads = [
            torch.stack([gates[name].mean() for name in names]).var(unbiased=False) for names in families.values()
        ]
        return self.weight * torch.stack(spreads).mean()


class FloorCeiling:
    """weight * squared excess of a group's mean gate below `floor` or above `ceiling`, averaged over groups.

    Args:
        floor: smallest fraction of a group that should stay, in [0, 1].
        ceiling: largest.
        weight: factor.
    """

    def __init__(self, floor: float = 0.0, ceiling: float = 1.0, weight: float = 1.0) -> None:
        if not 0.0 <= floor <= ceiling <= 1.0:
            raise ValueError(f"penalties: floor {floor} and ceiling {ceiling} must satisfy 0 <= floor <= ceiling <= 1")
        self.floor, self.ceiling, self.weight = floor, ceiling, weight

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        means = torch.stack([gate.mean() for gate in gates.values()])
        excess = torch.relu(self.floor - means) + torch.relu(means - self.ceiling)
        return self.weight * excess.square().mean()


class Polarization:
    """weight * (pull * mean |g| - mean |g - mean g|): drives gates to 0 or 1 and away from what lies between.

    Zhuang et al., Neuron-level structured pruning using polarization regularizer, 2020. Means are over all units.

    Args:
        weight: factor.
        pull: how strongly gates are also pulled to 0.
    """

    def __init__(self, weight: float = 0.0, pull: float = 1.0) -> None:
        self.weight, self.pull = weight, pull

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        every = torch.cat([gate.reshape(-1) for gate in gates.values()])
        return self.weight * (self.pull * every.abs().mean() - (every - every.mean()).abs().mean())


def combined_penalty(gates: Gates, groups: Sequence[Group], penalties: Sequence[Penalty]) -> Tensor:
    """Sum of the penalties, a scalar; zero when there are none."""
    total = next(iter(gates.values())).new_zeros(())
    for penalty in penalties:
        total = total + penalty(gates, groups)
    return total
