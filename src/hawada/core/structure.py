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
# For each group, how many units stay; where units belong to a parent's in equal numbers, how many for each of those.
Widths = dict[str, int]


@dataclass(frozen=True)
class GatePoint:
    """Where a group's gate multiplies an activation.

    Attributes:
        module: path of the module whose output (or first positional input) is multiplied.
        side: `"output"` or `"input"`.
        dim: the activation's axis that holds the units; ignored when the group has one unit.
        per_unit: consecutive elements along `dim` that belong to one unit (a head's head_dim).
        offsets: where unit 0 begins, once for each run of elements, as in `Cut`; None where one run fills the axis.
    """

    module: str
    side: str = "output"
    dim: int = 1
    per_unit: int = 1
    offsets: tuple[int, ...] | None = None


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
        times: the attribute is this many times the size (`in_channels` of a convolution with groups).
    """

    tensor: str
    dim: int
    per_unit: int = 1
    offsets: tuple[int, ...] = (0,)
    follows: str | None = None
    times: int = 1

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
class Norm:
    """A norm over a gated stream: its statistics must run over the kept units only.

    Attributes:
        module: its path; it has a `weight` and, for a LayerNorm, a `bias`.
        kind: `layer` (Ba et al., Layer Normalization, 2016) or `rms` (Zhang and Sennrich, 2019).
        eps: what it adds to the variance.
    """

    module: str
    kind: str
    eps: float


@dataclass(frozen=True)
class Group:
    """Units that live on the same coupled tensor axes and are gated, timed and cut together.

    Attributes:
        name: unique among a model's groups.
        kind: `channel`, `head`, `ffn`, `branch`, `layer` …; the key of `gpu.multiple` and of group filters. Under the
            uniform layout, groups of one kind have the same width.
        units: how many units the unpruned model has.
        gated_at: exactly one point per writer of the gated stream.
        cuts: the axes that shrink.
        removes: for groups of one unit that have no axis to cut (branches, layers).
        parent: name of the group inside which this one lives. The units are shared out among the parent's in order and
            in equal numbers; a unit's gate is multiplied by its parent's, and it goes when that goes.
        equal_per_parent: how many units each of the parent's holds, where every one that stays must keep equally many
            (query heads of a KV head); None leaves them free.
        norms: norms whose statistics run over these units.
        attributes: module attributes, `path.name`, that must equal the group's width.
    """

    name: str
    kind: str
    units: int
    gated_at: tuple[GatePoint, ...]
    cuts: tuple[Cut, ...] = ()
    removes: tuple[Removal, ...] = ()
    parent: str | None = None
    equal_per_parent: int | None = None
    norms: tuple[Norm, ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def full_width(self) -> int:
        """The unpruned width."""
        return self.equal_per_parent or self.units


@dataclass(frozen=True)
class Site:
    """A module that the latency table times.

    Attributes:
        module: its path.
        groups: names of *every* group whose width changes its time, parents first.
        kind: sites of one kind share a fitted scale (`layer1`, `attention` …).
        reads: the group whose units lie on an axis of the first tensor that the module is called with, where that axis
            shrinks too; several where it joins the channels of several.
        reads_dim: that axis.
        reads_per_unit: elements of a unit on that axis.
    """

    module: str
    groups: tuple[str, ...]
    kind: str
    reads: str | tuple[str, ...] | None = None
    reads_dim: int = -1
    reads_per_unit: int = 1

    @property
    def reading(self) -> tuple[str, ...]:
        """The groups that it reads."""
        return (self.reads,) if isinstance(self.reads, str) else self.reads or ()


def keep_all(groups: Sequence[Group]) -> Keep:
    """Every unit of every group: exporting it reproduces the teacher."""
    return {group.name: tuple(range(group.units)) for group in groups}


def widths_of(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Widths:
    """The width of every group.

    Raises:
        ValueError: when units that must be equally many for each of the parent's are not.
    """
    widths: Widths = {}
    for group in groups:
        kept = keep[group.name]
        if group.equal_per_parent is None:
            widths[group.name] = len(kept)
            continue
        parents = [unit // group.equal_per_parent for unit in kept]
        counts = {parents.count(parent) for parent in set(parents)}
        staying = keep.get(group.parent or "", parents)
        if len(counts) > 1 or (parents and set(parents) != set(staying)):
            raise ValueError(
                f"{group.name}: {len(kept)} units cannot be shared equally among the units of {group.parent}; "
                "keep the same number for each"
            )
        widths[group.name] = next(iter(counts), 0)
    return widths


def full_widths(groups: Sequence[Group]) -> Widths:
    """The unpruned widths."""
    return {group.name: group.full_width for group in groups}


def keep_first(
    groups: Sequence[Group], widths: Mapping[str, int], order: Mapping[str, Sequence[int]] | None = None
) -> Keep:
    """The first units in these numbers; where a parent's units hold equally many, the first of each that stays.

    Args:
        groups: parents among them, in any order.
        widths: of every group.
        order: by group, all its units with the most wanted first; groups without an entry go by index.
    """
    by_name = {group.name: group for group in groups}
    keep: Keep = {}

    def choose(group: Group) -> tuple[int, ...]:
        if group.name in keep:
            return keep[group.name]
        wanted: Iterable[int] = (order or {}).get(group.name, range(group.units))
        parent = by_name.get(group.parent or "")
        if parent is not None:
            staying, share = set(choose(parent)), group.units // parent.units
            wanted = [unit for unit in wanted if unit // share in staying]
        width = widths[group.name]
        if group.equal_per_parent is None:
            chosen = list(wanted)[:width]
        else:
            families: dict[int, list[int]] = {}
            for unit in wanted:
                families.setdefault(unit // group.equal_per_parent, []).append(unit)
            chosen = [unit for family in families.values() for unit in family[:width]]
        keep[group.name] = tuple(sorted(chosen))
        return keep[group.name]

    return {group.name: choose(group) for group in groups}


def without_orphans(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Keep:
    """Sort every entry and drop the units whose parent unit (or that one's parent) is gone."""
    by_name = {group.name: group for group in groups}
    result: Keep = {}

    def alive(group: Group) -> tuple[int, ...]:  # a parent that is not among the groups counts as kept
        if group.name not in result:
            kept: Iterable[int] = keep[group.name]
            parent = by_name.get(group.parent or "")
            if parent is not None:
                staying, share = set(alive(parent)), group.units // parent.units
                kept = [unit for unit in kept if unit // share in staying]
            result[group.name] = tuple(sorted(kept))
        return result[group.name]

    return {group.name: alive(group) for group in groups}


def completed(keep: Mapping[str, Sequence[int]], groups: Sequence[Group]) -> Keep:
    """Kept indices of every group from those of some: groups without an entry stay whole, units without parent go."""
    return without_orphans({**keep_all(groups), **keep}, groups)


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
        for cut in group.cuts:
            if cut.tensor not in tensors:
                raise ValueError(f"{group.name}: the model has no parameter or buffer {cut.tensor!r}")
            size, last = tensors[cut.tensor].shape[cut.dim], max(cut.offsets) + group.units * cut.per_unit - 1
            if last >= size:
                raise ValueError(f"{group.name}: {cut.tensor} has {size} elements on axis {cut.dim}, not {last + 1}")
