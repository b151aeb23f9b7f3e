"""The declaration of a traced model: groups made from its coupled channels and residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonpath

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hawada.adapters.graph.axes import Axis, Labels
from hawada.adapters.graph.coupling import KEPT_LABEL, Coupling, Place, describe
from hawada.adapters.graph.operators import is_channel_norm
from hawada.adapters.graph.residual import Residual, find_residuals
from hawada.adapters.graph.trace import Trace
from hawada.core.structure import Cut, GatePoint, Group, Removal

MAX_GROUPS_PER_SITE = 4  # the latency table of a site has one axis for each group that touches it


@dataclass(frozen=True)
class Bundle:
    """Channels that have the same producers: the units of one group.

    Attributes:
        name: The name of the group.
        kind: The kind of the group.
        units: The number of each channel, see `Declaration.channels`.
        places: The axes of tensors that hold the channels.
        order: The position in the graph of the first node that handles the channels.
    """

    name: str
    kind: str
    units: Labels
    places: tuple[Place, ...]
    order: int


class Declaration:
    """The groups that can be removed from a traced model.

    Attributes:
        coupling: The coupling of its channels.
        channels: For every label the number of its channel; 0 stands for all that must stay.
        residuals: The blocks whose branch can go.
        groups: The branches with the groups inside them, in order of execution, then the streams.

    Raises:
        ValueError: Nothing can be removed; the message names the first node that keeps its channels.
    """

    def __init__(self, trace: Trace, *, stream: bool) -> None:
        self.trace = trace
        self.coupling = Coupling(trace)
        self.residuals = find_residuals(trace)
        self._position = {node: index for index, node in enumerate(trace.nodes)}
        self._join_concatenated()
        self.channels = self.coupling.resolve()
        found = [self._group(bundle) for bundle in self._bundles(stream)]
        plain = [entry for entry in found if entry is not None]
        branches = [(self._branch(block), np.zeros(0, np.int64), block.call.start - 0.5) for block in self.residuals]
        streams = [entry for entry in plain if entry[0].kind == "stream"]
        inner = [entry for entry in plain if entry[0].kind != "stream"]
        ordered = [*sorted([*branches, *inner], key=lambda entry: entry[2]), *sorted(streams, key=lambda e: e[2])]
        self.groups = [group for group, _, _ in ordered]
        self._holder = np.full(len(self.channels), -1)  # for each channel, the index of its group
        for index, (_, units, _) in enumerate(ordered):
            self._holder[units] = index
        if not self.groups:
            reason = describe(self.coupling.obstacles) if self.coupling.obstacles else "it has no hidden channels"
            raise ValueError(
                f"{type(trace.model).__name__}: nothing can be pruned: {reason}; "
                "declare its groups with an adapter of your own"
            )

    def groups_on(self, axis: Axis | None) -> dict[str, int]:
        """Return the groups that have channels on an axis, each with the number of elements that a unit has there."""
        if axis is None:
            return {}
        index, counts = np.unique(self._holder[self.channels[axis.labels]], return_counts=True)
        groups = [(self.groups[i], count) for i, count in zip(index, counts, strict=True) if i >= 0]
        return {group.name: int(count) // group.units for group, count in groups}

    def _join_concatenated(self) -> None:
        """Couple groups of one size, index by index, where one layer consumes very many groups (in a dense block).

        A latency table has an axis for each group that touches a site, so their number must stay small.
        """
        joined = True
        while joined:
            joined, channels = False, self.coupling.resolve()
            produced = [np.unique(channels[place.labels]) for place in self.coupling.places if place.role == "produces"]
            produced = [units[units != KEPT_LABEL] for units in produced]
            producer = np.full(len(channels), -1)  # for each channel, the first place that produces it
            for index, units in reversed(list(enumerate(produced))):
                producer[units] = index
            for place in self.coupling.places:
                if place.input is None:
                    continue
                present = np.unique(producer[channels[place.input.labels]])
                present = present[present >= 0]
                if len(present) <= MAX_GROUPS_PER_SITE:
                    continue
                first: dict[int, int] = {}
                for index in present:
                    alike = first.setdefault(len(produced[index]), index)
                    if alike != index:
                        self.coupling.couple(produced[alike], produced[index])
                        joined = True

    def _bundles(self, stream: bool) -> list[Bundle]:
        """Sort channels by the layers that produce them, with the places that hold them."""
        places = self.coupling.places
        producers: dict[int, dict[str, None]] = {}
        for place in places:
            if place.role == "produces":
                for channel in np.unique(self.channels[place.labels]):
                    producers.setdefault(int(channel), {})[str(place.node.target)] = None
        producers.pop(KEPT_LABEL, None)
        families: dict[tuple[str, ...], list[int]] = {}
        for channel in sorted(producers):
            families.setdefault(tuple(producers[channel]), []).append(channel)
        family = np.full(len(self.channels), -1)
        for index, listed in enumerate(families.values()):
            family[listed] = index
        here = [set(family[self.channels[place.labels]]) for place in places]
        added = {int(channel) for labels in self.coupling.sums for channel in np.unique(self.channels[labels])}
        entering = {int(channel) for labels in self._entering() for channel in np.unique(self.channels[labels])}
        bundles = []
        for index, (paths, listed) in enumerate(families.items()):
            own = tuple(place for place, families_here in zip(places, here, strict=True) if index in families_here)
            in_stream = bool(added.intersection(listed))
            # Channels that enter a block with a projection and that nothing is added into (a separate stem) stay.
            if (in_stream and not stream) or (not in_stream and entering.intersection(listed)):
                continue
            kind = "stream" if in_stream else self._kind_of_units(own)
            name = f"{self._stage(own) or paths[0]}.stream" if in_stream else paths[0]
            order = min(self._position[place.node] for place in own)
            bundles.append(Bundle(name, kind, np.asarray(listed, np.int64), own, order))
        return _unique(bundles)

    def _kind_of_units(self, places: Sequence[Place]) -> str:
        """Name the kind of a group.

        Units of a convolution with groups are few and large, so they are not rounded as other channels are.
        """
        produced = [self.channels[place.labels] for place in places if place.role == "produces"]
        if any(place.times > 1 for place in places) or any(len(set(w[w > 0])) < (w > 0).sum() for w in produced):
            return "grouped"
        return "ffn" if all(place.follows in (None, "out_features", "in_features") for place in places) else "channel"

    def _entering(self) -> list[Labels]:
        """List the labels of the channels that residual blocks are called with."""
        axes = [self.coupling.axes[block.call.inputs[0]] for block in self.residuals]
        return [axis.labels for axis in axes if axis is not None]

    def _stage(self, places: Sequence[Place]) -> str:
        """Return the path that all residual blocks which produce a stream have in common."""
        producing = [str(place.node.target) for place in places if place.role == "produces"]
        blocks = {block.path for block in self.residuals for path in producing if path.startswith(f"{block.path}.")}
        parents = [path.rpartition(".")[0].replace(".", "/") for path in blocks]
        return commonpath(parents).replace("/", ".") if parents else ""

    def _branch(self, block: Residual) -> Group:
        return Group(
            name=f"{block.path}.branch",
            kind="branch",
            units=1,
            gated_at=(GatePoint(block.gate),),
            removes=(Removal(block.path, block.keeps),),
            parent=self._parent([block.path]),
        )

    def _parent(self, modules: Sequence[str]) -> str | None:
        """Name the innermost branch that holds all these modules."""
        holding = [block.path for block in self.residuals if all(block.holds(module) for module in modules)]
        return f"{max(holding, key=len)}.branch" if holding else None

    def _group(self, bundle: Bundle) -> tuple[Group, Labels, float] | None:
        """Make the group of a bundle, with its channels and its rank in order; None where no pattern describes it."""
        cuts, seen = [], set()
        for place in sorted(bundle.places, key=lambda place: place.role == "consumes"):
            layout = _layout(self.channels[place.labels], bundle.units)
            if layout is None:
                self.coupling.obstacles.append((place.node, "holds channels in an order that has no pattern"))
                return None
            cut = Cut(place.tensor, place.dim, *layout, follows=place.follows, times=place.times)
            cuts += [cut] if cut not in seen else []
            seen.add(cut)
        points = self._behind_producers(bundle) if bundle.kind == "stream" else None
        points = points or self._before_consumers(bundle)
        if not points:
            return None
        modules = [cut.tensor.rpartition(".")[0] for cut in cuts] + [point.module for point in points]
        group = Group(
            name=bundle.name,
            kind=bundle.kind,
            units=len(bundle.units),
            gated_at=points,
            cuts=tuple(cuts),
            parent=self._parent(modules),
        )
        return group, bundle.units, bundle.order

    def _before_consumers(self, bundle: Bundle) -> tuple[GatePoint, ...] | None:
        """Gate the inputs of all consumers: removed channels reach them as zeros, whatever came before."""
        points: dict[str, GatePoint] = {}
        for place in bundle.places:
            if place.role != "consumes" or place.input is None:
                continue
            point = self._point(str(place.node.target), "input", place.input, bundle)
            if point is None or points.setdefault(point.module, point) != point:
                return None
        return tuple(points.values())

    def _behind_producers(self, bundle: Bundle) -> tuple[GatePoint, ...] | None:
        """Gate behind the norm of every producer; None unless zeros stay zeros from there on."""
        points: dict[str, GatePoint] = {}
        behind = set()
        for place in bundle.places:
            if place.role != "produces":
                continue
            node = place.node
            users = list(node.users)
            if (
                len(users) == 1
                and users[0].op == "call_module"
                and is_channel_norm(self._submodule(str(users[0].target)))
            ):
                node = users[0]
                behind.add(node)
            axis = self.coupling.axes[node]
            point = None if axis is None else self._point(str(node.target), "output", axis, bundle)
            if point is None:
                return None
            points[point.module] = point
        for node, labels in self.coupling.shifts:
            if node not in behind and np.isin(self.channels[labels], bundle.units).any():
                return None
        return tuple(points.values())

    def _point(self, module: str, side: str, axis: Axis, bundle: Bundle) -> GatePoint | None:
        layout = _layout(self.channels[axis.labels], bundle.units)
        if layout is None:
            return None
        per_unit, offsets = layout
        fills = offsets == (0,) and per_unit * len(bundle.units) == len(axis.labels)
        return GatePoint(module, side, axis.dim, per_unit, None if fills else offsets)

    def _submodule(self, path: str) -> nn.Module:
        return self.trace.model.get_submodule(path)


def _unique(bundles: list[Bundle]) -> list[Bundle]:
    """Make names unique: streams are named by their first producer, parts of one producer are numbered."""
    names = [bundle.name for bundle in bundles]
    renamed = []
    for bundle in bundles:
        if names.count(bundle.name) > 1 and bundle.kind == "stream":
            first = next(place.tensor for place in bundle.places if place.role == "produces")
            bundle = replace(bundle, name=f"{first.removesuffix('.weight')}.stream")
        renamed.append(bundle)
    names = [bundle.name for bundle in renamed]
    return [
        replace(bundle, name=f"{bundle.name}.{names[:index].count(bundle.name)}")
        if names.count(bundle.name) > 1
        else bundle
        for index, bundle in enumerate(renamed)
    ]


def _layout(channels: Labels, units: Labels) -> tuple[int, tuple[int, ...]] | None:
    """Describe where units lie on an axis by (per_unit, offsets), as `Cut` does; None where no pattern fits."""
    where = np.flatnonzero(np.isin(channels, units))
    if not len(where) or len(where) % len(units):
        return None
    rank = np.searchsorted(units, channels[where])
    order = np.lexsort((where, rank))
    table: NDArray[np.int64] = where[order].reshape(len(units), -1)  # one row per unit
    if (rank[order].reshape(table.shape) != np.arange(len(units))[:, None]).any():
        return None
    each = table.shape[1]
    in_a_row = int(table[0, -1] - table[0, 0]) == each - 1
    step = int(table[1, 0] - table[0, 0]) if len(units) > 1 else (each if in_a_row else 1)
    if step < 1 or each % step:
        return None
    offsets = table[0, ::step]
    expected = (offsets[:, None] + np.arange(step)).reshape(1, -1) + np.arange(len(units))[:, None] * step
    return (step, tuple(int(offset) for offset in offsets)) if (table == expected).all() else None
