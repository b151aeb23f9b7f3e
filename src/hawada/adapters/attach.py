"""Attach gates to those groups of an adapter that pass a filter, and tabulate the gates of a gated model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from hawada.core.gates import GateFactory, SigmoidGate, Student
from hawada.core.structure import Group

GroupFilterFn = Callable[[Group, nn.Module], bool]


class Declares(Protocol):
    """The part of an adapter that `attach_adapters` uses."""

    def groups(self, model: nn.Module) -> list[Group]: ...


def is_attention_layer(group: Group, model: nn.Module) -> bool:
    """Return whether a group's units are attention heads, of whichever kind: plain, KV or query heads."""
    return group.kind in ("head", "kv_head", "query_head")


class GroupFilter:
    """A filter by name, kind or type of the gated module; an argument that is left None lets every group pass.

    Args:
        name: A shell pattern (`layer1.*`), or several, of which one must match the group's name.
        kind: One kind or several (`channel`, `branch`), of which one must be the group's.
        module_type: The first module that the group gates, or one that contains it, must be of this class.
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
        enclosing = [model.get_submodule(".".join(paths[:depth])) for depth in range(1, len(paths) + 1)]
        return any(isinstance(module, self.module_type) for module in enclosing)


def select_groups(groups: Sequence[Group], model: nn.Module, filter_fn: GroupFilterFn | None) -> list[Group]:
    """Return the groups that pass the filter; without a filter, all of them.

    Raises:
        ValueError: No group passes; the message lists the groups of the model, at most 12 of them.
    """
    chosen = [group for group in groups if filter_fn is None or filter_fn(group, model)]
    if not chosen:
        listed = ", ".join(f"{group.name} ({group.kind})" for group in groups[:12])
        more = f" and {len(groups) - 12} more" if len(groups) > 12 else ""
        raise ValueError(f"groups: the filter matches none of {listed}{more}; change groups.name or groups.kind")
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
        model: A model that the adapter describes.
        adapter_cls: An adapter, which declares the groups, or its class when that takes no arguments.
        filter_fn: A function of (group, model) that returns whether the group is gated; None gates every group.
        gate: A function that makes a gate from the number of units.

    Raises:
        ValueError: No group passes the filter, or a group does not fit the model; nothing is attached then.
    """
    adapter = adapter_cls() if isinstance(adapter_cls, type) else adapter_cls
    return Student(model, select_groups(adapter.groups(model), model, filter_fn), gate)


def group_table(student: Student) -> list[dict[str, str | int | float]]:
    """Return one row per group: its declaration, and statistics of its gates times those of its parents.

    `open` is the number of units whose value is at least 0.5.
    """
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
