"""Attach gates to the groups of an adapter that pass a filter, and look at what is attached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from hawada.core.gates import GateFactory, SigmoidGate, Student
from hawada.core.structure import Group

GroupFilterFn = Callable[[Group, nn.Module], bool]


class Declares(Protocol):
    """Part of an adapter that attaching needs."""

    def groups(self, model: nn.Module) -> list[Group]: ...


def is_attention_layer(group: Group, model: nn.Module) -> bool:
    """Passes the groups of attention heads, whatever the family calls them."""
    return group.kind in ("head", "kv_head", "query_head")


class GroupFilter:
    """Selects groups by name, kind or type of the gated module; what is left None does not matter.

    Args:
        name: shell pattern, or several, of which one must match (`layer1.*`).
        kind: one kind or several (`channel`, `branch`).
        module_type: the gated module, or one that contains it, must be of this class.
    """

    def __init__(
        self,
        name: str | Sequence[str] | None = None,
        kind: str | Sequence[str] | None = None,
        module_type: type[nn.Module] | None = None,
    ) -> None:
        self.names = [name] if isinstance(name, str) else name
        self.kinds = [kind] if isinstance(kind, str) else kind
        self.module_type = module_type

    def __call__(self, group: Group, model: nn.Module) -> bool:
        if self.names is not None and not any(fnmatchcase(group.name, pattern) for pattern in self.names):
            return False
        if self.kinds is not None and group.kind not in self.kinds:
            return False
        if self.module_type is None:
            return True
        paths = group.gated_at[0].module.split(".")
        around = [model.get_submodule(".".join(paths[:depth])) for depth in range(1, len(paths) + 1)]
        return any(isinstance(module, self.module_type) for module in around)


def select_groups(groups: Sequence[Group], model: nn.Module, filter_fn: GroupFilterFn | None) -> list[Group]:
    """The groups that pass.

    Raises:
        ValueError: when none passes, listing what is there.
    """
    chosen = [group for group in groups if filter_fn is None or filter_fn(group, model)]
    if not chosen:
        there = ", ".join(f"{group.name} ({group.kind})" for group in groups[:12])
        more = f" and {len(groups) - 12} more" if len(groups) > 12 else ""
        raise ValueError(f"groups: the filter matches none of {there}{more}; change groups.name or groups.kind")
    return chosen


def attach_adapters(
    model: nn.Module,
    *,
    adapter_cls: type[Declares] | Declares,
    filter_fn: GroupFilterFn | None = None,
    gate: GateFactory = SigmoidGate,
) -> Student:
    """Gate a model in place; `Student.detach()` (or leaving a `with` block) restores it bit for bit.

    Args:
        model: what the adapter describes.
        adapter_cls: what declares groups (an adapter), or its class when it needs no arguments.
        filter_fn: called with (group, model); None takes every group.
        gate: makes a gate from a unit count.

    Raises:
        ValueError: when no group passes the filter, or a group does not fit the model; nothing is attached then.
    """
    adapter = adapter_cls() if isinstance(adapter_cls, type) else adapter_cls
    return Student(model, select_groups(adapter.groups(model), model, filter_fn), gate)


def group_table(student: Student) -> list[dict[str, str | int | float]]:
    """One row per group: its shape, its parent and the statistics of its effective gates."""
    rows: list[dict[str, str | int | float]] = []
    gates = student.effective_gates()
    for group in student.groups:
        gate = gates[group.name].detach()
        rows.append(
            {
                "group": group.name,
                "kind": group.kind,
                "units": group.units,
                "parent": group.parent or "",
                "gated_at": ", ".join(point.module for point in group.gated_at),
                "tensors": len(group.cuts),
                "min": float(gate.min()),
                "mean": float(gate.mean()),
                "max": float(gate.max()),
                "open": int((gate >= 0.5).sum()),
            }
        )
    return rows
