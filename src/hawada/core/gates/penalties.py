"""Penalties on gates: each is a function of gate values and groups, never of weights or activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hawada.core.structure import Group

Gates = Mapping[str, Tensor]
"""By group, its gate values times those of its parents, each (units,)."""

Penalty = Callable[[Gates, Sequence[Group]], Tensor]
"""A function of gates and groups that returns a scalar, differentiable in the gates."""


class L1:
    """weight * mean of |g| over the units of all groups: it drives gates down, no matter in which group.

    Args:
        weight: the factor of the penalty.
    """

    def __init__(self, weight: float = 0.0) -> None:
        self.weight = weight

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        return self.weight * torch.cat([gate.reshape(-1) for gate in gates.values()]).abs().mean()


class StructuredConsistency:
    """weight * variance of the mean gates of the groups in a structure, averaged over structures.

    A structure is a parent group and its children, which are of use only together; the penalty makes a branch tend to
    be kept or removed as a whole. Groups without parent or children add nothing.

    Args:
        weight: the factor of the penalty.
    """

    def __init__(self, weight: float = 0.0) -> None:
        self.weight = weight

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        structures: dict[str, list[str]] = {}
        for group in groups:
            if group.parent is not None and group.parent in gates and group.name in gates:
                structures.setdefault(group.parent, [group.parent]).append(group.name)
        if not structures:
            return next(iter(gates.values())).new_zeros(())
        variances = [
            torch.stack([gates[name].mean() for name in names]).var(unbiased=False) for names in structures.values()
        ]
        return self.weight * torch.stack(variances).mean()


class FloorCeiling:
    """weight * squared distance of a group's mean gate from [floor, ceiling], averaged over groups.

    The mean gate stands for the fraction of the group's units that stay; within the bounds nothing is added.

    Args:
        floor: the smallest fraction of a group's units that should stay, in [0, 1].
        ceiling: the largest fraction that should stay, in [floor, 1].
        weight: the factor of the penalty.

    Raises:
        ValueError: when 0 <= floor <= ceiling <= 1 does not hold.
    """

    def __init__(self, floor: float = 0.0, ceiling: float = 1.0, weight: float = 1.0) -> None:
        if not 0.0 <= floor <= ceiling <= 1.0:
            raise ValueError(
                f"penalties: floor {floor} and ceiling {ceiling} must satisfy 0 <= floor <= ceiling <= 1; change "
                "penalties.floor or penalties.ceiling"
            )
        self.floor, self.ceiling, self.weight = floor, ceiling, weight

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        means = torch.stack([gate.mean() for gate in gates.values()])
        distances = torch.relu(self.floor - means) + torch.relu(means - self.ceiling)
        return self.weight * distances.square().mean()


class Polarization:
    """weight * (pull * mean |g| - mean |g - mean g|): it drives gates to 0 or 1, away from values in between.

    This is the regularizer of Zhuang et al., Neuron-level structured pruning using polarization regularizer, 2020; its
    means are taken over all units.

    Args:
        weight: the factor of the penalty.
        pull: the factor of the term that draws gates to 0.
    """

    def __init__(self, weight: float = 0.0, pull: float = 1.0) -> None:
        self.weight, self.pull = weight, pull

    def __call__(self, gates: Gates, groups: Sequence[Group]) -> Tensor:
        values = torch.cat([gate.reshape(-1) for gate in gates.values()])
        return self.weight * (self.pull * values.abs().mean() - (values - values.mean()).abs().mean())


def combined_penalty(gates: Gates, groups: Sequence[Group], penalties: Sequence[Penalty]) -> Tensor:
    """Return the sum of the penalties, a scalar; it is zero when there are none."""
    total = next(iter(gates.values())).new_zeros(())
    for penalty in penalties:
        total = total + penalty(gates, groups)
    return total
