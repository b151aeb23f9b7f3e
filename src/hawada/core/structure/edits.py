"""What slicing does to a model: which elements go, which attributes change, which modules are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawada.core.structure.checks import check_groups
from hawada.core.structure.groups import Group
from hawada.core.structure.kept import widths_of, without_orphans
from hawada.core.structure.slicing import slice_tensor


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
    for group in groups:  # before orphans are dropped: an index out of range has no parent either
        if set(keep[group.name]) - set(range(group.units)) or len(set(keep[group.name])) != len(keep[group.name]):
            raise ValueError(f"{group.name}: kept indices must be distinct and within 0..{group.units - 1}")
    keep = without_orphans(keep, groups)
    widths = widths_of(keep, groups)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    removed: dict[str, dict[int, Tensor]] = {}
    attributes: dict[str, int] = {}
    replaced: dict[str, tuple[str, ...]] = {}
    for group in groups:
        kept = keep[group.name]
        if group.parent is not None and not keep[group.parent]:
            continue  # it goes with its parent
        if group.removes and not kept:
            replaced.update({removal.module: removal.keeps for removal in group.removes})
        if len(kept) == group.units:
            continue
        if group.cuts and not kept:
            raise ValueError(f"{group.name}: all {group.units} units would go; keep at least one")
        attributes.update(dict.fromkeys(group.attributes, widths[group.name]))
        gone = sorted(set(range(group.units)) - set(kept))
        for cut in group.cuts:
            dims = removed.setdefault(cut.tensor, {})
            dims[cut.dim] = torch.cat([dims.get(cut.dim, torch.empty(0, dtype=torch.long)), cut.elements(gone)])
            if cut.follows:
                owner = cut.tensor.rpartition(".")[0]
                size = tensors[cut.tensor].shape[cut.dim] - len(dims[cut.dim].unique())
                attributes[f"{owner}.{cut.follows}"] = size * cut.times
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

    if any(prefix.startswith(f"{path}.") for path in edits.replaced):
        return nn.Identity()  # it lies inside a module that goes
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
        old = originals[key]
        smaller = without_elements(old, {dim: torch.cat(parts) for dim, parts in cuts.items()})
        if isinstance(old, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=old.requires_grad)
        for module, name in owners[key]:
            setattr(module, name, smaller)
    model = set_structure(model, edits.attributes, edits.replaced, prefix)
    return _remains(model, edits.replaced[prefix]) if prefix in edits.replaced else model


def without_elements(tensor: Tensor, removed: Mapping[int, Tensor]) -> Tensor:
    """A copy of `tensor` without the given positions, by axis."""
    for dim, gone in removed.items():
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        stays[gone] = False
        tensor = slice_tensor(tensor, dim, stays.nonzero().flatten())
    return tensor


def set_structure(
    model: nn.Module, attributes: Mapping[str, int], replaced: Mapping[str, Sequence[str]], prefix: str = ""
) -> nn.Module:
    """The part of the edits that is not numbers: attributes and removed modules. Changes `model` in place."""
    skip = len(prefix) + 1 if prefix else 0
    for name, value in attributes.items():
        path, _, attribute = name.rpartition(".")
        if not prefix or f"{path}.".startswith(f"{prefix}."):
            owner = model.get_submodule(path[skip:])
            setattr(owner, attribute, (value,) if isinstance(getattr(owner, attribute), tuple) else value)
    for path, keeps in replaced.items():
        if not prefix or path.startswith(f"{prefix}."):
            parent, _, child = path[skip:].rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, _remains(getattr(owner, child), tuple(keeps)))
    return model


def _remains(module: nn.Module, keeps: Sequence[str]) -> nn.Module:
    """What stands where a removed module was: its kept children in a row, under their old names, or the identity."""
    if not keeps:
        return nn.Identity()
    remains = nn.Sequential()
    for name in keeps:
        remains.add_module(name, getattr(module, name))
    return remains.train(module.training)
