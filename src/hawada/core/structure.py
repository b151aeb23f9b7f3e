"""What may be removed from a model, declared as data: units, the groups they form and where they are cut.

An adapter writes a list of `Group`. Gating, latency prediction, slicing and export are all derived from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# For each group, the sorted indices of the units that stay; a group that lies inside a removed parent keeps ().
Keep = dict[str, tuple[int, ...]]
Widths = dict[str, int]


@dataclass(frozen=True)
class GatePoint:
    """Where a group's gate multiplies an activation.

    Attributes:
        module: path of the module whose output (or first positional input) is multiplied.
        side: `"output"` or `"input"`.
        dim: the activation's axis that holds the units; ignored when the group has one unit.
        per_unit: consecutive elements along `dim` that belong to one unit (a head's head_dim).
    """

    module: str
    side: str = "output"
    dim: int = 1
    per_unit: int = 1


@dataclass(frozen=True)
class Cut:
    """One axis of one parameter or buffer that shrinks with the group.

    Unit `u` owns the elements `offset + u * per_unit + [0, per_unit)` for each of `offsets` (a fused q/k/v projection
    has three). Elements that no unit owns always stay.

    Attributes:
        tensor: qualified name of the parameter or buffer, e.g. `layer1.0.conv1.weight`.
        dim: the axis that is cut.
        per_unit: consecutive elements per unit.
        offsets: where unit 0 begins, once for each run of elements.
        follows: attribute of the module that owns the tensor and must equal the new size (`out_channels`), or None.
    """

    tensor: str
    dim: int
    per_unit: int = 1
    offsets: tuple[int, ...] = (0,)
    follows: str | None = None

    def elements(self, units: Iterable[int]) -> Tensor:
        """Sorted positions along `dim` that belong to `units`: int64 of shape (len(units) * per_unit * offsets,)."""
        starts = torch.as_tensor(sorted(units), dtype=torch.long) * self.per_unit
        runs = [offset + starts[:, None] + torch.arange(self.per_unit) for offset in self.offsets]  # each (units, k)
        return torch.cat([run.reshape(-1) for run in runs]).sort().values


@dataclass(frozen=True)
class Removal:
    """What is left of a module when its group's single unit goes.

    Attributes:
        module: path of the module that is replaced.
        keeps: names of its children that stay, applied one after the other; none means the identity.
    """

    module: str
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Units that live on the same coupled tensor axes and are gated, timed and cut together.

    Attributes:
        name: unique among a model's groups.
        kind: `channel`, `head`, `ffn`, `branch`, `layer` …; the key of `gpu.multiple` and of group filters.
        units: how many units the unpruned model has.
        gated_at: exactly one point per writer of the gated stream.
        cuts: the axes that shrink.
        removes: for groups of one unit that have no axis to cut (branches, layers).
        parent: name of the one-unit group inside which this one lives; its gate multiplies this group's.
    """

    name: str
    kind: str
    units: int
    gated_at: tuple[GatePoint, ...]
    cuts: tuple[Cut, ...] = ()
    removes: tuple[Removal, ...] = ()
    parent: str | None = None


@dataclass(frozen=True)
class Site:
    """A module that the latency table times.

    Attributes:
        module: its path.
        groups: names of *every* group whose width changes its time, parents first.
        kind: sites of one kind share a fitted scale (`layer1`, `attention` …).
    """

    module: str
    groups: tuple[str, ...]
    kind: str


def keep_all(groups: Sequence[Group]) -> Keep:
    """Every unit of every group: exporting it reproduces the teacher."""
    return {group.name: tuple(range(group.units)) for group in groups}


def widths_of(keep: Mapping[str, Sequence[int]]) -> Widths:
    """How many units each group keeps."""
    return {name: len(kept) for name, kept in keep.items()}


def full_widths(groups: Sequence[Group]) -> Widths:
    """The unpruned widths."""
    return {group.name: group.units for group in groups}


def without_orphans(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Keep:
    """Sort every entry and empty the groups whose parent (or parent's parent) is gone."""
    parents = {group.name: group.parent for group in groups}

    def alive(name: str | None) -> bool:  # a parent that is not among the groups counts as kept
        return name not in parents or (len(keep[name]) > 0 and alive(parents[name]))

    return {group.name: tuple(sorted(keep[group.name])) if alive(group.parent) else () for group in groups}


def check_groups(groups: Sequence[Group], model: nn.Module) -> None:
    """Check a declaration against the model before anything is attached, timed or cut.

    Raises:
        ValueError: naming the group and the path that is wrong.
    """
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
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
        if group.parent is not None and (group.parent not in by_name or by_name[group.parent].units != 1):
            raise ValueError(f"{group.name}: parent {group.parent!r} is not a group of one unit")
        if group.removes and group.units != 1:
            raise ValueError(f"{group.name}: removes modules but has {group.units} units; only a group of one may")
        for path in [point.module for point in group.gated_at] + [removal.module for removal in group.removes]:
            if path not in modules:
                raise ValueError(f"{group.name}: the model has no module {path!r}")
        for cut in group.cuts:
            if cut.tensor not in tensors:
                raise ValueError(f"{group.name}: the model has no parameter or buffer {cut.tensor!r}")
            size, last = tensors[cut.tensor].shape[cut.dim], int(cut.elements(range(group.units))[-1])
            if last >= size:
                raise ValueError(f"{group.name}: {cut.tensor} has {size} elements on axis {cut.dim}, not {last + 1}")
