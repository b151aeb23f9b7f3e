"""Which units gates or a policy keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hawada.core.structure.groups import Cut, Group
from hawada.core.structure.kept import Keep, Widths, keep_first
from hawada.core.structure.policy import ExportPolicy


def best_first(gate: Tensor) -> list[int]:
    """All indices, the largest gate first; ties go to the lower index."""
    return torch.sort(gate.detach().float().cpu(), descending=True, stable=True).indices.tolist()


def keep_group_indices_from_gate(gate: Tensor, group: Group, policy: ExportPolicy) -> tuple[int, ...]:
    """Sorted indices of the units that a gate keeps: as many as reach the threshold, rounded, largest first.

    Args:
        gate: the group's gate values, shape (units,).
        group: its declaration.
        policy: threshold, rounding and minimum.
    """
    width = _allowed_width(_count_from_gate(gate, group, policy), group, policy)
    return keep_first([group], {group.name: width}, {group.name: best_first(gate)})[group.name]


def keep_element_indices_from_gate(gate: Tensor, group: Group, cut: Cut, policy: ExportPolicy) -> Tensor:
    """Sorted positions along `cut.dim` that belong to the units which a gate keeps, int64."""
    return cut.elements(keep_group_indices_from_gate(gate, group, policy))


def keep_from_gates(gates: Mapping[str, Tensor], groups: Sequence[Group], policy: ExportPolicy) -> Keep:
    """Kept indices of every group; groups inside a removed parent keep ().

    Under the uniform layout a kind's width is the mean of what its gates ask for, rounded.
    """
    widths: Widths = {}
    for members in policy.shared(groups):
        counts = [_count_from_gate(gates[member.name], member, policy) for member in members]
        width = _allowed_width(sum(counts) / len(counts), members[0], policy)
        widths |= dict.fromkeys((member.name for member in members), width)
    branches = [group.name for group in groups if group.removes]
    widths = policy.with_required_branches(
        widths, groups, sorted(branches, key=lambda name: -float(gates[name].detach()))
    )
    return keep_first(groups, widths, {name: best_first(gate) for name, gate in gates.items()})


def smallest_keep(groups: Sequence[Group], policy: ExportPolicy) -> Keep:
    """The least that may stay: branches and layers gone as far as allowed, other groups at their smallest width."""
    widths = {group.name: policy.widths(group)[0] for group in groups}
    branches = [group.name for group in groups if group.removes]
    return keep_first(groups, policy.with_required_branches(widths, groups, branches))


def _count_from_gate(gate: Tensor, group: Group, policy: ExportPolicy) -> float:
    """The width that as many units give as reach the threshold."""
    return float((gate >= policy.threshold).sum()) * group.full_width / group.units


def _allowed_width(count: float, group: Group, policy: ExportPolicy) -> int:
    if group.removes:
        return int(count)
    return max(policy.rounding_of(group).round(count, group.full_width), policy.widths(group)[0])
