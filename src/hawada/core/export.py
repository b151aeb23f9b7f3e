"""From gates to kept units, and from kept units to a physically smaller model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hawada.core.slicing import slice_tensor
from hawada.core.structure import Cut, Group, Keep, check_groups, without_orphans
from hawada.core.student import GateHook


@dataclass(frozen=True)
class Rounding:
    """Which widths an accelerator runs well: multiples of `multiple`, and the full width.

    Attributes:
        multiple: 1 allows every width.
        mode: `nearest`, `up` or `down`.
    """

    multiple: int = 1
    mode: str = "nearest"

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"gpu.multiple: {self.multiple} is not a positive whole number")
        if self.mode not in ("nearest", "up", "down"):
            raise ValueError(f"rounding mode {self.mode!r} is not nearest, up or down")

    def widths(self, units: int) -> list[int]:
        """Every allowed width of a group with `units` units, ascending and ending at `units`."""
        return [*range(self.multiple, units, self.multiple), units]

    def round(self, width: float, units: int) -> int:
        """The allowed width next to `width` in this mode; never below the smallest allowed one."""
        allowed = self.widths(units)
        if self.mode == "up":
            return next((choice for choice in allowed if choice >= width), units)
        if self.mode == "down":
            return max((choice for choice in allowed if choice <= width), default=allowed[0])
        return min(allowed, key=lambda choice: (abs(choice - width), -choice))


@dataclass(frozen=True)
class ExportPolicy:
    """How kept units are read from gates.

    Attributes:
        threshold: a unit counts as kept when its gate is at least this.
        rounding: by group kind; kinds that are not listed are free.
        minimum: fewest units of a group that stays at all.
    """

    threshold: float = 0.5
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    minimum: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"export.threshold: {self.threshold} is not between 0 and 1")

    def rounding_of(self, group: Group) -> Rounding:
        """The rounding of a group's kind."""
        return self.rounding.get(group.kind, Rounding())

    def widths(self, group: Group) -> list[int]:
        """Every width that a group may have: 0 or 1 for a branch or layer, else the allowed multiples."""
        if group.removes:
            return [0, 1]
        return [w for w in self.rounding_of(group).widths(group.units) if w >= min(self.minimum, group.units)]


def top_units(gate: Tensor, width: int) -> tuple[int, ...]:
    """Indices of the `width` largest gates, sorted; ties go to the lower index."""
    order = torch.sort(gate.detach().float().cpu(), descending=True, stable=True).indices
    return tuple(sorted(order[:width].tolist()))


def keep_group_indices_from_gate(gate: Tensor, group: Group, policy: ExportPolicy) -> tuple[int, ...]:
    """Sorted indices of the units that a gate keeps: as many as reach the threshold, rounded, largest first.

    Args:
        gate: the group's gate values, shape (units,).
        group: its declaration.
        policy: threshold, rounding and minimum.
    """
    count = int((gate >= policy.threshold).sum())
    if group.removes:
        return tuple(range(count))
    allowed = policy.widths(group)
    return top_units(gate, max(policy.rounding_of(group).round(count, group.units), allowed[0]))


def keep_element_indices_from_gate(gate: Tensor, group: Group, cut: Cut, policy: ExportPolicy) -> Tensor:
    """Sorted positions along `cut.dim` that belong to the units which a gate keeps, int64."""
    return cut.elements(keep_group_indices_from_gate(gate, group, policy))


def keep_from_gates(gates: Mapping[str, Tensor], groups: Sequence[Group], policy: ExportPolicy) -> Keep:
    """Kept indices of every group; groups inside a removed parent keep ()."""
    keep = {group.name: keep_group_indices_from_gate(gates[group.name], group, policy) for group in groups}
    return without_orphans(keep, groups)


def smallest_keep(groups: Sequence[Group], policy: ExportPolicy) -> Keep:
    """The least that may stay: every branch removed, every other group at its smallest allowed width."""
    return without_orphans({group.name: tuple(range(policy.widths(group)[0])) for group in groups}, groups)


@dataclass(frozen=True)
class Edits:
    """What slicing does to a model, apart from the numbers: enough to rebuild the slim architecture.

    Attributes:
        removed: elements to drop, by tensor name, then axis.
        attributes: new values of module attributes, by `module.attribute`.
        replaced: modules that go, with the children that stay.
    """

    removed: dict[str, dict[int, Tensor]]
    attributes: dict[str, int]
    replaced: dict[str, tuple[str, ...]]


