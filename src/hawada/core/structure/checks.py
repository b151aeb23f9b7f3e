"""Checks of a declaration against a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hawada.core.structure.attributes import attribute_of
from hawada.core.structure.groups import Cut, Group
from hawada.core.structure.slicing import all_tensors


def check_groups(groups: Sequence[Group], model: nn.Module) -> None:
    """Check a declaration against the model before anything is attached, timed or cut.

    Raises:
        ValueError: naming the group and the path that is wrong.
    """
    modules = dict(model.named_modules())
    tensors = all_tensors(model)
    by_name = {group.name: group for group in groups}
    if len(by_name) != len(groups):
        raise ValueError("two groups share a name; group names must be unique")
    for group in groups:
        above, seen = group.parent, {group.name}
        while above in by_name:
            if above in seen:
                raise ValueError(f"{group.name}: its parents form a circle; a parent must lie further out")
            seen.add(above)
            above = by_name[above].parent
        if group.units < 1:
            raise ValueError(f"{group.name}: {group.units} units; a group needs at least one")
        if group.parent is not None and (group.parent not in by_name or group.units % by_name[group.parent].units):
            raise ValueError(
                f"{group.name}: parent {group.parent!r} is not a group whose units can share out {group.units}"
            )
        if group.equal_per_parent is not None and (
            group.units % group.equal_per_parent
            or (group.parent and by_name[group.parent].units * group.equal_per_parent != group.units)
        ):
            raise ValueError(
                f"{group.name}: {group.units} units are not {group.equal_per_parent} for each of the parent's"
            )
        if group.removes and group.units != 1:
            raise ValueError(f"{group.name}: removes modules but has {group.units} units; only a group of one may")
        paths = [
            *(p.module for p in group.gated_at),
            *(r.module for r in group.removes),
            *(n.module for n in group.norms),
        ]
        for path in [*paths, *(attribute.rpartition(".")[0] for attribute in group.attributes)]:
            if path not in modules:
                raise ValueError(f"{group.name}: the model has no module {path!r}")
        for attribute in group.attributes:
            path, _, name = attribute.rpartition(".")
            if not hasattr(modules[path], name):
                raise ValueError(f"{group.name}: the model has no attribute {attribute!r}")
        for number in group.sizes:
            path, _, name = number.attribute.rpartition(".")
            if not isinstance(attribute_of(modules[path], name) if path in modules else None, int):
                raise ValueError(f"{group.name}: the model has no whole number {number.attribute!r}")
        for cut in (*group.cuts, *(point for point in group.gated_at if isinstance(point, Cut))):
            if cut.tensor not in tensors:
                raise ValueError(f"{group.name}: the model has no parameter or buffer {cut.tensor!r}")
            size, last = tensors[cut.tensor].shape[cut.dim], int(cut.elements(range(group.units)).max())
            if last >= size:
                raise ValueError(f"{group.name}: {cut.tensor} has {size} elements on axis {cut.dim}, not {last + 1}")
