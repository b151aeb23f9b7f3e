"""What may be removed from a model, declared as data: units, the groups they form and where they are cut.

An adapter writes a list of `Group`. Gating, latency prediction, slicing and export are all derived from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GatePoint:
    """Where a group's gate multiplies an activation.

    Attributes:
        module: path of the module whose output (or first positional input) is multiplied.
        side: `"output"` or `"input"`.
        dim: the activation's axis that holds the units; ignored when the group has one unit.
        per_unit: consecutive elements along `dim` that belong to one unit (a head's head_dim).
        offsets: where unit 0 begins, once for each run of elements, as in `Cut`; None where one run fills the axis.
        positions: where the units lie in no such order, as in `Cut`.
    """

    module: str
    side: str = "output"
    dim: int = 1
    per_unit: int = 1
    offsets: tuple[int, ...] | None = None
    positions: tuple[int, ...] = ()


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
        divided_by: and divided by this (`in_channels` of a convolution that has several filters for each channel).
        positions: of all elements, unit by unit, `per_unit` of each, where they lie in no such order (shuffled ones);
            `offsets` mean nothing then.
    """

    tensor: str
    dim: int
    per_unit: int = 1
    offsets: tuple[int, ...] = (0,)
    follows: str | None = None
    times: int = 1
    divided_by: int = 1
    positions: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.tensor.rpartition(".")[0]

    def elements(self, units: Iterable[int]) -> Tensor:
        """Sorted positions along `dim` that belong to `units`: int64 of shape (len(units) * per_unit * offsets,)."""
        chosen = np.array(sorted(units), np.int64)
        if self.positions:
            found = np.array(self.positions, np.int64).reshape(-1, self.per_unit)[chosen]
        else:
            first = np.array(self.offsets, np.int64)[:, None] + chosen * self.per_unit  # (offsets, units)
            found = first[..., None] + np.arange(self.per_unit)
        return torch.from_numpy(np.sort(found, axis=None))


@dataclass(frozen=True)
class Size:
    """A number in a module's code that becomes smaller with the group.

    Attributes:
        attribute: `path.name`, or `path.name[1]` for an element of a list or tuple.
        per_unit: by how much it becomes smaller for every unit that goes.
    """

    attribute: str
    per_unit: int = 1


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
    """A norm over gated units: its statistics must run over the kept units only.

    Attributes:
        module: its path; it may have a `weight` and a `bias`, one number for each element of the axis.
        kind: `layer` (Ba et al., Layer Normalization, 2016), `rms` (Zhang and Sennrich, 2019) or `group` (Wu and He,
            Group Normalization, 2018: statistics over the axis and all behind it, apart for each of `parts`).
        eps: what it adds to the variance.
        dim: the axis of its input that it normalises over; of `group`, the axis of channels.
        parts: into how many equal parts the axis is divided, each with statistics of its own.
        per_unit: consecutive elements of the axis that belong to one unit.
        offsets: where unit 0 begins, once for each run of elements, as in `GatePoint`.
        positions: where the units lie in no such order, as in `Cut`.
        multiplied: whether its input is multiplied by the gate already; otherwise the norm does that too.
    """

    module: str
    kind: str
    eps: float
    dim: int = -1
    parts: int = 1
    per_unit: int = 1
    offsets: tuple[int, ...] | None = None
    positions: tuple[int, ...] = ()
    multiplied: bool = True


@dataclass(frozen=True)
class Group:
    """Units that live on the same coupled tensor axes and are gated, timed and cut together.

    Attributes:
        name: unique among a model's groups.
        kind: `channel`, `head`, `ffn`, `branch`, `layer` …; the key of `gpu.multiple` and of group filters. Under the
            uniform layout, groups of one kind have the same width.
        units: how many units the unpruned model has.
        gated_at: where the gate multiplies: one point for each layer that writes the units, or one for each that reads
            them; where no module's input holds what is read, the cut of the weight that reads it is multiplied.
        cuts: the axes that shrink.
        removes: for groups of one unit that have no axis to cut (branches, layers).
        parent: name of the group inside which this one lives. The units are shared out among the parent's in order and
            in equal numbers; a unit's gate is multiplied by its parent's, and it goes when that goes.
        equal_per_parent: how many units each of the parent's holds, where every one that stays must keep equally many
            (query heads of a KV head); None leaves them free.
        norms: norms whose statistics run over these units.
        attributes: module attributes, `path.name`, that must equal the group's width.
        sizes: numbers in modules that become smaller with the group; several groups may have a share in one.
    """

    name: str
    kind: str
    units: int
    gated_at: tuple[GatePoint | Cut, ...]
    cuts: tuple[Cut, ...] = ()
    removes: tuple[Removal, ...] = ()
    parent: str | None = None
    equal_per_parent: int | None = None
    norms: tuple[Norm, ...] = ()
    attributes: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()

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