def plan_edits(model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int]]) -> Edits:
    """Work out every cut before anything is touched.

    Raises:
        ValueError: when the groups do not fit, a kept index is out of range, or a group with an axis would be empty.
    """
    check_groups(groups, model)
    keep = without_orphans(keep, groups)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    removed: dict[str, dict[int, Tensor]] = {}
    attributes: dict[str, int] = {}
    replaced: dict[str, tuple[str, ...]] = {}
    for group in groups:
        kept = keep[group.name]
        if kept and (kept[0] < 0 or kept[-1] >= group.units or len(set(kept)) != len(kept)):
            raise ValueError(f"{group.name}: kept indices must be distinct and within 0..{group.units - 1}")
        if group.removes and not kept:
            replaced.update({removal.module: removal.keeps for removal in group.removes})
        if len(kept) == group.units or (group.parent is not None and not keep[group.parent]):
            continue
        if group.cuts and not kept:
            raise ValueError(f"{group.name}: all {group.units} units would go; keep at least one")
        gone = sorted(set(range(group.units)) - set(kept))
        for cut in group.cuts:
            dims = removed.setdefault(cut.tensor, {})
            dims[cut.dim] = torch.cat([dims.get(cut.dim, torch.empty(0, dtype=torch.long)), cut.elements(gone)])
            if cut.follows:
                owner = cut.tensor.rpartition(".")[0]
                attributes[f"{owner}.{cut.follows}"] = tensors[cut.tensor].shape[cut.dim] - len(dims[cut.dim].unique())
    return Edits(removed, attributes, replaced)


def apply_edits(model: nn.Module, edits: Edits, prefix: str = "") -> nn.Module:
    """Carry out edits on a model that the caller owns; returns it, or what stands in its place.

    Args:
        model: changed in place.
        edits: planned on the whole model.
        prefix: path of `model` within that whole, when it is a submodule.
    """

    def local(name: str) -> str | None:
        return name[len(prefix) + 1 :] if prefix and name.startswith(f"{prefix}.") else (None if prefix else name)

    if prefix and prefix in edits.replaced:
        return _remains(model, edits.replaced[prefix])
    owners: dict[int, list[tuple[nn.Module, str]]] = {}  # tied tensors have several owners and are cut once
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, name))
                tensors[f"{path}.{name}" if path else name] = tensor
    removed: dict[int, dict[int, list[Tensor]]] = {}
    originals: dict[int, Tensor] = {}
    for name, dims in edits.removed.items():
        tensor = tensors.get(local(name) or "")
        if tensor is not None:
            originals[id(tensor)] = tensor
            for dim, gone in dims.items():
                removed.setdefault(id(tensor), {}).setdefault(dim, []).append(gone)
    for key, cuts in removed.items():
        old = smaller = originals[key]
        for dim, parts in cuts.items():
            stays = torch.ones(old.shape[dim], dtype=torch.bool)
            stays[torch.cat(parts)] = False
            smaller = slice_tensor(smaller, dim, stays.nonzero().flatten())
        if isinstance(old, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=old.requires_grad)
        for module, name in owners[key]:
            setattr(module, name, smaller)
    return set_structure(model, edits.attributes, edits.replaced, prefix)


def set_structure(
    model: nn.Module, attributes: Mapping[str, int], replaced: Mapping[str, Sequence[str]], prefix: str = ""
) -> nn.Module:
    """The part of the edits that is not numbers: attributes and removed modules. Changes `model` in place."""
    skip = len(prefix) + 1 if prefix else 0
    for name, value in attributes.items():
        path, _, attribute = name.rpartition(".")
        if not prefix or f"{path}.".startswith(f"{prefix}."):
            setattr(model.get_submodule(path[skip:]), attribute, value)
    for path, keeps in replaced.items():
        if not prefix or path.startswith(f"{prefix}."):
            parent, _, child = path[skip:].rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, _remains(getattr(owner, child), tuple(keeps)))
    return model


def materialize(
    model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int]], prefix: str = ""
) -> nn.Module:
    """The slim model: a copy of `model` with only the kept units, without gates or hooks.

    Args:
        model: the teacher, or a gated student's model; not changed.
        groups: its declaration.
        keep: kept indices of every group.
        prefix: return only the submodule at this path, sliced (for timing a site).

    Raises:
        ValueError: see `plan_edits`.
    """
    edits = plan_edits(model, groups, keep)
    slim = copy.deepcopy(model.get_submodule(prefix))
    for module in slim.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, GateHook)]:
                del hooks[key]
    return apply_edits(slim, edits, prefix)


def _remains(module: nn.Module, keeps: Sequence[str]) -> nn.Module:
    """What stands where a removed module was: its kept children in a row, under their old names, or the identity."""
    if not keeps:
        return nn.Identity()
    remains = nn.Sequential()
    for name in keeps:
        remains.add_module(name, getattr(module, name))
    return remains.train(module.training)
