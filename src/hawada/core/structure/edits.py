"""What slicing does to a model: which elements go, which attributes change, which modules are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawada.core.structure.attributes import attribute_of, set_attribute
from hawada.core.structure.checks import check_groups
from hawada.core.structure.groups import Group
from hawada.core.structure.kept import widths_of, without_orphans
from hawada.core.structure.slicing import all_tensors, slice_tensor


@dataclass(frozen=True)
class Edits:
    """What slicing does to a model, apart from the numbers: enough to rebuild the slim architecture.

    Attributes:
        removed: the positions that go, sorted and distinct, by tensor name, then axis; a tensor that has several names
            is listed under each of them.
        attributes: new values of module attributes, by `module.attribute`.
        replaced: modules that go, with the children that stay.
    """

    removed: dict[str, dict[int, Tensor]]
    attributes: dict[str, int]
    replaced: dict[str, tuple[str, ...]]

    def removes(self, path: str) -> bool:
        """Whether a module or tensor goes: what is removed, and what lies inside it but for the children that stay."""
        return any(
            path == gone or (path.startswith(f"{gone}.") and path[len(gone) + 1 :].partition(".")[0] not in keeps)
            for gone, keeps in self.replaced.items()
        )

    def shape(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The shape that is left of the tensor of this name."""
        removed = self.removed.get(name, {})
        return tuple(size - (len(removed[dim]) if dim in removed else 0) for dim, size in enumerate(tensor.shape))

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """A copy without history of what is left of the tensor of this name."""
        if name not in self.removed:
            return slice_tensor(tensor, 0, None)
        for dim, gone in self.removed[name].items():
            stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
            stays[gone] = False
            tensor = slice_tensor(tensor, dim, stays.nonzero().flatten())
        return tensor


def plan_edits(model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Sequence[int]]) -> Edits:
    """Work out every cut before anything is touched: the one calculation of what goes from which tensor.

    Args:
        model: the unpruned model; not changed.
        groups: its declaration.
        keep: kept indices of every group.

    Raises:
        ValueError: when the groups do not fit, a kept index is out of range, or a group with an axis would be empty.
    """
    check_groups(groups, model)
    for group in groups:  # before orphans are dropped: an index out of range has no parent either
        if set(keep[group.name]) - set(range(group.units)) or len(set(keep[group.name])) != len(keep[group.name]):
            raise ValueError(f"{group.name}: kept indices must be distinct and within 0..{group.units - 1}")
    keep = without_orphans(keep, groups)
    widths = widths_of(keep, groups)
    tensors = all_tensors(model)
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
            dims[cut.dim] = _union(dims.get(cut.dim), cut.elements(gone))
            if cut.follows:
                left = tensors[cut.tensor].shape[cut.dim] - len(dims[cut.dim])
                attributes[f"{cut.module}.{cut.follows}"] = left * cut.times // cut.divided_by
        for size in group.sizes:
            known = attributes.get(size.attribute, _number(model, size.attribute))
            attributes[size.attribute] = known - len(gone) * size.per_unit
    return Edits(_under_every_name(removed, tensors), attributes, replaced)


def _number(model: nn.Module, attribute: str) -> int:
    path, _, name = attribute.rpartition(".")
    value = attribute_of(model.get_submodule(path), name)
    assert isinstance(value, int), "check_groups looked at it"
    return value


def _union(removed: Tensor | None, more: Tensor) -> Tensor:
    """The positions of both, sorted and distinct."""
    positions: Tensor = torch.unique(more if removed is None else torch.cat([removed, more]))
    return positions


def _under_every_name(
    removed: Mapping[str, dict[int, Tensor]], tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """Give all names of a tied tensor the positions that go under any of them."""
    shared: dict[int, dict[int, Tensor]] = {}
    for name, dims in removed.items():
        of_tensor = shared.setdefault(id(tensors[name]), {})
        for dim, gone in dims.items():
            of_tensor[dim] = _union(of_tensor.get(dim), gone)
    return {name: shared[id(tensor)] for name, tensor in tensors.items() if id(tensor) in shared}


def sliced_tensors(model: nn.Module, edits: Edits, prefix: str = "") -> dict[str, Tensor]:
    """Cut the parameters and buffers of a model, or of its submodule at `prefix`, to what stays of them.

    Returns:
        Copies by their names in `model`; a tensor that has several names is one tensor here too.
    """
    sliced: dict[int, Tensor] = {}
    tensors = all_tensors(model)
    inside = [name for name in tensors if not prefix or name.startswith(f"{prefix}.")]
    inside = [name for name in inside if not edits.removes(name)]
    for name in inside:
        if id(tensors[name]) not in sliced:
            sliced[id(tensors[name])] = edits.slice(name, tensors[name])
    return {name: sliced[id(tensors[name])] for name in inside}


def set_structure(
    model: nn.Module, attributes: Mapping[str, int], replaced: Mapping[str, Sequence[str]], prefix: str = ""
) -> nn.Module:
    """Carry out the part of the edits that is not numbers: attributes and removed modules.

    Args:
        model: the model, or its submodule at `prefix`; changed in place.
        attributes: see `Edits`.
        replaced: see `Edits`.
        prefix: path of `model` within the model that the edits were planned on.
    """
    skip = len(prefix) + 1 if prefix else 0
    for name, value in attributes.items():
        path, _, attribute = name.rpartition(".")
        if not prefix or f"{path}.".startswith(f"{prefix}."):
            set_attribute(model.get_submodule(path[skip:]), attribute, value)
    for path, keeps in replaced.items():
        if not prefix or path.startswith(f"{prefix}."):
            parent, _, child = path[skip:].rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, remains_of(getattr(owner, child), keeps))
    return model


class Skipped(nn.Identity):
    """Returns its first argument, whatever else the removed module was called with."""

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:
        return input


def remains_of(module: nn.Module, keeps: Sequence[str]) -> nn.Module:
    """What stands where a removed module was: its kept children in a row, under their old names, or the identity."""
    if not keeps:
        return Skipped()
    remains = nn.Sequential()
    for name in keeps:
        remains.add_module(name, getattr(module, name))
    return remains.train(module.training)
